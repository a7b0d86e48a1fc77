"""Others' tests from their source distributions: downloaded, put in place, never part of the repository."""

import importlib.metadata
import shutil
import subprocess
import sys
import tarfile
from dataclasses import dataclass, field
from pathlib import Path


class SourceFailed(Exception):
    """The tests could not be had. The message says why."""


@dataclass(frozen=True)
class Source:
    """Where a suite comes from.

    Args:
        distribution: the package whose source distribution has it, in the version that is installed.
        must_have: the file of its tests that is wanted.
        stand_ins: what its tests import and its archive leaves out, each file with the class that stands in for it.
        needed: further packages that its tests need, and nothing here.
    """

    distribution: str
    must_have: str
    stand_ins: dict[str, str] = field(default_factory=dict)
    needed: tuple[str, ...] = ()

    @property
    def package(self) -> str:
        """The name by which its tests are imported."""
        return f"{self.distribution}_tests"


SOURCES = {
    "transformers": Source(
        "transformers",
        "test_modeling_common.py",
        stand_ins={
            "generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
            "exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
        },
        needed=("parameterized",),
    ),
    "peft": Source("peft", "test_decoder_models.py"),
}


def prepare(folder: Path, source: Source) -> Path:
    """Download what is not there yet. Returns the folder that must be on PYTHONPATH.

    Raises:
        SourceFailed: the index does not give it, or the archive has no tests.
    """
    version = importlib.metadata.version(source.distribution)
    place = folder / source.distribution / version
    if (place / "complete").is_file():
        return place
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    # The environment's own setuptools is asked what the archive is; nothing is built.
    wanted = f"{source.distribution}=={version}"
    _pip("download", "--no-deps", "--no-binary", ":all:", "--no-build-isolation", "-d", place, wanted)
    if source.needed:
        _pip("install", "--no-deps", "--target", place, *source.needed)
    (archive,) = place.glob(f"{source.distribution}-*.tar.gz")
    start = f"{archive.name.removesuffix('.tar.gz')}/tests/"
    with tarfile.open(archive) as opened:
        members = [member for member in opened.getmembers() if member.name.startswith(start) and member.isfile()]
        for member in members:
            member.name = f"{source.package}/{member.name.removeprefix(start)}"
        opened.extractall(place, members, filter="data")
    tests = place / source.package
    if not (tests / source.must_have).is_file():
        raise SourceFailed(f"{archive.name} has no tests/{source.must_have}")
    for name, content in source.stand_ins.items():
        path = tests / name
        path.parent.mkdir(exist_ok=True)
        if not path.exists():
            path.write_text(content)
    for path in (tests, *(each for each in tests.iterdir() if each.is_dir())):
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
