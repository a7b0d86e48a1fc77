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
from ponder_hf.lenses import Lens

from .experiment import Outcome, Schedule, device
from .prepare import Setup


_SCHEDULED = ("steps", "base_steps", "text_blocks")
_PASSAGE_TOKENS = 64


def gather(
    setup: Setup,
    schedule: Schedule,
    outcome: Outcome,
    checked: dict[str, Any],
    samples: list[dict[str, str]],
    look: Lens | None,
    seconds: dict[str, float],
) -> dict[str, Any]:
    """Everything that the demo found out.

    Args:
        setup, schedule, outcome: of prepare.py and experiment.py.
        checked: what check_checkpoint gave, without the texts.
        samples: dicts of a prompt and how both models continue it.
        look: what the pondering model makes of a piece of held-out text; None where training diverged.
        seconds: of each phase.
    """
    size, corpus, models = setup.size, setup.corpus, outcome.models
    control, pondering = models["control"], models["pondering"]
    begun, converted = (trained.runs[-1].passes[0][1] for trained in (control, pondering))
    losses = {name: trained.losses[-1] for name, trained in models.items()}
    losses |= {"base": begun[-1], "converted": converted[-1]}
    lowest = {name: trained.lowest_loss for name, trained in models.items() if name != "base"}
    rates = {name: trained.runs[-1].tokens_per_second for name, trained in models.items()}
    trained_on = schedule.text_blocks * size.block_size
    results = {
        "output": str(setup.options.output),
        "held_out_loss": losses,
        "loss_difference": losses["pondering"] - losses["control"],
        "lowest_loss": lowest,
        "unit": "nats per token" if setup.base_is_given else "nats per byte",
        "bits_per_byte": {name: loss / math.log(2) / setup.bytes_per_token for name, loss in losses.items()},
        "loss_of_each_pass": {"converted": converted, "pondering": pondering.losses},
        "parameters": {name: trained.parameters for name, trained in models.items()},
        "tokens": {name: trained.tokens for name, trained in models.items()},
        "left_out": outcome.left_out,
        # Of training on, without that of the base, by the control's.
        "arithmetic": {name: models[name].last_operations / control.last_operations for name in lowest},
        "tokens_per_second": {**rates, "ratio": rates["control"] / rates["pondering"]},
        "samples": samples,
        "passage": None if look is None else _passage(look),
        "drafts": checked.pop("drafts"),
        "checkpoint": checked,
        "base": _describe_base(setup, schedule),
        "text": {
            "source": corpus.source,
            "held_out": corpus.held_out_rule,
            "tokens": trained_on,
            "times_seen": size.tokens(schedule.base_steps + schedule.steps) / trained_on,
            "more_tokens": None if setup.more_text is None else setup.more_text.rows.numel(),
            "held_out_tokens": setup.watched.rows.numel(),
            "bytes_per_token": setup.bytes_per_token,
        },
        "settings": {
            **setup.options.pondering_fields,
            "seed": setup.options.seed,
            "quick": setup.options.quick,
            "base_steps": schedule.base_steps,
            "steps": schedule.steps,
            "longer_steps": schedule.longer_steps,
            "text_blocks": schedule.text_blocks,
            "share_of_schedule": schedule.share,
            "batch_size": size.batch_size,
            "block_size": size.block_size,
            "tokens": size.tokens(schedule.steps),
            "learning_rate": setup.learning_rate,
            "threads": schedule.threads,
        },
        "repeat": _repeat_command(setup.options, schedule),
        # Of each model: tokens and operations so far, those of its base included, and the held-out loss.
        "curves": {name: trained.points() for name, trained in models.items()},
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
        if field.name in ("output", "overwrite", *_SCHEDULED) or value == field.default:
            continue
        values = [] if value is True else value if isinstance(value, (list, tuple)) else [value]
        words += [f"--{field.name.replace('_', '-')}", *map(str, values)]
    for name in _SCHEDULED:
        if getattr(schedule, name):  # a base that was given has no steps
            words += [f"--{name.replace('_', '-')}", str(getattr(schedule, name))]
    return shlex.join(words)


def _passage(look):
    """How probable each pass finds each token of a passage, after those before it."""
    probabilities = look.readings.probability[:, : _PASSAGE_TOKENS - 1].tolist()
    return {"tokens": look.tokens[:_PASSAGE_TOKENS], "probabilities": probabilities}


def _describe_base(setup, schedule):
    return {
        "name": setup.options.base or "made and trained by the demo",
        "model_type": setup.base.config.model_type,
        "parameters": setup.base.num_parameters(),
        "tokens": None if setup.base_is_given else setup.size.tokens(schedule.base_steps),
        "learning_rate": None if setup.base_is_given else setup.size.learning_rate,
    }


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
