"""Checkpoints as the library writes them today, with what they compute."""

import tiny
import torch
from safetensors.torch import save_file

from compat import abilities


# By model type: what differs between backbones (ties, projections, windows, names on disk) and between configurations.
CHECKPOINTS = {
    "gpt2": {"embedding_scale": 2.0, "intermediate_loss_weight": 0.3},
    "gpt_neox": {"pondering_gate": "zero_init", "pondering_top_k": 20},
    "llama": {"draft_heads": 2},
    "mistral": {"pondering_temperature": 0.7, "input_scale": 1.5},
    "opt": {},
}


def write(folder, model_type, base_changes=None):
    """Write a tiny checkpoint to `folder` / model_type, and what it computes beside it, to model_type.safetensors."""
    torch.manual_seed(0)
    fields = CHECKPOINTS[model_type]
    model = tiny.pondering_model(model_type, base_changes=base_changes, pondering_steps=2, **fields)
    with torch.no_grad():
        if model.pondering_gate is not None:
            model.pondering_gate.weight.fill_(0.5)  # a new gate is shut
        if model.draft_heads is not None:
            for parameter in model.draft_heads.parameters():
                parameter.normal_(std=0.1)
    model.save_pretrained(folder / model_type)
    measured = {}
    for ability in abilities.MEASURED:
        measured |= abilities.measure(model, ability)
    save_file(measured, folder / f"{model_type}.safetensors")
