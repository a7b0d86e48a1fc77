"""Run others' tests on pondering models and print what became of them. The exit code is 1 if any fails.

python -m upstream [--suite SUITE] [--folder FOLDER] [BACKBONE ...]      from tests/, or with it on PYTHONPATH
"""

import argparse
import collections
import datetime
import importlib.metadata
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

from . import source


HERE = Path(__file__).resolve().parent
# What is run of each suite. Mixtral has experts; "named" are tests of PEFT's that name the model they take.
SUITES = {
    "transformers": [*tiny.SPINE, "mixtral"],
    "peft": ["gpt2", "gpt_neo", "gpt_neox", "llama", "gemma3_text", "named"],
}
# How a reason may name the model, and the class of an adapter.
_MODEL = r"(<class '[\w.]*)?Pondering(Model|ForCausalLM|Config)('>)?|pondering/[\w-]+"
_ADAPTER = r"<class 'peft\.[\w.]*'>"
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


def run(backbone, place, suite="transformers"):
    """The outcomes of one backbone's tests, in a process of their own."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        variables = {"UPSTREAM_BACKBONES": backbone, "HF_HUB_OFFLINE": "1", "HF_HOME": folder, "OMP_NUM_THREADS": "1"}
        paths = [str(HERE.parent), str(place), os.environ.get("PYTHONPATH", "")]
        command = [sys.executable, "-m", "pytest", "-c", os.devnull, "--rootdir", str(HERE), "--noconftest"]
        command += ["-p", "no:cacheprovider", "-q", "-W", "ignore", "--basetemp", str(Path(folder) / "pytest")]
        command += [str(HERE / f"{suite}_suite.py"), "--junitxml", str(report)]
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
            words = re.sub(_ADAPTER, "this kind of adapter", re.sub(_MODEL, "the model", words)).strip(". ")
            tests_of, backbones_of = by_reason[words]
            tests_of.add(re.sub(r"_\d+_.*", "", name.partition("[")[0]))
            backbones_of.add(backbone)
    rows = ["| reason | backbones | tests |", "| --- | --- | --- |"]
    for words, (tests, backbones) in sorted(by_reason.items(), key=lambda each: -len(each[1][0])):
        named = "all" if len(backbones) == len(skipped) else ", ".join(sorted(backbones))
        rows.append(f"| {words} | {named} | {', '.join(f'`{name}`' for name in sorted(tests))} |")
    return "\n".join(rows)


def main():
    parser = argparse.ArgumentParser(prog="upstream", description=__doc__.partition("\n")[0])
    every = "; ".join(f"{suite}: {', '.join(backbones)}" for suite, backbones in SUITES.items())
    parser.add_argument("backbones", nargs="*", metavar="BACKBONE", help=f"of {every}; default: all")
    parser.add_argument("--suite", choices=SUITES, default="transformers", help="whose tests; default: %(default)s")
    parser.add_argument("--folder", type=Path, default=Path(".upstream"), help="where the tests are kept")
    arguments = parser.parse_args()
    known = SUITES[arguments.suite]
    unknown = set(arguments.backbones) - set(known)
    if unknown:
        parser.error(f"no such backbone: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    try:
        place = source.prepare(arguments.folder.resolve(), source.SOURCES[arguments.suite])
    except source.SourceFailed as error:
        print(f"upstream: {error}", file=sys.stderr)
        return 1
    versions = dict.fromkeys(("transformers", arguments.suite))
    print(
        f"{datetime.date.today()}, {', '.join(f'{name} {importlib.metadata.version(name)}' for name in versions)}, "
        f"torch {torch.__version__}, Python {platform.python_version()}\n\n"
        "| backbone | passed | skipped | failed |\n| --- | --- | --- | --- |"
    )
    skipped, failed = {}, 0
    for backbone in arguments.backbones or known:
        counts, skipped[backbone], failures = run(backbone, place, arguments.suite)
        print(f"| {backbone} | {counts['passed']} | {counts['skipped']} | {counts['failed']} |", flush=True)
        for name, message in failures.items():
            print(f"upstream: failed: {backbone}: {name}: {message}", file=sys.stderr, flush=True)
        failed += len(failures)
    print(f"\n{reasons_table(skipped)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
