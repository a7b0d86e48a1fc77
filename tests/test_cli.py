"""The command line: what goes to which stream, with which exit code, and what the commands do with good input."""

import dataclasses
import io
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import warnings
from importlib import metadata

import checkpoints
import pytest
import torch
import transformers
from checkpoints import WORDS, run
from huggingface_hub import constants
from patience import PATIENCE
from transformers import AutoTokenizer, HfArgumentParser, TrainingArguments

from ponder_hf import PonderingForCausalLM, __version__, diagnosis
from ponder_hf.cli import COMMANDS, build_parser, doctor
from ponder_hf.cli.flags import FIELDS, flag_of, given_fields
from ponder_hf.cli.training_flags import COMMON, further_flags
from ponder_hf.cli.words import in_flags
from ponder_hf.conversion import convert
from ponder_hf.modeling.configuration_pondering import PONDERING_FIELDS
from ponder_hf.training.arguments import argument_names


IN_A_PROCESS = [sys.executable, "-c", "import sys; from ponder_hf.cli import main; sys.exit(main())"]


@pytest.fixture(scope="module")
def made_once(tmp_path_factory):
    """A plain checkpoint `base` and a pondering one, `pondering`, whose every token id is a word."""
    folder = tmp_path_factory.mktemp("made once")
    torch.manual_seed(0)
    checkpoints.save_base(folder / "base", tokenizer=True, vocab_size=len(WORDS))
    convert(folder / "base", folder / "pondering", pondering_steps=2)
    return folder


@pytest.fixture
def pondering(made_once):
    return made_once / "pondering"


@pytest.fixture
def command(monkeypatch):
    """Have `ponder-hf doctor` do what the test says."""

    def replace(function):
        monkeypatch.setattr(doctor, "run", function)

    return replace


def one_object(text):
    """The one JSON object that `text` is, with nothing around it but the end of the line."""
    assert text.endswith("\n")
    assert len(text.splitlines()) == 1
    content = json.loads(text)
    assert isinstance(content, dict)
    return content


# Help, and command lines that are none.


def test_help_lists_every_command(capsys):
    assert run("--help") == 0
    output = capsys.readouterr()
    # A long name has its description on the next line.
    listed = dict(re.findall(r"^ {4}([\w-]+)\s+(\S.*)$", output.out, flags=re.MULTILINE))
    assert set(COMMANDS) == set(listed)
    assert all(listed.values()), "a command has no description"
    assert output.err == ""


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_and_json(capsys, name):
    assert run(name, "--help") == 0
    assert "--json" in capsys.readouterr().out


