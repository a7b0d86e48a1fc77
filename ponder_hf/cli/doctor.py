"""`ponder-hf doctor`: versions, devices, and what is missing."""

import os
import platform
import sys
from importlib import metadata

from ponder_hf import PonderingError, __version__
from ponder_hf.modeling.pondering_errors import TRANSFORMERS_RANGE, is_supported, is_tested


DISTRIBUTION = "ponder-hf"
PACKAGES = (
    "torch transformers huggingface-hub safetensors tokenizers tqdm accelerate peft datasets evaluate matplotlib"
).split()


def add_parser(subparsers):
    parser = subparsers.add_parser(
        "doctor",
        help="versions, devices, and what is missing",
        description="Show versions and devices, what is missing and how to install it. Shows no secret.",
    )
    parser.add_argument("--checkpoint", metavar="SOURCE", help="also load this pondering checkpoint and run it once")
    return parser


def run(args):
    report = {
        "python": {"version": platform.python_version(), "executable": sys.executable},
        "platform": platform.platform(),
        "ponder_hf": __version__,
        "packages": {name: _version(name) for name in PACKAGES},
        "devices": find_devices(),
        "extras": find_extras(),
        "transformers": check_transformers(),
        "hub": check_hub(),
    }
    report["problems"] = find_problems(report)
    if args.checkpoint is not None:
        report["checkpoint"] = try_checkpoint(args.checkpoint)
    if not args.json:
        print(as_table(report))
    return report


def _version(name):
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _requirements():
    from packaging.requirements import Requirement

    try:
        return [Requirement(line) for line in metadata.requires(DISTRIBUTION) or ()]
    except metadata.PackageNotFoundError:
        return []


def find_devices():
    """What torch can compute on here."""
    import torch

    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "cpu_threads": torch.get_num_threads(),
        "cuda": gpus if torch.cuda.is_available() else [],
        "mps": torch.backends.mps.is_available(),
        "xpu": torch.xpu.is_available() if hasattr(torch, "xpu") else False,
    }


def find_extras():
    """Map each optional extra to what is missing of it: requirements that are not installed, or not in the range."""
    extras = {}
    requirements = _requirements()
    names = _metadata_extras()
    for name in names:
        chosen = [
            requirement
            for requirement in requirements
            if requirement.marker is not None
            and requirement.marker.evaluate({"extra": name})
            and not requirement.marker.evaluate({"extra": ""})
            and requirement.name != DISTRIBUTION
        ]
        if chosen:  # an extra that only gathers others has none of its own
            extras[name] = sorted(str(_without_marker(each)) for each in chosen if not _is_met(each))
    return extras


def _metadata_extras():
    try:
        return metadata.metadata(DISTRIBUTION).get_all("Provides-Extra") or []
    except metadata.PackageNotFoundError:
        return []


def _without_marker(requirement):
    return f"{requirement.name}{requirement.specifier}"


def _is_met(requirement):
    version = _version(requirement.name)
    return version is not None and requirement.specifier.contains(version, prereleases=True)


def check_transformers():
    """Whether the installed transformers is in the ranges that checkpoints and the library were tested with."""
    version = _version("transformers")
    needed = next((each.specifier for each in _requirements() if each.name == "transformers"), None)
    return {
        "version": version,
        # What checkpoints were tested with, without ponder_hf; newer versions are tried, with a warning. The library
        # itself needs what its own requirements say.
        "checkpoints_need": TRANSFORMERS_RANGE,
        "good_for_checkpoints": is_supported(version),
        "tested": is_tested(version),
        "library_needs": None if needed is None else str(needed),
        "good_for_library": None if needed is None else needed.contains(version, prereleases=True),
    }


def check_hub():
    """The Hub's cache and access to it; of a token only whether there is one."""
    from huggingface_hub import constants, get_token

    cache = os.path.abspath(os.path.expanduser(constants.HF_HUB_CACHE))
    existing = cache
    while not os.path.exists(existing):
        existing = os.path.dirname(existing)
    return {
        "cache": cache,
        "cache_is_writable": os.path.isdir(existing) and os.access(existing, os.W_OK | os.X_OK),
        "token_is_set": get_token() is not None,
        "offline": bool(constants.HF_HUB_OFFLINE),
    }


def find_problems(report):
    """One line for each thing that will get in the way."""
    problems = []
    transformers, hub = report["transformers"], report["hub"]
    if transformers["good_for_library"] is False:
        problems.append(
            f"transformers {transformers['version']} is outside {transformers['library_needs']}: "
            f'pip install "transformers{transformers["library_needs"]}"'
        )
    if not transformers["tested"]:
        problems.append(
            f"checkpoints were tested with transformers {TRANSFORMERS_RANGE}, not {transformers['version']}: "
            f'pip install "transformers{TRANSFORMERS_RANGE}"'
        )
    if not hub["cache_is_writable"]:
        problems.append(f"the Hub's cache {hub['cache']} may not be written to: set HF_HOME to a folder of yours")
    return problems


def try_checkpoint(name):
    """Load a pondering checkpoint and predict one token.

    Raises:
        PonderingError: it does not load, or predicts something that is no number.
    """
    import torch

    from ponder_hf.conversion import load_pondering, open_checkpoint

    model = load_pondering(open_checkpoint(name))
    with torch.no_grad():
        logits = model(torch.zeros(1, 1, dtype=torch.long)).logits
    if not logits.isfinite().all():
        raise PonderingError(f"{name} loads, but predicts NaN or infinity: get its weights again")
    return {
        "source": name,
        "model_type": model.config.base_config.model_type,
        "pondering_steps": model.config.pondering_steps,
        "parameters": model.num_parameters(),
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def as_table(report):
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
        adds = f'pip install "{DISTRIBUTION}[{extra}]" adds {", ".join(missing)}'
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
