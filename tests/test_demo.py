"""The demo, from its options to the folder that it writes, and the training functions that it stands on."""

import contextlib
import copy
import dataclasses
import html
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from ponder_hf import PonderingForCausalLM, evaluation
from ponder_hf.cli import main
from ponder_hf.data.blocks import Blocks
from ponder_hf.demo import Options, corpus, experiment, load_and_run, prepare, report, run, separate_process
from ponder_hf.demo.figure import draw_curves
from ponder_hf.demo.simple_training import train
from ponder_hf.evaluation import evaluate_passes


SENTENCES = [
    f"The {a} {b} {c} the {d}.\n"
    for a in ("old", "red")
    for b in ("cat", "dog", "bird")
    for c in ("saw", "ate")
    for d in ("fish", "sun", "moon")
]
STORY = "".join(SENTENCES[(7 * index * index) % len(SENTENCES)] for index in range(400))


def call(*arguments):
    """Run one command line: (exit code, standard output, standard error)."""
    output, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        code = main([str(argument) for argument in arguments])
    return code, output.getvalue(), errors.getvalue()


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """What one `ponder-hf demo --quick --json` wrote: (results, folder, standard error)."""
    folder = tmp_path_factory.mktemp("demo") / "ponder-demo"
    code, output, errors = call("demo", "--quick", "--output", folder, "--json")
    assert code == 0, errors
    return json.loads(output), folder, errors


def blocks_of_ids(rows, length, seed=0):
    return Blocks(tiny.token_ids(rows, length, seed=seed).int())


# Training functions


def plain_passes(model, blocks):
    """The loss of each pass by ten lines of pondering and the definition of the mean, one row at a time."""
    losses = []
    for steps in range(model.config.pondering_steps + 1):
        total = 0.0
        for row in blocks.rows.long():
            logits = tiny.plain_pondering(model.backbone, row[None], steps)
            total += functional.cross_entropy(logits[0, :-1], row[1:], reduction="sum").item()
        losses.append(total / (len(blocks) * (blocks.rows.shape[1] - 1)))
    return losses


@pytest.mark.parametrize("limit", [1, 30, 1 << 24], ids=["one row", "some rows", "all rows"])
def test_evaluate_passes_is_the_mean_over_all_tokens(monkeypatch, limit):
    monkeypatch.setitem(evaluation.text._TOKENS_AT_ONCE, "cpu", limit)
    model = tiny.pondering_model("gpt2", base_changes={"embd_pdrop": 0.5}, pondering_steps=2)
    blocks = blocks_of_ids(7, 9)
    with torch.no_grad():
        expected = plain_passes(model, blocks)
    model.train()
    found = evaluate_passes(model, blocks)
    assert found == pytest.approx(expected, abs=1e-5)
    assert len(set(expected)) == 3
    assert model.training
    assert evaluate_passes(model.backbone, blocks) == pytest.approx(expected[:1], abs=1e-5)


