"""Run command lines in one process that may not read or write some paths. Called by test_permissions.py.

`python forbidding.py JSON` with folder, which becomes the current one, template, where its copy is to lie, and cases:
each has arguments, and modes, which some paths get before it and lose after it. Prints whether modes mean anything at
all, then how each case ended: `code`, `out`, `err`, and `changed`, the paths that are no longer as they were.

The superuser may read and write everything, so its process gives up just that, as Linux lets it. Another user could
not do it: the interpreter may lie where only the superuser reads.
"""

import contextlib
import ctypes
import io
import json
import os
import shutil
import sys
import traceback
from pathlib import Path


_VERSION_3 = 0x20080522  # of the structure that capset takes
_IGNORES_MODES = 0b110  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH


def give_up_ignoring_modes() -> None:
    """Before any thread is started: each has its own rights."""
    with contextlib.suppress(AttributeError):  # not Linux
        libc = ctypes.CDLL(None)
        header, rights = (ctypes.c_uint32 * 2)(_VERSION_3, 0), (ctypes.c_uint32 * 6)()
        if libc.capget(header, rights) == 0:
            rights[0] &= ~_IGNORES_MODES  # what it may do
            rights[1] &= ~_IGNORES_MODES  # and what it could allow itself, which os.access goes by
            libc.capset(header, rights)


def modes_mean_something(folder: Path) -> bool:
    file = folder / "closed for a moment"
    file.touch(mode=0)
    try:
        file.read_bytes()
    except PermissionError:
        return True
    finally:
        file.unlink()
    return False


def begin_anew() -> None:
    """Put everything back that a command has changed, so that the next one finds what it needs."""
    for parent, folders, _ in os.walk("."):
        for folder in folders:
            os.chmod(os.path.join(parent, folder), 0o755)
    for path in Path().iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.copytree(template, ".", dirs_exist_ok=True)


def ended(case: dict) -> dict:
    """How one command line ended."""
    before = listing(Path())
    modes = {path: os.stat(path).st_mode for path in case["modes"]}
    for path, mode in case["modes"].items():
        os.chmod(path, mode)
    try:
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
            try:
                code = main(case["arguments"])
            except Exception:  # it is said to raise nothing
                code = traceback.format_exc()
    finally:
        for path, mode in modes.items():
            with contextlib.suppress(FileNotFoundError):  # the command has removed it
                os.chmod(path, mode)
    after = listing(Path())
    changed = [name for name in {**before, **after} if before.get(name, "") != after.get(name, "")]
    if changed:
        begin_anew()
    return {"code": code, "out": out.getvalue(), "err": err.getvalue(), "changed": changed}


if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    os.chdir(job["folder"])
    give_up_ignoring_modes()
    is_possible = modes_mean_something(Path())
    print(json.dumps(is_possible), flush=True)
    if is_possible:
        from checkpoints import listing

        from ponder_hf.cli import main

        template = shutil.copytree(".", job["template"])
        for case in job["cases"]:
            print(json.dumps(ended(case)), flush=True)
