"""`ponder-hf inspect`: what a pondering checkpoint is."""

import argparse
from typing import Any

from .flags import add_revision_flag
from .parser import add_command


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    parser = add_command(
        subparsers,
        "inspect",
        "SOURCE",
        summary="what a pondering checkpoint is",
        description="Show how a checkpoint ponders, its backbone, its size, and whose code it brings. Its weights are "
        "neither loaded nor, of a model on the Hub, downloaded, and none of its code is run.",
        example="inspect your-name/pondering-pythia-70m",
    )
    parser.add_argument("source", metavar="SOURCE", help="a pondering checkpoint: a folder or a Hub id")
    add_revision_flag(parser)
    return parser


def run(args: argparse.Namespace) -> dict[str, Any]:
    from ponder_hf.hub import inspect_checkpoint

    result = inspect_checkpoint(args.source, args.revision)
    if not args.json:
        print(as_table(result))
    return result


def as_table(result: dict[str, Any]) -> str:
    """The result as lines of two columns for people."""
    backbone, code, weights = result["backbone"], result["code"], result["weights"]
    steps = result["pondering"]["pondering_steps"]
    rows = [
        ("checkpoint", result["source"]),
        *([("commit", result["revision"])] if result["revision"] else []),
        ("backbone", backbone["model_type"] + (f", from {backbone['name']}" if backbone["name"] else "")),
        *((name.replace("_", " "), _shown(backbone[name])) for name in list(backbone)[2:]),
        *((name.replace("_", " "), _shown(value)) for name, value in result["pondering"].items()),
        ("cost of a token", f"{steps + 1} forward passes of the backbone" if steps else "one forward pass"),
        ("draft heads", _shown(result["draft_heads"])),
        ("format version", result["format_version"]),
        ("parameters", f"{weights['parameters']:,}"),
        ("stored as", f"{', '.join(weights['dtypes'])}, {weights['bytes']:,} bytes in {', '.join(weights['files'])}"),
        ("tokenizer", "yes" if result["tokenizer"] else "none"),
        ("code", code["status"] + (f" (ponder_hf {code['release']})" if code["release"] else "")),
    ]
    different = [file["file"] for file in code["files"] if file["status"] != "same"]
    if different:
        rows.append(("", f"{', '.join(different)}: see `ponder-hf inspect-code {result['source']}`"))
    rows += [("", f"code in another repository, {reference}") for reference in code["elsewhere"]]
    width = max(len(name) for name, _ in rows) + 2
    return "\n".join(f"{name:<{width}}{value}" for name, value in rows)


def _shown(value):
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else f"{value:,}" if isinstance(value, int) else str(value)
