"""Run transformers' shared model tests and print what became of them. The exit code is 1 if any fails.

python -m upstream [--folder FOLDER] [BACKBONE ...]      from tests/, or with it on PYTHONPATH
"""

import argparse
import collections
import datetime
import os
import platform
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import tiny
import torch
import transformers

from . import source


SUITE = Path(__file__).with_name("suite.py")
BACKBONES = [*tiny.SPINE, "mixtral"]  # the last one has experts
# How a reason may name the class.
_CLASS = r"(<class '[\w.]*)?Pondering(Model|ForCausalLM|Config)('>)?"
# Where a test says what it needs by a decorator of transformers: the first words of its reason, and ours.
_WORDS = {
    "test is slow": "slow by transformers' own mark",
    "test requires": "needs hardware or a package that is absent",
}


def outcomes(report):
    """Of one JUnit report: counts by outcome, {test: reason} of those that were skipped, and of those that failed."""
    counts, skipped, failed = collections.Counter(), {}, {}
    for case in ElementTree.parse(report).iter("testcase"):
        name = case.get("name")
        skip, bad = case.find("skipped"), case.find("failure")
        bad = case.find("error") if bad is None else bad
        if bad is not None:
            counts["failed"] += 1
            errors = [line[1:].strip() for line in (bad.text or "").splitlines() if line.startswith("E ")]
            failed[name] = " ".join(errors or [bad.get("message") or ""])[:300]
        elif skip is not None:
            counts["skipped"] += 1
            skipped[name] = " ".join((skip.get("message") or "").split())
        else:
            counts["passed"] += 1
    return counts, skipped, failed


def run(backbone, place):
    """The outcomes of one backbone's tests, in a process of their own."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        variables = {"UPSTREAM_BACKBONES": backbone, "HF_HUB_OFFLINE": "1", "HF_HOME": folder, "OMP_NUM_THREADS": "1"}
        paths = [str(SUITE.parents[1]), str(place), os.environ.get("PYTHONPATH", "")]
        command = [sys.executable, "-m", "pytest", "-c", os.devnull, "--rootdir", str(SUITE.parent), "--noconftest"]
        command += ["-p", "no:cacheprovider", "-q", "-W", "ignore", str(SUITE), "--junitxml", str(report)]
        done = subprocess.run(
            command,
            env={**os.environ, **variables, "PYTHONPATH": os.pathsep.join(paths)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        if not report.is_file():
            return collections.Counter(failed=1), {}, {"the suite": done.stdout[-2000:] + done.stderr[-2000:]}
        return outcomes(report)


def reasons_table(skipped):
    """Markdown: every reason of a skipped test, how many tests of how many backbones, and their names.

    skipped: {backbone: {test: reason}}.
    """
    by_reason = collections.defaultdict(lambda: (set(), set()))
    for backbone, tests in skipped.items():
        for name, reason in tests.items():
            words = next((ours for start, ours in _WORDS.items() if reason.startswith(start)), reason)
            words = re.sub(_CLASS, "the model", words).strip(". ")
            tests_of, backbones_of = by_reason[words]
            tests_of.add(re.sub(r"_\d+_.*", "", name))
            backbones_of.add(backbone)
    rows = ["| reason | backbones | tests |", "| --- | --- | --- |"]
    for words, (tests, backbones) in sorted(by_reason.items(), key=lambda each: -len(each[1][0])):
        named = "all" if len(backbones) == len(skipped) else ", ".join(sorted(backbones))
        rows.append(f"| {words} | {named} | {', '.join(f'`{name}`' for name in sorted(tests))} |")
    return "\n".join(rows)


def main():
    parser = argparse.ArgumentParser(prog="upstream", description=__doc__.partition("\n")[0])
    parser.add_argument("backbones", nargs="*", metavar="BACKBONE", help=f"of {', '.join(BACKBONES)}; default: all")
    parser.add_argument("--folder", type=Path, default=Path(".upstream"), help="where the tests are kept")
    arguments = parser.parse_args()
    unknown = set(arguments.backbones) - set(BACKBONES)
    if unknown:
        parser.error(f"no such backbone: {', '.join(sorted(unknown))}; there are {', '.join(BACKBONES)}")
    try:
        place = source.prepare(arguments.folder.resolve())
    except source.SourceFailed as error:
        print(f"upstream: {error}", file=sys.stderr)
        return 1
    print(
        f"{datetime.date.today()}, transformers {transformers.__version__}, torch {torch.__version__}, "
        f"Python {platform.python_version()}\n\n| backbone | passed | skipped | failed |\n| --- | --- | --- | --- |"
    )
    skipped, failed = {}, {}
    for backbone in arguments.backbones or BACKBONES:
        counts, skipped[backbone], failures = run(backbone, place)
        print(f"| {backbone} | {counts['passed']} | {counts['skipped']} | {counts['failed']} |", flush=True)
        failed.update({f"{backbone}: {name}": message for name, message in failures.items()})
    print(f"\n{reasons_table(skipped)}")
    for name, message in failed.items():
        print(f"upstream: failed: {name}: {message}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
