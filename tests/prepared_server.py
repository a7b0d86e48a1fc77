"""The process that has imported torch and forks: each fork becomes a program. See prepared.py.

Argument: the number of a socket, over which each request comes as four open files: standard input, output and error of
the program, and a connection. Over this come the words, folder and variables, as a line of JSON; two lines go back:
the number of the process, and in the end its exit code.
"""

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import sys
import threading
import types
import warnings


# What most programs import sooner or later. None of them reads what a test sets, but for the number of threads.
PREPARED = """
    torch torch._dynamo torch.distributed.checkpoint torch.distributed.fsdp torch.distributed.tensor torch.export
    torch.fx.experimental.symbolic_shapes torch.utils.checkpoint torch.utils.data torch.utils._sympy.functions
    numpy pandas pyarrow scipy.optimize scipy.stats sympy PIL.Image httpx jinja2 requests rich safetensors.torch
    tokenizers tqdm.auto yaml
""".split()
OPTIONS_WITH_A_VALUE = ("-W", "-c", "-m")


def serve(descriptor):
    """Fork once for each request, until whoever asks is gone. Returns in the forks, with the request."""
    control = socket.socket(fileno=descriptor)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # those that watch the programs leave no zombies
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, 1, 4)
        if not message:
            os._exit(0)
        if os.fork() == 0:
            break
        for each in descriptors:
            os.close(each)
    control.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    *files, connection = descriptors
    with open(connection, "r+b", buffering=0) as connection:
        request = b""
        while not request.endswith(b"\n"):
            request += connection.read(1 << 16) or os._exit(1)
        pid = os.fork()
        if pid != 0:  # watches the program
            for each in (*files, 0, 1, 2):
                os.close(each)
            connection.write(b"%d\n" % pid)
            connection.write(b"%d\n" % os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
            os._exit(0)
    for number, each in enumerate(files):
        os.dup2(each, number)
        os.close(each)
    return json.loads(request)


def become(words, cwd, env, filters):
    """What the interpreter does at its start with these words. Returns a function that runs the program.

    filters: those of warnings, (what the imports added, what the interpreter has).
    """
    import numpy
    import torch

    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    numpy.random.seed()
    torch.set_num_threads(int(env.get("OMP_NUM_THREADS", torch.get_num_threads())))
    if any(name.startswith("COVERAGE") for name in env):
        with contextlib.suppress(ImportError):
            import coverage

            coverage.process_startup()
    isolated, code, module, warned, words = False, None, None, [], list(words)
    while words and words[0].startswith("-") and code is module is None:
        option = words.pop(0)
        value = words.pop(0) if option in OPTIONS_WITH_A_VALUE else None
        if option == "-I":
            isolated = True
        elif option == "-W":
            warned.append(value)
        elif option == "-c":
            code = value
        elif option == "-m":
            module = value
        else:
            raise SystemExit(f"prepared.py does not know the option {option}")
    sys.warnoptions[:] = warned
    warnings.filters[:] = filters[1]
    warnings._processoptions(warned)
    warnings.filters[:0] = filters[0]
    if not isolated:
        first = os.path.dirname(os.path.abspath(words[0])) if code is module is None else "" if code else cwd
        more = env.get("PYTHONPATH")
        sys.path[:0] = [first, *(map(os.path.abspath, more.split(os.pathsep)) if more else ())]
    sys.modules["__main__"] = types.ModuleType("__main__")
    if code is not None:
        sys.argv = ["-c", *words]
        return lambda: exec(compile(code, "<string>", "exec"), sys.modules["__main__"].__dict__)
    if module is not None:
        sys.argv = ["-m", *words]
        return lambda: runpy.run_module(module, run_name="__main__", alter_sys=True)
    sys.argv = words
    return lambda: runpy.run_path(words[0], run_name="__main__")


def run(program):
    """Run a program and end the process as the interpreter does, but do not take it to pieces: that takes seconds."""
    code = 0
    try:
        program()
    except SystemExit as exit:
        code = exit.code
        if code is not None and not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit((code or 0) & 0xFF)


if __name__ == "__main__":
    usual = list(warnings.filters)
    for name in PREPARED:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    added = [each for each in warnings.filters if each not in usual]
    gc.collect()
    gc.freeze()  # what is there is nothing that a collection in a fork should look at
    run(become(**serve(int(sys.argv[1])), filters=(added, usual)))
