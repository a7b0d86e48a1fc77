"""The scripts in examples/, run as a user runs them on a small real model and real text."""

import gzip
import json
import math
import os
import random
import re
import runpy
import sys
from pathlib import Path

import checkpoints
import elsewhere
import prepared
import pytest

from ponder_hf.conversion import convert


EXAMPLES = Path(__file__).resolve().parents[1] / "examples"

# Loads a folder and generates from it. Argument: the folder.
LOAD = """
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
prompt = tokenizer("One day", return_tensors="pt")
tokens = model.generate(**prompt, max_new_tokens=5, do_sample=False)
assert tokens.shape[1] == prompt["input_ids"].shape[1] + 5
print(type(model).__name__, model.config.pondering_steps, model.config.pondering_gate)
"""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def stories(shared):
    """The beginning of the TinyStories sample."""
    with gzip.open(shared / "data" / "text" / "tinystories-sample.txt.gz", "rt", encoding="utf-8") as file:
        return file.read(40_000)


@pytest.fixture(scope="module")
def base(shared):
    return shared / "data" / "models" / "stories260K-llama"


@pytest.fixture
def checkpoint(base, tmp_path):
    """The real model, made to ponder as carefully as can be."""
    convert(base, tmp_path / "checkpoint", pondering_steps=2, pondering_gate="zero_init")
    return tmp_path / "checkpoint"


