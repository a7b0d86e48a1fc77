"""`ponder-hf train`: train a model to ponder, with transformers' Trainer."""

import argparse
import sys

from .data_flags import add_text_flags
from .fields import add_device_flag, add_field_flags, given_fields
from .outcome import is_first_process
from .training_flags import add_training_flags, read_arguments_file


def add_parser(subparsers):
    parser = subparsers.add_parser(
        "train",
        help="train a model to ponder",
        description="Train a plain base, which is made to ponder first, a pondering checkpoint, or, with --config, a "
        "new model. Everything is transformers' Trainer; each of its arguments is a flag. OUTPUT gets the "
        "checkpoints, and at the end the model.",
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("source", nargs="?", metavar="SOURCE", help="a plain or a pondering model: a folder or Hub id")
    _add_run_flags(parser)
    _add_data_flags(parser)
    _add_scratch_flags(parser)
    _add_adapter_flags(parser)
    add_field_flags(parser)
    parser.set_defaults(json=False)
    parser.complete = add_training_flags
    return parser


def _add_run_flags(parser):
    group = parser.add_argument_group("run")
    group.add_argument(
        "--output", "--output-dir", "--output_dir", metavar="DIR", help="the folder to write. Required."
    )
    group.add_argument(
        "--resume",
        nargs="?",
        const="last",
        metavar="CHECKPOINT",
        help="continue the run in DIR from its last checkpoint, or from this one; nothing else need be said again",
    )
    group.add_argument("--overwrite", action="store_true", help="replace DIR if it is not empty")
    group.add_argument("--arguments", metavar="FILE", help="a YAML file with any of these flags; flags win over it")
    group.add_argument(
        "--draft-heads",
        action="store_true",
        help="leave SOURCE, a pondering model, as it is and train draft heads for it, which speed up `generate` with "
        "num_draft_tokens",
    )
    add_device_flag(group)
    group.add_argument("--revision", help="branch, tag or commit of SOURCE on the Hub")
    group.add_argument(
        "--dtype", metavar="DTYPE", help="of the weights: float32, bfloat16, or auto, as stored. Default: float32."
    )


def _add_data_flags(parser):
    group = parser.add_argument_group("data")
    add_text_flags(group)
    group.add_argument("--split", metavar="SPLIT", help="of a data set to train on. Default: train.")
    group.add_argument("--streaming", action="store_true", help="read DATA while training; needs --max-steps")
    group.add_argument(
        "--shuffle-buffer", type=int, metavar="N", help="streaming, shuffle among so many blocks. Default: 0."
    )
    group.add_argument("--validation", nargs="+", metavar="DATA", help="what to evaluate on")
    group.add_argument(
        "--validation-split", metavar="SPLIT", help="of a data set of the Hub there. Default: validation."
    )
    group.add_argument(
        "--held-out",
        type=_part,
        metavar="PART",
        help="without --validation: a share of the blocks (0.01) or their number to keep apart and evaluate on",
    )


def _add_scratch_flags(parser):
    group = parser.add_argument_group("from scratch")
    group.add_argument(
        "--config", metavar="CONFIG", help="in place of SOURCE: a config.json, or the folder or Hub id that has one"
    )
    group.add_argument("--tokenizer", metavar="TOKENIZER", help="a folder or Hub id with the tokenizer to use")
    group.add_argument(
        "--initialisation", metavar="WHOSE", help="authors: the paper's. transformers: its own. Default: authors."
    )


def _add_adapter_flags(parser):
    group = parser.add_argument_group("adapter")
    group.add_argument("--lora", action="store_true", help="train a low-rank adapter (PEFT) in place of all weights")
    group.add_argument("--lora-r", type=int, metavar="R", help="its rank. Default: 16.")
    group.add_argument("--lora-alpha", type=float, metavar="ALPHA", help="its scale times R. Default: 32.")
    group.add_argument("--lora-dropout", type=float, metavar="P", help="Default: 0.")
    group.add_argument("--lora-target-modules", nargs="+", metavar="NAME", help="Default: PEFT's for the backbone.")
    group.add_argument("--merge", action="store_true", help="at the end, save the model with the adapter merged in")


def run(args):
    given = dict(vars(args))
    if "arguments" in given:
        given = {**_said(read_arguments_file(args.arguments, args.parser)), **_said(args)}
        vars(args).update(given)  # so that errors name its flags, too
    if "device" in given:
        from ponder_hf.devices import training_device

        if training_device(given["device"]).type == "cpu":
            given["use_cpu"] = True
    options = make_options(given)
    from ponder_hf.training.run import train

    result = train(options)
    _leave_process_group()
    if is_first_process():
        _tell(result, options.output)
    return result


def make_options(given):
    """TrainOptions from a dict of what was said: options, pondering fields and training arguments."""
    from ponder_hf.training.arguments import argument_names
    from ponder_hf.training.options import OPTION_NAMES, TrainOptions

    names = [name for name in OPTION_NAMES if name in given]
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
