"""What `ponder-hf train` refuses: one line, exit code 2, and nothing written."""

import json
import shutil

import checkpoints
import pytest
import tiny
from checkpoints import listing, run
from training_runs import SMALL, train


pytest_plugins = ["refusals", "training_material"]

RUN = ["base", "--data", "text.txt", "--output", "out", *SMALL]


@pytest.fixture
def refused(folder, capsys, assert_refused):
    """Run a command line that must be refused. Returns the line."""

    def check(*arguments, words=()):
        before = listing(folder)
        capsys.readouterr()
        code = run("train", *arguments)
        output = capsys.readouterr()
        # Reading DATA comes first: its progress, and which files of a folder are no text.
        about_data = ("tokenising", "passed over what is not known as text")
        lines = [line for line in output.err.splitlines() if line.strip() and not any(w in line for w in about_data)]
        return assert_refused(code, output.out, "\n".join([*lines, ""]), before, listing(folder), words)

    return check


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere/at/all", *RUN[1:]], ["nowhere/at/all"]),
        (["./nowhere", *RUN[1:]], ["there is no folder ./nowhere"]),
        (RUN[1:], ["SOURCE", "--config"]),
        ([*RUN, "--config", "base"], ["SOURCE", "--config"]),
        (["base", "--data", "text.txt"], ["--output"]),
        (["base", "--output", "out"], ["--data"]),
        (["base", "--data", "nothing.txt", "--output", "out"], ["nothing.txt"]),
        (["base", "--data", "text.txt", "base", "--output", "out"], ["base"]),
        ([*RUN, "--block-size", "20000"], ["--block-size", "64 positions"]),
        ([*RUN, "--data", "short.txt"], ["short.txt", "fewer tokens than one block"]),
        ([*RUN, "--data", "empty.txt"], ["empty.txt"]),
        ([*RUN, "--data", "rows.jsonl"], ["line 2 of rows.jsonl", "'text'"]),
        ([*RUN, "--validation", "text.txt"], ["text.txt", "both"]),
        ([*RUN, "--held-out", "1.5"], ["held out"]),
        ([*RUN, "--held-out", "few"], ["--held-out", "'few'"]),
        ([*RUN, "--held-out", "0.1", "--validation", "other.txt"], ["--held-out", "--validation"]),
        ([*RUN, "--held-out", "100000"], ["blocks"]),
        ([*RUN, "--streaming"], ["--max-steps"]),
        ([*RUN, "--shuffle-buffer", "5"], ["--shuffle-buffer"]),
        ([*RUN, "--pondering-steps", "-1"], ["--pondering-steps", "-1"]),
        ([*RUN, "--pondering-stepz", "1"], ["did you mean --pondering-steps?"]),
        ([*RUN, "--learning-rat", "1"], ["did you mean --learning-rate?"]),
        ([*RUN, "--learning-rate", "fast"], ["--learning-rate", "fast"]),
        ([*RUN, "--learning-rate", "0"], ["--learning-rate"]),
        ([*RUN, "--lr-scheduler-type", "cosin"], ["cosin"]),
        ([*RUN, "--optim", "adamm"], ["adamm"]),
        ([*RUN, "--eval-strategy", "steps"], ["--validation", "--held-out"]),
        ([*RUN, "--bf16", "--fp16", "--use-cpu"], ["fp16 and bf16"]),
        (
            [*RUN, "--label-smoothing-factor", "0.1", "--intermediate-loss-weight", "0.3"],
            ["label_smoothing_factor", "intermediate_loss_weight is 0.3"],
        ),
        ([*RUN, "--report-to", "nobody"], ["nobody"]),
        ([*RUN, "--lora-r", "0", "--lora"], ["--lora-r"]),
        ([*RUN, "--lora-r", "4"], ["--lora-r says nothing without --lora"]),
        ([*RUN, "--lora-target-modules", "dense"], ["--lora-target-modules", "--lora"]),
        ([*RUN, "--validation-split", "test"], ["--validation-split says nothing without --validation"]),
        ([*RUN, "--initialisation", "transformers"], ["--initialisation says nothing without --config"]),
        ([*RUN, "--lora", "--lora-target-modules", "query_key_valu"], ["did you mean query_key_value"]),
        ([*RUN, "--merge"], ["--merge", "--lora"]),
        ([*RUN, "--tokenizer", "large"], ["large", "131 embeddings"]),
        ([*RUN, "--tokenizer", "./nowhere"], ["./nowhere"]),
        ([*RUN, "--dtype", "int8"], ["--dtype"]),
        ([*RUN, "--arguments", "none.yaml"], ["none.yaml"]),
        ([*RUN, "--arguments", "broken.yaml"], ["broken.yaml", "YAML"]),
        ([*RUN, "--arguments", "list.yaml"], ["list.yaml"]),
        ([*RUN, "--arguments", "unknown.yaml"], ["unknown.yaml", "learning_rat", "did you mean learning-rate?"]),
        ([*RUN, "--arguments", "wrong.yaml"], ["wrong.yaml", "learning-rate", "fast"]),
        ([*RUN, "--arguments", "taken.yaml"], ["taken.yaml", "resume_from_checkpoint", "it is --resume"]),
        ([*RUN, "--resume"], ["out has no checkpoint"]),
        ([*RUN, "--resume", "out/checkpoint-7"], ["out/checkpoint-7"]),
        ([*RUN, "--resume", "--overwrite"], ["--resume", "--overwrite"]),
        ([*RUN[:4], "full", *SMALL], ["full exists and is not empty", "--overwrite"]),
        ([*RUN[:4], "text.txt", *SMALL], ["text.txt is a file"]),
        ([*RUN[:4], "base", "--overwrite", *SMALL], ["base is the source"]),
        ([*RUN, "--push-to-hub"], ["token", "HF_TOKEN"]),
        (["--config", "base/config.json", *RUN[1:]], ["--tokenizer"]),
        (["--config", "none.json", *RUN[1:]], ["none.json"]),
        (["--config", "opt.json", "--tokenizer", "base", *RUN[1:]], ["'opt'", "--initialisation transformers"]),
        (["--config", "bad.json", "--tokenizer", "base", *RUN[1:]], ["bad.json"]),
    ],
    ids=lambda value: " ".join(map(str, value))[-60:] if isinstance(value, list) else "",
)
def test_bad_input(folder, refused, monkeypatch, arguments, words):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    (folder / "short.txt").write_text("once upon a time")
    (folder / "empty.txt").write_text("")
    (folder / "rows.jsonl").write_text('{"text": "once upon a time"}\n{"content": "there was"}\n')
    (folder / "broken.yaml").write_text("learning_rate: [1")
    (folder / "list.yaml").write_text("- 1\n")
    (folder / "unknown.yaml").write_text("learning_rat: 1\n")
    (folder / "wrong.yaml").write_text("learning_rate: fast\n")
    (folder / "taken.yaml").write_text("resume_from_checkpoint: out\n")
    (folder / "opt.json").write_text(tiny.base_config("opt").to_json_string())
    (folder / "bad.json").write_text("{")
    (folder / "full").mkdir()
    (folder / "full" / "file").write_text("precious")
    (folder / "large").mkdir()
    shutil.copytree(folder / "base", folder / "large", dirs_exist_ok=True)
    tokenizer = json.loads((folder / "large/tokenizer.json").read_text())
    tokenizer["model"]["vocab"] |= {f"word{index}": index for index in range(len(tokenizer["model"]["vocab"]), 500)}
    (folder / "large/tokenizer.json").write_text(json.dumps(tokenizer))
    refused(*arguments, words=words)