def test_version(capsys):
    assert run("--version") == 0
    assert capsys.readouterr().out == f"ponder-hf {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "no command given"),
        (["covert", "a", "b"], "did you mean convert"),
        (["genrate"], "did you mean generate"),
        (["xyzzy"], "the commands are demo, convert"),
        (["doctor", "--jsn"], "did you mean --json?"),
        (["eval", "a", "--held-out", "3"], "no flag --held-out (see"),  # not: did you mean --help?
        (["convert", "a"], "DEST"),
        (["convert"], "SOURCE, DEST"),
        (["--jsn"], "no command given"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_command_line_is_one_line(capsys, arguments, words):
    assert run(*arguments) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert len(output.err.splitlines()) == 1
    assert output.err.startswith("ponder-hf: error: ")
    assert words in output.err


# Streams and exit codes.


@pytest.mark.parametrize("name", ["convert", "export"])
def test_what_convert_and_export_say(made_once, tmp_path, capsys, name):
    source = made_once / {"convert": "base", "export": "pondering"}[name]
    assert run(name, source, tmp_path / "out") == 0
    output = capsys.readouterr()
    assert output.out == ""
    assert "gpt_neox" in output.err
    assert run(name, source, tmp_path / "out", "--json", "--overwrite") == 0
    output = capsys.readouterr()
    result = one_object(output.out)
    assert output.err, "people's text goes to standard error"
    assert result["source"] == str(source)
    assert result["destination"] == str(tmp_path / "out")
    assert set(result["files"]) == {p.name for p in (tmp_path / "out").iterdir() if p.is_file()} | {
        "additional_chat_templates/tools.jinja"
    }
    assert result["parameters"] == PonderingForCausalLM.from_pretrained(made_once / "pondering").num_parameters()
    assert result["dtype"] == "float32"


def test_a_new_pondering_model_says_that_it_needs_training(made_once, tmp_path, capsys):
    said = {}
    for flags in (["--pondering-steps", 2], ["--pondering-steps", 0], ["--pondering-gate", "zero_init"]):
        run("convert", made_once / "base", tmp_path / "out", "--overwrite", *flags)
        said[flags[1]] = "train it before use" in capsys.readouterr().err
    assert said == {2: True, 0: False, "zero_init": False}


def test_what_libraries_print_stays_out_of_the_json(capsys, command):
    def chatty(args):
        print("loading")
        return {"answer": 3}

    command(chatty)
    assert run("doctor", "--json") == 0
    output = capsys.readouterr()
    assert one_object(output.out) == {"answer": 3}
    assert output.err == "loading\n"


def failing(error):
    def function(args):
        raise error

    return function


LONG = RuntimeError("\n\n  first line " + "x" * 1000 + "\nsecond line")


def test_an_unexpected_failure_is_one_short_line(capsys, command):
    command(failing(LONG))
    assert run("doctor") == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert len(output.err.splitlines()) == 1
    assert output.err.startswith("ponder-hf: error: unexpected RuntimeError: first line x")
    assert "second line" not in output.err
    assert len(output.err) < 450
    assert "PONDER_HF_DEBUG=1" in output.err


@pytest.mark.parametrize("value", ["1", "0"])
def test_debugging_shows_the_traceback(capsys, command, monkeypatch, value):
    monkeypatch.setenv("PONDER_HF_DEBUG", value)
    command(failing(LONG))
    assert run("doctor") == 1
    lines = capsys.readouterr().err.splitlines()
    assert (lines[0] == "Traceback (most recent call last):") == (value == "1")
    assert lines[-1].startswith("ponder-hf: error: unexpected RuntimeError")


def test_an_interruption(capsys, command):
    command(failing(KeyboardInterrupt()))
    assert run("doctor", "--json") == 130
    assert capsys.readouterr() == ("", "ponder-hf: interrupted\n")


def test_a_reader_that_is_gone(pondering):
    # Python must buffer its output, as it does by default: the pipe then breaks only when the buffer is flushed.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([*IN_A_PROCESS, "doctor"], env=environment, **pipes) as process:
        process.stdout.close()
        assert process.wait(timeout=PATIENCE) == 1
        assert process.stderr.read() == ""


def warn_everybody(args):
    logging.getLogger("transformers.models").warning("a report\nof many lines")
    warnings.warn("careful", UserWarning, stacklevel=1)


@pytest.mark.parametrize("debug", [False, True], ids=["quiet", "debugging"])
def test_what_libraries_log_is_shown_only_while_debugging(capfd, recwarn, command, monkeypatch, debug):
    monkeypatch.setenv("PONDER_HF_DEBUG", str(int(debug)))
    handlers = transformers.utils.logging.get_logger("transformers").handlers
    before = list(handlers)
    heard = []
    listener = logging.Handler()
    listener.emit = heard.append
    stream = logging.StreamHandler(sys.stderr)
    command(warn_everybody)
    try:
        handlers.extend([listener, stream])
        assert run("doctor") == 0
    finally:
        handlers.remove(listener)
        handlers.remove(stream)
    assert ("of many lines" in capfd.readouterr().err) == debug
    assert [str(warning.message) for warning in recwarn] == ["careful"] * debug
    assert len(heard) == 1, "a listener of somebody else hears everything"
    assert transformers.utils.logging.get_logger("transformers").handlers == before
    assert transformers.utils.logging.is_progress_bar_enabled()


# Fields as flags.


def parse_fields(*flags):
    return given_fields(build_parser().parse_args(["convert", "a", "b", *flags]))


def test_every_field_has_a_flag_with_help(capsys):
    assert set(FIELDS) == set(PONDERING_FIELDS) - {"pondering_format_version", "draft_heads"}
    assert {name: default for name, (default, _) in FIELDS.items()} == {
        name: PONDERING_FIELDS[name][0] for name in FIELDS
    }
    run("convert", "--help")
    text = " ".join(capsys.readouterr().out.split())
    for name in FIELDS:
        assert flag_of(name) in text
        assert "_" not in flag_of(name)


def test_flags_that_are_not_used_say_nothing():
    assert parse_fields() == {}


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--pondering-steps 0", {"pondering_steps": 0}),
        ("--pondering-top-k 100", {"pondering_top_k": 100}),
        ("--pondering-top-k null", {"pondering_top_k": None}),
        ("--pondering-temperature 2", {"pondering_temperature": 2.0}),
        ("--embedding-scale=22.6 --input-scale 1e0", {"embedding_scale": 22.6, "input_scale": 1.0}),
        ("--pondering-gate none", {"pondering_gate": "none"}),
        ("--intermediate-loss-weight .1", {"intermediate_loss_weight": 0.1}),
        ("--pondering-steps 3.0", {"pondering_steps": 3.0}),
        ("--pondering-steps three", {"pondering_steps": "three"}),
    ],
)
def test_values_of_flags(flags, expected):
    found = parse_fields(*flags.split())
    assert found == expected
    assert [type(value) for value in found.values()] == [type(value) for value in expected.values()]


