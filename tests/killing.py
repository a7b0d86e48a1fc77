"""Run something again and again in children, each with a fault at another moment. Called by test_faults.py.

Reads jobs, each a line of JSON: template, work (folders), run, again (what is run afterwards), kinds, num_faults (of
each kind), and before, a program that is run here, so that no child need do it. What is run is the words of a command
line, or a program, which finds the names of `before`; NUMBER in it becomes the number of the fault. For each of them a
copy of the template becomes the current folder of a child, with its temporary files in `tmp`. work/N/after is what the
child left of it, work/N/again what the second run made of that. The answer is one line of JSON: a list of how they
ended, first of a whole run without a fault.

Moments are events that change a file or folder, counted by Python's audit hook, and requests to a Hub: before event N
the child is killed (`kill`), from event N on nothing can be written (`full`), or nothing changed at all (`read-only`).
With `time` the child is killed after a random share of the time that a whole run took. Kind `count` makes no fault.
"""

import errno
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback


CREATING = {"os.mkdir", "os.link", "os.symlink", "os.truncate"}
CHANGING = CREATING | {"os.rename", "os.remove", "os.rmdir", "os.chmod"}
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
REQUEST = "request to a Hub"


class Hook:
    """Counts the events below a folder and makes the fault."""

    def __init__(self, folder: str, kind: str, moment: float) -> None:
        self.folder, self.kind, self.moment, self.count = os.path.realpath(folder), kind, moment, 0

    def __call__(self, event: str, arguments: tuple) -> None:
        if event == REQUEST:
            self.count += 1
            if self.kind == "kill" and self.count >= self.moment:
                os.kill(os.getpid(), signal.SIGKILL)
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


def run(what: list[str] | str) -> int:
    """Run a command line or a program. Returns the exit code."""
    if not isinstance(what, str):
        return main(what)
    try:
        exec(what, names)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def child(folder: str, what: list[str] | str, kind: str, moment: float) -> dict:
    """Run something in a child. How it ended: `code` (negative: a signal), `seconds`, `events`, `said`."""
    log = folder + ".log"
    open(log, "w", encoding="utf-8").close()  # a child may be killed before it has come so far
    os.makedirs(os.path.join(folder, "tmp"), exist_ok=True)
    start, pid = time.monotonic(), os.fork()
    if pid == 0:
        os.chdir(folder)
        tempfile.tempdir = os.path.join(folder, "tmp")
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        hook = Hook(folder, kind, moment)
        sys.addaudithook(hook)
        code = run(what)
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


def moments(job: dict, whole: dict) -> list[list]:
    """The faults, with numbers for moments: `job["num_faults"]` of each kind over all events of a whole run."""
    chance, events, found = random.Random(job["work"]), whole["events"], []
    for kind in job["kinds"]:
        some = set(chance.sample(range(1, events + 1), min(job["num_faults"], events)))
        if job["num_faults"] > 2:
            some |= {1, events}
        if kind == "time":
            found += [[kind, chance.random() * whole["seconds"]] for _ in range(job["num_faults"])]
        else:
            found += [[kind, each] for each in ([1] if kind == "read-only" else sorted(some))]
    return found


def numbered(what: list[str] | str, number: object) -> list[str] | str:
    """The same with the number in it."""
    if isinstance(what, str):
        return what.replace("NUMBER", str(number))
    return [word.replace("NUMBER", str(number)) for word in what]


def done(job: dict) -> list[dict]:
    """How a job ended."""
    try:
        exec(job["before"], names)
    except BaseException:
        return [{"code": 1, "said": traceback.format_exc().splitlines()}]
    whole = os.path.join(job["work"], "whole")
    shutil.copytree(job["template"], whole, symlinks=True)
    endings = [child(whole, numbered(job["run"], "whole"), "count", 0)]
    if endings[0]["code"]:
        return endings
    for number, (kind, moment) in enumerate(moments(job, endings[0])):
        place = os.path.join(job["work"], str(number))
        folder, again = os.path.join(place, "after"), os.path.join(place, "again")
        shutil.copytree(job["template"], folder, symlinks=True)
        first = child(folder, numbered(job["run"], number), kind, moment)
        shutil.copytree(folder, again, symlinks=True)
        second = child(again, numbered(job["again"], number), "count", 0)
        endings.append({"kind": kind, "moment": moment, "first": first, "second": second})
    return endings


if __name__ == "__main__":
    answers, sys.stdout, names = sys.stdout, sys.stderr, {"__name__": "a program"}
    import matplotlib.pyplot  # noqa: F401 (which children then need not import)
    import torch
    import torch.distributed.checkpoint
    from huggingface_hub import get_session

    import ponder_hf.cli.running
    import ponder_hf.conversion
    import ponder_hf.demo
    import ponder_hf.evaluation
    import ponder_hf.hub
    import ponder_hf.lenses
    import ponder_hf.training.run  # noqa: F401
    from ponder_hf.cli import main

    client_class = type(get_session())
    send = client_class.send

    def audited(client, request, **settings):
        sys.audit(REQUEST, request.method)
        return send(client, request, **settings)

    client_class.send = audited
    torch.set_num_threads(1)
    for line in sys.stdin:
        print(json.dumps(done(json.loads(line))), file=answers, flush=True)
