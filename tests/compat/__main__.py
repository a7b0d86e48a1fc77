"""Run what versions.txt names and print the table. The exit code is 1 if anything fails.

python -m compat [--environments FOLDER] [VERSION ...]      from tests/, or with it on PYTHONPATH
"""

import argparse
import datetime
import json
import platform
import sys
import tempfile
from pathlib import Path

import elsewhere
import torch
import transformers
from safetensors.torch import load_file

from ponder_hf import PonderingForCausalLM, __version__
from ponder_hf.modeling.pondering_errors import TRANSFORMERS_RANGE, is_supported

from . import abilities
from .environments import EnvironmentFailed, build, chosen_versions
from .written import CHECKPOINTS, write


COLUMNS = (*abilities.ABILITIES, "back here", "no deprecations")
REFUSED = abilities.REFUSED
LIBRARIES = ("transformers", "huggingface-hub", "tokenizers", "torch")


def read_back(copies):
    """Map each checkpoint that another version saved to None, or to what goes wrong when the library loads it here."""
    problems = {}
    for expected in sorted(copies.glob("*.safetensors")):  # the last thing that is written there
        problems[expected.stem] = None
        try:
            model = PonderingForCausalLM.from_pretrained(expected.with_suffix(""))
            abilities.compare(abilities.measure(model, "logits"), load_file(expected), "logits")
        except Exception as error:
            problems[expected.stem] = f"{type(error).__name__}: {error}".splitlines()[0]
    return problems


def try_version(pins, python, written, place):
    """For one environment: {column: {checkpoint: problem or None}}, and the versions that it imports.

    Args:
        pins: {package: version} that it must import.
        python: its interpreter.
    """
    version = pins["transformers"]
    copies = place / "copies"
    copies.mkdir(parents=True)
    expectation = "supported" if is_supported(version) else "refused"
    program = Path(abilities.__file__).read_text(encoding="utf-8")
    report = json.loads(elsewhere.run(program, place / "home", written, copies, expectation, python=python))
    installed = {name: version for name, version in pins.items() if name in LIBRARIES}
    if not installed.items() <= report["versions"].items():
        raise EnvironmentFailed(f"it imports {report['versions']} where {installed} were installed")
    outcomes = report["outcomes"]
    if expectation == "supported":
        outcomes["back here"] = read_back(copies)
        outcomes["no deprecations"] = {"all": "; ".join(report["deprecations"]) or None}
    return outcomes, report["versions"]


def cells(version, outcomes):
    """The texts of one row's columns, and the problems that they stand for."""
    texts, problems = [], []
    for column in COLUMNS:
        found = outcomes.get(column, {})
        if not found:
            texts.append("")
            continue
        failed = [name for name, problem in found.items() if problem not in (None, REFUSED)]
        problems += [f"{version}: {column}: {name}: {found[name]}" for name in failed]
        refused = [name for name, problem in found.items() if problem == REFUSED]
        good = REFUSED if refused or not is_supported(version) else "yes"
        if 0 < len(refused) < len(found):
            good = f"yes; {', '.join(refused)} {REFUSED}"
        texts.append(f"NO: {', '.join(failed)}" if failed else good)
    return texts, problems


def row(texts):
    return f"| {' | '.join(texts)} |"


def main(argv=None):
    parser = argparse.ArgumentParser(prog="make compat", description="Try checkpoints under versions of transformers.")
    parser.add_argument("--environments", type=Path, default=Path(".compat"), metavar="FOLDER", help="where they lie")
    parser.add_argument("versions", nargs="*", metavar="VERSION", help="by default all; also: oldest, newest, latest")
    args = parser.parse_args(argv)
    try:
        versions = chosen_versions(args.versions)
    except EnvironmentFailed as error:
        parser.error(str(error))
    print(
        f"ponder_hf {__version__}, range {TRANSFORMERS_RANGE}; checkpoints ({', '.join(CHECKPOINTS)}) written under "
        f"transformers {transformers.__version__}, torch {torch.__version__}, Python {platform.python_version()}; "
        f"{datetime.date.today()}\n"
    )
    print(row([*LIBRARIES, *COLUMNS]))
    print(row(["---"] * (len(LIBRARIES) + len(COLUMNS))))
    transformers.logging.disable_progress_bar()
    problems = []
    with tempfile.TemporaryDirectory() as place:
        written = Path(place) / "written"
        for name in CHECKPOINTS:
            write(written, name)
        for name, pins in versions.items():
            imported = pins
            try:
                python = build(pins, args.environments.absolute() / name)
                outcomes, imported = try_version(pins, python, written, Path(place) / name)
                texts, found = cells(pins["transformers"], outcomes)
            except (EnvironmentFailed, AssertionError) as error:  # the latter: the program there ended with an error
                texts = ["NO"] + [""] * (len(COLUMNS) - 1)
                found = [f"{name}: {error}"]
            problems += found
            print(row([*(imported.get(library, "") for library in LIBRARIES), *texts]), flush=True)
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