def test_train_sees_every_block_once_in_order_and_learns():
    model = tiny.base_model()
    model.config.use_cache = True
    blocks = blocks_of_ids(12, 8)
    before = copy.deepcopy(model.state_dict())
    seen = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].clone()) if module.training else None,
        with_kwargs=True,
    )
    record = train(
        model,
        blocks,
        held_out=blocks,
        evaluate_every=3,
        max_steps=6,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        logging_steps=2,
        use_cpu=True,
    )
    hook.remove()
    assert torch.equal(torch.cat(seen), blocks.rows.long())
    assert [step for step, _ in record.passes] == [0, 3, 6]
    assert record.passes[-1][1][0] < record.passes[0][1][0]
    assert [step for step, _ in record.losses] == [2, 4, 6]
    assert record.tokens_per_step == 16
    assert len(record.step_seconds) == 6
    assert not model.training
    assert model.config.use_cache
    assert any(not torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


# Text, split and plan


def test_standard_library_is_split_into_disjoint_files():
    chosen = corpus.standard_library(200_000)
    training_names = {document.name for document in chosen.training}
    held_out_names = {document.name for document in chosen.held_out}
    assert training_names
    assert held_out_names
    assert not training_names & held_out_names
    assert chosen.training_characters <= 200_000
    assert not any(re.search("(^|/)(tests?|site-packages)/", name) for name in training_names | held_out_names)
    assert [document.name for document in corpus.standard_library(200_000).training] == [
        document.name for document in chosen.training
    ]


def test_many_documents_are_split_whole(tmp_path):
    path = tmp_path / "many.jsonl"
    texts = [f"{line} Number {index % 300}." for index, line in enumerate(SENTENCES * 25)]
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in texts), encoding="utf-8")
    chosen = corpus.own_text([path], "text", 10**6)
    training_texts, held_out_texts = (
        [document.text for document in side] for side in (chosen.training, chosen.held_out)
    )
    assert sorted(training_texts + held_out_texts) == sorted(texts)
    assert not set(training_texts) & set(held_out_texts)
    assert 0.01 < len(held_out_texts) / len(texts) < 0.12


def test_few_documents_give_their_ends(tmp_path):
    path = tmp_path / "story.txt"
    path.write_text(STORY, encoding="utf-8")
    chosen = corpus.own_text([path], "text", 10**6)
    (beginning,), (end,) = chosen.training, chosen.held_out
    assert beginning.text + end.text == STORY
    assert 0.03 < len(end.text) / len(STORY) < 0.07
    assert beginning.text.endswith("\n")


def test_own_text_stops_at_the_limit(tmp_path):
    path = tmp_path / "story.txt"
    path.write_text(STORY, encoding="utf-8")
    chosen = corpus.own_text([path, tmp_path / "never read"], "text", 1000)
    assert "".join(document.text for document in (*chosen.training, *chosen.held_out)) == STORY[:1000]


def small_setup(tmp_path, **options):
    """A Setup that is smaller still than --quick, of a short story."""
    path = tmp_path / "story.txt"
    path.write_text(STORY, encoding="utf-8")
    options = Options(output=str(tmp_path / "out"), text=(str(path),), quick=True, **options)
    setup = prepare.prepare(options)
    return dataclasses.replace(setup, size=dataclasses.replace(setup.size, base_steps=6, steps=4, batch_size=4))


def test_plan_is_halved_until_it_fits(tmp_path, monkeypatch):
    setup = small_setup(tmp_path)
    setup = dataclasses.replace(setup, size=dataclasses.replace(setup.size, base_steps=400, steps=100))
    seconds = {"plain": 0.1, "pondering": 0.5}
    monkeypatch.setattr(
        experiment,
        "_step_seconds",
        lambda model, size, repeats: seconds["pondering" if isinstance(model, PonderingForCausalLM) else "plain"],
    )
    schedule = experiment.make_schedule(setup)  # 400 * 0.1 + 100 * 0.6 = 100 seconds of 200
    assert (schedule.base_steps, schedule.steps, schedule.share) == (400, 100, 1)
    seconds.update(plain=0.3, pondering=1.7)  # 320 seconds
    schedule = experiment.make_schedule(setup)
    assert (schedule.base_steps, schedule.steps, schedule.share) == (200, 50, 0.5)
    seconds.update(plain=1e6, pondering=1e6)
    assert experiment.make_schedule(setup).steps >= 8
    chosen = dataclasses.replace(setup, options=dataclasses.replace(setup.options, steps=77))
    schedule = experiment.make_schedule(chosen)
    assert (schedule.base_steps, schedule.steps, schedule.share) == (400, 77, 1)


