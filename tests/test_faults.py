"""Whoever writes is killed at any moment, or finds a full or a read-only disk: whole or absent, then it succeeds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import listing


pytest_plugins = ["refusals"]
pytest.importorskip("matplotlib", reason="needs ponder-hf[viz]")
pytestmark = pytest.mark.skipif(os.name != "posix", reason="processes are forked and killed otherwise there")

# Moments for each kind of fault. The hundred: PONDER_FAULTS=50 make test PYTEST_ARGS=tests/test_faults.py
NUM_FAULTS = int(os.environ.get("PONDER_FAULTS", "2"))
TEXT = "once upon a time there was one cat and two dogs who sat by the sea " * 20

WRITERS = {
    "convert": "convert base out",
    "convert, overwriting": "convert base old --overwrite",
    "export": "export pondering out",
    "export, overwriting": "export pondering old --overwrite",
    "lens": "lens pondering --prompt once --html page.html --png heat.png",
    "lens, overwriting": "lens pondering --prompt once --html old.html --overwrite",
    "eval": "eval pondering --data text.txt --block-size 16 --card",
    "train": "train pondering --data text.txt --output out --max-steps 2 --save-steps 1 --block-size 16 "
    "--per-device-train-batch-size 2 --disable-tqdm true",
}

PARAMETERS = [pytest.param(each, marks=[] if each in ("convert", "eval") else [pytest.mark.slow]) for each in WRITERS]


@pytest.fixture
def template(place):
    """The checkpoints of `place`, a text, and what is to be replaced."""
    (place / "text.txt").write_text(TEXT)
    (place / "old").mkdir()
    (place / "old/mine").write_text("mine")
    (place / "old.html").write_text("mine")
    (place / "pondering/README.md").write_text("---\nlicense: mit\n---\n\nWhat I wrote.\n")
    return place


def with_faults(template, work, line, kinds):
    """Runs killing.py; gives what a whole run left, and for each fault what is left and how both runs ended."""
    again = line
    work.mkdir()
    if line.split()[0] in ("train", "lens") and "--overwrite" not in line:
        again += " --overwrite"
    job = {
        "template": str(template),
        "work": str(work),
        "arguments": line.split(),
        "again": again.split(),
        "kinds": kinds,
        "num_faults": NUM_FAULTS,
    }
    program = [sys.executable, str(Path(__file__).with_name("killing.py")), json.dumps(job)]
    done = subprocess.run(program, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    whole, *faults = map(json.loads, done.stdout.splitlines())
    assert whole["code"] == 0, whole
    return faults


def is_leftover(name):
    """Hidden, or with an underscore in front: what a killed run leaves and the next one removes."""
    return any(part.startswith((".", "_")) and ("partial" in part or "re" in part) for part in name.split("/"))


def contents(folder):
    return {name: content for name, content in listing(folder).items() if not is_leftover(name)}


def is_same_but_for_numbers(found, expected, writer):
    """Whether a folder is what the writer leaves; of training, cards and pages, times are in the files."""
    if writer.split(",")[0] in ("convert", "export"):
        return found == expected
    return found.keys() == expected.keys()


@pytest.mark.parametrize("writer", PARAMETERS)
def test_killed(template, tmp_path, writer):
    line, before = WRITERS[writer], listing(template)
    work = tmp_path / "work"
    faults = with_faults(template, work, line, ["kill", "time"] if NUM_FAULTS > 2 else ["kill"])
    whole, num_killed = listing(work / "whole"), 0
    for number, fault in enumerate(faults):
        num_killed += fault["first"]["code"] == -9
        after = contents(work / str(number) / "after")
        if writer == "train":  # whole checkpoints, as many as there are
            (work / str(number) / "after/out").mkdir(exist_ok=True)
            for checkpoint in (work / str(number) / "after/out").glob("checkpoint-*"):
                step = checkpoint.name
                assert contents(checkpoint).keys() == contents(work / "whole/out" / step).keys(), fault
        elif "overwriting" in writer and writer != "lens, overwriting":
            # Between two renames neither may be there; then the old one is beside it, and comes back.
            assert any(is_same_but_for_numbers(after, each, writer) for each in (before, whole)) or (
                not any(name.startswith("old/") for name in after)
                and any(".old.replaced-" in name for name in listing(work / str(number) / "after"))
            ), fault
        elif writer == "lens":  # two files, each whole or absent
            for name in ("page.html", "heat.png"):
                path = work / str(number) / "after" / name
                assert not path.exists() or path.stat().st_size > 0.9 * (work / "whole" / name).stat().st_size, fault
        elif writer == "eval":
            card = (work / str(number) / "after/pondering/README.md").read_text()
            assert "What I wrote." in card, fault
            assert "license: mit" in card, fault
        elif writer == "lens, overwriting":
            page = (work / str(number) / "after/old.html").read_text()
            assert page == "mine" or page.rstrip().endswith("</html>"), fault
        else:
            assert any(is_same_but_for_numbers(after, each, writer) for each in (before, whole)), fault
        if fault["second"]["code"] == 2 and "--overwrite" in str(fault["second"]["said"]):
            assert after.keys() == whole.keys(), fault  # the first had finished already
            continue
        assert fault["second"]["code"] == 0, fault
        assert is_same_but_for_numbers(listing(work / str(number) / "again"), whole, writer), fault
    assert num_killed, faults  # a run may be over before a child is killed after a time
    print(f"{writer}: killed {num_killed} times of {len(faults)}")


@pytest.mark.parametrize("writer", PARAMETERS)
def test_full_and_read_only_disks(template, tmp_path, writer):
    line, before, work = WRITERS[writer], listing(template), tmp_path / "work"
    faults = with_faults(template, work, line, ["full", "read-only"])
    whole = listing(work / "whole")
    for number, fault in enumerate(faults):
        first = fault["first"]
        if first["code"] == 0:  # the moment came after all was written
            continue
        errors = [each for each in first["said"] if each.startswith("ponder-hf: error: ")]
        assert len(errors) == 1, fault
        assert "unexpected" not in errors[0], fault
        assert "Traceback" not in "".join(first["said"]), fault
        assert first["code"] in (1, 2), fault
        after = listing(work / str(number) / "after")
        if writer == "train":  # its whole checkpoints stay, and say so
            after = {name: content for name, content in after.items() if name.split("/")[0] != "out"}
        elif writer == "lens":  # one of the two files may be whole
            after = {name: content for name, content in after.items() if name not in ("page.html", "heat.png")}
        assert after == before, fault
        assert fault["second"]["code"] == 0 or "--overwrite" in str(fault["second"]["said"]), fault
        if fault["second"]["code"] == 0:
            assert is_same_but_for_numbers(listing(work / str(number) / "again"), whole, writer), fault
    assert any(fault["first"]["code"] for fault in faults)