# The flags of training.


def test_the_usual_training_arguments_are_parsed_as_transformers_does():
    generated = {action.dest: action for action in HfArgumentParser(TrainingArguments)._actions}
    for name, (kind, _, _) in COMMON.items():
        assert (generated[name].type is kind) != (kind is bool), name
        assert (generated[name].nargs == "?") == (kind is bool), name


def test_every_training_argument_is_known_without_importing_it():
    assert {flag_of(field.name) for field in dataclasses.fields(TrainingArguments)} <= set(further_flags())


def test_help_of_train_is_short_and_has_one_spelling(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert run("train", "--help") == 0
    short = capsys.readouterr().out
    assert len(short.splitlines()) <= 73
    assert run("train", "--help-all") == 0
    whole = capsys.readouterr().out
    assert not re.findall(r"--\w+_", short + whole)
    for name in argument_names():
        assert f"{flag_of(name)} " in whole
    assert set(re.findall(r"^  (--[\w-]+)", short, flags=re.MULTILINE)) < set(re.findall(r"--[\w-]+", whole))


def parse_training(*flags):
    return vars(build_parser().parse_args(["train", "a", *flags]))


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--max-steps 3 --bf16 --push-to-hub false", {"max_steps": 3, "bf16": True, "push_to_hub": False}),
        ("--per_device_train_batch_size=2", {"per_device_train_batch_size": 2}),
        ("--adam_beta1 .5 --no-dataloader-pin-memory", {"adam_beta1": 0.5, "dataloader_pin_memory": False}),
        ("--output_dir x_y", {"output": "x_y"}),
        ("--max-steps 3", {"adam_beta1": None, "seed": None}),
    ],
)
def test_values_of_training_flags(flags, expected):
    found = parse_training(*flags.split())
    assert {name: found.get(name) for name in expected} == expected


def test_values_that_look_like_something_else():
    kwargs = '{"min_lr_rate": 0.1}'
    assert parse_training(f"--lr_scheduler_kwargs={kwargs}")["lr_scheduler_kwargs"] in (kwargs, json.loads(kwargs))
    args = build_parser().parse_args(["generate", "a", "--prompt", "--no flag but a text", "--top-p=0.5"])
    assert (args.prompt, args.top_p) == ("--no flag but a text", 0.5)


# Flags that there are not.


@pytest.mark.parametrize(
    ("line", "near"),
    [
        ("convert --embeding-scale 2", "--embedding-scale"),
        ("convert a b --draft-head 1", None),
        ("generate a --prompt x --max-tokens 3", "--max-new-tokens"),
        ("generate a --exit-threshold 3", "--pondering-exit-threshold"),
        ("generate a --top_p 0.5", "--top-p"),
        ("eval a --dta x", "--data"),
        ("train --batch-size 3", "--per-device-train-batch-size"),
        ("train --adam-epsilo 3", "--adam-epsilon"),
        ("train a --do-train", None),
        ("push a b --private-repo", "--private"),
    ],
)
def test_an_unknown_flag_is_an_error_with_the_nearest(capsys, line, near):
    assert run(*line.split()) == 2
    message = capsys.readouterr().err
    flag = next(word for word in line.split() if word.startswith("--") and f"no flag {word}" in message)
    hint = re.search(rf"there is no flag {flag}(?:, did you mean (\S+)\?)? \(see `ponder-hf \w+ --help`\)\n$", message)
    assert near is None or hint[1] == near


