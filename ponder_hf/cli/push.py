"""`ponder-hf push`: put a checkpoint on the Hub."""

import argparse
import sys
from typing import Any

from .parser import add_command


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    parser = add_command(
        subparsers,
        "push",
        "FOLDER REPO",
        summary="put a checkpoint on the Hub",
        description="Put a pondering checkpoint or an adapter on the Hub, with code, tokenizer and model card, in one "
        "commit. Files that are there already are not sent again. The token is that of HF_TOKEN or `hf auth login`.",
        example="push pondering-pythia-70m your-name/pondering-pythia-70m --dry-run",
    )
    parser.add_argument("folder", metavar="FOLDER", help="the folder of the checkpoint")
    parser.add_argument("repository", metavar="REPO", help="its name on the Hub, NAME/MODEL; made if it is not there")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--revision", metavar="BRANCH", help="push to this branch. Default: main.")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request in place of a commit")
    parser.add_argument("--dry-run", action="store_true", help="list the files and their sizes, and do nothing")
    parser.add_argument("--message", metavar="TEXT", help="of the commit")
    parser.add_argument("--base-model", metavar="ID", help="the base's name on the Hub, where the files do not say it")
    unsafe = parser.add_mutually_exclusive_group()
    unsafe.add_argument("--skip-unsafe", action="store_true", help="push without files that would be refused")
    unsafe.add_argument(
        "--allow",
        nargs="+",
        default=(),
        choices=("pickles", "secrets", "optimiser-states", "links"),
        metavar="KIND",
        help="push them: pickles, secrets (access tokens, private keys), optimiser-states, links (out of FOLDER)",
    )
    return parser


def run(args: argparse.Namespace) -> dict[str, Any]:
    from ponder_hf.hub import push

    result = push(
        args.folder,
        args.repository,
        revision=args.revision,
        private=args.private,
        create_pr=args.create_pr,
        dry_run=args.dry_run,
        message=args.message,
        base_model=args.base_model,
        allow=args.allow,
        skip_unsafe=args.skip_unsafe,
    )
    if not args.json:
        _tell(result)
    return result


def _tell(result):
    if result["dry_run"]:
        for file in result["files"]:
            print(f"{file['size']:>15,}  {file['path']}")
    total = sum(file["size"] for file in result["files"])
    if result["left_out"]:
        print(f"left out: {', '.join(result['left_out'])}", file=sys.stderr)
    what = f"{len(result['files'])} files, {total:,} bytes"
    if result["dry_run"]:
        print(f"{result['repository']}: {what} would be pushed, and a model card", file=sys.stderr)
    elif not result["uploaded"] and not result["deleted"]:
        print(f"{result['url']}: all {what} are there already", file=sys.stderr)
    else:
        where = result["pull_request"] or f"{result['url']}, commit {result['commit']}"
        print(f"{where}: {what}, {len(result['uploaded'])} of them new", file=sys.stderr)