def start(script, *arguments):
    """Run an example, in which what is deprecated of ours is an error."""
    command = [sys.executable, "-W", "error::DeprecationWarning:__main__", "-W", "error::FutureWarning:__main__"]
    command += [EXAMPLES / script, *map(str, arguments)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    return prepared.run(command, env=environment)


def run(script, *arguments):
    """Run an example, and hold that the held-out loss fell."""
    done = start(script, *arguments)
    assert done.returncode == 0, done.stderr
    before, after = (float(loss) for loss in re.findall(r"held-out loss \w+: *([\d.]+)", done.stdout))
    assert after < before - 0.01, done.stdout
    return done.stdout


def test_continued_pretraining(base, shared, tmp_path):
    with gzip.open(shared / "data" / "text" / "tinyshakespeare.txt.gz", "rt", encoding="utf-8") as file:
        (tmp_path / "text.txt").write_text(file.read(30_000), encoding="utf-8")  # far from what the base has seen
    text, folder = tmp_path / "text.txt", tmp_path / "out"
    output = run("continued_pretraining.py", base, text, folder, "--steps", 12, "--block", 64)
    assert "pass_0_loss" in output
    printed = elsewhere.run(LOAD, tmp_path / "home", folder)
    assert printed.split() == ["PonderingForCausalLM", "3", "zero_init_matrix"]


def test_lora(checkpoint, stories, tmp_path):
    (tmp_path / "text.txt").write_text(stories, encoding="utf-8")
    output = run("lora.py", checkpoint, tmp_path / "text.txt", tmp_path / "out", "--steps", 12, "--block", 64)
    generated = output.partition("held-out loss after: ")[2].partition("\n")[2]  # of any number of lines
    assert len(generated) > 40
    adapter = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert adapter["target_modules"]
    assert adapter["modules_to_save"] == ["pondering_gate"]
    printed = elsewhere.run(LOAD, tmp_path / "home", tmp_path / "out" / "merged")
    assert printed.split() == ["PonderingForCausalLM", "2", "zero_init"]


def test_sft(checkpoint, stories, tmp_path):
    with open(tmp_path / "data.jsonl", "w", encoding="utf-8") as file:
        for story in stories.split("\n\n"):
            prompt, end, completion = story.partition(". ")
            if len(completion) > 40:
                file.write(json.dumps({"prompt": prompt + end, "completion": completion}) + "\n")
    run("sft.py", checkpoint, tmp_path / "data.jsonl", tmp_path / "out", "--steps", 12, "--max-length", 96)
    for home, folder in (("home", "out"), ("another home", "out/checkpoint-12")):
        printed = elsewhere.run(LOAD, tmp_path / home, tmp_path / folder)
        assert printed.split() == ["PonderingForCausalLM", "2", "zero_init"]


# Generates from a folder with drafts and without.
DRAFT = """
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
prompt = tokenizer("the old cat", return_tensors="pt", return_token_type_ids=False)
settings = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True}
plain = model.generate(**prompt, **settings)
drafted = model.generate(**prompt, num_draft_tokens=2, **settings)
assert drafted.sequences.tolist() == plain.sequences.tolist()
assert 0 <= drafted.draft_acceptance_rate <= 1
print(model.config.pondering_steps, model.config.intermediate_loss_weight, drafted.pondering_steps_used.max().item())
"""


def test_train_small(tmp_path, monkeypatch, capsys):
    chance, words = random.Random(0), "the old cat saw a red dog by the sea and sat there".split()
    lines = [" ".join(chance.choices(words, k=9)) + ".\n" for _ in range(400)]
    (tmp_path / "text.txt").write_text("".join(lines))
    small = ["--block", 16, "--rows", 2, "--characters", 20_000, "--pondering-steps", 2]
    small += ["--intermediate-loss-weight", 0.3]
    text, folder = tmp_path / "text.txt", tmp_path / "out"
    done = start("train_small.py", text, folder, "--steps", 12, "--learning-rate", 0.01, *small)
    assert done.returncode == 0, done.stderr
    assert float(re.search(r"held-out loss: ([\d.]+)", done.stdout)[1]) < math.log(2048) - 1  # nats of a guess
    assert elsewhere.run(DRAFT, tmp_path / "home", folder).split() == ["2", "0.3", "2"]

    before = checkpoints.listing(tmp_path)
    (tmp_path / "short.txt").write_text(lines[0])
    for arguments, message in (
        ([text, folder], "out exists and is not empty: give a new folder"),
        ([tmp_path / "short.txt", tmp_path / "another"], "blocks of 16 tokens, but 100 are held out"),
    ):
        monkeypatch.setattr(sys, "argv", ["train_small.py", *map(str, [*arguments, *small])])
        with pytest.raises(SystemExit, match="2"):
            runpy.run_path(str(EXAMPLES / "train_small.py"), run_name="__main__")
        output = capsys.readouterr()
        assert message in output.err
        assert output.out == ""
    (tmp_path / "short.txt").unlink()
    assert checkpoints.listing(tmp_path) == before


def test_interventions(checkpoint, stories, tmp_path):
    (tmp_path / "text.txt").write_text(stories, encoding="utf-8")
    arguments = (checkpoint, tmp_path / "text.txt", "--block-size", 64, "--max-blocks", 6)
    done = start("interventions.py", *arguments, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["tokens"] == 5 * 63, "one block lends its thoughts"
    names = [row["change"] for row in result["rows"]]
    assert names[:4] == ["none", "stopped at pass 0", "stopped at pass 1", "mean embedding"]
    assert names[5:] == ["noise of the same norm", "another text's", "scaled by 0.5", "scaled by 2"]
    assert names[4].startswith("'"), "a token by its text"
    # The gate is 0 yet: what is pondered is worth nothing, and nothing that is scaled by it either.
    assert [row["more"] for row in result["rows"][1:]] == pytest.approx([0] * 8, abs=1e-5)


def test_hooks(checkpoint):
    done = start("hooks.py", checkpoint, "Once upon a", "She saw a")
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    assert [row[:2] for row in rows[1:]] == [["pass", str(index)] for index in range(3)]
    # All that the prediction is made of is the last layer in the last pass; with a gate of 0 no earlier pass matters.
    assert float(rows[-1][-1]) == pytest.approx(1, abs=0.01)
    assert [float(value) for row in rows[1:3] for value in row[2:]] == pytest.approx([0] * 10, abs=0.01)