# The library's words as flags.


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("`max_shard_size` must be", "--max-shard-size must be"),
        ("give `ignore_code=True`, or not", "give --ignore-code, or not"),
        ("use max_shard_size=3 or less", "use --max-shard-size 3 or less"),
        ("`revision='v1'` and `source`", "--revision v1 and SOURCE"),
        ("`pondering_steps` of a flag needs `pondering_gate`", "--pondering-steps of a flag needs --pondering-gate"),
        ("`pondering_gate` of config.json", None),
        ("`use_cache=True`, `ponder-hf convert`, f(revision=None)", None),
        ("first, with `ponder_hf.convert`", "first, with `ponder-hf convert`"),
        ("`ponder_hf.export('a/b', DEST)`", "`ponder-hf export a/b DEST`"),
    ],
)
def test_words_of_the_library_become_flags(message, shown):
    args = build_parser().parse_args(["convert", "a", "b", "--pondering-steps", "3"])
    assert in_flags(message, args) == (shown or message)


# generate


def expected_tokens(folder, prompt, **kwargs):
    tokenizer, model = AutoTokenizer.from_pretrained(folder), PonderingForCausalLM.from_pretrained(folder)
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    tokens = model.generate(**inputs, max_new_tokens=12, **{"do_sample": False, **kwargs})[0]
    return tokenizer.decode(tokens, skip_special_tokens=True), len(tokens) - inputs["input_ids"].shape[1]


@pytest.mark.parametrize("steps", [None, 0, 1])
def test_generate_is_what_the_model_generates(pondering, capsys, steps):
    flags = [] if steps is None else ["--pondering-steps", steps]
    kwargs = {} if steps is None else {"pondering_steps": steps}
    text, count = expected_tokens(pondering, "once upon a", **kwargs)
    assert run("generate", pondering, "--prompt", "once upon a", "--max-new-tokens", 12, *flags) == 0
    assert capsys.readouterr().out == text + "\n"
    assert run("generate", pondering, "--prompt", "once upon a", "--max-new-tokens", 12, "--json", *flags) == 0
    output = capsys.readouterr()
    result = one_object(output.out)
    assert result["prompt"] + result["text"] == text
    assert result["new_tokens"] == count
    assert result["pondering_steps"] == (2 if steps is None else steps)
    assert output.err == ""


def test_generate_with_drafts_and_with_exits(pondering, capsys):
    def generated(*flags):
        line = ["--prompt", "once upon a", "--max-new-tokens", 12, "--json", *flags]
        assert run("generate", pondering, *line) == 0
        return one_object(capsys.readouterr().out)

    plain = generated()
    assert plain["pondering_steps_used"] == 2
    assert plain["draft_acceptance_rate"] is None
    for source in ([], ["--draft-source", "prompt_lookup"]):
        drafted = generated("--num-draft-tokens", 2, *source)
        assert drafted["text"] == plain["text"]
        assert 0 <= drafted["draft_acceptance_rate"] <= 1
    stopped = generated("--pondering-exit-criterion", "kl", "--pondering-exit-threshold", 1e9)
    assert stopped["pondering_steps_used"] == 1


def test_generate_with_what_the_checkpoint_says(pondering, tmp_path, capsys):
    """Its S and drafts count; beams do not, for it is greedy unless a flag says otherwise."""
    shutil.copytree(pondering, tmp_path / "copy")
    path = tmp_path / "copy" / "generation_config.json"
    settings = {"pondering_steps": 1, "num_draft_tokens": 2, "num_beams": 3}
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    expected = expected_tokens(pondering, "once upon a", pondering_steps=1)
    for flags in ([], ["--json"]):
        line = ["--prompt", "once upon a", "--max-new-tokens", 12, *flags]
        assert run("generate", tmp_path / "copy", *line) == 0
    text, _, result = capsys.readouterr().out.partition("\n")
    assert text == expected[0]
    assert one_object(result)["pondering_steps"] == 1


