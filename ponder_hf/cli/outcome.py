"""How a command that did not end well says so: one line on standard error, and an exit code."""

import contextlib
import errno
import io
import os
import re
import sys
import traceback

from .parser import UsageError


UNEXPECTED, BAD_INPUT, INTERRUPTED = 1, 2, 130
DEBUG = "PONDER_HF_DEBUG"
_LONGEST = 1200
_TOKEN = re.compile(r"hf_[A-Za-z0-9]{20,}")


class OutputClosed(OSError):
    """Something was printed on a standard output that is closed (`>&-`)."""


class _ClosedOutput(io.TextIOBase):
    def write(self, text):
        raise OutputClosed("standard output is closed: what was to be printed is lost")


def open_closed_streams() -> None:
    """Put something in the place of standard streams that are closed, where Python has None.

    What is printed to None goes to standard output: messages would stand among results.
    """
    if None not in (sys.stdin, sys.stdout, sys.stderr):
        return
    number = 0
    while number <= 2:  # so that no file which is opened later is taken for a standard stream
        number = os.open(os.devnull, os.O_RDWR)
    os.close(number)
    if sys.stdin is None:
        sys.stdin = os.fdopen(os.open(os.devnull, os.O_RDONLY), encoding="utf-8")
    if sys.stdout is None:
        sys.stdout = _ClosedOutput()
    if sys.stderr is None:
        sys.stderr = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w", encoding="utf-8")


def is_debugging() -> bool:
    """Whether the user wants to see tracebacks and what the libraries log."""
    return os.environ.get(DEBUG, "") not in ("", "0")


def is_first_process() -> bool:
    """Whether this process speaks for all that torchrun or `accelerate launch` started; true where it is alone."""
    return os.environ.get("RANK", "0") == "0"


def warn(message: str) -> None:
    """Say what may not be as the user means it, and go on."""
    if is_first_process():
        print(f"ponder-hf: warning: {_readable(without_token(message))}", file=sys.stderr, flush=True)


def failed(error: Exception) -> int:
    """Say why a command failed: what is wrong with its input, what could not be finished, or what nobody expected."""
    _traceback_if_debugging()
    if _is(error, "errors", "NotFinished"):
        return _end(UNEXPECTED, f"error: {' '.join(str(error).split())}")
    if isinstance(error, UsageError) or _is(error, "modeling.pondering_errors", "PonderingError"):
        return _end(BAD_INPUT, f"error: {' '.join(str(error).split())}")
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:  # whoever asked for it first
        return _end(BAD_INPUT, f"error: {error.filename or 'a name'} is too long for the name of a file or a folder")
    if isinstance(error, PermissionError) and error.filename is not None:  # likewise
        return _end(BAD_INPUT, f"error: cannot access {error.filename}: {error.strerror}")
    if isinstance(error, OutputClosed):
        return _end(UNEXPECTED, f"error: {error}")
    if isinstance(error, BrokenPipeError):  # the reader of our output is gone (`| head`): nobody is left to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return UNEXPECTED
    hint = "" if is_debugging() else f" ({DEBUG}=1 shows the traceback)"
    return _end(UNEXPECTED, f"error: unexpected {type(error).__name__}: {_first_line(error)}{hint}")


def interrupted(error: KeyboardInterrupt) -> int:
    """Say that the user stopped it, and what the error says on how to go on."""
    _traceback_if_debugging()
    return _end(INTERRUPTED, f"interrupted; {error}" if str(error) else "interrupted")


def _is(error, module, name):
    """Whether it is an error of ours. A class that nobody has imported yet has not been raised."""
    return isinstance(error, getattr(sys.modules.get(f"ponder_hf.{module}"), name, ()))


def _first_line(error):
    try:
        from ponder_hf.errors import first_line
    except Exception:  # what failed is the import of the library
        return " ".join(str(error).split())
    return first_line(error)


def _end(code, message):
    # A progress bar that broke off would share its line with the message.
    for bar in list(getattr(getattr(sys.modules.get("tqdm"), "tqdm", None), "_instances", ())):
        bar.close()
    print(f"ponder-hf: {_readable(without_token(message))}", file=sys.stderr, flush=True)
    return code


def _readable(message):
    """What a terminal shows as it is, whatever names and values it has brought; cut in the middle if it is long."""
    if len(message) > _LONGEST:
        message = f"{message[: _LONGEST * 2 // 3]} ... {message[-_LONGEST // 3 :]}"
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in message)


def _traceback_if_debugging():
    if is_debugging():
        print(without_token(traceback.format_exc()), file=sys.stderr)


def without_token(text: str) -> str:
    """The text with every access token of the Hub made unreadable, whoever wrote it there."""
    from huggingface_hub import get_token

    token = None
    with contextlib.suppress(OSError):  # its file may not be read
        token = get_token()
    if token:
        text = text.replace(token, "(token)")
    return _TOKEN.sub("(token)", text)
