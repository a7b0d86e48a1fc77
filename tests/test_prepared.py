"""A program in a prepared process sees what it sees in one that starts from nothing."""

import subprocess
import sys

import prepared
import pytest


PROGRAMS = {
    "words": "import os, sys; print(sys.argv, os.getcwd(), sys.path, sys.warnoptions, __name__, sys.stdin.read())",
    "variables": "import os; print(sorted(os.environ.items()))",
    "filters": "import warnings; warnings.warn('old', DeprecationWarning); warnings.warn('new')",
    "an error": "raise SystemExit(3)",
    "a message": "raise SystemExit('wrong')",
    "a signal": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    "what is done at the end": "import atexit; atexit.register(print, 'end'); print('begin', end=' ')",
    "a thread that goes on": "import threading; threading.Timer(0.1, print, ['later']).start()",
    "libraries": "import sys; print({'transformers', 'huggingface_hub', 'ponder_hf', 'datasets'} & set(sys.modules))",
}


@pytest.mark.parametrize("options", [[], ["-I", "-W", "ignore"], ["-W", "error::UserWarning"]], ids=" ".join)
@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
def test_as_in_a_process_that_starts_from_nothing(tmp_path, program, options):
    command = [sys.executable, *options, "-c", program, "one", "another"]
    settings = {
        "cwd": tmp_path,
        "env": {"PYTHONPATH": "somewhere:else", "OMP_NUM_THREADS": "1", "LC_CTYPE": "C.UTF-8"},
    }
    found = prepared.run(command, **settings)
    expected = subprocess.run(command, **settings, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert found.returncode == expected.returncode
    assert found.stdout == expected.stdout
    assert found.stderr.splitlines()[-1:] == expected.stderr.splitlines()[-1:]


def test_modules_and_files(tmp_path):
    (tmp_path / "program.py").write_text("import sys\nprint(__name__, sys.argv[1:], sys.path[0])\n")
    for words in (["-m", "program", "a"], ["program.py", "a"], [tmp_path / "program.py", "a"]):
        command = [sys.executable, *words]
        expected = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert prepared.run(command, cwd=tmp_path).stdout == expected.stdout != ""


def test_two_that_find_each_other_and_one_that_fails(tmp_path):
    program = (
        "import os, time; rank = os.environ['RANK']; time.sleep(600 * int(rank)); raise SystemExit('rank ' + rank)"
    )
    with pytest.raises(AssertionError, match="rank 0"):
        prepared.run_two([sys.executable, "-c", program])


def test_patience_has_an_end():
    with pytest.raises(subprocess.TimeoutExpired):
        prepared.run([sys.executable, "-c", "import time; time.sleep(600)"], timeout=0.2)


def test_another_interpreter_is_refused():
    with pytest.raises(ValueError, match="is not this interpreter"):
        prepared.run(["/usr/bin/python", "-c", ""])
