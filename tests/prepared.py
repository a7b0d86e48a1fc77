"""Programs in processes of their own that need not import torch: one process did, and each program is a fork of it.

Torch and what comes with it take two thirds of the time in which a program starts here. Hugging Face's libraries and
ponder_hf are imported by the program itself, so that all they read when they are imported (HF_HOME, HF_ENDPOINT) is
its own. Not for tests of what a program imports, of memory, or of hash seeds: all forks have those of one process.
The one process is prepared_server.py.
"""

import atexit
import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

from patience import PATIENCE


SERVER = Path(__file__).with_name("prepared_server.py")


class Process:
    """A program that runs. command: as for subprocess, beginning with sys.executable; then -I, -W, -c, -m or a file.

    stdin (by default there is none), stdout and stderr are open files or descriptors. `wait` gives the exit code.
    """

    def __init__(self, command, stdout, stderr, stdin=None, cwd=None, env=None):
        self.args, self.returncode = [os.fspath(word) for word in command], None
        if self.args.pop(0) != sys.executable:
            raise ValueError(f"{command[0]} is not this interpreter, which is the one that is prepared")
        self.connection, theirs = socket.socketpair()
        with theirs, open(os.devnull, "rb") as nothing:
            files = (nothing if stdin is None else stdin, stdout, stderr, theirs)
            descriptors = [each if isinstance(each, int) else each.fileno() for each in files]
            socket.send_fds(_server(), [b"1"], descriptors)
        request = {"words": self.args, "cwd": os.fspath(cwd or os.getcwd()), "env": dict(env or os.environ)}
        self._answers = self.connection.makefile("rw", encoding="utf-8")
        print(json.dumps(request), file=self._answers, flush=True)
        self.pid = int(self._answers.readline())

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def poll(self):
        """The exit code, or None: it runs."""
        if self.returncode is None and select.select([self.connection], [], [], 0)[0]:
            self.wait()
        return self.returncode

    def wait(self, timeout=PATIENCE):
        if self.returncode is None:
            self.connection.settimeout(timeout)
            try:
                self.returncode = int(self._answers.readline())
            except TimeoutError:
                raise subprocess.TimeoutExpired(self.args, timeout) from None
            self._answers.close()
            self.connection.close()
        return self.returncode


def run(command, cwd=None, env=None, timeout=PATIENCE):
    """As subprocess.run with text of both streams captured, and nothing on standard input."""
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        process = Process(command, output, errors, cwd=cwd, env=env)
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        texts = []
        for file in (output, errors):
            file.seek(0)
            texts.append(file.read().decode("utf-8").replace("\r\n", "\n"))
    return subprocess.CompletedProcess(process.args, code, *texts)


def run_two(command, env=None):
    """A program in two processes, with the variables by which torch.distributed.run lets them find each other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    together = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    together |= {"OMP_NUM_THREADS": "1"}
    processes, files = [], []
    with contextlib.ExitStack() as stack:
        for rank in "01":
            variables = {**(env or os.environ), **together, "RANK": rank, "LOCAL_RANK": rank}
            files.append(stack.enter_context(tempfile.TemporaryFile()))
            processes.append(Process(command, files[-1], files[-1], env=variables))
        waiting = list(processes)
        while waiting:
            ended, _, _ = select.select([process.connection for process in waiting], [], [], PATIENCE)
            if not ended or any(process.wait() for process in waiting if process.connection in ended):
                for process in processes:  # the other one would wait for ever
                    process.kill()
            waiting = [process for process in waiting if process.returncode is None]
        said = []
        for file in files:
            file.seek(0)
            said.append(file.read().decode("utf-8"))
    assert [process.returncode for process in processes] == [0, 0], "\n".join(text[-4000:] for text in said)


_servers = []


def _server():
    """The socket of the process that forks. It starts at the first call and ends with this one."""
    if not _servers:
        ours, theirs = socket.socketpair()
        variables = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE")}
        with theirs:
            subprocess.Popen(
                [sys.executable, "-I", SERVER, str(theirs.fileno())],
                env=variables,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
            )
        _servers.append(ours)
        atexit.register(ours.close)
    return _servers[0]