def test_experiment_is_fair_and_repeats_itself(tmp_path, monkeypatch):
    calls = []

    def recording(model, blocks, label, **arguments):
        calls.append((label.strip(), blocks.rows.clone(), {**arguments, "held_out": None}))
        return train(model, blocks, label, **arguments)

    monkeypatch.setattr(experiment, "train", recording)
    outcomes = []
    for seed in (3, 3, 4):
        setup = small_setup(tmp_path, seed=seed)
        schedule = experiment.Schedule(base_steps=6, steps=4, threads=1, share=1.0, step_seconds=(1, 1))
        outcomes.append(experiment.run_experiment(setup, schedule))
    first, second, other = outcomes
    (_, base_rows, _), (_, control_rows, control_arguments), (_, pondering_rows, pondering_arguments) = calls[:3]
    assert [label for label, _, _ in calls[:3]] == ["base", "control", "pondering"]
    assert torch.equal(control_rows, pondering_rows)
    assert control_arguments == pondering_arguments
    setup = small_setup(tmp_path, seed=3)
    assert torch.equal(torch.cat([base_rows, control_rows]), experiment.take(setup.training, 0, 40).rows)
    assert not torch.equal(setup.training.rows, small_setup(tmp_path, seed=4).training.rows)
    assert control_arguments["seed"] == 3
    assert first.converted_losses[0] == pytest.approx(first.base_loss, abs=1e-6)
    assert first.control_loss < first.base_loss
    assert first.pondering_losses == second.pondering_losses
    assert first.control_loss == second.control_loss
    assert first.control_loss != other.control_loss
    weights = dict(first.pondering.named_parameters())
    assert all(torch.equal(weights[name], tensor) for name, tensor in second.pondering.named_parameters())


# The whole demo


def test_results_are_whole_and_say_what_was_done(demo):
    results, folder, _ = demo
    assert sorted(path.name for path in folder.iterdir()) == [
        "checkpoint",
        "curves.png",
        "report.html",
        "results.json",
    ]
    assert json.loads((folder / "results.json").read_text(encoding="utf-8")) == results
    losses = results["held_out_loss"]
    assert 0 < losses["control"] < losses["base"] < 7
    assert 0 < losses["pondering"] < losses["converted"]
    assert results["loss_of_each_pass"]["converted"][0] == pytest.approx(losses["base"], abs=1e-5)
    assert len(results["loss_of_each_pass"]["pondering"]) == 4
    assert results["loss_of_each_pass"]["pondering"][-1] == losses["pondering"]
    assert results["loss_difference"] == pytest.approx(losses["pondering"] - losses["control"])
    rates = results["tokens_per_second"]
    assert rates["ratio"] == pytest.approx(rates["control"] / rates["pondering"])
    assert rates["ratio"] > 1.5
    bits = losses["control"] / 0.6931 / results["text"]["bytes_per_token"]
    assert results["bits_per_byte"]["control"] == pytest.approx(bits, rel=1e-3)
    assert results["checkpoint"]["loss"] == pytest.approx(results["checkpoint"]["expected_loss"], abs=1e-5)
    assert results["checkpoint"]["class"].startswith("transformers_modules.")
    assert all(sample["control"] and sample["pondering"] for sample in results["samples"])
    assert results["settings"]["tokens"] == results["settings"]["steps"] * 8 * 64


