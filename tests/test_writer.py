"""The folder writer: whole or not at all, and it cleans up after runs that were killed."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import listing

from ponder_hf import PonderingError
from ponder_hf.conversion.whole_folder import check_destination, check_space, whole_folder


@pytest.fixture
def dead_pid():
    """The id of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def write(destination, text="new", **kwargs):
    with whole_folder(destination, **kwargs) as folder:
        (folder / "sub").mkdir()
        (folder / "file").write_text(text)
        (folder / "sub/file").write_text(text)


def test_it_appears_whole_and_leaves_nothing_else(tmp_path):
    destination = tmp_path / "a/b/out"
    with whole_folder(destination) as folder:
        (folder / "file").write_text("new")
        assert not destination.exists()
        assert folder.parent == destination.parent, "on the same disk, so that a rename is enough"
        assert folder.name.startswith(".")
    assert listing(tmp_path).keys() == {"a", "a/b", "a/b/out", "a/b/out/file"}


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "out").mkdir()
    write(tmp_path / "out")
    assert listing(tmp_path).keys() == {"out", "out/file", "out/sub", "out/sub/file"}


def test_overwriting_replaces_everything_and_only_at_the_end(tmp_path):
    write(tmp_path / "out", "old")
    (tmp_path / "out/gone").write_text("old")
    with whole_folder(tmp_path / "out", overwrite=True) as folder:
        (folder / "file").write_text("new")
        assert (tmp_path / "out/gone").read_text() == "old"
    assert (tmp_path / "out/file").read_text() == "new"
    assert listing(tmp_path).keys() == {"out", "out/file"}


def test_a_link_is_followed(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    write(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real/file").read_text() == "new"


@pytest.mark.parametrize(
    "error", [ValueError("no"), PonderingError("no"), KeyboardInterrupt(), SystemExit(3)], ids=repr
)
@pytest.mark.parametrize("exists", [True, False], ids=["overwrite", "new"])
def test_whatever_goes_wrong_nothing_has_happened(tmp_path, error, exists):
    if exists:
        write(tmp_path / "a/b/out", "old")
    before = listing(tmp_path)

    def fail():
        with whole_folder(tmp_path / "a/b/out", overwrite=exists) as folder:
            (folder / "file").write_text("half")
            raise error

    with pytest.raises(type(error)):
        fail()
    assert listing(tmp_path) == before


def test_the_old_folder_comes_back_where_the_last_rename_fails(tmp_path, monkeypatch):
    write(tmp_path / "out", "old")
    before = listing(tmp_path)
    rename = Path.rename

    def failing(path, target):
        if ".partial-" in path.name:
            raise OSError(5, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(PonderingError, match="Input/output error"):
        write(tmp_path / "out", overwrite=True)
    assert listing(tmp_path) == before


def test_leftovers_of_killed_runs_are_removed(tmp_path, dead_pid):
    for name in (f".out.partial-{dead_pid}", f".out.replaced-{dead_pid}", f".out.partial-{os.getpid()}"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("half")
    (tmp_path / "out").mkdir()
    write(tmp_path / "out")
    assert listing(tmp_path).keys() == {"out", "out/file", "out/sub", "out/sub/file"}


def test_what_may_be_anothers_stays(tmp_path, dead_pid):
    names = {
        f".out.partial-{os.getppid()}",  # still running
        f".other.partial-{dead_pid}",
        f".out.partial-{dead_pid}.txt",
        ".out.partial-x",
        f"out.partial-{dead_pid}",
    }
    for name in names:
        (tmp_path / name).mkdir()
    write(tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"out", *names}


def test_a_folder_that_a_killed_run_had_put_aside_comes_back(tmp_path, dead_pid):
    aside = tmp_path / f".out.replaced-{dead_pid}"
    aside.mkdir()
    (aside / "file").write_text("old")
    with pytest.raises(ValueError, match="no"), whole_folder(tmp_path / "out", overwrite=True):
        raise ValueError("no")
    assert (tmp_path / "out/file").read_text() == "old"
    assert not aside.exists()


@pytest.mark.skipif(os.name != "posix", reason="processes are killed differently there")
def test_a_killed_process_leaves_only_what_the_next_run_removes(tmp_path):
    program = (
        "import sys, time\nfrom ponder_hf.conversion.whole_folder import whole_folder\n"
        "with whole_folder(sys.argv[1]) as folder:\n"
        "    (folder / 'file').write_text('half')\n    print('ready', flush=True)\n    time.sleep(60)"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGKILL)
    assert [path.name for path in tmp_path.iterdir()] == [f".out.partial-{process.pid}"]
    write(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_files_can_be_read_by_whoever_may_read_the_folder(tmp_path):
    with whole_folder(tmp_path / "out") as folder:
        (folder / "file").touch(mode=0o600)
    assert (tmp_path / "out/file").stat().st_mode & 0o777 == (tmp_path / "out").stat().st_mode & 0o666


def test_the_home_folder_is_never_replaced(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "me"))
    (tmp_path / "me/models").mkdir(parents=True)
    for folder in (tmp_path / "me", tmp_path):
        with pytest.raises(PonderingError, match="home folder"):
            check_destination(folder, overwrite=True)
    assert check_destination(tmp_path / "me/models") == (tmp_path / "me/models").resolve()


def test_space_is_looked_up_where_the_folder_will_be(tmp_path):
    check_space(tmp_path / "not/there/yet", 1)
    with pytest.raises(PonderingError, match="no space left for"):
        check_space(tmp_path / "not/there/yet", 10**18)
