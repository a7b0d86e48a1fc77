"""Tiny random models for the tests: one configuration a backbone, small enough to run in milliseconds."""

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from ponder_hf import PonderingForCausalLM


VOCAB_SIZE = 131

_COMMON = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GROUPED = {**_COMMON, "num_key_value_heads": 2}
_GPT2 = {"vocab_size": VOCAB_SIZE, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}
_EXPERTS = {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}
_GEMMA = {**_GROUPED, "head_dim": 8, "sliding_window": 8}

# What is set beyond the common sizes is what makes a backbone particular: its own scales, caps, ties and windows.
CONFIGS = {
    "cohere": {**_GROUPED, "logit_scale": 0.25},
    "falcon": {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    "gemma": {**_GROUPED, "head_dim": 8},
    "gemma2": {**_GEMMA, "final_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
    "gemma3_text": {**_GEMMA, "final_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
    "glm": {**_GROUPED, "head_dim": 8},
    "gpt2": {**_GPT2, "n_positions": 64, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0},
    "gpt_bigcode": {**_GPT2, "n_positions": 64},
    "gpt_neo": {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 4,
        "max_position_embeddings": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "gpt_neox": _COMMON,
    "gptj": {**_GPT2, "n_positions": 64, "rotary_dim": 8},
    "granite": {**_GROUPED, "embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.5},
    "llama": _GROUPED,
    "mistral": {**_GROUPED, "sliding_window": 8},
    "mixtral": _EXPERTS,
    "olmo": _GROUPED,
    "olmo2": _GROUPED,
    "opt": {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "word_embed_proj_dim": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "ffn_dim": 64,
        "max_position_embeddings": 64,
        "do_layer_norm_before": False,
        "dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    },
    "phi": _GROUPED,
    "phi3": _GROUPED,
    "qwen2": _GROUPED,
    "qwen3": {**_GROUPED, "head_dim": 8},
    "smollm3": _GROUPED,
    "stablelm": _GROUPED,
    "starcoder2": _GROUPED,
}
# The ones that the project promises by name.
SPINE = "gpt2 gpt_neox llama qwen2 qwen3 mistral phi opt gemma2 gemma3_text olmo2 granite".split()


def base_config(model_type, **changes):
    """The tiny configuration of a backbone, with some fields changed."""
    return CONFIG_MAPPING[model_type](**{**CONFIGS[model_type], **changes})


def base_model(model_type="gpt_neox", dtype=torch.float32, scale=3.0, **changes):
    """A tiny random backbone in evaluation mode.

    Matrices are `scale` times larger than transformers initialises them: at 0.02 every prediction is nearly uniform
    and a wrong pondering embedding would hide in rounding.
    """
    model = AutoModelForCausalLM.from_config(base_config(model_type, **changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(scale)
    return model.to(dtype)


def pondering_model(model_type="gpt_neox", dtype=torch.float32, base_changes=None, **fields):
    """A tiny random pondering model in evaluation mode."""
    return PonderingForCausalLM.from_base(base_model(model_type, dtype, **(base_changes or {})), **fields)


def token_ids(*shape, seed=0):
    """Random token ids of this shape, without the special ones."""
    return torch.randint(3, VOCAB_SIZE, shape, generator=torch.Generator().manual_seed(seed))


def plain_pondering(backbone, input_ids, steps, **kwargs):
    """Ten lines of pondering by nothing but the backbone's own forward pass: logits (B, T, V) of the last pass."""
    module = backbone.get_input_embeddings()
    table = module(torch.arange(module.num_embeddings))
    return plain_pondering_of(backbone, module(input_ids), table, steps, **kwargs)


def plain_pondering_of(backbone, hidden_inputs, table, steps, **kwargs):
    """The same of embeddings (B, T, d) and the table's rows (V, d)."""
    for _ in range(steps):
        logits = backbone(inputs_embeds=hidden_inputs, use_cache=False, **kwargs).logits
        hidden_inputs = hidden_inputs + logits.softmax(-1) @ table
    return backbone(inputs_embeds=hidden_inputs, use_cache=False, **kwargs).logits


def left_padded(rows, pad=0):
    """Ragged rows of ids as one left-padded batch: (input_ids, attention_mask), both (B, T)."""
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, width - len(row) :] = row
        mask[index, width - len(row) :] = 1
    return ids, mask
