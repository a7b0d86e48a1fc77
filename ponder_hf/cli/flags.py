"""The flags that several commands have: how a model ponders, the text that is read, the device."""

import argparse
from contextlib import suppress
from typing import Any


# Every field of PonderingConfig that is a flag: its default, and what it means. The configuration itself would take
# seconds to import; tests/test_cli.py holds this against it. Two of its fields are no flags: the code decides on
# pondering_format_version, and `ponder-hf train --draft-heads` makes draft_heads.
FIELDS: dict[str, tuple[Any, str]] = {
    "pondering_steps": (3, "forward passes before that of a prediction"),
    "pondering_top_k": (None, "sum over the N most probable tokens; null: all"),
    "pondering_temperature": (1.0, "of the softmax that weights the embeddings"),
    "embedding_scale": (1.0, "factor on token and pondering embeddings"),
    "input_scale": (1.0, "factor on the token embedding before pass 0"),
    "pondering_gate": ("none", "none, zero_init, zero_init_matrix, random_signs"),
    "intermediate_loss_weight": (0.0, "of the mean loss of the earlier passes"),
}
_METAVARS = {int: "N", type(None): "N", float: "X", str: "GATE"}


def flag_of(name: str) -> str:
    """The flag of a field or an argument: pondering_steps is --pondering-steps."""
    return "--" + name.replace("_", "-")


def add_field_flags(parser: argparse.ArgumentParser) -> Any:
    """Give `parser` a flag for each field. A flag that is not used says nothing, it does not mean the default.

    Returns:
        The group of flags.
    """
    group = parser.add_argument_group("pondering")
    for name, (default, meaning) in FIELDS.items():
        shown = "null" if default is None else default
        group.add_argument(
            flag_of(name),
            dest=name,
            default=None,
            type=_parse,
            metavar=_METAVARS[type(default)],
            help=f"{meaning}. Default: {shown}.",
        )
    return group


def given_fields(args: argparse.Namespace) -> dict[str, Any]:
    """The fields whose flags were used, as a dict."""
    given = {name: getattr(args, name) for name in FIELDS if getattr(args, name, None) is not None}
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
    is_number = isinstance(FIELDS[name][0], float) and isinstance(value, int)
    return float(value) if is_number else value


def add_text_flags(parser: Any, required: bool = False) -> None:
    """Give a parser, or a group of its flags, --data, --text-field, --data-name and --block-size."""
    parser.add_argument(
        "--data",
        nargs="+",
        required=required,
        metavar="DATA",
        help="files (text, .jsonl, .parquet, .gz), folders, or data sets",
    )
    parser.add_argument("--text-field", metavar="NAME", help="the field or column that holds the text. Default: text.")
    parser.add_argument("--data-name", metavar="NAME", help="the configuration of a data set")
    parser.add_argument(
        "--block-size", type=int, metavar="N", help="tokens in a row. Default: the model's, up to 2048."
    )


def add_device_flag(parser: Any) -> None:
    """`--device`, of the commands that run a model; read by ponder_hf.devices."""
    parser.add_argument(
        "--device", metavar="DEVICE", help="cpu, cuda, cuda:1, mps, xpu. Default: an accelerator, if any."
    )


def add_revision_flag(parser: Any, what: str = "a model") -> None:
    """`--revision`, of the commands that read from the Hub."""
    parser.add_argument("--revision", metavar="REVISION", help=f"branch, tag or commit of {what} on the Hub")