def test_a_run_is_not_begun_anew_over_its_checkpoints(folder, capsys, refused):
    assert train("out", "--max-steps", "1") == 0
    refused(*RUN, words=["out has checkpoints", "--resume", "--overwrite"])
    assert train("out", "--max-steps", "2", "--overwrite") == 0
    assert sorted(path.name for path in (folder / "out").glob("checkpoint-*")) == ["checkpoint-2"]


def test_what_contradicts_the_checkpoint(folder, refused):
    assert train("out", "--max-steps", "2", "--save-steps", "1") == 0
    resume = ["--output", "out", "--resume"]
    again = ["base", "--data", "text.txt", *SMALL, "--max-steps", "3"]
    for more, words in [
        (["--pondering-steps", "3"], ["--pondering-steps is 3", "made with 2"]),
        (["--pondering-gate", "zero_init"], ["--pondering-gate"]),
        (["--block-size", "8"], ["--block-size is 8", "made with 16"]),
        (["--learning-rate", "1"], ["--learning-rate is 1.0", "SOURCE"]),
        (["--per-device-train-batch-size", "3"], ["--per-device-train-batch-size is 3"]),
        (["--seed", "1"], ["--seed"]),
        (["--lora"], ["--lora"]),
        (["--streaming"], ["--streaming"]),
        (["--data", "other.txt"], ["--data is not what", "checkpoint-2"]),
    ]:
        refused(*resume, *more, words=words)
    refused("dropout", *again[1:], *resume, words=["SOURCE is dropout"])
    (folder / "out/checkpoint-2/optimizer.pt").unlink()
    refused(*resume, words=["checkpoint-2", "optimizer.pt"])
    (folder / "out/checkpoint-1/ponder_training.json").unlink()
    refused(*resume, "out/checkpoint-1", words=["ponder_training.json"])


def test_a_pondering_source_keeps_its_gate(folder, refused, capsys):
    checkpoints.run("convert", "base", "pondering", "--pondering-gate", "zero_init")
    arguments = ["pondering", "--data", "text.txt", "--output", "out"]
    refused(*arguments, "--pondering-gate", "none", words=["--pondering-gate", "part of its weights"])
