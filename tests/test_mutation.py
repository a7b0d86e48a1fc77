"""`make mutants` itself: that each mutant still is a change of the code, and that a test which misses one is named."""

import ast
from collections import Counter
from pathlib import Path

import pytest
from mutation import __main__ as mutation
from mutation.mutants import MUTANTS, Mutant


ROOT = Path(__file__).resolve().parents[1]


def test_there_are_enough_and_each_is_another():
    assert len(MUTANTS) >= 60
    assert max(Counter(mutant.name for mutant in MUTANTS).values()) == 1
    assert {mutant.file.split("/")[0] for mutant in MUTANTS} == {"modeling", "conversion", "ponder_hf"}


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_is_a_change_of_one_place(mutant):
    text = (ROOT / mutant.file).read_text(encoding="utf-8")
    assert text.count(mutant.before) == 1
    ast.parse(text.replace(mutant.before, mutant.after))
    for name in mutant.tests:
        assert (ROOT / "tests" / name).is_file()


# A file and tests without torch, which takes seconds to import in each of the processes.
CODE = "ponder_hf/progress.py"
NOTICED = Mutant(CODE, "disable=not shown,", "disable=shown,", ("test_tiny.py",))
MISSED = Mutant(CODE, "dynamic_ncols=True,", "dynamic_ncols=False,", ("test_tiny.py",))
TEST = """
from ponder_hf.progress import progress_bar

def test_a_bar_that_is_not_shown():
    assert progress_bar("reading", "lines", 1, shown=False).disable
"""


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A copy of the repository, whose one test is the one above."""
    copy = mutation.copy_of_repository(tmp_path / "root")
    (copy / "tests" / "conftest.py").unlink()
    (copy / "tests" / "test_tiny.py").write_text(TEST, encoding="utf-8")
    monkeypatch.setattr(mutation, "copy_of_repository", lambda folder: copy)
    return copy


def test_what_is_noticed_and_what_survives_is_said(tree, monkeypatch, capsys):
    monkeypatch.setattr(mutation, "MUTANTS", [NOTICED, MISSED])
    before = (tree / CODE).read_text(encoding="utf-8")
    assert mutation.main(["--workers", "1"]) == 1
    printed = capsys.readouterr().out
    assert "[1/2] noticed" in printed
    assert "[2/2] SURVIVED" in printed
    assert "1 of 2 mutants noticed" in printed
    assert (tree / CODE).read_text(encoding="utf-8") == before
    assert mutation.main(["--workers", "1", "disable="]) == 0


def test_tests_that_fail_by_themselves_prove_nothing(tree, monkeypatch, capsys):
    (tree / "tests" / "test_tiny.py").write_text("def test_it():\n    assert False\n", encoding="utf-8")
    monkeypatch.setattr(mutation, "MUTANTS", [NOTICED])
    assert mutation.main(["--workers", "1"]) == 1
    assert "test_tiny.py fail without any mutant" in capsys.readouterr().err
