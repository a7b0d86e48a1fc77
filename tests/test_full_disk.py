"""Disks that are full, fail or fill up, and interruptions: one line, and nothing left behind."""

import errno
import os
import shutil
import subprocess

import checkpoints
import pytest
import safetensors.torch
from checkpoints import listing


pytest_plugins = ["refusals"]


def fail_at(monkeypatch, error, call):
    """Have transformers write only half of its file number `call` of weights and then fail. Returns what it wrote."""
    calls = []

    def failing(tensors, filename, metadata=None):
        calls.append(filename)
        safetensors.torch.save_file(tensors, filename, metadata=metadata)
        if len(calls) == call:
            os.truncate(filename, os.path.getsize(filename) // 2)
            raise error

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", failing)
    return calls


FULL_DISK = {
    "ENOSPC": OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    "EDQUOT": OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
    "as safetensors says it": safetensors.SafetensorError(
        "Error while serializing: I/O error: No space left on device (os error 28)"
    ),
}


@pytest.mark.parametrize("kind", FULL_DISK)
@pytest.mark.parametrize("overwrite", [False, True], ids=["new", "overwrite"])
@pytest.mark.parametrize("command", ["convert", "export"])
def test_a_disk_that_fills_up_in_the_middle(place, check_refused, monkeypatch, command, overwrite, kind):
    flags = ["--max-shard-size", "60KB"]
    if overwrite:
        (place / "out").mkdir()
        (place / "out/old").write_text("mine")
        flags.append("--overwrite")
    calls = fail_at(monkeypatch, FULL_DISK[kind], call=2)
    source = {"convert": "base", "export": "pondering"}[command]
    check_refused(
        command, source, "out" if overwrite else "new/folders/out", *flags, words=["no space left", "another disk"]
    )
    assert len(calls) == 2


def test_a_disk_that_is_too_small_from_the_start(place, check_refused, monkeypatch):
    usage = shutil.disk_usage(place)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    check_refused("convert", "base", "out", words=["no space left", "1,000 are free"])


def test_a_disk_that_fails(place, check_refused, monkeypatch):
    fail_at(monkeypatch, OSError(errno.EIO, os.strerror(errno.EIO)), call=1)
    check_refused("convert", "base", "out", words=["cannot write out", "Input/output error"])


def test_a_small_disk_of_its_own(place, capsys, monkeypatch, assert_refused):
    """A real file system of 1 MB; the space check is told otherwise, so that writing itself must fail."""
    disk = place / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("mounting a small tmpfs needs Linux and the superuser")
    try:
        usage = shutil.disk_usage(disk)
        before = listing(place)
        for free in (usage.free, 10**12):
            monkeypatch.setattr(shutil, "disk_usage", lambda folder, free=free: usage._replace(free=free))
            (disk / "filler").write_bytes(b"x" * 950_000)
            code = checkpoints.run("convert", "base", disk / "out")
            output = capsys.readouterr()
            (disk / "filler").unlink()
            assert_refused(code, output.out, output.err, before, listing(place), ["no space left"])
        assert checkpoints.run("convert", "base", disk / "out") == 0, "without the filler it fits"
    finally:
        subprocess.run(["umount", str(disk)], check=True, capture_output=True)


def test_an_interruption_leaves_nothing(place, capsys, monkeypatch):
    before = listing(place)
    fail_at(monkeypatch, KeyboardInterrupt(), call=1)
    assert checkpoints.run("convert", "base", "new/out") == 130
    assert capsys.readouterr().err == "ponder-hf: interrupted\n"
    assert listing(place) == before
