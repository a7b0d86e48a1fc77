"""Measure what is missing of some tables, one run after another.

    python examples/evidence/run.py gate settings --texts FOLDER

Results are small JSON files in a folder; `report.py` makes tables and plots of them. It may be killed at any time:
started again, it goes on from the last checkpoint, about a minute back, and comes to the same numbers.
Small models leave most of a GPU idle: with `--device cuda --at-once 8` so many runs are trained side by side.
"""

import argparse
import functools
import gc
import json
import sys
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
    parser.add_argument("--at-once", type=int, default=1, metavar="N", help="runs side by side on one GPU")
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
        else:  # killed after its result was written
            (work / f"{run.name}.checkpoint").unlink(missing_ok=True)
    if arguments.at_once > 1 and (arguments.device == "cpu" or any(run.dropout for run in missing)):
        raise SystemExit("--at-once needs --device cuda, and runs without dropout: they share one random state")
    torch.set_num_threads(arguments.threads)
    gc.collect()
    gc.freeze()  # capturing a step collects garbage, which need not look through all that was imported
    measure(missing, arguments, work)


def measure(runs: list[Run], arguments: argparse.Namespace, work: Path) -> None:
    """Measure runs, `arguments.at_once` of them side by side in turns, and write their results and weights."""
    free = [None if arguments.device == "cpu" else torch.cuda.Stream() for _ in range(arguments.at_once)]
    waiting, active = list(runs), []
    while waiting or active:
        run = next_of(waiting, active) if free else None
        if run is not None:
            say = functools.partial(print, f"[{len(runs) - len(waiting)}/{len(runs)}]", file=sys.stderr, flush=True)
            stream = free.pop()
            with torch.cuda.stream(stream):
                training = Training(run, _text(run.text, arguments.texts, run.vocabulary), work, arguments.device)
            active.append((training, training.train(say=say), stream))
        for each in list(active):
            training, steps, stream = each
            with torch.cuda.stream(stream):
                if next(steps, "end") != "end":
                    continue
                write_result(arguments.results / f"{training.run.name}.json", training.result())
            training.checkpoint.unlink()
            active.remove(each)
            free.append(stream)


def next_of(waiting: list[Run], active: list[tuple]) -> Run | None:
    """Take the next run from those that wait, if there is one whose base is there."""
    missing = {run.name for run in waiting} | {training.run.name for training, *_ in active}
    for number, run in enumerate(waiting):
        if run.base is None or run.base.name not in missing:
            return waiting.pop(number)
    return None


@functools.cache
def _text(*arguments):
    return read_text(*arguments)


def _is_needed(base: Run, runs: list[Run], results: Path) -> bool:
    """Whether a run that is missing goes on from this one."""
    return any(run.base == base and not is_done(run, results) for run in runs)


if __name__ == "__main__":
    main()
