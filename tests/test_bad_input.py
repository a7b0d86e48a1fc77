"""Bad input: exit code 2, one line that says what is wrong and what to do, and nothing left behind."""

import os
import re
import shutil
import subprocess
import sys

import pytest
import tiny
import torch
from checkpoints import change_config, change_tensors, listing
from transformers import T5Config


pytest_plugins = ["refusals"]


# Sources that are no checkpoint, or a broken one. Each function spoils the copy and gives back the source to name.


def not_a_model(place):
    (place / "folder").mkdir()
    (place / "folder/notes.txt").write_text("nothing")
    return "folder"


def a_file(place):
    (place / "model.safetensors").write_bytes((place / "base/model.safetensors").read_bytes())
    return "model.safetensors"


def encoder_decoder(place):
    T5Config(d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2).save_pretrained(place / "t5")
    shutil.copyfile(place / "base/model.safetensors", place / "t5/model.safetensors")
    return "t5"


def unknown_model_type(place):
    change_config(place / "base", model_type="gpt_nix")
    return "base"


def code_of_its_own(place):
    change_config(place / "base", model_type="special", auto_map={"AutoConfig": "configuration_special.Special"})
    return "base"


def quantised(place):
    change_config(place / "base", quantization_config={"quant_method": "gptq", "bits": 4})
    return "base"


def float8(place):
    change_tensors(
        place / "base", lambda t: t.update({"embed_out.weight": t["embed_out.weight"].to(torch.float8_e4m3fn)})
    )
    return "base"


def truncated(place):
    file = place / "base/model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    return "base"


def truncated_in_its_header(place):
    file = place / "base/model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    return "base"


def empty_weights(place):
    (place / "base/model.safetensors").write_bytes(b"")
    return "base"


def truncated_shard(place):
    file = sorted((place / "sharded").glob("*.safetensors"))[-1]
    file.write_bytes(file.read_bytes()[:-8])
    return "sharded"


def too_long(place):
    with open(place / "base/model.safetensors", "ab") as file:
        file.write(b"more")
    return "base"


def renamed(place):
    (place / "base/model.safetensors").rename(place / "base/weights.safetensors")
    return "base"


def renamed_shard(place):
    file = sorted((place / "sharded").glob("*.safetensors"))[0]
    file.rename(file.with_name("first.safetensors"))
    return "sharded"


def swapped_shards(place):
    first, second = sorted((place / "sharded").glob("*.safetensors"))[:2]
    second.write_bytes(first.read_bytes())
    return "sharded"


def index_out_of_the_folder(place):
    index = place / "sharded/model.safetensors.index.json"
    index.write_text(re.sub(r"model-00001-of-\d+", "../base/model", index.read_text()))
    assert "../base/model.safetensors" in index.read_text()
    return "sharded"


def pickle_under_another_name(place):
    (place / "base/model.safetensors").write_bytes(b"PK\x03\x04" + b"\0" * 100)
    return "base"


def pickle_only(place):
    (place / "base/model.safetensors").rename(place / "base/pytorch_model.bin")
    return "base"


def lfs_pointer(place):
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:0000\nsize 12345\n"
    (place / "base/model.safetensors").write_text(text)
    return "base"


def no_weights(place):
    (place / "base/model.safetensors").unlink()
    return "base"


def adapter(place):
    (place / "base/config.json").rename(place / "base/adapter_config.json")
    return "base"


def config_is_no_json(place):
    (place / "base/config.json").write_text('{"model_type": ')
    return "base"


def config_is_a_list(place):
    (place / "base/config.json").write_text("[1, 2]")
    return "base"


def config_is_binary(place):
    (place / "base/config.json").write_bytes(b"\xff\xfe\x00\x01")
    return "base"


def tokenizer_is_no_json(place):
    (place / "base/tokenizer.json").write_text("{")
    return "base"


def generation_config_of_a_wrong_value(place):
    (place / "base/generation_config.json").write_text('{"max_new_tokens": -4}')
    return "base"


def wrong(**fields):
    def change(place):
        change_config(place / "base", **fields)
        return "base"

    return change