def test_folder_is_small_and_leaves_nothing_beside_it(demo):
    _, folder, _ = demo
    sizes = {path.name: path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    assert sizes["curves.png"] < 500_000
    assert sizes["report.html"] < 1_000_000
    assert sum(sizes.values()) < 3_000_000
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_report_holds_the_numbers_and_needs_no_other_file(demo):
    results, folder, _ = demo
    page = (folder / "report.html").read_text(encoding="utf-8")
    text = html.unescape(page)
    for losses in (results["held_out_loss"].values(), *results["loss_of_each_pass"].values()):
        for loss in losses:
            assert f"{loss:.3f}" in text
    for rate in ("control", "pondering"):
        assert f"{results['tokens_per_second'][rate]:,.0f}" in text
    for value in results["bits_per_byte"].values():
        assert f"{value:.3f}" in text
    assert report.verdict(results) in text
    assert report.on_the_way(results) in text
    assert report.on_the_way(results).endswith(f"{results['loss_difference']:+.3f}.")
    assert results["repeat"] in text
    assert results["versions"]["transformers"] in text
    assert all(sample["pondering"] in text for sample in results["samples"])
    assert "$" not in re.sub(r"<pre>.*?</pre>", "", page, flags=re.DOTALL)
    assert not re.search(r"""(src|srcset|href)=["'](?!data:)""", page)
    assert page.count("data:image/png;base64,") == 2
    assert str(folder.parent) not in json.dumps({**results, "output": ""})


def test_summary_and_progress_go_to_standard_error(demo):
    results, folder, errors = demo
    assert f"Report: {folder / 'report.html'}" in errors
    assert f'ponder-hf generate {folder / "checkpoint"} --prompt "def "' in errors
    assert report.verdict(results) in errors
    assert "base     : 100%" in errors
    assert "pondering: 100%" in errors


def test_checkpoint_loads_and_gives_the_held_out_loss(demo):
    results, folder, _ = demo
    model = PonderingForCausalLM.from_pretrained(folder / "checkpoint")
    assert AutoModelForCausalLM.from_pretrained(folder / "checkpoint").config.pondering_steps == 3
    assert "use_cache" not in json.loads((folder / "checkpoint/config.json").read_text(encoding="utf-8"))
    setup = prepare.prepare(Options(output=str(folder.parent / "other"), quick=True))
    tokenizer = AutoTokenizer.from_pretrained(folder / "checkpoint")
    content = "def f(x):\n    return x\n"
    assert tokenizer(content)["input_ids"] == setup.tokenizer(content)["input_ids"]
    found = evaluate_passes(model, setup.watched)
    assert found == pytest.approx(results["loss_of_each_pass"]["pondering"], abs=1e-5)


def test_repeat_command_is_one_that_the_parser_takes(demo):
    results, _, _ = demo
    assert results["repeat"] == "ponder-hf demo --quick --steps 24 --base-steps 60"


def test_diverged_training_ends_with_a_report(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "check_checkpoint", lambda *args, **job: FOUND | {"texts": list(job["prompts"])})
    (tmp_path / "story.txt").write_text(STORY, encoding="utf-8")
    sizes = {"--steps": 4, "--base-steps": 4, "--text": tmp_path / "story.txt", "--output": tmp_path / "out"}
    words = [word for pair in sizes.items() for word in pair]
    code, output, errors = call("demo", "--quick", "--json", "--learning-rate", "1e30", *words)
    assert code == 0, errors
    assert json.loads(output)["loss_difference"] is None
    assert json.loads(output)["samples"] == []
    assert "training diverged" in errors


def test_own_base_and_text(tmp_path, monkeypatch):
    """A base of another architecture in bfloat16, .jsonl text, a gate; the other process is left out for its time."""
    monkeypatch.setattr(
        run,
        "check_checkpoint",
        lambda folder, model, ids, prompts, **job: FOUND | {"texts": ["</pre>"] * len(prompts)},
    )
    rows = "".join(json.dumps({"content": line}) + "\n" for line in SENTENCES * 12)
    (tmp_path / "a.jsonl").write_text(rows, encoding="utf-8")
    tokenizer = corpus.train_tokenizer([corpus.Document("story", STORY)], tiny.VOCAB_SIZE + 141, 64)
    base = tiny.base_model("llama", dtype=torch.bfloat16, vocab_size=len(tokenizer))
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    code, output, errors = call(
        *("demo", "--quick", "--json", "--output", tmp_path / "out", "--base", tmp_path / "base"),
        *("--text", tmp_path / "a.jsonl", "--text-field", "content", "--steps", 5, "--pondering-gate", "zero_init"),
        *("--pondering-steps", 2, "--seed", 7),
    )
    assert code == 0, errors
    results = json.loads(output)
    assert results["base"]["model_type"] == "llama"
    assert results["curves"]["base"] is None
    assert results["settings"]["base_steps"] == 0
    assert results["loss_of_each_pass"]["converted"] == pytest.approx([results["held_out_loss"]["base"]] * 3, abs=1e-6)
    assert results["held_out_loss"]["control"] < results["held_out_loss"]["base"]
    assert "--pondering-gate zero_init" in results["repeat"]
    assert "&lt;/pre&gt;" in (tmp_path / "out/report.html").read_text(encoding="utf-8")
    model = PonderingForCausalLM.from_pretrained(tmp_path / "out/checkpoint")
    assert model.dtype == torch.float32
    assert model.pondering_gate.weight.abs().max() > 0


FOUND = {"class": "transformers_modules.x.PonderingForCausalLM", "loss": 1.0, "expected_loss": 1.0, "same_bits": True}


# The other process


def test_other_process_cannot_import_ponder_hf():
    program = (
        Path(load_and_run.__file__)
        .read_text(encoding="utf-8")
        .replace('if __name__ == "__main__":', "sys.meta_path.insert(0, NoPonderHf())\nimport ponder_hf\nif False:")
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode != 0
    assert "ponder_hf is hidden from this process" in done.stderr
    assert "ponder_hf" not in {
        line.split(".")[0] for line in re.findall(r"^(?:from|import) (\S+)", program, re.M)[:-1]
    }


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"loss": 1.5, "checksum": "other"}, "the saved checkpoint has the loss 1.5"),
        ({"loss": float("nan"), "checksum": "other"}, "the saved checkpoint has the loss nan"),
        ({"saw_ponder_hf": True}, "imported ponder_hf"),
    ],
)
def test_another_model_in_the_checkpoint_is_noticed(monkeypatch, answer, message):
    good = {"class": "c", "saw_ponder_hf": False, "loss": 2.0, "checksum": "same", "texts": []}
    monkeypatch.setattr(separate_process, "fingerprint", lambda model, ids: (2.0, "same"))
    monkeypatch.setattr(separate_process, "_run", lambda job: {**good, **answer})
    with pytest.raises(RuntimeError, match=message):
        separate_process.check_checkpoint("folder", None, torch.zeros(1, 2), prompts=())
    monkeypatch.setattr(separate_process, "_run", lambda job: {**good, "loss": 2.0 + 1e-6, "checksum": "rounded"})
    found = separate_process.check_checkpoint("folder", None, torch.zeros(1, 2), prompts=())
    assert found["same_bits"] is False


