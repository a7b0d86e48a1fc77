"""A process that talks to the tests' Hub: HF_ENDPOINT is read when huggingface_hub is imported, so it needs its own.

It stays alive and takes one piece of Python after another, so that a module of tests imports torch once.
"""

import json
import os
import sys
from contextlib import contextmanager

import hub_server
import prepared
from elsewhere import WITHOUT_PONDER_HF


WORKER = """
import contextlib, io, json, os, sys, time, traceback

waits = []
time.sleep = waits.append  # the client's own retries, without the waiting
replies = os.fdopen(os.dup(1), "w")
for line in sys.stdin:
    order = json.loads(line)
    os.environ.pop("HF_TOKEN", None)
    if order["token"]:
        os.environ["HF_TOKEN"] = order["token"]
    waits.clear()
    result = None
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            names = {"argv": order["argv"]}
            exec(order["program"], names)
            result = names.get("result")
        except BaseException:
            traceback.print_exc()
            result = "raised"
    reply = {"result": result, "out": out.getvalue(), "err": err.getvalue(), "waits": waits}
    print(json.dumps(reply), file=replies, flush=True)
"""
COMMAND = "from ponder_hf.cli import main\nresult = main(argv)"


class Client:
    """The other process. token: its HF_TOKEN; folder: where it runs; packages: a folder with more of them."""

    def __init__(self, hub, folder, without_ponder_hf=False, packages=None, token=hub_server.WRITER, **variables):
        self.token, self.folder = token, folder
        self.home = folder / "home"
        program = (WITHOUT_PONDER_HF if without_ponder_hf else "") + WORKER
        if packages is not None:
            program = f"import sys\nsys.path.append({str(packages)!r})\n{program}"
        words = [*(["-I"] if without_ponder_hf else []), "-W", "ignore", "-c", program]
        given, self.orders = os.pipe()
        self.replies, answered = os.pipe()
        variables = environment(hub, self.home) | variables
        self.process = prepared.Process([sys.executable, *words], answered, 2, given, folder, variables)
        os.close(given)
        os.close(answered)
        self.orders = os.fdopen(self.orders, "w", encoding="utf-8")
        self.replies = os.fdopen(self.replies, encoding="utf-8")

    def python(self, program, *argv, token=None):
        """Run Python there. Returns its variable `result`, "out", "err", and "waits", the seconds it would wait."""
        token = self.token if token is None else token or None  # False: none
        order = {"program": program, "argv": [str(word) for word in argv], "token": token}
        print(json.dumps(order), file=self.orders, flush=True)
        line = self.replies.readline()
        assert line, "the client's process has ended"
        return json.loads(line)

    def done(self, program, *argv, **settings):
        """As `python`, which must not raise. Returns its `result`."""
        reply = self.python(program, *argv, **settings)
        assert reply["result"] != "raised", reply["err"]
        return reply["result"]

    def command(self, *argv, **settings):
        """Run one `ponder-hf` command line. Returns (exit code, standard output, standard error)."""
        reply = self.python(COMMAND, *argv, **settings)
        return reply["result"], reply["out"], reply["err"]

    def json(self, *argv, **settings):
        """Run a command line with --json, which must end well. Returns the object."""
        code, out, err = self.command(*argv, "--json", **settings)
        assert code == 0, err
        return json.loads(out)

    def refused(self, *argv, code=2, **settings):
        """Run a command line that must be refused. Returns its one line on standard error, and that is all it says."""
        found, out, err = self.command(*argv, **settings)
        assert (found, out) == (code, ""), (found, out, err)
        lines = [line for line in err.replace("\r", "\n").splitlines() if line.startswith("ponder-hf: error: ")]
        assert len(lines) == 1, err
        assert "Traceback" not in err
        return lines[0]

    def close(self):
        self.orders.close()
        self.process.wait()
        self.replies.close()


def environment(hub, home):
    """The variables of a process that has this Hub and no other (None: the real one), and a Hugging Face home."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON"))}
    kept |= {"HF_HOME": str(home), "HF_MODULES_CACHE": str(home / "modules"), "OMP_NUM_THREADS": "1"}
    if hub is None:
        return kept
    return kept | {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}


@contextmanager
def connected(hub, folder, **settings):
    """A context that gives a Client of this Hub."""
    client = Client(hub, folder, **settings)
    try:
        yield client
    finally:
        client.close()
