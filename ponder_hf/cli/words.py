"""The library's words for what it is given become the command line's: `block_size` is --block-size.

The library never speaks of flags. Its errors and warnings name what Python users write, between backticks: a name, or
a name with its value.
"""

import argparse
import re

from .flags import FIELDS
from .generate import PONDERING


# `name`, `name=value`, `name="value"`; with a number also without backticks.
_WORDS = re.compile(r"`(?P<name>[a-z]\w*)(?:=[\"']?(?P<value>[^`\"']*)[\"']?)?`|\b(?P<bare>[a-z]\w*)=(?P<number>\d+)")
# `ponder_hf.convert` or `ponder_hf.convert('a', DEST)`.
_CALLS = re.compile(r"`ponder_hf\.(?P<command>[a-z]+)(?:\((?P<arguments>[^`]*)\))?`")
# What config.json and generation_config.json may say as well as a flag.
_IN_FILES = {*FIELDS, *PONDERING}


def in_flags(message: str, args: argparse.Namespace) -> str:
    """The message with every name that is a flag of this command as that flag, and calls of ponder_hf as commands.

    Where it names only what a file of a checkpoint may say, and no flag said it here, the error is about that file.
    """
    message = _CALLS.sub(_as_command, message)
    shown: dict[str, str] = {}
    for action in args.parser._actions:
        shown.setdefault(action.dest, action.option_strings[0] if action.option_strings else action.metavar)
    names = {found["name"] or found["bare"] for found in _WORDS.finditer(message)} & set(shown)
    if names <= _IN_FILES and all(getattr(args, name, None) is None for name in names):
        return message

    def translated(found: re.Match) -> str:
        name, value = found["name"] or found["bare"], found["value"] or found["number"]
        if name not in shown:
            return found[0]
        return shown[name] if value in (None, "True") else f"{shown[name]} {value}"

    return _WORDS.sub(translated, message)


def _as_command(call: re.Match) -> str:
    """`ponder_hf.convert('a', DEST)` as `ponder-hf convert a DEST`."""
    arguments = [argument.strip().strip("'\"") for argument in (call["arguments"] or "").split(",")]
    return f"`{' '.join(['ponder-hf', call['command'], *arguments]).strip()}`"
