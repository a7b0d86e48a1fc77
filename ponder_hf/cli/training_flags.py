"""The flags of `ponder-hf train` that are read off transformers' TrainingArguments, and YAML files of any flags."""

import argparse
import difflib
import json

from ponder_hf import PonderingError
from ponder_hf.errors import reading


def add_training_flags(parser):
    """Give `parser` a flag for each field of TrainingArguments, in kebab and in snake case.

    A flag that is not used leaves no trace in the namespace. Importing TrainingArguments takes a while, so this is
    done when a line of this command is parsed.
    """
    from transformers import HfArgumentParser, TrainingArguments

    from ponder_hf.training.arguments import NOT_ARGUMENTS

    generated = HfArgumentParser(TrainingArguments, add_help=False, formatter_class=argparse.HelpFormatter)
    group = parser.add_argument_group(
        "training arguments", "All of transformers' TrainingArguments; its documentation says more about each."
    )
    taken = {action.dest for action in parser._actions}
    for action in generated._actions:
        if action.dest in NOT_ARGUMENTS or action.dest in taken:
            continue
        action.option_strings.sort(key=lambda flag: "_" in flag)  # messages name the first
        action.default = argparse.SUPPRESS
        action.help = (action.help or "").split(". ")[0].rstrip(".")
        group._add_action(action)


def read_arguments_file(path, parser):
    """The flags that a YAML file means, parsed as if they stood on the command line.

    Args:
        path: a file with one mapping; keys are flags without dashes in front, in kebab or snake case.
        parser: of the command.

    Raises:
        PonderingError: the file cannot be read, or a key or a value in it is none of the command's.
    """
    flags = {option: action for action in parser._actions for option in action.option_strings}
    words = []
    for key, value in _read_mapping(path).items():
        flag = f"--{str(key).replace('_', '-')}"
        _check_not_taken(str(key).replace("-", "_"), path)
        if key == "source":
            words = [str(value), *words]
            continue
        if flag not in flags or flag in ("--arguments", "--help", "--json"):
            near = difflib.get_close_matches(flag, flags, n=1)
            hint = f", did you mean {near[0].lstrip('-')}?" if near else ""
            raise PonderingError(f"{path}: there is no argument {key}{hint}")
        words += _as_words(flag, value, flags[flag])
    try:
        return parser.parse_args(words)
    except PonderingError as error:
        raise PonderingError(f"{path}: {error}") from error


def _check_not_taken(name, path):
    from ponder_hf.training.arguments import NOT_ARGUMENTS

    if name in NOT_ARGUMENTS and name != "output_dir":
        raise PonderingError(f"{path}: {name} cannot be given: {NOT_ARGUMENTS[name]}")


def _read_mapping(path):
    import yaml

    with reading(path), open(path, encoding="utf-8") as file:
        try:
            content = yaml.safe_load(file)
        except yaml.YAMLError as error:
            raise PonderingError(f"{path} is not YAML ({' '.join(str(error).split())}): repair it") from error
    if not isinstance(content, dict):
        raise PonderingError(f"{path} must hold names and values, as in `learning_rate: 3e-4`")
    return content


def _as_words(flag, value, action):
    """What to write on a command line to say the same."""
    if action.nargs == 0:  # a switch
        if not isinstance(value, bool):
            raise PonderingError(f"{flag.lstrip('-')} is either true or false, got {value!r}")
        return [flag] if value else []
    if value is None:
        return [flag, "null"]
    if isinstance(value, bool):
        return [flag, str(value).lower()]
    if isinstance(value, dict):
        return [flag, json.dumps(value)]
    if isinstance(value, list):
        return [flag, *map(str, value)]
    return [flag, str(value)]
