"""Run a command: check transformers, keep what libraries print out of the way, and speak of flags.

Standard error is for one clear line, standard output for the result. Importing this imports torch and transformers.
"""

import argparse
import contextlib
import json
import logging
import sys
import warnings
from collections.abc import Iterator
from typing import TextIO

import transformers
from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars

from ponder_hf import PonderingError
from ponder_hf.modeling.pondering_errors import check_transformers

from .outcome import is_debugging, is_first_process, warn
from .words import in_flags


_LOGGERS = ("transformers", "huggingface_hub", "torch", "datasets")


def run_command(args: argparse.Namespace) -> None:
    """Run the command that was parsed, and print what it gives back where --json asks for it."""
    if args.command != "doctor":  # which reports it among other things
        check_transformers()
    with quiet_libraries(), _spoken_in_flags(args):
        if not args.json:
            args.run(args)
            return
        with standard_output_for_json() as output:
            answer = json.dumps(args.run(args) or {})
            if is_first_process():
                print(answer, file=output)


@contextlib.contextmanager
def _spoken_in_flags(args):
    """A context in which errors, warnings of ponder_hf, and what an interruption says to do next speak of flags.

    Each warning that ponder_hf logs is one line on standard error.
    """
    logger, handler = logging.getLogger("ponder_hf"), logging.Handler(logging.WARNING)
    handler.emit = lambda record: warn(in_flags(" ".join(record.getMessage().split()), args))
    logger.addHandler(handler)
    try:
        yield
    except (PonderingError, KeyboardInterrupt) as error:
        raise type(error)(in_flags(str(error), args)) from error
    finally:
        logger.removeHandler(handler)


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """A context in which libraries log nothing and warn nobody on standard error, unless the user is debugging.

    Handlers and filters that others installed (a test suite's) still see everything. Progress bars of downloads and
    uploads stay; the one of loading weights goes, for it is over at once.
    """
    if is_debugging():
        yield
        return
    handlers = {name: logging.getLogger(name).handlers for name in _LOGGERS}
    bars = transformers.utils.logging.is_progress_bar_enabled()
    for name, installed in handlers.items():
        # Without any handler Python would print the message itself.
        logging.getLogger(name).handlers = [logging.NullHandler(), *filter(_is_silent, installed)]
    downloads = not are_progress_bars_disabled()
    transformers.utils.logging.disable_progress_bar()  # which switches those of the Hub off, too
    if downloads:
        enable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_nothing
            yield
    finally:
        for name, installed in handlers.items():
            logging.getLogger(name).handlers = installed
        if bars:
            transformers.utils.logging.enable_progress_bar()


@contextlib.contextmanager
def standard_output_for_json() -> Iterator[TextIO]:
    """A context that gives the real standard output, while whatever else is printed goes to standard error."""
    output = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        yield output


def _is_silent(handler):
    return type(handler) is not logging.StreamHandler


def _show_nothing(*args, **kwargs):
    pass
