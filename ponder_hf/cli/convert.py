"""`ponder-hf convert`: a pondering checkpoint from a plain one."""

import argparse
import sys
from typing import Any

from .flags import add_field_flags, add_revision_flag, given_fields
from .outcome import warn
from .parser import add_command
from .words import in_flags


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    parser = add_command(
        subparsers,
        "convert",
        "SOURCE DEST",
        summary="make a pondering checkpoint from a plain one",
        description="Make a pondering checkpoint from a plain one, or from one that the method's authors wrote. "
        "Weights and dtype are kept; tokenizer, chat template and generation defaults travel along.",
        example="convert EleutherAI/pythia-70m pondering-pythia-70m --pondering-steps 3",
    )
    add_source_and_destination(parser)
    add_field_flags(parser)
    unusual = parser.add_argument_group("unusual checkpoints")
    unusual.add_argument(
        "--authors",
        action="store_true",
        help="a model of the method's authors whose config.json lacks their flags: S = 3, --embedding-scale "
        "sqrt(hidden size) and --input-scale S, where no flag says otherwise",
    )
    unusual.add_argument(
        "--ignore-field",
        dest="ignore_fields",
        action="append",
        default=[],
        metavar="NAME",
        help="leave a field of config.json out that nobody knows; may be given several times",
    )
    unusual.add_argument(
        "--ignore-code",
        action="store_true",
        help="convert a checkpoint that names code of its own as transformers' own model of that type",
    )
    return parser


def add_source_and_destination(parser: argparse.ArgumentParser) -> None:
    """The arguments that convert and export share."""
    parser.add_argument("source", metavar="SOURCE", help="a folder, or the id of a model on the Hub")
    parser.add_argument("destination", metavar="DEST", help="the folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace DEST if it is not empty")
    add_revision_flag(parser)
    parser.add_argument(
        "--max-shard-size", default="5GB", metavar="SIZE", help="of one file of weights. Default: 5GB."
    )


def writing_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """What the flags of add_source_and_destination say, as keyword arguments of convert and export."""
    return {"overwrite": args.overwrite, "revision": args.revision, "max_shard_size": args.max_shard_size}


def run(args: argparse.Namespace) -> dict[str, Any]:
    from ponder_hf.conversion import convert

    result = convert(
        args.source,
        args.destination,
        **writing_arguments(args),
        authors=args.authors,
        ignore_fields=args.ignore_fields,
        ignore_code=args.ignore_code,
        **given_fields(args),
    )
    steps, gate = result["pondering"]["pondering_steps"], result["pondering"]["pondering_gate"]
    print(
        f"{args.destination}: {result['model_type']} with {result['parameters']:,} parameters in {result['dtype']}, "
        f"pondering {steps} step{'' if steps == 1 else 's'} before each token",
        file=sys.stderr,
    )
    for warning in result["warnings"]:
        warn(in_flags(warning, args))
    may_be_theirs = result["authors_checkpoint"] or any("authors" in warning for warning in result["warnings"])
    if steps and gate in ("none", "random_signs") and not may_be_theirs:
        print(
            "its base never learned to ponder: train it before use, or convert with --pondering-gate "
            "zero_init_matrix, which predicts as its base does until it is trained",
            file=sys.stderr,
        )
    return result
