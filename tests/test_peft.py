"""PEFT on a pondering model: the backbone's own target names, saving, loading, merging, and wrapped heads."""

import copy
import json

import elsewhere
import pytest
import tiny
import torch
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    MultitaskPromptTuningConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from ponder_hf import PonderingError, PonderingForCausalLM
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


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_trained_tokens_of_a_tied_embedding_merge_into_both(model_type):
    """PEFT asks the outermost model which weights are one."""
    changes = {"tie_word_embeddings": True}
    model = tiny.pondering_model(model_type, base_changes=changes, pondering_steps=2)
    settings = {"target_modules": TARGETS[model_type], "trainable_token_indices": [5, 9], "init_lora_weights": False}
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, **settings)).eval()
    torch.nn.init.normal_(adapted.get_input_embeddings().token_adapter.trainable_tokens_delta["default"])
    input_ids = tiny.token_ids(2, 9)
    input_ids[:, 3] = 5
    before = adapted(input_ids).logits
    merged = adapted.merge_and_unload()
    assert merged.get_output_embeddings().weight is merged.get_input_embeddings().weight
    torch.testing.assert_close(merged(input_ids).logits, before, rtol=1e-4, atol=1e-4)


def test_gradient_checkpointing_is_refused_with_activated_lora():
    settings = {"target_modules": TARGETS["llama"], "alora_invocation_tokens": [1]}
    adapted = get_peft_model(tiny.pondering_model("llama", pondering_steps=2), LoraConfig(**settings))
    with pytest.raises(ValueError, match="does not go with activated LoRA"):
        adapted.gradient_checkpointing_enable({"use_reentrant": True})
    assert not adapted.is_gradient_checkpointing
    plain = get_peft_model(tiny.pondering_model("llama", pondering_steps=0), LoraConfig(**settings))
    plain.gradient_checkpointing_enable()  # with one pass there is one backward pass


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


def adapter_on_disk(place, model_type, base_changes=None, **settings):
    """A pondering checkpoint, and beside it an adapter of random weights: (PEFT model, adapter's folder)."""
    base = tiny.pondering_model(model_type, base_changes=base_changes, pondering_steps=2, pondering_gate="zero_init")
    torch.nn.init.constant_(base.pondering_gate.weight, 0.3)
    base.save_pretrained(place / "base")
    targets = {"target_modules": TARGETS[model_type], "fan_in_fan_out": model_type == "gpt2", **settings}
    model = PonderingForCausalLM.from_pretrained(place / "base")
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, **targets))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(place / "adapter")
    return adapted.eval(), place / "adapter"


# Loads an adapter, merges and saves. Arguments: the adapter, where to save, results.
LOAD_AND_MERGE = """
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import save_file

adapter, merged, results = sys.argv[1:]
model = AutoPeftModelForCausalLM.from_pretrained(adapter, trust_remote_code=True)
ids = torch.arange(3, 27).view(2, 12)
whole = model.merge_and_unload() if merged != "none" else model
save_file({"logits": whole(input_ids=ids).logits.detach()}, results)
if merged != "none":
    whole.save_pretrained(merged)
"""


@pytest.mark.slow
def test_an_adapter_loads_and_merges_where_ponder_hf_is_not(tmp_path):
    adapted, adapter = adapter_on_disk(tmp_path, "gpt2", modules_to_save=["pondering_gate"])
    expected = adapted(torch.arange(3, 27).view(2, 12)).logits
    for name, merged in (("loaded", "none"), ("merged", tmp_path / "merged")):
        elsewhere.run(LOAD_AND_MERGE, tmp_path / f"home of {name}", adapter, merged, tmp_path / name)
        torch.testing.assert_close(load_file(tmp_path / name)["logits"], expected, rtol=1e-4, atol=1e-5)