BROKEN_SOURCES = {
    "unknown Hub id": (lambda place: "nobody/nothing", ["nobody/nothing"]),
    "unknown path": (lambda place: "./nothing", ["there is no folder ./nothing"]),
    "unknown absolute path": (lambda place: place / "nothing", ["there is no folder"]),
    "neither path nor id": (lambda place: "a/b/c", ["there is no folder a/b/c"]),
    "empty name": (lambda place: "", ["empty"]),
    "a name of two lines": (lambda place: "./no\nthing", ["there is no folder ./no thing"]),
    "not a model": (not_a_model, ["folder is not a model", "config.json"]),
    "a file": (a_file, ["model.safetensors is a file", "folder"]),
    "an encoder-decoder": (encoder_decoder, ["'t5'", "encoder-decoder"]),
    "unknown model_type": (unknown_model_type, ["'gpt_nix'"]),
    "code of its own": (code_of_its_own, ["code of its own"]),
    "quantised": (quantised, ["quantised"]),
    "float8 weights": (float8, ["quantised", "embed_out.weight"]),
    "truncated": (truncated, ["base/model.safetensors is truncated", "get it again"]),
    "truncated in its header": (truncated_in_its_header, ["base/model.safetensors is truncated"]),
    "empty weights": (empty_weights, ["base/model.safetensors is not a safetensors file"]),
    "truncated shard": (truncated_shard, ["sharded/model-", "is truncated"]),
    "too long": (too_long, ["bytes that belong to no weight"]),
    "renamed": (renamed, ["weights.safetensors", "model.safetensors"]),
    "renamed shard": (renamed_shard, ["sharded lacks model-00001-of-"]),
    "swapped shards": (swapped_shards, ["names the weight"]),
    "index out of the folder": (index_out_of_the_folder, ["model.safetensors.index.json"]),
    "pickle under another name": (pickle_under_another_name, ["is not a safetensors file"]),
    "pickle only": (pickle_only, ["pytorch_model.bin", "convert it to safetensors first, by python -c"]),
    "LFS pointer": (lfs_pointer, ["git lfs pull"]),
    "no weights": (no_weights, ["has no weights"]),
    "an adapter": (adapter, ["merge it"]),
    "config is no JSON": (config_is_no_json, ["base/config.json is not valid JSON"]),
    "config is a list": (config_is_a_list, ["base/config.json"]),
    "config is binary": (config_is_binary, ["base/config.json is not valid JSON"]),
    "tokenizer is no JSON": (tokenizer_is_no_json, ["base/tokenizer.json is not valid JSON"]),
    "generation config of a wrong value": (generation_config_of_a_wrong_value, ["max_new_tokens"]),
    "hidden_size: 'big'": (wrong(hidden_size="big"), ["config.json of base", "hidden_size", "'big'"]),
    "num_hidden_layers: null": (wrong(num_hidden_layers=None), ["config.json of base", "num_hidden_layers"]),
    "num_attention_heads: 0": (wrong(num_attention_heads=0), ["config.json of base"]),
    "unknown activation": (wrong(hidden_act="glue"), ["config.json of base", "glue"]),
    "no model_type": (wrong(model_type=None), ["no model_type"]),
    "another vocabulary": (wrong(vocab_size=99), ["base"]),
    "another hidden size": (wrong(hidden_size=48), ["base"]),
    "more layers": (wrong(num_hidden_layers=3), ["lacks the weight gpt_neox.layers.2."]),
    "fewer layers": (wrong(num_hidden_layers=1), ["has the weight gpt_neox.layers.1."]),
    "pondering already": (lambda place: "pondering", ["pondering checkpoint already", "ponder-hf export"]),
}


@pytest.mark.parametrize("case", BROKEN_SOURCES)
def test_a_source_that_cannot_be_converted(place, check_refused, case):
    spoil, words = BROKEN_SOURCES[case]
    check_refused("convert", spoil(place), "out", words=words)


@pytest.mark.parametrize(
    "revision", ["/dev/full", "../../../secret", "", "a b", "a//b", ".hidden", "x\x07", "v1.lock"]
)
def test_a_revision_that_is_none(check_refused, revision):
    """The Hub's client reads the file of that name in its cache, or, of a path, any other: /dev/full has no end."""
    for command in ("inspect", "inspect-code", "generate --prompt text"):
        name, *flags = command.split()
        check_refused(name, "nobody/nothing", *flags, "--revision", revision, words=["revision", "cannot be one"])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--pondering-steps", "-1"], ["--pondering-steps", "-1"]),
        (["--pondering-steps", "three"], ["--pondering-steps", "'three'"]),
        (["--pondering-steps", "1.5"], ["--pondering-steps", "1.5"]),
        (["--pondering-steps", "null"], ["--pondering-steps"]),
        (["--pondering-steps", "true"], ["--pondering-steps"]),
        (["--pondering-steps"], ["--pondering-steps", "--help"]),
        (["--pondering-top-k", "0"], ["--pondering-top-k", "0"]),
        (["--pondering-top-k", str(tiny.VOCAB_SIZE + 1)], ["--pondering-top-k", f"at most {tiny.VOCAB_SIZE}"]),
        (["--pondering-temperature", "0"], ["--pondering-temperature"]),
        (["--pondering-temperature", "hot"], ["--pondering-temperature", "'hot'"]),
        (["--embedding-scale", "nan"], ["--embedding-scale", "nan"]),
        (["--input-scale", "-2"], ["--input-scale"]),
        (["--intermediate-loss-weight", "-0.1"], ["--intermediate-loss-weight"]),
        (["--pondering-gate", "ajar"], ["--pondering-gate", "zero_init"]),
        (["--max-shard-size", "huge"], ["--max-shard-size", "5GB"]),
        (["--revision", "main"], ["revision"]),
        (["--pondering-stepps", "3"], ["--pondering-stepps", "did you mean --pondering-steps"]),
        (["a third"], ["a third"]),
    ],
    ids=" ".join,
)
def test_a_flag_that_cannot_be(check_refused, flags, words):
    check_refused("convert", "base", "out", *flags, words=words)


