"""Run a command line again and again in children, each with a fault at another moment. Called by test_faults.py.

`python killing.py JSON` with template, work (folders), arguments, again (what is run afterwards), kinds and num_faults
(of each kind). For each fault a copy of the template becomes the current folder of a child. work/N/after is what the
child left of it, work/N/again what the second run made of that, and one line of JSON says how both ended.

Moments are events that change a file or a folder, counted by Python's audit hook: before event N the child is killed
(`kill`), from event N on nothing can be written (`full`), or nothing changed at all (`read-only`). With `time` the
child is killed after a random share of the time that a whole run took. Kind `count` makes no fault.
"""

import errno
import json
import os
import random
import shutil
import signal
import sys
import time


CREATING = {"os.mkdir", "os.link", "os.symlink", "os.truncate"}
CHANGING = CREATING | {"os.rename", "os.remove", "os.rmdir", "os.chmod"}
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


class Hook:
    """Counts the events below a folder and makes the fault."""

    def __init__(self, folder: str, kind: str, moment: float) -> None:
        self.folder, self.kind, self.moment, self.count = os.path.realpath(folder), kind, moment, 0

    def __call__(self, event: str, arguments: tuple) -> None:
        if event not in CHANGING and event != "open":
            return
        name = arguments[0]
        if isinstance(name, int) or (event == "open" and not arguments[2] & WRITES):
            return
        if not os.path.abspath(os.fsdecode(name)).startswith(self.folder):
            return
        self.count += 1
        if self.count < self.moment or self.kind in ("count", "time"):
            return
        if self.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.kind == "read-only":
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), os.fsdecode(name))
        if event == "open" or event in CREATING:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), os.fsdecode(name))


def child(folder: str, arguments: list[str], kind: str, moment: float) -> dict:
    """Run one command line in a child. How it ended: `code` (negative: a signal), `seconds`, `events`, `said`."""
    log = folder + ".log"
    open(log, "w", encoding="utf-8").close()  # a child may be killed before it has come so far
    start, pid = time.monotonic(), os.fork()
    if pid == 0:
        os.chdir(folder)
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        hook = Hook(folder, kind, moment)
        sys.addaudithook(hook)
        code = main(arguments)
        hook.kind = "count"
        print(f"\nevents {hook.count}", flush=True)
        os._exit(code)
    if kind == "time":
        time.sleep(moment)
        os.kill(pid, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with open(log, encoding="utf-8", errors="replace") as file:
        said = file.read().replace("\r", "\n").splitlines()
    events = int(said.pop().split()[1]) if said and said[-1].startswith("events ") else None
    return {"code": code, "seconds": time.monotonic() - start, "events": events, "said": said}


def moments(job: dict) -> list[list]:
    """The faults, with numbers for moments: `job["num_faults"]` of each kind over all events of a whole run."""
    whole = os.path.join(job["work"], "whole")
    shutil.copytree(job["template"], whole, symlinks=True)
    ended = child(whole, job["arguments"], "count", 0)
    print(json.dumps(ended), flush=True)
    chance, events, found = random.Random(job["work"]), ended["events"], []
    for kind in job["kinds"]:
        some = sorted({1, events, *chance.sample(range(1, events + 1), min(job["num_faults"], events))})
        if kind == "time":
            found += [[kind, chance.random() * ended["seconds"]] for _ in range(job["num_faults"])]
        else:
            found += [[kind, each] for each in ([1] if kind == "read-only" else some)]
    return found


if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    import matplotlib.pyplot  # noqa: F401 (which children then need not import)
    import torch
    import torch.distributed.checkpoint

    import ponder_hf.cli.running
    import ponder_hf.conversion
    import ponder_hf.evaluation
    import ponder_hf.hub
    import ponder_hf.lenses
    import ponder_hf.training.run  # noqa: F401
    from ponder_hf.cli import main

    torch.set_num_threads(1)
    for number, (kind, moment) in enumerate(moments(job)):
        place = os.path.join(job["work"], str(number))
        folder = os.path.join(place, "after")
        shutil.copytree(job["template"], folder, symlinks=True)
        first = child(folder, job["arguments"], kind, moment)
        shutil.copytree(folder, os.path.join(place, "again"), symlinks=True)
        second = child(os.path.join(place, "again"), job["again"], "count", 0)
        print(json.dumps({"kind": kind, "moment": moment, "first": first, "second": second}), flush=True)
