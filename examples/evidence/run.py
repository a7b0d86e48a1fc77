"""Measure what is missing of some tables, one run after another.

    python examples/evidence/run.py gate settings --texts FOLDER

Results are small JSON files in a folder; `report.py` makes tables and plots of them. It may be killed at any time:
started again, it goes on from the last checkpoint, about a minute back, and comes to the same numbers.
On a GPU small models leave most of it idle: `--device cuda --workers 12` measures as many runs at once.
"""

import argparse
import functools
import json
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch
from runs import TABLES, Run
from texts import read_text
from training import Training, write_result


def with_bases(runs: list[Run]) -> list[Run]:
    """These runs, each after the base that it goes on from, none twice."""
    chosen = {}
    for run in runs:
        for each in (run.base, run):
            if each is not None:
                chosen.setdefault(each.name, each)
    return list(chosen.values())


def is_done(run: Run, results: Path) -> bool:
    """Whether there is a result of this very run.

    Raises:
        SystemExit: there is one of another run with this name.
    """
    path = results / f"{run.name}.json"
    if not path.is_file():
        return False
    measured = json.loads(path.read_text(encoding="utf-8"))["run"]
    if with_all_fields(measured) != run.as_json():
        raise SystemExit(f"{path} is of another run than its name means today: remove it to measure again")
    return True


def with_all_fields(measured: dict) -> dict:
    """A run as it stands in a result, with the defaults of fields that came later."""
    base = measured["base"] and with_all_fields(measured["base"])
    return {**Run("", "", 0).as_json(), **measured, "base": base}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tables", nargs="+", choices=TABLES, metavar="TABLE", help=", ".join(TABLES))
    parser.add_argument("--only", default="", metavar="PART", help="only runs with this in their name")
    parser.add_argument("--results", type=Path, default=Path("evidence"), help="folder of the results")
    parser.add_argument("--work", type=Path, help="folder of checkpoints and weights, by default RESULTS/work")
    parser.add_argument("--texts", type=Path, help="folder of the texts; see texts.py")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--device", default="cpu", help="where to compute")
    parser.add_argument("--workers", type=int, default=1, help="runs at once, each in a process of its own")
    parser.add_argument("--list", action="store_true", help="say what is done and what is missing, and do nothing")
    arguments = parser.parse_args(argv)
    work = arguments.work or arguments.results / "work"

    runs = with_bases([run for table in arguments.tables for run in TABLES[table] if arguments.only in run.name])
    missing = []
    for run in runs:
        done = is_done(run, arguments.results)
        if arguments.list:
            print("done   " if done else "missing", run.name)
        elif not done or (not (work / f"{run.name}.weights").is_file() and _is_needed(run, runs, arguments.results)):
            missing.append(run)
    settings = (arguments.results, work, arguments.texts, arguments.threads, arguments.device)
    if arguments.workers == 1:
        for number, run in enumerate(missing, 1):
            measure(run, f"[{number}/{len(missing)}]", *settings)
        return
    # Bases first, since others go on from them; then the longest, so that none is left over at the end.
    bases = [run for run in missing if any(run == other.base for other in missing)]
    others = sorted((run for run in missing if run not in bases), key=work_of, reverse=True)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.workers, mp_context=context) as pool:
        failed = []
        for part in (bases, others):
            tasks = {pool.submit(measure, run, f"[{n}/{len(part)}]", *settings): run for n, run in enumerate(part, 1)}
            for task in as_completed(tasks):
                if task.exception() is not None:
                    failed.append(f"{tasks[task].name}: {task.exception()!r}")
    if failed:
        raise SystemExit("\n".join(failed))


def measure(run: Run, number: str, results: Path, work: Path, texts: Path | None, threads: int, device: str) -> None:
    """Measure one run, and write its result and its weights."""
    torch.set_num_threads(threads)
    say = functools.partial(print, number, file=sys.stderr, flush=True)
    training = Training(run, _text(run.text, texts, run.vocabulary), work, device)
    write_result(results / f"{run.name}.json", training.train(say=say))
    training.checkpoint.unlink()


def work_of(run: Run) -> int:
    """What a run takes, roughly, as passes of a layer over all tokens."""
    return run.steps * run.batch * run.layers * (run.pondering_steps + 1)


@functools.cache
def _text(*arguments):
    return read_text(*arguments)


def _is_needed(base: Run, runs: list[Run], results: Path) -> bool:
    """Whether a run that is missing goes on from this one."""
    return any(run.base == base and not is_done(run, results) for run in runs)


if __name__ == "__main__":
    main()
