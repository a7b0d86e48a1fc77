"""`ponder-hf doctor`: versions, devices, and what is missing."""

import argparse
from typing import Any

from .parser import add_command


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    parser = add_command(
        subparsers,
        "doctor",
        "",
        summary="versions, devices, and what is missing",
        description="Show versions and devices, what is missing and how to install it. Shows no secret.",
        example="doctor --checkpoint pondering-pythia-70m",
    )
    parser.add_argument("--checkpoint", metavar="SOURCE", help="also load this pondering checkpoint and run it once")
    return parser


def run(args: argparse.Namespace) -> dict[str, Any]:
    from ponder_hf.diagnosis import diagnose

    report = diagnose(args.checkpoint)
    if not args.json:
        print(as_table(report))
    return report


def as_table(report: dict[str, Any]) -> str:
    """The report as lines of two columns for people."""
    devices, hub, transformers = report["devices"], report["hub"], report["transformers"]
    rows = [
        ("python", f"{report['python']['version']} ({report['python']['executable']})"),
        ("platform", report["platform"]),
        ("ponder-hf", report["ponder_hf"]),
        *((name, version or "not installed") for name, version in report["packages"].items()),
        ("CPU", f"{devices['cpu_threads']} threads"),
        ("CUDA", ", ".join(devices["cuda"]) or "none"),
        ("MPS", "yes" if devices["mps"] else "none"),
        ("XPU", "yes" if devices["xpu"] else "none"),
        ("checkpoints", f"tested with transformers {transformers['checkpoints_need']}"),
        ("library", f"needs transformers {transformers['library_needs'] or 'unknown: ponder-hf is not installed'}"),
        ("Hub cache", f"{hub['cache']} ({'writable' if hub['cache_is_writable'] else 'not writable'})"),
        ("Hub token", "set" if hub["token_is_set"] else "not set"),
        ("Hub", "offline (HF_HUB_OFFLINE)" if hub["offline"] else "online"),
    ]
    for extra, missing in report["extras"].items():
        adds = f'pip install "ponder-hf[{extra}]" adds {", ".join(missing)}'
        rows.append((f"extra {extra}", adds if missing else "complete"))
    if "checkpoint" in report:
        found = report["checkpoint"]
        rows.append(
            (
                "checkpoint",
                f"{found['source']} loads: {found['model_type']}, S = {found['pondering_steps']}, "
                f"{found['parameters']:,} parameters in {found['dtype']}",
            )
        )
    rows.extend(("problem", problem) for problem in report["problems"] or ["none found"])
    width = max(len(name) for name, _ in rows) + 2
    return "\n".join(f"{name:<{width}}{value}" for name, value in rows)
