"""`make gpu` where there is no GPU: it says so, it runs on a tiny model, and what dies costs no other its results."""

import argparse
import json
import os
import sys
from pathlib import Path

import gpu.__main__
import prepared
import pytest
import torch
from gpu import costs, registry
from patience import PATIENCE


TESTS = Path(__file__).resolve().parent


def run_gpu(*arguments, timeout):
    command = [sys.executable, "-m", "gpu", *map(str, arguments)]
    return prepared.run(command, env={**os.environ, "PYTHONPATH": str(TESTS)}, timeout=timeout)


def test_without_a_gpu_it_ends_in_words(capsys, monkeypatch):
    monkeypatch.setattr(gpu.__main__, "read_device", lambda name: torch.device("cpu"))
    assert gpu.__main__.main([]) == 2
    assert "finds no GPU here" in capsys.readouterr().err


def test_a_device_that_is_not_here_ends_in_words(capsys):
    assert gpu.__main__.main(["--device", "nonsense"]) == 2
    assert "gpu: error: the device 'nonsense' cannot be used" in capsys.readouterr().err


@pytest.mark.slow
def test_every_check_and_every_table_runs_on_a_tiny_model(tmp_path):
    done = run_gpu("--device", "cpu", "--tiny", "--output", tmp_path / "found", timeout=PATIENCE)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "found" / "gpu.json").read_text(encoding="utf-8"))
    assert {f"{row['check']}, {row['dtype']}" for row in report["checks"]} == set(registry.all_checks())
    assert {row["outcome"] for row in report["checks"]} == {"ok", "left out"}
    assert report["tables"].keys() == costs.TABLES.keys()
    assert report["problems"] == []
    text = (tmp_path / "found" / "gpu.md").read_text(encoding="utf-8")
    assert text == done.stdout
    for rows in report["tables"].values():
        assert all(torch.__version__ in row["measured on"] for row in rows)


PROGRAM = """
import json, os, sys, time
for name in sys.argv[1:]:
    if name == "dies":
        os.abort()
    if name == "hangs":
        time.sleep(600)
    print(json.dumps({"row": name}), flush=True)
    print(json.dumps({"done": name}), flush=True)
    if name == "breaks the device":
        sys.exit(3)
"""


class Impatient(gpu.__main__.Child):
    """Has time for all but what hangs, so that a busy machine loses nothing else."""

    def _timer(self, process):
        self.each = 1 if self.names[:1] == ["hangs"] else PATIENCE
        return super()._timer(process)


def test_what_dies_or_hangs_costs_no_other_its_results():
    rows = []
    names = ["first", "dies", "breaks the device", "hangs", "last"]
    arguments = argparse.Namespace(device="cpu", tiny=True, quick=False)
    child = Impatient(arguments, "checks", names, PATIENCE, PATIENCE, rows.append)
    child.command = [sys.executable, "-c", PROGRAM]
    child.run()
    assert [row["row"] for row in rows] == ["first", "breaks the device", "last"]
    assert [name for name, _ in child.lost] == ["dies", "hangs"]
    assert child.lost[1][1] == "the process was stopped after 1 seconds"


def test_a_check_that_fails_is_a_row_and_the_exit_code(monkeypatch):
    def wrong(place):
        place.close(torch.ones(2), torch.zeros(2) + 2)

    monkeypatch.setitem(registry.CHECKS, "wrong", (wrong, (torch.float32,)))
    row, works = registry.run_check("wrong, float32", torch.device("cpu"), True)
    assert works
    assert row["outcome"] == "FAILED"
    assert "off by 5.0e-01" in row["detail"]
    run = gpu.__main__.Run(argparse.Namespace(device="cpu"), "here")
    run.check_row(row)
    assert len(run.problems) == 1
