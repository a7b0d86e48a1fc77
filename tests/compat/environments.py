"""Environments that have their own transformers, and everything else from the environment of this process."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import torch
import transformers
from packaging.version import parse

from ponder_hf.modeling.pondering_errors import is_supported


VERSIONS = Path(__file__).with_name("versions.txt")


class EnvironmentFailed(Exception):
    """An environment could not be made. The message says why."""


LATEST = "latest"  # of the package index, whatever it is: not pinned


def read_pins():
    """Map the name of each line in versions.txt, oldest first, to its pins: {package: version}.

    The name is the version of transformers, or torch-VERSION where torch is pinned.
    """
    lines = [line for line in VERSIONS.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    pins = [dict(word.split("==") for word in line.split()) for line in lines]
    return {f"torch-{each['torch']}" if "torch" in each else each["transformers"]: each for each in pins}


def chosen_versions(words):
    """Map the names that are asked for to their pins: all without words.

    "oldest" and "newest" are the ends of the range; "latest" is the newest release on the package index.
    Newest is the newest that is not newer than the installed one, as the newest of all may need a newer Python.

    Raises:
        EnvironmentFailed: versions.txt has no such name, or the index cannot be asked.
    """
    known = read_pins()
    supported = [name for name, pins in known.items() if "torch" not in pins and is_supported(name)]
    installed = parse(transformers.__version__)
    newest = [version for version in supported if parse(version) <= installed] or supported
    ends = {"oldest": supported[0], "newest": newest[-1]}
    chosen = {}
    for word in words or known:
        name = ends.get(word, word)
        if word == LATEST:
            chosen[LATEST] = {"transformers": latest_version()}
        elif name in known:
            chosen[name] = known[name]
        else:
            raise EnvironmentFailed(f"{VERSIONS.name} has no transformers {word}: it has {', '.join(known)}")
    return chosen


def latest_version():
    """The newest release of transformers on the package index that pip is set up with."""
    found = json.loads(_run([sys.executable, "-m", "pip", "index", "versions", "--json", "transformers"]))
    return found["versions"][0]


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
    requirements = {name: f"{name}=={version}" for name, version in pins.items()}
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-compile"]
    if "torch" in pins:
        _run([*pip, requirements.pop("torch")])
    packages = _run([str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"])
    on_top_of = Path(packages.strip(), "on_top_of.pth")
    if len(pins) == 1:  # what else it needs is whatever the index has, where it is not there already
        on_top_of.write_text(made_of["on top of"] + "\n", encoding="utf-8")
        _run([*pip, *requirements.values()])
    else:
        _run([*pip, "--no-deps", *requirements.values()])
        on_top_of.write_text(made_of["on top of"] + "\n", encoding="utf-8")
    stamp.write_text(json.dumps(made_of), encoding="utf-8")
    return python


def _run(command):
    result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if result.returncode != 0:
        lines = (result.stdout + result.stderr).strip().splitlines() or [f"exit code {result.returncode}"]
        raise EnvironmentFailed(lines[-1])
    return result.stdout
