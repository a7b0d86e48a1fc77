"""What a pondering class says of itself against what the backbone really does; transformers acts on these words."""

import re

import pytest
import tiny
import torch
from transformers import AttentionInterface, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

from ponder_hf import PonderingForCausalLM


@pytest.mark.parametrize("model_type", tiny.SPINE)
def test_plans_of_parallelism_name_modules_that_are_there(model_type):
    """Each rule applies to a module or a parameter, and the backbone's rules to the same ones."""
    model = tiny.pondering_model(model_type)
    names = {name for name, _ in (*model.named_modules(), *model.named_parameters())}
    plain = {name for name, _ in (*model.backbone.named_modules(), *model.backbone.named_parameters())}
    for plan in (model._tp_plan or {}, model._pp_plan or {}):
        for rule in plan:
            pattern = re.compile(re.escape(rule).replace(r"\*", r"\d+"))
            found = {name for name in names if pattern.fullmatch(name)}
            own = re.compile(re.escape(rule.removeprefix("backbone.")).replace(r"\*", r"\d+"))
            expected = {f"backbone.{name}" for name in plain if own.fullmatch(name)}
            assert found == expected
            if "lm_head" not in rule:  # GPT-NeoX's plan has the name that its head has in newer releases
                assert found, rule


@pytest.mark.parametrize("model_type", tiny.SPINE)
def test_a_layer_is_never_split(model_type):
    """accelerate keeps every module of these classes on one device, here where half of the model does not fit."""
    from accelerate import infer_auto_device_map
    from accelerate.utils import compute_module_sizes

    model = tiny.pondering_model(model_type)
    size = compute_module_sizes(model)[""]
    places = infer_auto_device_map(
        model, max_memory={0: size // 2, "cpu": 2 * size}, no_split_module_classes=model._no_split_modules
    )
    for name, module in model.named_modules():
        if type(module).__name__ in model._no_split_modules:
            inside = [place for key, place in places.items() if key == name or key.startswith(f"{name}.")]
            assert len(set(inside)) <= 1, name


@pytest.mark.parametrize("field", ["_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"])
def test_what_stays_in_float32(field, tmp_path, monkeypatch):
    """Loaded in half precision, as the backbone by itself is."""
    model = tiny.pondering_model("llama", pondering_steps=1)
    model.save_pretrained(tmp_path / "pondering")
    model.backbone.save_pretrained(tmp_path / "plain")
    monkeypatch.setattr(LlamaForCausalLM, field, {"norm"})
    loaded = PonderingForCausalLM.from_pretrained(tmp_path / "pondering", dtype=torch.float16)
    plain = LlamaForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float16)
    assert {name: each.dtype for name, each in loaded.backbone.named_parameters()} == {
        name: each.dtype for name, each in plain.named_parameters()
    }
    for name, parameter in loaded.named_parameters():
        assert parameter.dtype == (torch.float32 if "norm" in name else torch.float16), name


@pytest.mark.parametrize("model_type", tiny.SPINE)
def test_an_attention_of_ones_own_is_called_in_every_pass(model_type, monkeypatch):
    changes = {"attn_logit_softcapping": None} if model_type == "gemma2" else {}  # sdpa has no cap
    model = tiny.pondering_model(model_type, base_changes=changes, pondering_steps=2)
    ids = tiny.token_ids(2, 9)
    expected, calls = model(ids).logits, []

    def counted(*arguments, **settings):
        calls.append(1)
        return sdpa_attention_forward(*arguments, **settings)

    AttentionInterface.register("counted", counted)
    AttentionMaskInterface.register("counted", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    assert model._supports_attention_backend
    model.set_attn_implementation("counted")
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert len(calls) == 3 * 2  # passes, layers


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gpt_neox"])
def test_a_class_that_says_so_compiles_without_breaks(model_type):
    model = tiny.pondering_model(model_type, pondering_steps=1)
    assert model._can_compile_fullgraph == model.backbone._can_compile_fullgraph
    ids = tiny.token_ids(1, 6)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits)
