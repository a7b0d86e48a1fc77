"""Long runs in small: `python -m benchmarks endurance` finds nothing that grows, is left behind or is said twice."""

import re
import sys
from pathlib import Path

import prepared
import pytest


REPOSITORY = Path(__file__).resolve().parents[1]


def endure(*arguments):
    """What the benchmark prints; it ends with 1 where it finds something."""
    command = [sys.executable, "-m", "benchmarks", "endurance", *map(str, arguments)]
    done = prepared.run(command, cwd=REPOSITORY)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_two_hundred_requests_of_eight_clients_of_whom_some_hang_up():
    """S, drafts, exits and beams are of the request; each answer is what the model itself generates."""
    pytest.importorskip("fastapi", reason="needs ponder-hf[serve]")
    printed = endure("serving", "--requests", 200)
    answered, cancelled = map(int, re.search(r"(\d+) answered, (\d+) cancelled", printed).groups())
    assert answered + cancelled == 200
    assert cancelled > 20


@pytest.mark.slow
def test_calls_and_training_in_small():
    printed = endure("calls", "training", "--calls", 44, "--steps", 40)
    assert "44 calls of 11 kinds" in printed
    assert "40 steps" in printed
