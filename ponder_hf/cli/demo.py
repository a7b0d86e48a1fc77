"""`ponder-hf demo`: train a small model on real text, make it ponder, and compare."""

import argparse
import sys
from typing import Any

from .flags import add_device_flag
from .parser import add_command


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    parser = add_command(
        subparsers,
        "demo",
        "",
        summary="train a small model, make it ponder, compare, and write a report",
        description="Train a small model on the bytes of a short text, make it ponder, train on beside plain models, "
        "and write a report and a checkpoint. Within five minutes on two cores; nothing is downloaded.",
        example="demo --output my-demo",
    )
    parser.add_argument(
        "--output", default="ponder-demo", metavar="FOLDER", help="the folder to write. Default: ./ponder-demo."
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the folder if it is not empty")
    parser.add_argument("--quick", action="store_true", help="a far smaller model and text: half a minute")
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="the same seed gives the same result. Default: 0."
    )
    what = parser.add_argument_group("text and base")
    what.add_argument(
        "--text",
        nargs="+",
        default=(),
        metavar="FILE",
        help="plain text, .jsonl, or one of them as .gz. Default: the source files of Python's standard library.",
    )
    what.add_argument("--text-field", default="text", metavar="NAME", help="the .jsonl field to read. Default: text.")
    what.add_argument(
        "--text-blocks",
        type=int,
        metavar="N",
        help="blocks of text that the models see again and again; one gets the others. Default: 320.",
    )
    what.add_argument(
        "--base",
        metavar="SOURCE",
        help="a plain checkpoint with a tokenizer, a folder or a Hub id. Default: a GPT-NeoX trained here.",
    )
    how = parser.add_argument_group("training")
    add_device_flag(how)
    how.add_argument("--pondering-steps", type=int, default=3, metavar="S", help="Default: 3.")
    how.add_argument(
        "--pondering-gate",
        default="zero_init_matrix",
        metavar="GATE",
        help="none: as in the paper. zero_init, zero_init_matrix: the converted model starts exactly as its base. "
        "random_signs is for training from scratch. "
        "Default: zero_init_matrix.",
    )
    how.add_argument("--steps", type=int, metavar="N", help="optimiser steps of the models on the same tokens")
    how.add_argument("--base-steps", type=int, metavar="N", help="optimiser steps of the demo's own base")
    how.add_argument("--learning-rate", type=float, metavar="RATE", help="of the control and the pondering model")
    return parser


def run(args: argparse.Namespace) -> dict[str, Any]:
    from ponder_hf.demo import Options, run_demo, summary

    results = run_demo(Options(**{name: getattr(args, name) for name in Options.__dataclass_fields__}))
    print(summary(results), file=sys.stderr)
    return results
