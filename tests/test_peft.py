"""PEFT on a pondering model: the backbone's own target names, saving, loading, merging, and wrapped heads."""

import pytest
import tiny
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from ponder_hf import PonderingForCausalLM
from ponder_hf.training.lora import default_target_modules


TARGETS = {"gpt2": ["c_attn"], "gpt_neox": ["query_key_value"], "llama": ["q_proj", "v_proj"]}


def with_lora(model_type, **settings):
    torch.manual_seed(0)
    model = tiny.pondering_model(model_type, pondering_steps=2, pondering_top_k=9)
    targets = {"target_modules": TARGETS[model_type], **settings}
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, **targets))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:  # one of each pair starts at zero, and the adapter would do nothing
            torch.nn.init.normal_(parameter, std=0.1)
    return adapted.eval()


@pytest.mark.parametrize("model_type", TARGETS)
def test_the_adapter_acts_in_every_pass_and_trains(model_type):
    adapted = with_lora(model_type).train()
    input_ids = tiny.token_ids(2, 9)
    calls = []
    for name, module in adapted.named_modules():
        if name.endswith("lora_A.default"):
            module.register_forward_hook(lambda *_: calls.append(1))
    loss = adapted(input_ids=input_ids, labels=input_ids).loss
    assert len(calls) == 3 * 2 * len(TARGETS[model_type])
    loss.backward()
    gradients = {name: p.grad for name, p in adapted.named_parameters() if p.requires_grad}
    assert gradients
    assert all("lora_" in name and gradient.abs().max() > 0 for name, gradient in gradients.items())
    assert adapted.get_base_model().pondering_kernel == "top_k"


@pytest.mark.parametrize("model_type", TARGETS)
def test_adapter_saved_loaded_and_merged(tmp_path, model_type):
    adapted = with_lora(model_type)
    input_ids = tiny.token_ids(2, 9)
    expected = adapted(input_ids).logits
    base = tiny.pondering_model(model_type, pondering_steps=2, pondering_top_k=9)
    base.load_state_dict(
        {k.replace(".base_layer", ""): v for k, v in adapted.get_base_model().state_dict().items() if "lora_" not in k}
    )
    base.save_pretrained(tmp_path / "base")
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    adapted.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(PonderingForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    torch.testing.assert_close(loaded(input_ids).logits, expected)
    automatic = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(automatic(input_ids).logits, expected)
    merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert type(again) is PonderingForCausalLM
    torch.testing.assert_close(again(input_ids).logits, expected)


@pytest.mark.parametrize("wrapped", ["head", "embedding"])
def test_an_adapted_head_or_embedding_is_asked_through_its_module(wrapped):
    targets = {"head": ["lm_head"], "embedding": ["embed_tokens"]}[wrapped]
    adapted = with_lora("llama", target_modules=targets)
    model = adapted.get_base_model()
    assert model.pondering_kernel == "plain"
    input_ids = tiny.token_ids(2, 9)
    before = adapted(input_ids).logits
    adapted(input_ids, labels=input_ids).loss.backward()
    assert all(p.grad.abs().max() > 0 for p in adapted.parameters() if p.requires_grad)
    merged = adapted.merge_and_unload()
    assert merged.pondering_kernel == "top_k"
    torch.testing.assert_close(merged(input_ids).logits, before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model_type", tiny.SPINE)
def test_default_targets_are_what_peft_takes_for_the_backbone(model_type):
    model = tiny.pondering_model(model_type, pondering_steps=1)
    targets = default_target_modules(model.config.base_config)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=targets))
    found = {name.removeprefix("base_model.model.backbone.") for name in adapted.targeted_module_names}
    if targets == "all-linear":
        assert {name.rpartition(".")[2] for name in found} >= {"o_proj", "down_proj"}
    else:
        plain = get_peft_model(tiny.base_model(model_type), LoraConfig(task_type="CAUSAL_LM"))
        assert {name.removeprefix("backbone.") for name in found} == set(plain.targeted_module_names)
    assert not any(
        model.get_output_embeddings() is module for module in adapted.modules() if hasattr(module, "lora_A")
    )
