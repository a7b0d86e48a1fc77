"""Weights of a model that is trained from scratch, as the method's authors initialise them.

Matrices are drawn from a normal distribution cut at three standard deviations, with std = sqrt(2 / (5 d)). Those that
write into the residual stream, the output projections of attention and MLP, are divided by sqrt(2 L (S + 1)), the
square root of how often the stream is written to in all passes. Biases are 0 and norms are what transformers makes
of them.
"""

import math

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ponder_hf.modeling import PonderingConfig, PonderingError, PonderingForCausalLM


_LLAMA = ("self_attn.o_proj", "mlp.down_proj")
# The modules of each backbone that write into the residual stream, by the end of their names.
OUTPUT_PROJECTIONS = {
    "gemma": _LLAMA,
    "gemma2": _LLAMA,
    "gemma3_text": _LLAMA,
    "gpt2": ("attn.c_proj", "mlp.c_proj"),
    "gpt_neox": ("attention.dense", "mlp.dense_4h_to_h"),
    "granite": _LLAMA,
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "olmo": _LLAMA,
    "olmo2": _LLAMA,
    "phi3": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "smollm3": _LLAMA,
    "stablelm": _LLAMA,
}
_CUT = 3.0  # in standard deviations


def check_initialisation(config: PonderingConfig) -> None:
    """Raise a PonderingError unless the backbone of this PonderingConfig is in OUTPUT_PROJECTIONS."""
    model_type = config.base_config.model_type
    if model_type not in OUTPUT_PROJECTIONS:
        raise PonderingError(
            f"the authors' initialisation is not known for {model_type!r}, only for {', '.join(OUTPUT_PROJECTIONS)}: "
            "use `initialisation='transformers'`"
        )


@torch.no_grad()
def initialise(model: PonderingForCausalLM) -> PonderingForCausalLM:
    """Draw the weights of a PonderingForCausalLM anew, from torch's random state, those of a gate as well.

    Raises:
        PonderingError: it is not known which matrices of this backbone are output projections.
    """
    config = model.config
    check_initialisation(config)
    outputs = OUTPUT_PROJECTIONS[config.base_config.model_type]
    std = math.sqrt(2 / (5 * config.hidden_size))
    output_std = std / math.sqrt(2 * config.num_hidden_layers * (config.pondering_steps + 1))
    for name, module in model.backbone.named_modules():
        if not isinstance(module, (nn.Linear, Conv1D, nn.Embedding)):
            continue
        chosen = output_std if name.endswith(outputs) else std
        nn.init.trunc_normal_(module.weight, std=chosen, a=-_CUT * chosen, b=_CUT * chosen)
        padding, bias = getattr(module, "padding_idx", None), getattr(module, "bias", None)
        if padding is not None:
            module.weight[padding].zero_()
        if bias is not None:
            nn.init.zeros_(bias)
    if model.pondering_gate is not None:
        model.pondering_gate.reset()
    model.tie_weights()
    return model
