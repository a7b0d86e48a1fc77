"""Fixtures for tests of bad input: checkpoints to spoil, and a command line that must be refused."""

import shutil

import checkpoints
import pytest
import torch
from checkpoints import listing

from ponder_hf import conversion


@pytest.fixture(scope="module")
def made_once(tmp_path_factory):
    """A plain checkpoint `base` (GPT-NeoX with a tokenizer, in two shards `sharded`) and a `pondering` one."""
    folder = tmp_path_factory.mktemp("made once")
    torch.manual_seed(0)
    checkpoints.save_base(folder / "base", tokenizer=True)
    checkpoints.save_base(folder / "sharded", shard_size="60KB")
    conversion.convert(folder / "base", folder / "pondering")
    return folder


@pytest.fixture
def place(made_once, tmp_path, monkeypatch):
    """A fresh copy of those three, in the current folder."""
    shutil.copytree(made_once, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    return tmp_path / "place"


@pytest.fixture
def check_refused(place, capsys, assert_refused):
    """Run a command line that must be refused. Returns the one line without its `ponder-hf: error: `."""

    def run(*arguments, words=()):
        before = listing(place.parent)
        capsys.readouterr()
        code = checkpoints.run(*arguments)
        output = capsys.readouterr()
        return assert_refused(code, output.out, output.err, before, listing(place.parent), words)

    return run


@pytest.fixture
def assert_refused():
    """A function that looks at how a command line ended; see `check_refusal`."""
    return check_refusal


def check_refusal(code, out, err, before, after, words):
    """Exit code 2, one line with all of `words` on standard error, and no file changed. Returns the line's message."""
    assert code == 2, err
    assert out == ""
    assert err.endswith("\n")
    (line,) = err.splitlines()
    assert line.startswith("ponder-hf: error: ")
    assert after == before, "something was left behind or changed"
    for word in words:
        assert word in line
    return line.removeprefix("ponder-hf: error: ")