# Destinations. Each function gets the current folder and the source, and gives back the destination to name.


def file_as_destination(place, source):
    (place / "out").write_text("mine")
    return "out"


def below_a_file(place, source):
    (place / "file").write_text("mine")
    return "file/out"


def filled(place, source):
    (place / "out").mkdir()
    (place / "out/.hidden").write_text("mine")
    return "out"


def link_to_the_source(place, source):
    (place / "link").symlink_to(source)
    return "link"


def above_the_source(place, source):
    os.chdir(place.parent)
    return place


def current_folder(place, source):
    os.chdir(place / filled(place, source))
    return "."


DESTINATIONS = {
    "a file": (file_as_destination, [], "out is a file"),
    "a file, to overwrite": (file_as_destination, ["--overwrite"], "out is a file"),
    "below a file": (below_a_file, [], "file is a file"),
    "not empty": (filled, [], "--overwrite"),
    "the source": (lambda place, source: source, ["--overwrite"], "is the source itself"),
    "a link to the source": (link_to_the_source, ["--overwrite"], "is the source itself"),
    "above the source": (above_the_source, ["--overwrite"], "contains the source"),
    "the current folder": (current_folder, ["--overwrite"], "current folder"),
    "empty name": (lambda place, source: "", [], "empty"),
}


@pytest.mark.parametrize("case", DESTINATIONS)
@pytest.mark.parametrize("command", ["convert", "export"])
def test_a_destination_that_may_not_be_written(place, check_refused, command, case):
    source = place / {"convert": "base", "export": "pondering"}[command]
    prepare, flags, words = DESTINATIONS[case]
    check_refused(command, source, prepare(place, source), *flags, words=[words])


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="the superuser may write anywhere")
def test_a_folder_without_permission(place, check_refused):
    (place / "locked").mkdir(mode=0o500)
    check_refused("convert", "base", "locked/out", words=["locked"])


# What a shell closes: command lines, each with its exit code and the number of lines on standard output.
STREAMS = {
    "<&-": {"convert base out --json": (0, 1), "generate pondering --prompt -": (2, 0)},
    ">&-": {"convert base out": (0, 0), "generate pondering --prompt once": (1, 0)},
    "2>&-": {"convert base out": (0, 0), "generate nothing --prompt once": (2, 0)},
}


@pytest.mark.skipif(os.name != "posix", reason="needs a POSIX shell")
@pytest.mark.parametrize("closed", STREAMS)
def test_a_standard_stream_that_is_closed(place, closed):
    environment = {**os.environ, "HF_HOME": str(place.parent / "home")}
    program = f"{sys.executable} -c 'import sys; from ponder_hf.cli import main; sys.exit(main())'"
    for words, (code, lines) in STREAMS[closed].items():
        line = f"{program} {words} {closed}"
        result = subprocess.run(["sh", "-c", line], cwd=place, env=environment, capture_output=True, text=True)
        assert (result.returncode, len(result.stdout.splitlines())) == (code, lines), result.stderr
        assert "unexpected" not in result.stderr
        if code == 1:
            assert result.stderr.splitlines()[-1].startswith("ponder-hf: error: standard output is closed")
    assert (place / "out/config.json").is_file()


def test_through_a_real_process(place, assert_refused):
    """What the other tests see in this process is what a shell sees."""
    truncated(place)
    before = listing(place)
    environment = {**os.environ, "HF_HOME": str(place.parent / "home")}
    for source, words in (("base", "is truncated"), ("nobody/nothing", "nobody/nothing")):
        command = [sys.executable, "-c", "import sys; from ponder_hf.cli import main; sys.exit(main())"]
        result = subprocess.run(
            [*command, "convert", source, "out"], cwd=place, env=environment, capture_output=True, text=True
        )
        assert_refused(result.returncode, result.stdout, result.stderr, before, listing(place), [words])
