"""`ponder-hf export`: the plain backbone of a pondering checkpoint."""

import argparse
import sys
from typing import Any

from .convert import add_source_and_destination, writing_arguments
from .outcome import warn
from .parser import add_command
from .words import in_flags


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    parser = add_command(
        subparsers,
        "export",
        "SOURCE DEST",
        summary="write the plain backbone of a pondering checkpoint",
        description="Write the plain backbone of a pondering checkpoint, as transformers itself would save it. "
        "Pondering is lost: a model that was trained to ponder predicts differently without.",
        example="export pondering-pythia-70m plain-pythia-70m",
    )
    add_source_and_destination(parser)
    return parser


def run(args: argparse.Namespace) -> dict[str, Any]:
    from ponder_hf.conversion import export

    result = export(args.source, args.destination, **writing_arguments(args))
    print(
        f"{args.destination}: {result['model_type']} with {result['parameters']:,} parameters in {result['dtype']}",
        file=sys.stderr,
    )
    for warning in result["warnings"]:
        warn(in_flags(warning, args))
    return result
