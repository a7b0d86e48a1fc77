"""Try to ponder with every causal language model of transformers, at tiny size, and say what came of it.

Prints a Markdown table: a backbone is held against itself (verify_backbone), then against a plain pondering loop that
calls its own forward pass, then cached generation against recomputation.
"""

import argparse
import dataclasses

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ponder_hf import PonderingConfig, PonderingError, PonderingForCausalLM
from ponder_hf.modeling.pondering_backbone import TESTED, embedding_table


TINY = {
    "vocab_size": 131,
    "hidden_size": 32,
    "n_embd": 32,
    "d_model": 32,
    "num_hidden_layers": 2,
    "n_layer": 2,
    "n_layers": 2,
    "num_layers": 2,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rotary_dim": 8,
    "intermediate_size": 64,
    "ffn_dim": 64,
    "moe_intermediate_size": 32,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "max_position_embeddings": 64,
    "n_positions": 64,
    "max_seq_len": 64,
    "sliding_window": 8,
    "word_embed_proj_dim": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "is_decoder": True,
}


def tiny_config(model_type):
    """The configuration of a tiny model of this type, in float32."""
    config_class = CONFIG_MAPPING[model_type]
    names = {field.name for field in dataclasses.fields(config_class)} | set(config_class.attribute_map)
    fields = {name: value for name, value in TINY.items() if name in names}
    if "kv_lora_rank" in names:  # latent attention has no grouped queries
        fields["num_key_value_heads"] = 4
    if model_type == "gpt_neo":
        fields["attention_types"] = [[["global", "local"], 1]]
    return config_class(**fields)


def plain_loop(model, input_ids, num_steps):
    """Pondering by nothing but the backbone's own forward pass: (B, T, V)."""
    backbone = model.backbone
    table = embedding_table(backbone)
    hidden_inputs = backbone.get_input_embeddings()(input_ids)
    for _ in range(num_steps):
        logits = backbone(inputs_embeds=hidden_inputs, use_cache=False).logits
        hidden_inputs = hidden_inputs + logits.softmax(-1) @ table
    return backbone(inputs_embeds=hidden_inputs, use_cache=False).logits


def first_line(error):
    return f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"


def try_backbone(model_type):
    """One line of the table: (verdict, detail)."""
    input_ids = torch.randint(3, 131, (2, 12), generator=torch.Generator().manual_seed(0))
    try:
        config = tiny_config(model_type)
    except Exception as error:  # a configuration of its own kind: nothing of pondering has run yet
        return "not tried", f"no tiny configuration: {first_line(error)}"
    torch.manual_seed(0)
    try:
        model = PonderingForCausalLM(PonderingConfig(config, pondering_steps=2)).eval()
    except PonderingError as error:
        reason = str(error).split("cannot ponder: ")[-1]
        if "does not run" in reason:
            try:
                AutoModelForCausalLM.from_config(config).eval()(input_ids=input_ids)
            except Exception as plain_error:  # nor does the plain model at this size: not pondering's doing
                return "not tried", f"no tiny model: {first_line(plain_error)}"
        return "refused", reason
    except Exception as error:
        return "not tried", f"no tiny model: {first_line(error)}"
    try:
        with torch.no_grad():
            difference = (model(input_ids).logits - plain_loop(model, input_ids, 2)).abs().max().item()
    except Exception as error:
        return "wrong", first_line(error)
    if not difference < 1e-4:
        return "wrong", f"differs from a plain loop by {difference:.1e}"
    kwargs = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    try:
        same = torch.equal(
            model.generate(input_ids, use_cache=True, **kwargs), model.generate(input_ids, use_cache=False, **kwargs)
        )
    except Exception as error:
        return "no cache", first_line(error)
    return ("ponders", "") if same else ("no cache", "cached generation differs from recomputation")


def main(argv=None):
    """Print the table for the named model types, or for all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "model_types", nargs="*", default=sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES} - {PonderingConfig.model_type})
    )
    arguments = parser.parse_args(argv)
    transformers.logging.set_verbosity_error()
    print(f"transformers {transformers.__version__}, torch {torch.__version__}\n")
    print("| model_type | in the test suite | verdict | detail |\n| --- | --- | --- | --- |")
    for model_type in arguments.model_types:
        verdict, detail = try_backbone(model_type)
        print(f"| {model_type} | {'yes' if model_type in TESTED else ''} | {verdict} | {detail} |", flush=True)


if __name__ == "__main__":
    main()