def test_the_steps_of_a_call_matter(pondering):
    assert expected_tokens(pondering, "once upon a") != expected_tokens(pondering, "once upon a", pondering_steps=0)


def test_the_prompt_from_standard_input(pondering, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("once upon a"))
    assert run("generate", pondering, "--prompt", "-", "--max-new-tokens", 12) == 0
    assert capsys.readouterr().out == expected_tokens(pondering, "once upon a")[0] + "\n"


def test_sampling(pondering, capsys):
    def sample(*flags):
        assert run("generate", pondering, "--prompt", "the sea", "--max-new-tokens", 30, "--json", *flags) == 0
        return one_object(capsys.readouterr().out)

    hot = ["--temperature", 3.0]
    assert not sample()["do_sample"]
    assert sample(*hot, "--seed", 1)["text"] == sample(*hot, "--seed", 1)["text"]
    assert len({sample(*hot, "--seed", seed)["text"] for seed in range(4)}) > 1
    assert sample("--top-p", 0.5)["do_sample"]
    assert sample("--do-sample")["do_sample"]
    assert sample("--temperature", 1e-4, "--seed", 1)["text"] == sample()["text"], "cold sampling is greedy"


def test_generate_a_story(shared, tmp_path, capsys):
    convert(shared / "data/models/stories260K-llama", tmp_path / "pondering", pondering_gate="zero_init")
    assert run("generate", tmp_path / "pondering", "--prompt", "Once upon a time", "--max-new-tokens", 20) == 0
    assert capsys.readouterr().out.startswith("Once upon a time, there was a little girl named Lily.")


# doctor


def test_doctor_reports_versions_and_devices(pondering, capsys):
    assert run("doctor", "--json", "--checkpoint", pondering) == 0
    report = one_object(capsys.readouterr().out)
    assert report["packages"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]  # of a CUDA build
    assert report["packages"]["transformers"] == transformers.__version__
    assert report["ponder_hf"] == __version__
    assert report["devices"]["cpu_threads"] == torch.get_num_threads()
    assert report["transformers"]["good_for_checkpoints"]
    assert report["checkpoint"]["pondering_steps"] == 2
    assert report["hub"]["cache"] == constants.HF_HUB_CACHE
    assert report["hub"]["cache_is_writable"]
    assert run("doctor", "--checkpoint", pondering) == 0
    table = capsys.readouterr().out
    assert f"transformers     {transformers.__version__}" in table
    assert f"{pondering} loads: gpt_neox, S = 2" in table


@pytest.mark.parametrize("token", ["hf_thisisasecret", None])
def test_doctor_never_shows_a_token(capsys, monkeypatch, token):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    for flags in ([], ["--json"]):
        assert run("doctor", *flags) == 0
        output = capsys.readouterr()
        assert "thisisasecret" not in output.out + output.err
    assert json.loads(output.out)["hub"]["token_is_set"] == (token is not None)


def pretend_versions(monkeypatch, **versions):
    """Other versions of some packages than those that are installed; None: it is not."""
    version = metadata.version

    def pretended(name):
        if versions.get(name, "") is None:
            raise metadata.PackageNotFoundError(name)
        return versions.get(name) or version(name)

    monkeypatch.setattr(metadata, "version", pretended)


def test_doctor_says_what_an_extra_would_add(capsys, monkeypatch):
    pretend_versions(monkeypatch, peft=None, datasets="2.0")
    extras = diagnosis.find_extras()
    if not extras:
        pytest.skip("ponder-hf is not installed here, so its extras are not known")
    assert [line.partition(">")[0] for line in extras["train"]] == ["datasets", "peft"]
    assert "all" not in extras
    run("doctor")
    assert 'pip install "ponder-hf[train]" adds datasets' in capsys.readouterr().out


def test_doctor_finds_what_gets_in_the_way(capsys, monkeypatch, tmp_path):
    pretend_versions(monkeypatch, transformers="3.9")
    (tmp_path / "file").touch()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file/cache"))
    assert run("doctor", "--json") == 0
    report = one_object(capsys.readouterr().out)
    assert not report["transformers"]["good_for_checkpoints"]
    assert not report["hub"]["cache_is_writable"]
    assert any("transformers 3.9" in problem or "not 3.9" in problem for problem in report["problems"])
    assert any("HF_HOME" in problem for problem in report["problems"])
