"""Keep what libraries print out of the way: standard error is for one clear line, standard output for the result."""

import contextlib
import logging
import sys
import warnings

import transformers
from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars

from .outcome import is_debugging, warn


_LOGGERS = ("transformers", "huggingface_hub", "torch", "datasets")


@contextlib.contextmanager
def quiet_libraries():
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
def standard_output_for_json():
    """A context that gives the real standard output, while whatever else is printed goes to standard error."""
    output = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        yield output


@contextlib.contextmanager
def own_warnings_shown(in_flags):
    """A context in which each warning that ponder_hf logs is one line on standard error, as `in_flags` words it."""
    logger, handler = logging.getLogger("ponder_hf"), logging.Handler(logging.WARNING)
    handler.emit = lambda record: warn(in_flags(" ".join(record.getMessage().split())))
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def _is_silent(handler):
    return type(handler) is not logging.StreamHandler


def _show_nothing(*args, **kwargs):
    pass
