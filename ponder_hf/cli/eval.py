"""`ponder-hf eval`: the loss of each pass on a text."""

import argparse
import sys
from typing import Any

from .flags import add_device_flag, add_revision_flag, add_text_flags
from .parser import add_command


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    parser = add_command(
        subparsers,
        "eval",
        "SOURCE --data DATA",
        summary="the loss of each pass on a text",
        description="Measure the loss and perplexity of each pass on text, in blocks as `train` makes them: documents "
        "one after another, cut into rows of N tokens. The first token of a block is not predicted, and what does not "
        "fill a last block is left out. SOURCE may be a plain model, which has one pass.",
        example="eval pondering-pythia-70m --data my_text.txt --block-size 512",
    )
    parser.add_argument("source", metavar="SOURCE", help="a pondering or a plain model: a folder or a Hub id")
    add_text_flags(parser, required=True)
    parser.add_argument("--split", help="of a data set. Default: validation; of files and folders here: train.")
    parser.add_argument("--max-blocks", type=int, metavar="N", help="no more than the first N blocks")
    parser.add_argument("--pondering-steps", type=int, metavar="S", help="in place of the checkpoint's own")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="Default: as stored.")
    add_device_flag(parser)
    add_revision_flag(parser)
    return parser


def run(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    from ponder_hf.evaluation import evaluate_text

    result = evaluate_text(
        args.source,
        args.data,
        text_field=args.text_field or "text",
        data_name=args.data_name,
        split=args.split,
        block_size=args.block_size,
        max_blocks=args.max_blocks,
        pondering_steps=args.pondering_steps,
        dtype=None if args.dtype is None else getattr(torch, args.dtype),
        device=args.device,
        revision=args.revision,
        progress=True,
    )
    if not args.json:
        _tell(result)
    return result


def _tell(result):
    print("pass      loss  perplexity")
    for index, each in enumerate(result["passes"]):
        print(f"{index:>4}  {each['loss']:>8.4f}  {each['perplexity']:>10.2f}")
    print(
        f"{result['tokens']:,} tokens in {result['blocks']:,} blocks of {result['block_size']:,}, "
        f"{result['tokens_per_second']:,.0f} tokens per second, in {result['dtype']}",
        file=sys.stderr,
    )
