"""Check and measure pondering on this machine's GPU: `make gpu`, or `python -m gpu` with tests/ on PYTHONPATH.

First the checks, which print one row each; then the tables of docs/cost.md, which are printed as they are measured.
The checks run beside each other where there are cores for it; the tables run alone, each in a process of its own.

Exit code: 0 all is well; 1 a check or a table failed; 2 there is no GPU, or the arguments are wrong.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

import torch

from ponder_hf import PonderingError
from ponder_hf.devices import read_device

from . import costs, machine, shape
from .registry import all_checks, run_check


COMPILES = ("a compiled training step", "a static cache compiled")
# Tables that share a process, and the seconds that it may take.
GROUPS = {
    "training": (("train", "chunks"), 180),
    "generation": (("prefill", "decode", "drafts", "exits"), 240),
    "compiled": (("compiled",), 240),
}
CHECK_SECONDS, EACH_CHECK_SECONDS = 240, 150
# A program that is stopped says so within this process's own lines.
_PRINTING = threading.Lock()


def say(text):
    """To people: standard error, at once."""
    with _PRINTING:
        print(text, file=sys.stderr, flush=True)


def show(text):
    """A result: standard output, at once."""
    with _PRINTING:
        print(text, flush=True)


def as_row(cells):
    return f"| {' | '.join('' if cell is None else str(cell) for cell in cells)} |"


class Child:
    """A process that runs some checks or tables and writes a line of JSON for each row, as it is found.

    Where it dies, or one of them takes longer than `each` seconds, what is left goes on in another process.
    """

    def __init__(self, arguments, kind, names, seconds, each, on_row):
        self.names, self.deadline, self.each, self.on_row = list(names), time.monotonic() + seconds, each, on_row
        self.command = [sys.executable, "-m", "gpu", "--child", kind, "--device", arguments.device]
        self.command += [flag for flag in ("--tiny", "--quick") if getattr(arguments, flag[2:])]
        self.lost = []  # (name, why) of what gave no result

    def run(self):
        """Until all is done, or time is up."""
        while self.names and time.monotonic() < self.deadline:
            why = self._run_once()
            if why is not None:
                self.lost.append((self.names.pop(0), why))
        self.lost += [(name, "no time was left") for name in self.names]
        return self

    def _run_once(self):
        """Why the first of the names that are left gave no result, or None where the process ended well."""
        process = subprocess.Popen(
            [*self.command, *self.names], stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True
        )
        timers = [self._timer(process)]
        try:
            for line in process.stdout:
                if not line.startswith("{"):
                    say(line.rstrip())
                    continue
                found = json.loads(line)
                if "done" not in found:
                    self.on_row(found)
                    continue
                self.names.remove(found["done"])
                timers[-1].cancel()
                timers.append(self._timer(process))
        finally:
            timers[-1].cancel()
            code = process.wait()
        if not self.names or code == 3:  # 3: the device no longer works in that process
            return None
        return f"the process was stopped after {self.each} seconds" if code == -9 else f"the process died ({code})"

    def _timer(self, process):
        timer = threading.Timer(max(1, min(self.each, self.deadline - time.monotonic())), process.kill)
        timer.daemon = True
        timer.start()
        return timer


def be_child(arguments):
    """Run what is named, and print a line of JSON for each row; standard output is for these lines only."""
    device = read_device(arguments.device)
    machine.transformers.utils.logging.disable_progress_bar()
    results = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def tell(**found):
        print(json.dumps(found), file=results, flush=True)

    for name in arguments.names:
        if arguments.child == "checks":
            row, works = run_check(name, device, arguments.tiny)
            tell(**row)
            tell(done=name)
            if not works:
                return 3
            continue
        size = shape.TINY if arguments.tiny else shape.QUICK if arguments.quick else shape.PYTHIA_410M
        try:
            for row in costs.TABLES[name][1](size, device):
                tell(table=name, row=row)
        except Exception as error:
            tell(table=name, problem=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
            traceback.print_exc()
        tell(done=name)
    return 0


class Run:
    """All that is found: rows of checks, rows of tables, problems."""

    def __init__(self, arguments, where):
        self.arguments, self.where = arguments, where
        self.checks, self.tables, self.problems, self.lines = [], {}, [], []

    def put(self, line):
        self.lines.append(line)
        show(line)

    def problem(self, text):
        self.problems.append(text)
        say(f"gpu: PROBLEM: {text}")

    def check_row(self, row):
        trace = row.pop("traceback", None)
        self.checks.append(row)
        say(f"gpu: {row['outcome']:<8} {row['check']}, {row['dtype']} ({row['seconds']} s) {row['detail']}")
        if row["outcome"] == "FAILED":
            say(trace or "")
            self.problem(f"{row['check']}, {row['dtype']}: {row['detail']}")

    def table_row(self, found):
        name = found["table"]
        if "problem" in found:
            self.problem(f"table {name}: {found['problem']}")
            return
        row = {**found["row"], "measured on": self.where}
        if name not in self.tables:
            self.put(f"\n{costs.TABLES[name][0]}:\n\n{as_row(row)}\n{as_row(['---'] * len(row))}")
        self.tables.setdefault(name, []).append(row)
        self.put(as_row(row.values()))

    def run_checks(self, names):
        compiling = [name for name in names if name.startswith(COMPILES)]
        groups = [[name for name in names if name.endswith(dtype)] for dtype in ("float32", "bfloat16")]
        groups = [[name for name in group if name not in compiling] for group in groups]
        groups = [group for group in (compiling, *groups) if group]
        if self.arguments.tiny:
            groups = [names]
        limits = [600, 600] if self.arguments.tiny else [CHECK_SECONDS, EACH_CHECK_SECONDS]
        children = [Child(self.arguments, "checks", group, *limits, self.check_row) for group in groups]
        if (os.cpu_count() or 1) >= 6 and not self.arguments.tiny:
            threads = [threading.Thread(target=child.run) for child in children]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        else:
            for child in children:
                child.run()
        for child in children:
            for name, why in child.lost:
                check, _, dtype = name.rpartition(", ")
                self.check_row({"check": check, "dtype": dtype, "outcome": "FAILED", "detail": why, "seconds": None})
        self._print_checks()

    def _print_checks(self):
        dtypes = ("float32", "bfloat16")
        self.put(f"\nChecks, {self.where}:\n\n{as_row(['check', *dtypes])}\n{as_row(['---'] * 3)}")
        found = {}
        for row in self.checks:
            text = row["outcome"] + (f": {row['detail']}" if row["detail"] else "")
            found.setdefault(row["check"], {})[row["dtype"]] = text
        for name, outcomes in found.items():
            self.put(as_row([name, *(outcomes.get(dtype) for dtype in dtypes)]))

    def write(self, folder):
        """gpu.md, what was printed, and gpu.json, the same for machines."""
        folder.mkdir(parents=True, exist_ok=True)
        report = {
            "date": machine.today(),
            "device": machine.name_of(read_device(self.arguments.device)),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": machine.transformers.__version__,
            "checks": self.checks,
            "tables": self.tables,
            "problems": self.problems,
        }
        (folder / "gpu.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        (folder / "gpu.md").write_text("\n".join(self.lines) + "\n", encoding="utf-8")


def read_arguments(argv):
    parser = argparse.ArgumentParser(prog="make gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--device", help="which device; by default the accelerator that torch finds")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="write gpu.md and gpu.json there")
    parser.add_argument("--quick", action="store_true", help="fewer rounds, one batch size, nothing compiled at size")
    parser.add_argument(
        "--only", nargs="+", default=[], choices=["checks", *GROUPS], help="leave out what is not named"
    )
    parser.add_argument("--tiny", action="store_true", help="tiny models: only whether this program runs")
    parser.add_argument("--minutes", type=float, default=9.5, help="begin nothing that might take longer in all")
    parser.add_argument("--child", choices=["checks", "tables"], help=argparse.SUPPRESS)
    parser.add_argument("names", nargs="*", help="these checks only (parts of their names)")
    return parser.parse_args(argv)


def main(argv):
    arguments = read_arguments(argv)
    if arguments.child:
        return be_child(arguments)
    try:
        device = read_device(arguments.device)
    except PonderingError as error:
        say(f"gpu: error: {error}")
        return 2
    if device.type == "cpu" and not arguments.tiny:
        say(
            "gpu: error: torch finds no GPU here (no CUDA, MPS, XPU): run this on a machine that has one, or with "
            "--device cpu --tiny to see that it runs"
        )
        return 2
    start = time.monotonic()
    arguments.device = str(device)
    run = Run(arguments, machine.described(device))
    say(f"gpu: {run.where}")
    parts = arguments.only or ["checks", *GROUPS]
    if arguments.quick and not arguments.only:
        parts.remove("compiled")
    if "checks" in parts:
        names = all_checks()
        run.run_checks([n for n in names if not arguments.names or any(part in n for part in arguments.names)])
    if arguments.output:
        run.write(arguments.output)
    groups = GROUPS
    if arguments.tiny and not arguments.only:  # one process starts sooner than three
        groups = {parts[-1]: (tuple(costs.TABLES), 600)}
    for group, (tables, seconds) in groups.items():
        if group not in parts:
            continue
        left = 60 * arguments.minutes - (time.monotonic() - start)
        if left < 30:
            run.problem(f"tables {', '.join(tables)}: no time left")
            continue
        say(f"gpu: measuring {', '.join(tables)}")
        seconds = min(seconds, left)
        for name, why in Child(arguments, "tables", tables, seconds, seconds, run.table_row).run().lost:
            run.problem(f"table {name}: {why}")
        if arguments.output:
            run.write(arguments.output)
    failed = len(run.problems)
    run.put(f"\n{failed} problems" if failed else "\nAll is well.")
    for text in run.problems:
        run.put(f"- {text}")
    if arguments.output:
        run.write(arguments.output)
    say(f"gpu: done in {time.monotonic() - start:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
