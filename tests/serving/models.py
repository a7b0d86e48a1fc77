"""Tiny pondering checkpoints of the kind that vLLM can run, and what transformers' `generate` makes of them."""

import tiny
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast

from ponder_hf import PonderingForCausalLM


NUM_PROMPTS, NUM_NEW_TOKENS = 16, 64
# vLLM's attention on CPUs takes heads of 32, 64 or 128 numbers. No token ends a text: vLLM and transformers differ in
# how one goes on behind it.
_COMMON = {"hidden_size": 64, "num_attention_heads": 2, "max_position_embeddings": 640, "eos_token_id": None}
_GROUPED = {**_COMMON, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
CHANGES = {
    "gemma2": {**_GROUPED, "query_pre_attn_scalar": 32, "sliding_window": 32},
    "gemma3_text": {**_GROUPED, "query_pre_attn_scalar": 32, "sliding_window": 32},
    "gpt2": {"n_embd": 64, "n_head": 2, "n_positions": 640, "eos_token_id": None},
    "gpt_neox": _COMMON,
    "granite": {**_COMMON, "num_key_value_heads": 2},
    "llama": _GROUPED,
    "mistral": {**_GROUPED, "sliding_window": 32},
    "olmo2": {**_COMMON, "num_key_value_heads": 2},
    "opt": {**_COMMON, "word_embed_proj_dim": 48},
    "phi": {**_COMMON, "num_key_value_heads": 2},
    "qwen2": {**_COMMON, "hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2},
    "qwen3": _GROUPED,
}

# Mixtures of experts, whose routers choose anew in every pass.
_EXPERTS = {**tiny.CONFIGS["mixtral"], **_GROUPED, "num_hidden_layers": 2}
EXPERTS = {
    "mixtral": {**_EXPERTS, "num_local_experts": 4},
    "olmoe": {**_EXPERTS, **_COMMON, "num_experts": 4},
    "qwen2_moe": {
        **_EXPERTS,
        **CHANGES["qwen2"],
        "num_experts": 4,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
    },
}


def _base_model(model_type, changes):
    if model_type in tiny.CONFIGS:
        return tiny.base_model(model_type, scale=4.0, **changes)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4.0)
    return model


def make_checkpoint(folder, model_type="llama", base_changes=None, **fields):
    """Write a pondering model whose passes all matter. Returns it.

    Matrices are far larger than transformers initialises them, and biases and norms are no zeros and ones.
    """
    base = _base_model(model_type, {**(CHANGES | EXPERTS)[model_type], **(base_changes or {})})
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in base.parameters():
            if parameter.ndim == 1:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    base.set_attn_implementation("eager")  # the default leaves the caps of Gemma 2 on scores out
    model = PonderingForCausalLM.from_base(base, **fields).eval()
    if model.pondering_gate is not None:
        weight = model.pondering_gate.weight
        with torch.no_grad():
            if weight.ndim == 1:
                weight.uniform_(0.5, 1.5, generator=generator)
            else:  # neither symmetric nor near to the identity
                weight.normal_(std=weight.shape[0] ** -0.5, generator=generator)
    model.save_pretrained(folder)
    return model


def add_byte_tokenizer(folder):
    """Write a tokenizer with a token for each byte, 259 in all with its special ones, and a chat template."""
    vocabulary = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(vocabulary)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    fast.chat_template = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    fast.save_pretrained(folder)


def ragged_prompts(count=NUM_PROMPTS, longest=40):
    """Lists of token ids of different lengths, the first of one token."""
    lengths = torch.linspace(1, longest, count).int().tolist()
    return [tiny.token_ids(length, seed=seed).tolist() for seed, length in enumerate(lengths)]


@torch.no_grad()
def generated(model, prompts, num_new_tokens=NUM_NEW_TOKENS, **arguments):
    """What `generate` continues prompts with, greedily.

    Returns:
        The new tokens, a list for each prompt, and their log-probabilities, a tensor (prompts, new tokens).
    """
    ids, mask = tiny.left_padded([torch.tensor(prompt) for prompt in prompts])
    output = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=num_new_tokens,
        do_sample=False,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
        **arguments,
    )
    tokens = output.sequences[:, ids.shape[1] :]
    log_probabilities = torch.stack(output.logits, dim=1).log_softmax(-1)
    return tokens.tolist(), log_probabilities.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
