"""Environments that have their own transformers, and everything else from the environment of this process."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import torch
import transformers
from packaging.version import parse

from ponder_hf.modeling.pondering_version import is_supported


VERSIONS = Path(__file__).with_name("versions.txt")


class EnvironmentFailed(Exception):
    """An environment could not be made. The message says why."""


def read_pins():
    """Map each version of transformers in versions.txt, oldest first, to its pins: {package: version}."""
    lines = [line for line in VERSIONS.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    pins = [dict(word.split("==") for word in line.split()) for line in lines]
    return {each["transformers"]: each for each in pins}


def chosen_versions(words):
    """The versions that are asked for: all without words; "oldest" and "newest" are the ends of the range.

    Newest is the newest that is not newer than the installed one, as the newest of all may need a newer Python.

    Raises:
        EnvironmentFailed: versions.txt has no such version.
    """
    known = list(read_pins())
    supported = [version for version in known if is_supported(version)]
    installed = parse(transformers.__version__)
    newest = [version for version in supported if parse(version) <= installed] or supported
    ends = {"oldest": supported[0], "newest": newest[-1]}
    chosen = [ends.get(word, word) for word in words] or known
    for version in chosen:
        if version not in known:
            raise EnvironmentFailed(f"{VERSIONS.name} has no transformers {version}: it has {', '.join(known)}")
    return chosen


def build(pins, folder):
    """Make an environment with these packages, unless it is there already. Returns its Python.

    The packages of this process's environment are found after its own, so none of them is downloaded again.
    ponder_hf, which is installed there by reference, is not found.

    Raises:
        EnvironmentFailed: Python could not make it, or pip could not install the packages.
    """
    python = folder / "bin/python"
    stamp = folder / "made-of.json"
    made_of = {"packages": pins, "python": sys.version, "on top of": str(Path(torch.__file__).parents[1])}
    if stamp.is_file() and json.loads(stamp.read_text(encoding="utf-8")) == made_of:
        return python
    shutil.rmtree(folder, ignore_errors=True)
    _run([sys.executable, "-m", "venv", "--without-pip", str(folder)])
    requirements = [f"{name}=={version}" for name, version in pins.items()]
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install"]
    _run([*pip, "--quiet", "--no-deps", "--no-compile", *requirements])
    packages = _run([str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"])
    Path(packages.strip(), "on_top_of.pth").write_text(made_of["on top of"] + "\n", encoding="utf-8")
    stamp.write_text(json.dumps(made_of), encoding="utf-8")
    return python


def _run(command):
    result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if result.returncode != 0:
        lines = (result.stdout + result.stderr).strip().splitlines() or [f"exit code {result.returncode}"]
        raise EnvironmentFailed(lines[-1])
    return result.stdout
