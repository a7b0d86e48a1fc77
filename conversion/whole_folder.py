"""Write a folder, or a single file, whole or not at all.

Everything goes into a hidden folder beside the destination, `.NAME.partial-PID`, which is renamed into place at the
end. A folder that is replaced steps aside as `.NAME.replaced-PID` for the moment between two renames.
"""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ponder_hf.errors import walk, writing
from ponder_hf.modeling import PonderingError


def check_destination(
    destination: str | os.PathLike, overwrite: bool = False, source: str | os.PathLike | None = None
) -> Path:
    """The absolute path of `destination`, if it may be written.

    Args:
        destination: a folder that does not exist or is empty; with `overwrite`, any that is safe to replace.
        source: a folder that must not be touched.

    Raises:
        PonderingError: it may not be written, and why.
    """
    if not str(destination).strip():
        raise PonderingError("the name of the destination is empty: give a folder")
    with writing(destination):
        path = Path(os.path.realpath(Path(destination).expanduser()))
        if source is not None:
            _keep_apart(destination, path, Path(os.path.realpath(source)))
        existing = next(place for place in (path, *path.parents) if place.exists())
        if not existing.is_dir():
            what = destination if existing == path else existing
            raise PonderingError(f"{what} is a file: give a folder as the destination")
        if existing == path:
            if any(path.iterdir()) and not overwrite:
                raise PonderingError(
                    f"{destination} exists and is not empty: give another folder, or `overwrite=True` to replace it"
                )
            _check_replaceable(destination, path)
            if overwrite:
                _check_removable(destination, path)
            existing = path.parent
        if not os.access(existing, os.W_OK | os.X_OK):
            raise PonderingError(f"cannot write {destination}: {existing} may not be written to; give another folder")
    return path


def _keep_apart(destination: str | os.PathLike, path: Path, source: Path) -> None:
    if path == source:
        raise PonderingError(f"{destination} is the source itself: give another destination")
    if path in source.parents:
        raise PonderingError(f"{destination} contains the source: give another destination")


def _check_replaceable(destination: str | os.PathLike, path: Path) -> None:
    for place, what in ((Path.cwd(), "the current folder"), (Path.home(), "the home folder")):
        place = Path(os.path.realpath(place))
        if path == place or path in place.parents:
            raise PonderingError(f"{destination} is or contains {what}, which is never replaced: give a folder in it")
    if os.path.ismount(path):
        raise PonderingError(f"{destination} is a mount point, which cannot be replaced: give a folder in it")


def _check_removable(destination: str | os.PathLike, path: Path) -> None:
    """Raise a PonderingError where something below `path` would stay, because its folder may not be changed."""
    for parent, folders, names in walk(path):
        if (folders or names) and not os.access(parent, os.W_OK | os.X_OK):
            raise PonderingError(f"cannot replace {destination}: {parent} may not be written to; give another folder")


def check_space(destination: Path, num_bytes: int) -> None:
    """Raise a PonderingError unless the disk of `destination`, a path as check_destination gives it, has room."""
    place = next(folder for folder in destination.parents if folder.is_dir())
    with writing(destination):
        free = shutil.disk_usage(place).free
    if num_bytes > free:
        raise PonderingError(
            f"no space left for {destination}: {num_bytes:,} bytes are needed and {free:,} are free; free some, or "
            "choose a destination on another disk"
        )


@contextmanager
def whole_folder(destination: str | os.PathLike, overwrite: bool = False) -> Iterator[Path]:
    """A context that gives an empty folder to write into and puts it in the place of `destination` at the end.

    If the block raises anything, KeyboardInterrupt included, nothing is left of it and the destination is as before.
    What a killed run left behind beside the destination is cleaned up first.

    Raises:
        PonderingError: the destination may not or cannot be written, a full disk included.
    """
    path = check_destination(destination, overwrite)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    missing = [folder for folder in path.parents if not folder.exists()]
    try:
        with writing(destination):
            path.parent.mkdir(parents=True, exist_ok=True)
            _clean_up_after_killed_runs(path)
            partial.mkdir()
            yield partial
            flush(partial)
            _put_in_place(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if not path.exists():
            for folder in missing:
                with suppress(OSError):  # another process may have put something there
                    folder.rmdir()


@contextmanager
def whole_file(destination: str | os.PathLike) -> Iterator[Path]:
    """A context that gives a path to write to, and renames what is there to `destination` at the end.

    If the block raises anything nothing is left of it, and a file of that name is as before. What a killed run left
    behind beside it is cleaned up first.

    Raises:
        PonderingError: it cannot be written.
    """
    path = Path(os.path.realpath(Path(destination).expanduser()))
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        with writing(destination):
            _clean_up_after_killed_runs(path)
            yield partial
            partial.replace(path)
    finally:
        with suppress(OSError):  # nothing to remove, or nothing that may be: what went wrong has been said
            partial.unlink()


def _put_in_place(partial: Path, path: Path) -> None:
    if not path.exists():
        partial.rename(path)
    else:
        aside = path.with_name(f".{path.name}.replaced-{os.getpid()}")
        try:
            path.rename(aside)
            partial.rename(path)
        except BaseException:
            if aside.exists() and not path.exists():
                aside.rename(path)
            raise
        shutil.rmtree(aside, ignore_errors=True)
    flush_entry(path.parent)


def flush(folder: Path) -> None:
    """Have every file below `folder` on the disk, so that a power cut after the rename cannot leave empty files."""
    readable = folder.stat().st_mode & 0o666
    for parent, _, names in os.walk(folder):
        for name in names:
            with open(os.path.join(parent, name), "rb") as file:
                os.fsync(file.fileno())
            os.chmod(os.path.join(parent, name), readable)  # safetensors makes its files private to their owner
        flush_entry(parent)


def flush_entry(folder: str | os.PathLike) -> None:
    """Have what was renamed in `folder` on the disk."""
    if os.name == "nt":  # a folder cannot be opened there
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _clean_up_after_killed_runs(path: Path) -> None:
    pattern = re.compile(re.escape(f".{path.name}.") + r"(partial|replaced)-(\d+)")
    for leftover in path.parent.iterdir():
        match = pattern.fullmatch(leftover.name)
        if match is None or _is_running(int(match[2])):
            continue
        if match[1] == "replaced" and not path.exists():  # killed between the two renames: the old folder comes back
            leftover.rename(path)
        elif leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()


def _is_running(pid: int) -> bool:
    """Whether another process with this id runs. A folder with our own id was left by a namesake of ours."""
    if pid == os.getpid():
        return False
    if os.name == "nt":  # there signal 0 would end the process: never take a folder from one that may run
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
