"""What is installed, what a model can run on here, what is missing, and what will get in the way."""

import os
import platform
import sys
from importlib import metadata
from typing import Any

import torch
from huggingface_hub import constants, get_token
from packaging.requirements import Requirement

from ponder_hf import PonderingError, __version__
from ponder_hf.modeling.pondering_errors import TRANSFORMERS_RANGE, is_supported, is_tested


DISTRIBUTION = "ponder-hf"
PACKAGES = (
    "torch transformers huggingface-hub safetensors tokenizers tqdm accelerate peft datasets evaluate matplotlib"
).split()


def diagnose(checkpoint: str | os.PathLike | None = None) -> dict[str, Any]:
    """Look at versions and devices, what is missing, and what will get in the way. Shows no secret.

    Args:
        checkpoint: a folder or a Hub id of a pondering checkpoint, to load it and predict one token.

    Returns:
        What was found, as a dict that JSON can hold. "problems" has a line for each thing that will get in the way,
        "extras" for each optional extra what is missing of it.

    Raises:
        PonderingError: the checkpoint does not load, or predicts something that is no number.
    """
    report: dict[str, Any] = {
        "python": {"version": platform.python_version(), "executable": sys.executable},
        "platform": platform.platform(),
        "ponder_hf": __version__,
        "packages": {name: _version(name) for name in PACKAGES},
        "devices": find_devices(),
        "extras": find_extras(),
        "transformers": transformers_version(),
        "hub": hub_access(),
    }
    report["problems"] = _problems(report)
    if checkpoint is not None:
        report["checkpoint"] = try_checkpoint(checkpoint)
    return report


def _version(name):
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _requirements():
    try:
        return [Requirement(line) for line in metadata.requires(DISTRIBUTION) or ()]
    except metadata.PackageNotFoundError:
        return []


def find_devices() -> dict[str, Any]:
    """What torch can compute on here."""
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "cpu_threads": torch.get_num_threads(),
        "cuda": gpus if torch.cuda.is_available() else [],
        "mps": torch.backends.mps.is_available(),
        "xpu": torch.xpu.is_available() if hasattr(torch, "xpu") else False,
    }


def find_extras() -> dict[str, list[str]]:
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


def transformers_version() -> dict[str, Any]:
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


def hub_access() -> dict[str, Any]:
    """The Hub's cache and access to it; of a token only whether there is one."""
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


def _problems(report):
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


def try_checkpoint(name: str | os.PathLike) -> dict[str, Any]:
    """Load a pondering checkpoint and predict one token.

    Raises:
        PonderingError: it does not load, or predicts something that is no number.
    """
    from ponder_hf.conversion import load_pondering, open_checkpoint

    model = load_pondering(open_checkpoint(name))
    with torch.no_grad():
        logits = model(torch.zeros(1, 1, dtype=torch.long)).logits
    if not logits.logsumexp(-1).isfinite().all():  # minus infinity forbids a token
        raise PonderingError(f"{name} loads, but predicts NaN or infinity: get its weights again")
    return {
        "source": str(name),
        "model_type": model.config.base_config.model_type,
        "pondering_steps": model.config.pondering_steps,
        "parameters": model.num_parameters(),
        "dtype": str(model.dtype).removeprefix("torch."),
    }
