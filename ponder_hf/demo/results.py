"""The demo's results as one dict that JSON can hold; the report and the summary say nothing that is not in it."""

import dataclasses
import datetime
import json
import math
import os
import platform
import shlex
from pathlib import Path
from typing import Any

import torch
import transformers

from ponder_hf import __version__
from ponder_hf.devices import name_of

from .experiment import Outcome, Schedule, device
from .prepare import Setup


def gather(
    setup: Setup,
    schedule: Schedule,
    outcome: Outcome,
    checked: dict[str, Any],
    samples: list[dict[str, str]],
    seconds: dict[str, float],
) -> dict[str, Any]:
    """Everything that the demo found out.

    Args:
        setup, schedule, outcome: of prepare.py and experiment.py.
        checked: what check_checkpoint gave, without the texts.
        samples: dicts of a prompt and how both models continue it.
        seconds: of each phase.
    """
    size, corpus = setup.size, setup.corpus
    rates = {"control": outcome.control_run.tokens_per_second, "pondering": outcome.pondering_run.tokens_per_second}
    losses = {
        "base": outcome.base_loss,
        "control": outcome.control_loss,
        "converted": outcome.converted_losses[-1],
        "pondering": outcome.pondering_losses[-1],
    }
    results = {
        "output": str(setup.options.output),
        "held_out_loss": losses,
        "loss_difference": losses["pondering"] - losses["control"],
        "bits_per_byte": {name: loss / math.log(2) / setup.bytes_per_token for name, loss in losses.items()},
        "loss_of_each_pass": {"converted": outcome.converted_losses, "pondering": outcome.pondering_losses},
        "tokens_per_second": {**rates, "ratio": rates["control"] / rates["pondering"]},
        "samples": samples,
        "checkpoint": checked,
        "base": _describe_base(setup, schedule),
        "text": {
            "source": corpus.source,
            "held_out": corpus.held_out_rule,
            "training_documents": len(corpus.training),
            "training_tokens": setup.training.rows.numel(),
            "held_out_documents": len(corpus.held_out),
            "held_out_tokens": setup.watched.rows.numel(),
            "bytes_per_token": setup.bytes_per_token,
        },
        "settings": {
            **setup.options.pondering_fields,
            "seed": setup.options.seed,
            "quick": setup.options.quick,
            "base_steps": schedule.base_steps,
            "steps": schedule.steps,
            "share_of_schedule": schedule.share,
            "batch_size": size.batch_size,
            "block_size": size.block_size,
            "tokens": size.tokens(schedule.steps),
            "learning_rate": setup.learning_rate,
            "threads": schedule.threads,
        },
        "repeat": _repeat_command(setup.options, schedule),
        "curves": {
            "base": _curve(outcome.base_run),
            "control": _curve(outcome.control_run),
            "pondering": _curve(outcome.pondering_run),
        },
        "versions": {
            "ponder_hf": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "machine": {
            "system": f"{platform.system()} {platform.machine()}",
            "cores": _cores(),
            "device": name_of(device()),
        },
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "seconds": seconds,
    }
    return _without_nan(results)


def write_json(results: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(results, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _repeat_command(options, schedule):
    """The command line that gives the same numbers on the same machine."""
    words = ["ponder-hf", "demo"]
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if field.name in ("output", "overwrite", "steps", "base_steps") or value == field.default:
            continue
        values = [] if value is True else value if isinstance(value, (list, tuple)) else [value]
        words += [f"--{field.name.replace('_', '-')}", *map(str, values)]
    words += ["--steps", str(schedule.steps)]
    if schedule.base_steps:
        words += ["--base-steps", str(schedule.base_steps)]
    return shlex.join(words)


def _describe_base(setup, schedule):
    parameters = sum(parameter.numel() for parameter in setup.base.parameters())
    return {
        "name": setup.options.base or "made and trained by the demo",
        "model_type": setup.base.config.model_type,
        "parameters": parameters,
        "tokens": None if setup.base_is_given else setup.size.tokens(schedule.base_steps),
        "learning_rate": None if setup.base_is_given else setup.size.learning_rate,
    }


def _curve(run):
    return None if run is None else {"training": run.losses, "held_out": run.passes}


def _cores():
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on every system
        return os.cpu_count()


def _without_nan(value):
    """The same with null for every number that JSON does not have: the losses of a model that diverged."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
