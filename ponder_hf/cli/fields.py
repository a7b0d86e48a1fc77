"""The fields of PonderingConfig as flags, for every command that takes them.

All of it is read off the configuration class, so a new field is a new flag without an edit here.
"""

import inspect
from contextlib import suppress

from ponder_hf import PonderingConfig
from ponder_hf.modeling.configuration_pondering import PONDERING_FIELDS


# The code decides on the one, and training makes the other (`ponder-hf train --draft-heads`).
_NO_FLAGS = ("pondering_format_version", "draft_heads")
FLAG_FIELDS = tuple(name for name in PONDERING_FIELDS if name not in _NO_FLAGS)


def flag_of(name):
    """The flag of a field: pondering_steps is --pondering-steps."""
    return "--" + name.replace("_", "-")


def add_field_flags(parser):
    """Give `parser` a flag for each field. A flag that is not used says nothing, it does not mean the default."""
    group = parser.add_argument_group("pondering")
    meanings = _meanings()
    for name in FLAG_FIELDS:
        default = PONDERING_FIELDS[name][0]
        shown = "null" if default is None else default
        group.add_argument(
            flag_of(name),
            dest=name,
            default=None,
            type=_parse,
            metavar=name.split("_")[-1].upper(),
            help=f"{meanings[name]} Default: {shown}.".replace("%", "%%"),
        )


def given_fields(args):
    """The fields whose flags were used, as a dict."""
    given = {name: getattr(args, name) for name in FLAG_FIELDS if getattr(args, name, None) is not None}
    return {name: _unwrap(name, value) for name, value in given.items()}


class _Null:
    """The value of `--flag null`, which is not the same as no flag."""


def _parse(text):
    # What is not a number or null stays text; the configuration class then says what it wants instead.
    if text == "null":
        return _Null
    for number in (int, float):
        with suppress(ValueError):
            return number(text)
    return text


def _unwrap(name, value):
    if value is _Null:
        return None
    is_number = isinstance(PONDERING_FIELDS[name][0], float) and isinstance(value, int)
    return float(value) if is_number else value


def _meanings():
    """What each field means: the "name: meaning" lines of PonderingConfig's docstring."""
    meanings = {}
    for line in inspect.getdoc(PonderingConfig).splitlines():
        name, separator, meaning = line.strip().partition(": ")
        if separator and name in PONDERING_FIELDS:
            meanings[name] = meaning
    return meanings


def add_device_flag(parser):
    """`--device`, of the commands that run a model; read by ponder_hf.devices."""
    parser.add_argument(
        "--device", metavar="DEVICE", help="cpu, cuda, cuda:1, mps, xpu. Default: the accelerator, where there is one."
    )
