"""Small training runs for the tests: the command line, and what it leaves."""

import json
import random

import torch
from checkpoints import WORDS, run
from safetensors.torch import load_file


SMALL = "--block-size 16 --per-device-train-batch-size 2 --pondering-steps 2".split()


def write_text(path, num_lines, seed=0):
    """Sentences of random words that the tests' tokenizer knows."""
    chooser = random.Random(seed)
    lines = (" ".join(chooser.choices(WORDS[4:], k=9)) for _ in range(num_lines))
    path.write_text("\n".join(lines), encoding="utf-8")


def train(output, *words, source="base", data="text.txt", small=SMALL):
    """Run `ponder-hf train` in this process. Returns the exit code."""
    start = [] if source is None else [source]
    return run("train", *start, "--data", data, "--output", output, *small, *words)


def train_json(capsys, *arguments, **settings):
    """As `train` with --json, which must end well. Returns the object."""
    capsys.readouterr()
    assert train(*arguments, "--json", **settings) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def weights(folder):
    """All tensors of a saved model."""
    return load_file(folder / "model.safetensors")


def assert_same_model(one, other):
    """Every bit of two saved models is the same."""
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def history(folder):
    """What a checkpoint's run logged, without what depends on the clock."""
    rows = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [
        {key: value for key, value in row.items() if not key.endswith(("_runtime", "_per_second"))} for row in rows
    ]
