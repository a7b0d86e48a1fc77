"""The gate's own group of parameters in an optimiser: a learning rate of its own, and no weight decay.

A gate of factors that starts at 0 hardly opens in a short training at the model's own rate, and weight decay pulls it
back. Random signs need no rate of their own, but should not decay either. A matrix needs none of this.
"""

import math
import os
from pathlib import Path

import torch
from torch import nn
from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from ponder_hf.modeling import PonderingError


# Times the model's learning rate, wherever factors from 0 are trained by this package. Measured: docs/evidence.md.
GATE_LEARNING_RATE_FACTOR = 30.0

_FACTOR = "gate_learning_rate_factor"  # marks the group in the optimiser, and so in its stored state
_OPTIMIZERS = ("optimizer.pt", "optimizer.bin")  # Trainer's names for the stored state; the second under FSDP


def trained_gate(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of the gate that learn, by their names; empty where there is none.

    They are found by name, within the wrappers of PEFT and FSDP, in compiled models and in those of a checkpoint's own
    code, too.
    """
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and "pondering_gate" in name.split(".")
    }


def default_factor(pondering_gate: str) -> float | None:
    """What the learning rate of this kind of gate is multiplied by; None: it is trained as any other parameter."""
    return {"zero_init": GATE_LEARNING_RATE_FACTOR, "random_signs": 1.0}.get(pondering_gate)


def check_factor(factor: float) -> None:
    """Raise a PonderingError unless this is a positive, finite number."""
    if not 0 < factor < math.inf:
        raise PonderingError(f"`gate_learning_rate_factor` must be > 0 and finite, got {factor}")


def gate_group(optimizer: torch.optim.Optimizer) -> dict | None:
    """The group of parameters that `separate_gate` has made, or None."""
    return next((group for group in optimizer.param_groups if _FACTOR in group), None)


def separate_gate(
    optimizer: torch.optim.Optimizer, model: nn.Module, factor: float = GATE_LEARNING_RATE_FACTOR
) -> torch.optim.Optimizer:
    """Move the gate of a pondering model into a group of its own, the last one, with its own learning rate.

    All other settings of the group are those of the group that had it, but weight decay is 0. Schedules that are made
    afterwards scale its learning rate as any other. PonderingTrainer does this by itself; for any other Trainer:

        trainer = Trainer(model, ...)
        separate_gate(trainer.create_optimizer(), model)
        trainer.train()

    Args:
        optimizer: one that has the gate's parameters.
        model: a pondering model with a gate, or what wraps it.
        factor: of the gate's learning rate to that of the group that had it; > 0.

    Returns:
        The optimiser.

    Raises:
        PonderingError: the model has no gate that learns, the optimiser does not have it in a group, it has been
            separated before, or a schedule has been made.
    """
    check_factor(factor)
    gate = {id(parameter) for parameter in trained_gate(model).values()}
    if not gate:
        raise PonderingError(
            "the model has no gate that learns: make it with `pondering_gate='zero_init'`, and under FSDP1 keep "
            "`use_orig_params` true"
        )
    groups = list(getattr(optimizer, "param_groups", ()))
    # LOMO steps within the backward pass, at one learning rate: it has groups, and never looks at them.
    held = {id(each) for group in groups for each in group["params"]} if not _is_lomo(optimizer) else set()
    if not gate <= held:
        raise _no_group(type(optimizer).__name__)
    if any(_FACTOR in group for group in groups):
        raise PonderingError("the gate has been given a group of its own already: separate it once")
    if any("initial_lr" in group for group in groups):
        raise PonderingError("a schedule of the learning rate has been made already: separate the gate before that")
    for group in groups:
        _move(optimizer, group, gate, factor)
    return optimizer


def check_optimizer_name(settings: TrainingArguments) -> None:
    """Raise a PonderingError where `optim` is one of those that have no groups of parameters."""
    name = OptimizerNames(settings.optim).value
    if "lomo" in name or "layerwise" in name:
        raise _no_group(name)


def _no_group(name):
    return PonderingError(
        f"the optimizer {name} has no group of parameters for the gate, which needs a learning rate of its own: "
        "choose an `optim` that is neither LOMO nor layer-wise, and name no optimizer in DeepSpeed's configuration"
    )


def _is_lomo(optimizer):
    return "lomo" in type(getattr(optimizer, "optimizer", optimizer)).__name__.lower()


def _move(optimizer, group, gate, factor):
    """Take what of the gate is in a group out of it, and add a group with that."""
    names = group.pop("param_names", None)  # of an optimiser that was given names
    members = list(zip(names, group["params"], strict=True)) if names else list(group["params"])
    is_gate = [id(parameter) in gate for parameter in group["params"]]
    kept = [member for member, moves in zip(members, is_gate, strict=True) if not moves]
    moved = [member for member, moves in zip(members, is_gate, strict=True) if moves]
    # A group that is left empty stays: the first one's learning rate is what Trainer logs.
    group["params"] = [member[1] for member in kept] if names else kept
    if names:
        group["param_names"] = [member[0] for member in kept]
    if moved:
        own = {"params": moved, "lr": group["lr"] * factor, "weight_decay": 0.0, _FACTOR: factor}
        optimizer.add_param_group({**group, **own})


def check_gate_in_checkpoint(checkpoint: str | os.PathLike) -> None:
    """Raise a PonderingError where the stored state of an optimiser has no group for the gate.

    Only whole states are looked at, not those that engines store in parts.
    """
    for name in _OPTIMIZERS:
        path = Path(checkpoint) / name
        if not path.is_file():
            continue
        groups = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["param_groups"]
        if not any(_FACTOR in group for group in groups):
            raise PonderingError(
                f"{checkpoint} cannot be resumed: its gate shares a group of the optimizer with other parameters, and "
                "now a gate has a learning rate of its own; start a new run with it as `source`"
            )
