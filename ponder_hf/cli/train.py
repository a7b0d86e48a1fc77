"""`ponder-hf train`: train a model to ponder, with transformers' Trainer."""

import argparse
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .flags import add_device_flag, add_field_flags, add_revision_flag, add_text_flags, given_fields
from .outcome import is_first_process
from .parser import add_command
from .training_flags import add_common_flags, add_further_flags, further_flags, read_arguments_file


if TYPE_CHECKING:
    from ponder_hf.training import TrainOptions


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    parser = add_command(
        subparsers,
        "train",
        "SOURCE --data DATA --output DIR",
        summary="train a model to ponder",
        description="Train a plain base, which is made to ponder first, a pondering checkpoint, or, with --config, a "
        "new model, by transformers' Trainer. DIR gets checkpoints, and at the end the model.",
        example="train EleutherAI/pythia-70m --data my_text.txt --output trained --held-out 0.01",
        argument_default=argparse.SUPPRESS,
        further_flags=further_flags,
        complete=add_further_flags,
    )
    _add_run_flags(parser)
    _add_data_flags(parser)
    add_common_flags(parser)
    fields = add_field_flags(parser)
    fields.add_argument(
        "--gate-learning-rate-factor",
        type=float,
        metavar="X",
        help="of the gate to the model. Default: 30 for zero_init, else 1.",
    )
    fields.add_argument(
        "--sampled-steps",
        nargs="+",
        metavar="RULE",
        help="S of each training step: growing, or weights of 0, 1, ...",
    )
    _add_adapter_flags(parser)
    _add_scratch_flags(parser)
    parser.set_defaults(json=False)
    return parser


def _add_run_flags(parser):
    group = parser.add_argument_group("run")
    group.add_argument("source", nargs="?", metavar="SOURCE", help="a plain or a pondering model: a folder or Hub id")
    group.add_argument("--output", metavar="DIR", help="the folder to write. Required.")
    group.add_argument("--output-dir", dest="output", help=argparse.SUPPRESS)  # Trainer's name for it
    group.add_argument("--overwrite", action="store_true", help="replace DIR if it is not empty")
    group.add_argument(
        "--resume", nargs="?", const="last", metavar="CHECKPOINT", help="go on from DIR's last checkpoint, or this one"
    )
    group.add_argument("--arguments", metavar="FILE", help="a YAML file with any of these flags; flags win over it")
    add_device_flag(group)
    add_revision_flag(group, "SOURCE")
    group.add_argument("--dtype", metavar="DTYPE", help="of the weights: float32, bfloat16, auto. Default: float32.")
    group.add_argument(
        "--draft-heads", action="store_true", help="train only draft heads for SOURCE, which speed up `generate`"
    )


def _add_data_flags(parser):
    group = parser.add_argument_group("data")
    add_text_flags(group)
    group.add_argument("--split", metavar="SPLIT", help="of a data set to train on. Default: train.")
    group.add_argument(
        "--held-out", type=_part, metavar="PART", help="share (0.01) or number of blocks to evaluate on"
    )
    group.add_argument("--validation", nargs="+", metavar="DATA", help="other data to evaluate on")
    group.add_argument("--validation-split", metavar="SPLIT", help="of a data set there. Default: validation.")
    group.add_argument("--streaming", action="store_true", help="read DATA while training; needs --max-steps")
    group.add_argument("--shuffle-buffer", type=int, metavar="N", help="blocks to shuffle among then. Default: 0.")


def _add_adapter_flags(parser):
    group = parser.add_argument_group("adapter")
    group.add_argument("--lora", action="store_true", help="train a low-rank adapter (PEFT) in place of all weights")
    group.add_argument("--lora-r", type=int, metavar="R", help="its rank. Default: 16.")
    group.add_argument("--lora-alpha", type=float, metavar="ALPHA", help="its scale times R. Default: 32.")
    group.add_argument("--lora-dropout", type=float, metavar="P", help="Default: 0.")
    group.add_argument("--lora-target-modules", nargs="+", metavar="NAME", help="Default: PEFT's for the backbone.")
    group.add_argument("--merge", action="store_true", help="at the end, save the model with the adapter merged in")


def _add_scratch_flags(parser):
    group = parser.add_argument_group("from scratch")
    group.add_argument("--config", metavar="CONFIG", help="in place of SOURCE: a config.json, or what has one")
    group.add_argument("--tokenizer", metavar="TOKENIZER", help="a folder or Hub id with the tokenizer to use")
    group.add_argument("--initialisation", metavar="WHOSE", help="authors (the paper's; default) or transformers")


def run(args: argparse.Namespace) -> dict[str, Any]:
    given = dict(vars(args))
    if "arguments" in given:
        given = {**_said(read_arguments_file(args.arguments, args.parser)), **_said(args)}
        vars(args).update(given)  # so that errors name its flags, too
    if "device" in given:
        from ponder_hf.devices import training_device

        if training_device(given["device"]).type == "cpu":
            given["use_cpu"] = True
    if not {"source", "config", "resume"} & given.keys():
        from ponder_hf import PonderingError

        raise PonderingError(
            "give either SOURCE, a model to start from, or --config, one to train from scratch; SOURCE comes before "
            "flags that take several values"
        )
    options = make_options(given)
    from ponder_hf.training.run import train

    result = train(options)
    _leave_process_group()
    if is_first_process():
        _tell(result, options.output)
    return result


def make_options(given: Mapping[str, Any]) -> "TrainOptions":
    """TrainOptions from a dict of what was said: options, pondering fields and training arguments."""
    from ponder_hf.training.arguments import argument_names
    from ponder_hf.training.options import OPTION_NAMES, TrainOptions
    from ponder_hf.training.sampled_steps import read_rule

    names = [name for name in OPTION_NAMES if name in given]
    if given.get("sampled_steps") is not None:
        given = {**given, "sampled_steps": read_rule(given["sampled_steps"])}
    return TrainOptions(
        **{name: given[name] for name in names},
        fields=given_fields(argparse.Namespace(**given)),
        arguments={name: given[name] for name in argument_names() if name in given},
        given=frozenset(names),
    )


def _leave_process_group():
    """Where several processes have trained, part in good order.

    A process that ends while threads of its process group still listen is aborted now and then ("terminate called
    without an active exception"), and the launcher then reports a failed run.
    """
    import torch

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _said(args):
    """What was said on a line; the flags of pondering fields are None where they were not used."""
    return {name: value for name, value in vars(args).items() if value is not None}


def _part(text):
    number = float(text)
    return int(number) if number >= 1 and number.is_integer() else number


def _tell(result, output):
    kind = "adapter" if result["adapter"] else "model"
    loss = "" if result["loss"] is None else f", loss {result['loss']:.4f}"
    print(
        f"{output}: the {kind} after {result['steps']:,} steps and {result['tokens']:,} tokens{loss}, "
        f"{result['tokens_per_second']:,.0f} tokens per second",
        file=sys.stderr,
    )
    passes = {name: value for name, value in result["evaluation"].items() if name.startswith("eval_pass_")}
    if passes:
        print("held-out loss of each pass: " + ", ".join(f"{value:.4f}" for value in passes.values()), file=sys.stderr)
