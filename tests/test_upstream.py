"""How `make upstream` reads and shows what became of others' tests; those themselves it downloads."""

import subprocess
import sys

import pytest
import tiny
from upstream import source
from upstream.__main__ import SUITES, main, outcomes, reasons_table, run


TESTS = """
import unittest
from unittest import TestCase

class Test_llama(TestCase):
    def test_passes(self): pass
    def test_skips_0_fp16(self): self.skipTest("PonderingModel does not do this.")
    def test_skips_1_fp32(self): self.skipTest("PonderingModel does not do this.")
    def test_fails(self): assert 1 == 2, "one is not two"
    def test_has_parts(self):
        for part in range(2):
            with self.subTest(part):
                assert part == 0
"""


def test_outcomes_of_a_report(tmp_path):
    """A part of a test that fails is a failure of the test."""
    (tmp_path / "suite.py").write_text(TESTS)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-c",
        "/dev/null",
        "--rootdir",
        tmp_path,
        "-p",
        "no:cacheprovider",
        "-q",
    ]
    report = tmp_path / "report.xml"
    subprocess.run([*command, tmp_path / "suite.py", "--junitxml", report], capture_output=True)
    counts, skipped, failed = outcomes(report)
    assert counts == {"passed": 1, "skipped": 2, "failed": 2}
    assert set(failed) == {"test_fails", "test_has_parts"}
    assert "one is not two" in failed["test_fails"]
    table = reasons_table({"llama": skipped, "gpt2": {}})
    assert table.splitlines()[2:] == ["| the model does not do this | llama | `test_skips` |"]


def test_reasons_name_kinds_and_not_their_cases():
    """PEFT's tests have parameters, and its reasons the class of the adapter."""
    reason = "Mixed adapter batches not supported for <class 'peft.tuners.ia3.config.IA3Config'>."
    skipped = {f"test_mixed[IA3Config-config_kwargs{number}-pondering/tiny]": reason for number in range(2)}
    row = "| Mixed adapter batches not supported for this kind of adapter | all | `test_mixed` |"
    assert reasons_table({"gpt2": skipped}).splitlines()[2:] == [row]


@pytest.mark.parametrize("suite", SUITES)
def test_a_suite_that_cannot_run_is_a_failure(tmp_path, suite):
    counts, _, failed = run("llama", tmp_path, suite)  # its tests are not there
    assert counts["failed"] == 1
    assert f"No module named '{suite}_tests'" in "".join(failed.values())


def test_the_promised_backbones_are_all_there():
    assert set(tiny.SPINE) < set(SUITES["transformers"])


@pytest.mark.parametrize("suite", SUITES)
def test_an_archive_that_cannot_be_had(tmp_path, monkeypatch, suite):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(source.SourceFailed, match="pip download failed"):
        source.prepare(tmp_path, source.SOURCES[suite])


def test_a_backbone_of_another_suite_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["upstream", "--suite", "peft", "mixtral"])
    with pytest.raises(SystemExit) as raised:
        main()
    assert raised.value.code == 2
    assert "no such backbone: mixtral; there are gpt2" in capsys.readouterr().err
