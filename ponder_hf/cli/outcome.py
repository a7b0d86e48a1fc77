"""How a command that did not end well says so: one line on standard error, and an exit code."""

import os
import re
import sys
import traceback

from huggingface_hub import get_token
from tqdm import tqdm

from ponder_hf.errors import first_line


UNEXPECTED, BAD_INPUT, INTERRUPTED = 1, 2, 130
DEBUG = "PONDER_HF_DEBUG"
_TOKEN = re.compile(r"hf_[A-Za-z0-9]{20,}")


def is_debugging():
    """Whether the user wants to see tracebacks and what the libraries log."""
    return os.environ.get(DEBUG, "") not in ("", "0")


def is_first_process():
    """Whether this process speaks for all that torchrun or `accelerate launch` started; true where it is alone."""
    return os.environ.get("RANK", "0") == "0"


def bad_input(error):
    """Say what is wrong with the input and what to do."""
    _traceback_if_debugging()
    return _end(BAD_INPUT, f"error: {' '.join(str(error).split())}")


def warn(message):
    """Say what may not be as the user means it, and go on."""
    if is_first_process():
        print(f"ponder-hf: warning: {without_token(message)}", file=sys.stderr, flush=True)


def stopped(error):
    """Say why it could not be finished although the input seemed fine."""
    _traceback_if_debugging()
    return _end(UNEXPECTED, f"error: {' '.join(str(error).split())}")


def unexpected(error):
    """Say what went wrong although the input seemed fine, and how to see more."""
    if isinstance(error, BrokenPipeError):  # the reader of our output is gone (`| head`): nobody is left to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return UNEXPECTED
    _traceback_if_debugging()
    hint = "" if is_debugging() else f" ({DEBUG}=1 shows the traceback)"
    return _end(UNEXPECTED, f"error: unexpected {type(error).__name__}: {first_line(error)}{hint}")


def interrupted(error=None):
    """Say that the user stopped it, and what `error`, a KeyboardInterrupt, says on how to go on."""
    _traceback_if_debugging()
    hint = "" if error is None else str(error)
    return _end(INTERRUPTED, f"interrupted; {hint}" if hint else "interrupted")


def _end(code, message):
    for bar in list(getattr(tqdm, "_instances", ())):  # one that broke off would share its line with the message
        bar.close()
    print(f"ponder-hf: {without_token(message)}", file=sys.stderr, flush=True)
    return code


def _traceback_if_debugging():
    if is_debugging():
        print(without_token(traceback.format_exc()), file=sys.stderr)


def without_token(text):
    """The text with every access token of the Hub made unreadable, whoever wrote it there."""
    token = get_token()
    if token:
        text = text.replace(token, "(token)")
    return _TOKEN.sub("(token)", text)
