"""`ponder-hf inspect-code`: whether the code in a checkpoint is a release's."""

import argparse
import sys
from typing import Any

from .flags import add_revision_flag
from .parser import add_command


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    parser = add_command(
        subparsers,
        "inspect-code",
        "SOURCE",
        summary="compare a checkpoint's code with this release's",
        description="Compare the Python files in a checkpoint with those of the installed ponder_hf by SHA-256, and "
        "say: the same, an older release's, or changed and where. None of them is run.",
        example="inspect-code your-name/pondering-pythia-70m",
    )
    parser.add_argument("source", metavar="SOURCE", help="a checkpoint: a folder or a Hub id")
    add_revision_flag(parser)
    return parser


def run(args: argparse.Namespace) -> dict[str, Any]:
    from ponder_hf.hub import inspect_code

    result = inspect_code(args.source, args.revision)
    if not args.json:
        _tell(result)
    return result


def _tell(result):
    release = f" (ponder_hf {result['release']})" if result["release"] else ""
    print(f"{result['status']}{release}")
    for file in result["files"]:
        if file["status"] == "changed":
            print(f"  {file['file']}: differs from line {file['line']}: {file['text']}")
        elif file["status"] != "same":
            print(f"  {file['file']}: {file['status']}")
    for reference in result["elsewhere"]:
        print(f"  code in another repository, {reference}")
    if result["status"] == "no code":
        print("it loads where ponder_hf is installed; `ponder-hf push FOLDER REPO` adds the code", file=sys.stderr)
    if result["revision"]:
        print(f"at commit {result['revision']}: load it with revision={result['revision']!r}", file=sys.stderr)
