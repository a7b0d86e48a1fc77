"""transformers' tests from its source distribution: downloaded, put in place, never part of the repository."""

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import transformers


PACKAGE = "transformers_tests"
# What its tests import and its archive leaves out: each file with the empty class that stands in for it.
LEFT_OUT_OF_THE_ARCHIVE = {
    "generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
}
NEEDED = ("parameterized",)  # by its tests, and by nothing here


class SourceFailed(Exception):
    """The tests could not be had. The message says why."""


def prepare(folder: Path, version: str = transformers.__version__) -> Path:
    """Download what is not there yet. Returns the folder that must be on PYTHONPATH.

    Raises:
        SourceFailed: the index does not give it, or the archive has no tests.
    """
    place = folder / version
    if (place / "complete").is_file():
        return place
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    # The environment's own setuptools is asked what the archive is; nothing is built.
    _pip(
        "download",
        "--no-deps",
        "--no-binary",
        ":all:",
        "--no-build-isolation",
        "-d",
        place,
        f"transformers=={version}",
    )
    _pip("install", "--no-deps", "--target", place, *NEEDED)
    (archive,) = place.glob("transformers-*.tar.gz")
    start = f"{archive.name.removesuffix('.tar.gz')}/tests/"
    with tarfile.open(archive) as opened:
        members = [member for member in opened.getmembers() if member.name.startswith(start) and member.isfile()]
        for member in members:
            member.name = f"{PACKAGE}/{member.name.removeprefix(start)}"
        opened.extractall(place, members, filter="data")
    if not (place / PACKAGE / "test_modeling_common.py").is_file():
        raise SourceFailed(f"{archive.name} has no tests/test_modeling_common.py")
    for name, content in LEFT_OUT_OF_THE_ARCHIVE.items():
        path = place / PACKAGE / name
        path.parent.mkdir(exist_ok=True)
        if not path.exists():
            path.write_text(content)
    for path in (place / PACKAGE, *(each for each in (place / PACKAGE).iterdir() if each.is_dir())):
        (path / "__init__.py").touch()
    (place / "complete").touch()
    return place


def _pip(*words):
    done = subprocess.run(
        [sys.executable, "-m", "pip", *map(str, words), "--quiet"],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    if done.returncode:
        last = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "no reason given")
        raise SourceFailed(f"pip {words[0]} failed: {last}")