def test_a_merged_model_keeps_code_and_auto_map(tmp_path):
    adapted, adapter = adapter_on_disk(tmp_path, "llama")
    expected = adapted(tiny.token_ids(2, 9)).logits
    for index, model in enumerate((adapted, AutoPeftModelForCausalLM.from_pretrained(adapter))):
        folder = tmp_path / f"merged {index}"
        model.merge_and_unload().save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        assert config["auto_map"] == json.loads((tmp_path / "base" / "config.json").read_text())["auto_map"]
        assert config["architectures"] == ["PonderingForCausalLM"]
        assert {path.name for path in folder.glob("*.py")} == {path.name for path in (tmp_path / "base").glob("*.py")}
        loaded = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        torch.testing.assert_close(loaded(tiny.token_ids(2, 9)).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`:UserWarning")
def test_head_and_embeddings_are_trained_and_saved_whole(tmp_path, tied):
    whole = {"modules_to_save": ["embed_tokens", "lm_head"]}
    adapted, adapter = adapter_on_disk(tmp_path, "llama", {"tie_word_embeddings": tied}, **whole)
    input_ids = tiny.token_ids(2, 9)
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    adapted.train()(input_ids=input_ids, labels=input_ids).loss.backward()
    head, embedding = adapted.get_base_model().get_output_embeddings(), adapted.get_base_model().get_input_embeddings()
    assert head.weight.grad.abs().max() > 0
    assert embedding.weight.grad.abs().max() > 0
    optimizer.step()
    expected = adapted.eval()(input_ids).logits
    adapted.save_pretrained(adapter)
    loaded = AutoPeftModelForCausalLM.from_pretrained(adapter)
    torch.testing.assert_close(loaded(input_ids).logits, expected)
    loaded.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(merged(input_ids).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "settings", [{"target_modules": "all-linear"}, {"use_dora": True}], ids=["all-linear", "DoRA"]
)
def test_other_kinds_of_adapters_act_in_every_pass_and_merge(settings):
    adapted = with_lora("llama", **settings)
    model = adapted.get_base_model()
    assert model.pondering_kernel == "top_k"  # "all-linear" leaves the head alone
    input_ids = tiny.token_ids(2, 9)
    expected = adapted(input_ids).logits
    with adapted.disable_adapter():
        assert (adapted(input_ids).logits - expected).abs().max() > 1e-2
    adapted.train()(input_ids=input_ids, labels=input_ids).loss.backward()
    assert all(p.grad.abs().max() > 0 for p in adapted.parameters() if p.requires_grad)
    torch.testing.assert_close(adapted.eval().merge_and_unload()(input_ids).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("reentrant", [False, True], ids=["not reentrant", "reentrant"])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant):
    adapted = with_lora("llama").train()
    input_ids = tiny.token_ids(2, 9)

    def gradients():
        adapted.zero_grad()
        adapted(input_ids=input_ids, labels=input_ids).loss.backward()
        return {name: p.grad.clone() for name, p in adapted.named_parameters() if p.requires_grad}

    expected = gradients()
    model = adapted.get_base_model()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    found = gradients()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=name)


class QuantisedLinear(torch.nn.Module):
    """A stand-in for the layers of bitsandbytes and others: int8 rows and their scales, and a `weight` of no use."""

    def __init__(self, linear):
        super().__init__()
        self.scale = linear.weight.detach().abs().amax(1) / 127
        rows = (linear.weight.detach() / self.scale[:, None]).round().to(torch.int8)
        self.weight = torch.nn.Parameter(rows, requires_grad=False)

    def forward(self, hidden_states):
        return torch.nn.functional.linear(hidden_states, self.weight.to(hidden_states.dtype)) * self.scale


def test_a_quantised_base_ponders_and_trains_through_its_modules():
    torch.manual_seed(0)
    model = tiny.pondering_model("llama", base_changes={"tie_word_embeddings": False}, pondering_top_k=9)
    reference = copy.deepcopy(model)
    head = reference.get_output_embeddings()
    model.set_output_embeddings(QuantisedLinear(model.get_output_embeddings()))
    quantised = model.get_output_embeddings()
    with torch.no_grad():
        head.weight.copy_(quantised.weight * quantised.scale[:, None])
    assert model.pondering_kernel == "plain"
    assert reference.pondering_kernel == "top_k"
    input_ids = tiny.token_ids(2, 9)
    output, expected = model(input_ids, labels=input_ids), reference(input_ids, labels=input_ids)
    torch.testing.assert_close(output.logits, expected.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(output.loss, expected.loss, rtol=1e-4, atol=1e-4)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"])).train()
    adapted(input_ids=input_ids, labels=input_ids).loss.backward()
    assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)


PROMPTS = {
    "prompt tuning": PromptTuningConfig,
    "p-tuning": PromptEncoderConfig,
    "multitask": MultitaskPromptTuningConfig,
}


def with_virtual_tokens(model, kind, **settings):
    """A model with four virtual tokens, the same for every call, and the arguments that its kind needs."""
    extra = {"num_tasks": 2} if kind is MultitaskPromptTuningConfig else {}
    torch.manual_seed(3)
    adapted = get_peft_model(model, kind(task_type="CAUSAL_LM", num_virtual_tokens=4, **extra, **settings))
    return adapted, {"task_ids": torch.tensor([0, 1])} if extra else {}


def greedily(adapted, ids, count, **arguments):
    """Tokens one by one, each from a pass over the whole text without a cache."""
    for _ in range(count):
        with torch.no_grad():
            logits = adapted(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **arguments).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
    return ids


@pytest.mark.parametrize("kind", PROMPTS.values(), ids=PROMPTS)
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
@pytest.mark.parametrize("steps", [0, 2])
def test_virtual_tokens_are_pondered_over_like_any_others(model_type, kind, steps):
    model = tiny.pondering_model(model_type, pondering_steps=steps)
    backbone, ids = model.to_base(), tiny.token_ids(2, 6)
    mask = torch.ones_like(ids)
    adapted, arguments = with_virtual_tokens(model, kind)
    adapted.eval()
    with torch.no_grad():
        prompts = adapted.get_prompt(batch_size=2, **arguments)
        table = backbone.get_input_embeddings().weight
        inputs = torch.cat([prompts, table[ids]], dim=1)
        for _ in range(steps):
            inputs = inputs + backbone(inputs_embeds=inputs, use_cache=False).logits.softmax(-1) @ table
        expected = backbone(inputs_embeds=inputs, use_cache=False).logits
    output = adapted(input_ids=ids, attention_mask=mask, labels=ids, **arguments)
    torch.testing.assert_close(output.logits, expected, rtol=1e-4, atol=1e-4)
    trained = adapted.train()(input_ids=ids, attention_mask=mask, labels=ids, **arguments)
    torch.testing.assert_close(trained.loss, output.loss, rtol=1e-4, atol=1e-5)
    trained.loss.backward()
    assert all(p.grad.abs().max() > 0 for p in adapted.parameters() if p.requires_grad and p.grad is not None)
    adapted.eval()
    generated = adapted.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=5, do_sample=False, eos_token_id=None, **arguments
    )
    assert torch.equal(generated[:, -5:], greedily(adapted, ids, 5, **arguments)[:, -5:])


def test_a_prefix_for_too_few_slots_says_how_many_it_needs():
    adapted, _ = with_virtual_tokens(tiny.pondering_model("llama", pondering_steps=2), PrefixTuningConfig)
    ids = tiny.token_ids(2, 6)
    with pytest.raises(PonderingError, match="by PEFT's prefix tuning, which needs num_layers=6"):
        adapted(input_ids=ids, attention_mask=torch.ones_like(ids))


# PEFT 0.21 gives the plain model its prefix under the name from before transformers 5.24.
@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mistral", "gemma2"])
@pytest.mark.parametrize("steps", [0, 2])
def test_a_prefix_has_keys_and_values_for_every_pass(model_type, steps, use_cache):
    model = tiny.pondering_model(model_type, pondering_steps=steps)
    model.config.use_cache = use_cache  # False is what Trainer sets
    plain = copy.deepcopy(model.to_base())
    ids = tiny.token_ids(2, 6)
    mask = torch.ones_like(ids)
    adapted, _ = with_virtual_tokens(model, PrefixTuningConfig, num_layers=2 * (steps + 1))
    adapted.eval()
    with torch.no_grad():
        output = adapted(input_ids=ids, attention_mask=mask, labels=ids)
        if steps == 0:
            prefix, _ = with_virtual_tokens(plain, PrefixTuningConfig)
            prefix.prompt_encoder.load_state_dict(adapted.prompt_encoder.state_dict())
            expected = prefix.eval()(input_ids=ids, attention_mask=mask).logits
            torch.testing.assert_close(output.logits, expected, rtol=1e-4, atol=1e-5)
        assert (output.logits - model(ids).logits).abs().max() > 1e-3
    trained = adapted.train()(input_ids=ids, attention_mask=mask, labels=ids)
    torch.testing.assert_close(trained.loss, output.loss, rtol=1e-4, atol=1e-5)
    trained.loss.backward()
    (gradient,) = [p.grad for p in adapted.parameters() if p.requires_grad]
    assert (gradient.view(4, 2 * (steps + 1), -1).abs().amax((0, 2)) > 0).all()  # of each slot
    adapted.eval()
    generated = adapted.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=5, do_sample=False, eos_token_id=None
    )
    assert torch.equal(generated[:, -5:], greedily(adapted, ids, 5)[:, -5:])


@pytest.mark.parametrize("kind", [*PROMPTS.values(), PrefixTuningConfig], ids=[*PROMPTS, "prefix tuning"])
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("steps", [0, 2])
def test_virtual_tokens_are_there_once_in_every_step_of_generation(kind, use_cache, steps):
    # PEFT 0.21 looks for the cache under its name before transformers 5.24, and sees none there of its own accord.
    model = tiny.pondering_model("gpt2", pondering_steps=steps)
    for weight in model.parameters():
        weight.data.mul_(6.0)  # so that each token depends on all before it
    is_prefix = kind is PrefixTuningConfig
    adapted, arguments = with_virtual_tokens(model, kind, **({"num_layers": 2 * (steps + 1)} if is_prefix else {}))
    torch.nn.init.normal_(adapted.prompt_encoder["default"].embedding.weight, std=1.0)
    adapted.eval()
    ids = tiny.token_ids(2, 6)
    prompt = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **arguments}
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "use_cache": use_cache}
    expected = greedily(adapted, ids, 6, **arguments)
    assert len(set(expected[:, -6:].flatten().tolist())) > 4
    assert not torch.equal(expected, model.generate(ids, attention_mask=torch.ones_like(ids), **settings))
    assert torch.equal(adapted.generate(**prompt, **settings), expected)
    if use_cache:
        exits = {"pondering_exit_criterion": "kl", "pondering_exit_threshold": 1e-30}
        assert torch.equal(adapted.generate(**prompt, **settings, **exits), expected)