# Words


@pytest.mark.parametrize(
    ("difference", "words"),
    [(-0.02, "lowered"), (0.02, "did not lower"), (0.0001, "made no difference"), (None, "diverged")],
)
def test_headline_says_what_came_out(demo, difference, words):
    results = {**demo[0], "loss_difference": difference}
    assert words in report.headline(results)
    if difference is not None:
        assert f"{abs(difference):.3f} {'less' if difference < 0 else 'more'} with pondering" in report.verdict(
            results
        )


def test_diverged_training_is_reported(demo):
    results = json.loads(json.dumps(demo[0]))
    results["loss_difference"] = results["held_out_loss"]["pondering"] = results["bits_per_byte"]["pondering"] = None
    results["loss_of_each_pass"]["pondering"] = [5.0, None, None, None]
    curve = results["curves"]["pondering"]
    curve["training"][1:] = [[step, None] for step, _ in curve["training"][1:]]
    curve["held_out"] = [[step, [None] * 4] for step, _ in curve["held_out"]]
    assert "diverged" in report.write_report(results)
    assert "not a number" in report.summary(results)
    assert draw_curves(results).startswith(b"\x89PNG")


# Bad input


FILES = {
    "binary.txt": b"ab\0cd",
    "latin.txt": b"caf\xe9",
    "empty.txt": b"",
    "short.txt": b"One line.",
    "broken.txt.gz": b"no gzip",
    "other.jsonl": b'{"text": "x"}\n{"body": "x"}\n',
    "story.txt": STORY.encode(),
    "full/mine.txt": STORY.encode(),
}
BAD_INPUT = {
    "binary": (["--text", "binary.txt"], "binary.txt is not text (line 1 has a NUL byte)"),
    "not UTF-8": (["--text", "latin.txt"], "latin.txt is not UTF-8 text (line 1 has the byte 0xe9)"),
    "missing": (["--text", "nowhere.txt"], "there is no file nowhere.txt"),
    "empty": (["--text", "empty.txt"], "empty.txt holds no text"),
    "too short": (["--text", "short.txt"], "fewer tokens than one block"),
    "second of two": (["--text", "story.txt", "binary.txt"], "binary.txt is not text"),
    "no field": (["--text", "other.jsonl"], "line 2 of other.jsonl has no field 'text'"),
    "damaged gzip": (["--text", "broken.txt.gz"], "broken.txt.gz is not a whole gzip file"),
    "no base": (["--base", "./nowhere"], "there is no folder ./nowhere"),
    "base without a model": (["--base", "full"], "full is not a model"),
    "base with base steps": (["--base", "full", "--base-steps", "3"], "--base-steps is for the demo's own base"),
    "full output": (["--output", "full"], "full exists and is not empty"),
    "text in the output": (["--output", "full", "--overwrite", "--text", "full/mine.txt"], "would be replaced"),
    "output is a file": (["--output", "story.txt"], "story.txt is a file"),
    "negative S": (["--pondering-steps", "-1"], "--pondering-steps must be an integer >= 0"),
    "unknown gate": (["--pondering-gate", "open"], "--pondering-gate must be one of"),
    "no steps": (["--steps", "0"], "--steps must be at least 1"),
    "negative seed": (["--seed", "-1"], "--seed must be at least 0"),
    "learning rate": (["--learning-rate", "nan"], "--learning-rate must be a finite number > 0"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_line_and_writes_nothing(tmp_path, monkeypatch, case):
    for name, content in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    monkeypatch.chdir(tmp_path)
    arguments, message = BAD_INPUT[case]
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    code, output, errors = call("demo", "--quick", *arguments)
    assert code == 2, errors
    assert output == ""
    assert errors.splitlines()[-1].startswith("ponder-hf: error: ")
    assert message in errors
    assert "Traceback" not in errors
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt()], ids=["failure", "interrupt"])
def test_failure_on_the_way_leaves_the_old_folder_alone(tmp_path, monkeypatch, error):
    def fail(*args, **kwargs):
        assert [path.name[:13] for path in tmp_path.iterdir() if path.name.startswith(".")] == [".out.partial-"]
        raise error

    monkeypatch.setattr(run, "check_checkpoint", fail)
    (tmp_path / "story.txt").write_text(STORY, encoding="utf-8")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/old.txt").write_text("old", encoding="utf-8")
    sizes = {"--steps": 2, "--base-steps": 2, "--text": tmp_path / "story.txt", "--output": tmp_path / "out"}
    code, _, errors = call("demo", "--quick", "--overwrite", *(word for pair in sizes.items() for word in pair))
    assert code == (1 if isinstance(error, RuntimeError) else 130), errors
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "story.txt"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["old.txt"]


def test_the_next_command_is_one_that_the_shell_finds(monkeypatch, tmp_path):
    monkeypatch.setattr("ponder_hf.demo.report.shutil.which", lambda name: None)
    monkeypatch.setattr(sys, "executable", str(tmp_path / ".venv/bin/python"))
    monkeypatch.chdir(tmp_path)
    assert report.program() == "ponder-hf"  # nor does it lie there
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/ponder-hf").touch()
    assert report.program() == ".venv/bin/ponder-hf"
    monkeypatch.setattr("ponder_hf.demo.report.shutil.which", lambda name: name)
    assert report.program() == "ponder-hf"
