"""What a checkpoint was made with, and what may differ when its run is resumed."""

import json
from dataclasses import replace

from ponder_hf import PonderingError
from ponder_hf.errors import reading

from .arguments import FREE_ON_RESUME, check_argument_names, current_names
from .options import OPTION_NAMES
from .trainer import RECORD


# Options that say how this call is to be carried out, or where its data now lies, which its fingerprint checks.
_FREE_OPTIONS = frozenset("output resume overwrite merge data validation data_name".split())


def make_record(options, arguments, fingerprint):
    """The record of a run, as a dict that JSON can hold."""
    return {"options": options.as_dict(), "arguments": arguments, "fingerprint": fingerprint}


def read_record(checkpoint):
    """The record in a checkpoint.

    Raises:
        PonderingError: there is none, because something else wrote the checkpoint.
    """
    path = checkpoint / RECORD
    if not path.is_file():
        raise PonderingError(
            f"{checkpoint} has no {RECORD}, `ponder-hf train` did not write it: use it as `source` of a new run"
        )
    with reading(path):
        return json.loads(path.read_text(encoding="utf-8"))


def resumed_options(options, checkpoint):
    """The options and arguments of the run that goes on from a checkpoint, and its record.

    What is given again must say what the record says, unless it may differ.

    Raises:
        PonderingError: something given contradicts the checkpoint.
    """
    record = read_record(checkpoint)
    stored = record["options"]
    given = {name: getattr(options, name) for name in options.given if name in OPTION_NAMES}
    for name, value in given.items():
        if name not in _FREE_OPTIONS and value != stored[name]:
            raise _contradiction(name, value, stored[name], checkpoint)
    check_argument_names(options.arguments)
    arguments = dict(record["arguments"])
    for name, value in current_names(options.arguments).items():
        if name not in FREE_ON_RESUME and value != arguments.get(name, value):
            raise _contradiction(name, value, arguments[name], checkpoint)
        if name not in FREE_ON_RESUME and name not in arguments:
            raise PonderingError(
                f"`{name}` was not given when {checkpoint} was made: leave it out, or start a new run with "
                f"{checkpoint} as `source`"
            )
        arguments[name] = value
    return replace(options, **{**stored, **given}), arguments, record


def check_fields(fields, config, checkpoint):
    """Raise a PonderingError for pondering fields that are not those of the checkpoint's configuration."""
    for name, value in fields.items():
        if value != getattr(config, name):
            raise _contradiction(name, value, getattr(config, name), checkpoint)


def _contradiction(name, value, stored, checkpoint):
    return PonderingError(
        f"`{name}` is {value}, but {checkpoint} was made with {stored}: leave it out, or start a new run with "
        f"{checkpoint} as `source`"
    )
