"""The flags of `ponder-hf train` that are fields of transformers' TrainingArguments, and YAML files of any flags."""

import argparse
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

from .flags import flag_of
from .parser import CommandParser, UsageError, near_flag


# What people set most: its type, its place in the help, and what it means. All other fields are read off
# TrainingArguments, which takes seconds to import; tests/test_cli.py holds these against it.
COMMON: dict[str, tuple[type, str | None, str]] = {
    "per_device_train_batch_size": (int, "N", "rows in a batch. Default: 8."),
    "gradient_accumulation_steps": (int, "N", "batches before the weights change. Default: 1."),
    "learning_rate": (float, "RATE", "at its peak. Default: by the size of the model."),
    "num_train_epochs": (float, "N", "how often to read the data. Default: 1."),
    "max_steps": (int, "N", "how often the weights change, in place of epochs"),
    "warmup_steps": (float, "N", "until the peak; below 1: a share of all. Default: 0.01."),
    "bf16": (bool, None, "compute in bfloat16, with weights in float32"),
    "gradient_checkpointing": (bool, None, "less memory, more time"),
    "save_steps": (float, "N", "between checkpoints. Default: 500."),
    "report_to": (str, "NAME", "tensorboard, trackio, wandb, ... Default: none."),
    "seed": (int, "N", "Default: 42."),
    "push_to_hub": (bool, None, "push the model at the end, and checkpoints as they are made"),
}


def add_common_flags(parser: argparse.ArgumentParser) -> None:
    """Give `parser` a flag for each of COMMON. A flag that is not used leaves no trace in the namespace."""
    group = parser.add_argument_group("training, as transformers' Trainer does (--help-all shows all that it takes)")
    for name, (kind, metavar, meaning) in COMMON.items():
        settings: dict[str, Any] = {"type": kind, "metavar": metavar}
        if kind is bool:
            settings = {"type": _true_or_false, "nargs": "?", "const": True, "metavar": "BOOL"}
        group.add_argument(flag_of(name), default=argparse.SUPPRESS, help=meaning, **settings)


def _true_or_false(text):
    if text.lower() in ("true", "yes", "t", "y", "1"):
        return True
    if text.lower() in ("false", "no", "f", "n", "0"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")


def further_flags() -> list[str]:
    """The flags of TrainingArguments' fields, read off its source, which takes no time."""
    found = importlib.util.find_spec("transformers")
    folders = (found.submodule_search_locations if found is not None else None) or []
    files = [path for path in (Path(folder) / "training_args.py" for folder in folders) if path.is_file()]
    names = {
        name for path in files for name in re.findall(r"^    (\w+): ", path.read_text("utf-8"), flags=re.MULTILINE)
    }
    return [prefix + flag_of(name).removeprefix("--") for name in sorted(names) for prefix in ("--", "--no-")]


def add_further_flags(parser: CommandParser) -> None:
    """Give `parser` a flag for every other field of TrainingArguments."""
    from transformers import HfArgumentParser, TrainingArguments

    from ponder_hf.training.arguments import NOT_ARGUMENTS

    generated = HfArgumentParser(TrainingArguments, add_help=False)
    group = parser.add_argument_group(
        "all training arguments", "Fields of transformers' TrainingArguments; its documentation says more about each."
    )
    taken = {action.dest for action in parser._actions}
    for action in generated._actions:
        if action.dest in NOT_ARGUMENTS or action.dest in taken:
            continue
        action.option_strings = [flag for flag in action.option_strings if "_" not in flag]
        action.default = argparse.SUPPRESS
        action.help = (action.help or "").split(". ")[0].rstrip(".")
        group._add_action(action)


def read_arguments_file(path: str, parser: CommandParser) -> argparse.Namespace:
    """The flags that a YAML file means, parsed as if they stood on the command line.

    Args:
        path: a file with one mapping; keys are flags without dashes in front, in kebab or snake case.
        parser: of the command.

    Raises:
        PonderingError: the file cannot be read, or a key or a value in it is none of the command's.
    """
    from ponder_hf import PonderingError

    parser.complete()
    flags = parser.flags()
    words: list[str] = []
    for key, value in _read_mapping(path).items():
        flag = f"--{str(key).replace('_', '-')}"
        _check_not_taken(str(key).replace("-", "_"), path)
        if key == "source":
            words = [str(value), *words]
            continue
        if flag not in flags or flag in ("--arguments", "--help", "--help-all", "--json"):
            near = near_flag(flag, list(flags))
            hint = f", did you mean {near.lstrip('-')}?" if near else ""
            raise PonderingError(f"{path}: there is no argument {key}{hint}")
        words += _as_words(flag, value, flags[flag])
    try:
        return parser.parse_args(words)
    except UsageError as error:
        raise PonderingError(f"{path}: {error}") from error


def _check_not_taken(name, path):
    from ponder_hf import PonderingError
    from ponder_hf.training.arguments import NOT_ARGUMENTS

    if name in NOT_ARGUMENTS and name != "output_dir":
        raise PonderingError(f"{path}: {name} cannot be given: {NOT_ARGUMENTS[name]}")


def _read_mapping(path):
    import yaml

    from ponder_hf import PonderingError
    from ponder_hf.errors import reading

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
    from ponder_hf import PonderingError

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
