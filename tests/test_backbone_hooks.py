"""What a class of transformers says about itself, and its own part in generation, hold for it as a backbone, too."""

import inspect

import pytest
import tiny
import torch
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, GenerationMixin
from transformers import PreTrainedModel as Plain

from ponder_hf import PonderingError, PonderingForCausalLM
from ponder_hf.modeling.modeling_pondering import _SAID_BY_CLASSES
from ponder_hf.modeling.pondering_generate_exits import PonderingExit


LIMIT = 16  # from here on the rotations of LONGROPE are others
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 4,
    "long_factor": [3.0] * 4,
    "short_mscale": 1.0,
    "long_mscale": 1.0,
    "original_max_position_embeddings": LIMIT,
}
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
EXITS = {"pondering_exit_criterion": "kl", "pondering_exit_threshold": 0.02}
_SMALL = tiny.CONFIGS["gpt_neox"]
_GPT = tiny.CONFIGS["gpt2"]
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "experts_implementation": "eager"}

# Classes with a part of their own in generation, and which part: all that transformers has in 5.0 to 5.24.
PREPARE_INPUTS = frozenset(
    "bamba cpmant ctrl falcon_h1 falcon_mamba gemma3 gemma4 gemma4_unified mamba mamba2 musicgen musicgen_melody "
    "nemotron_h openai-gpt phi3 phi4_multimodal phimoe reformer roc_bert xlm xlnet zamba zamba2".split()
)
OVERRIDES = {
    "prepare_inputs_for_generation": PREPARE_INPUTS,
    "_prepare_position_ids_for_generation": {"reformer"},
    "generate": {"musicgen", "musicgen_melody"},
    "_check_and_adjust_attn_implementation": {"hrm_text"},
}
# Those that can ponder, small. The others are multimodal, encoders, or keep a state: refused before they generate.
WITH_HOOKS = {
    "bloom": {"vocab_size": tiny.VOCAB_SIZE, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "ctrl": {**_GPT, "dff": 64, "n_positions": 64},
    "doge": {**_SMALL, "num_key_value_heads": 2},
    "hrm_text": _SMALL,
    "openai-gpt": {**_GPT, "n_positions": 64},
    "phi3": {**_SMALL, "rope_parameters": LONGROPE, "original_max_position_embeddings": LIMIT},
    "phimoe": {
        **_SMALL,
        **_EXPERTS,
        "num_key_value_heads": 4,
        "rope_parameters": LONGROPE,
        "original_max_position_embeddings": LIMIT,
    },
}
WITHOUT_DRAFTS = {
    "openai-gpt": "needs a cache, but model_type 'openai-gpt' keeps none",
    "phi3": "cannot follow model_type 'phi3' beyond 16 tokens, where its rotary embeddings change",
    "phimoe": "cannot follow model_type 'phimoe' beyond 16 tokens, where its rotary embeddings change",
}


def backbone(model_type, **changes):
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {model_type}")
    torch.manual_seed(0)
    config = CONFIG_MAPPING[model_type](**{**WITH_HOOKS.get(model_type, {}), **changes})
    model = AutoModelForCausalLM.from_config(config).eval().double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6)
    return model


def ragged_batch():
    # With float64_throughout: Bloom's eager attention makes NaN of left padding in float64, the plain model too.
    return tiny.left_padded([tiny.token_ids(10, seed=1), tiny.token_ids(7, seed=2)])


def generate(model, ids, mask, **arguments):
    return model.generate(ids, attention_mask=mask, **{"max_new_tokens": 14, **GREEDY, **arguments}).tolist()


def telling_threshold(model, ids, **inputs):
    """A distance that half of the tokens reach after pass 1."""
    with torch.no_grad():
        before, after = model(ids, output_pondering=True, use_cache=False, **inputs).pondering_logits[:2]
    before, after = before.log_softmax(-1), after.log_softmax(-1)
    distances = (after.exp() * (after - before)).sum(-1)
    distances = distances[inputs["attention_mask"].bool()] if "attention_mask" in inputs else distances.flatten()
    distances = distances.sort().values
    return ((distances[len(distances) // 2] + distances[len(distances) // 2 - 1]) / 2).item()


def test_hooks_into_generation_are_the_ones_that_are_known():
    for name, known in OVERRIDES.items():
        usual = getattr(Plain, name, None) or getattr(GenerationMixin, name)
        found = set()
        for config_class in MODEL_FOR_CAUSAL_LM_MAPPING:
            model_class = MODEL_FOR_CAUSAL_LM_MAPPING[config_class]
            for one in model_class if isinstance(model_class, tuple) else (model_class,):
                is_ours = config_class.model_type == "pondering"
                if not is_ours and inspect.unwrap(getattr(one, name, usual)) is not inspect.unwrap(usual):
                    found.add(config_class.model_type)
        assert found <= known, name


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("model_type", WITH_HOOKS)
def test_without_pondering_tokens_are_the_plain_model_s(model_type, cache, float64_throughout):
    plain = backbone(model_type)
    ids, mask = ragged_batch()
    expected = generate(plain, ids, mask, cache_implementation=cache)
    model = PonderingForCausalLM.from_base(plain, pondering_steps=0)
    assert generate(model, ids, mask, cache_implementation=cache) == expected


@pytest.mark.parametrize("model_type", WITH_HOOKS)
def test_cached_tokens_are_those_of_whole_passes(model_type, float64_throughout):
    model = PonderingForCausalLM.from_base(backbone(model_type), pondering_steps=2)
    ids, mask = ragged_batch()
    expected = generate(model, ids, mask, use_cache=False)
    with torch.no_grad():
        assert (model(ids).logits - model(ids, pondering_steps=0).logits).abs().max() > 0.01
    assert generate(model, ids, mask) == expected
    assert generate(model, ids, mask, cache_implementation="static") == expected
    if model_type in WITHOUT_DRAFTS:
        with pytest.raises(PonderingError, match=WITHOUT_DRAFTS[model_type]):
            generate(model, ids, mask, num_draft_tokens=2)
    else:
        assert generate(model, ids, mask, num_draft_tokens=2) == expected


@pytest.mark.parametrize("model_type", WITH_HOOKS)
def test_early_exits_are_the_same_with_and_without_a_cache(model_type, float64_throughout):
    model = PonderingForCausalLM.from_base(backbone(model_type), pondering_steps=2)
    ids, mask = ragged_batch()
    if model_type == "openai-gpt":
        with pytest.raises(
            PonderingError, match="a backbone of model_type 'openai-gpt' keeps none: leave out `ponderi"
        ):
            generate(model, ids, mask, **EXITS)
        return
    expected = generate(model, ids, mask, use_cache=False, **EXITS)
    assert generate(model, ids, mask, **EXITS) == expected


@pytest.mark.parametrize("model_type", ["bloom", "doge", "hrm_text"])
def test_early_exits_of_a_prompt_are_those_of_its_tokens_one_by_one(model_type):
    model = PonderingForCausalLM.from_base(backbone(model_type), pondering_steps=2)
    ids, taken = tiny.token_ids(2, 9), []
    exit = PonderingExit.read("kl", telling_threshold(model, ids))
    exit.record = taken.append
    with torch.no_grad():
        whole = model(ids, position_ids=torch.arange(9)[None], pondering_exit=exit, use_cache=True).logits
        cache, parts = None, []
        for column in range(9):
            output = model(ids[:, column : column + 1], past_key_values=cache, pondering_exit=exit, use_cache=True)
            cache, parts = output.past_key_values, [*parts, output.logits]
    torch.testing.assert_close(whole, torch.cat(parts, dim=1))
    assert taken[0].tolist() == torch.cat(taken[1:], dim=1).tolist()
    assert len(taken[0].unique()) > 1


@pytest.mark.parametrize("going_on", ["first tokens", "short text"])
@pytest.mark.parametrize("length", [12, 24], ids=["prompt below", "prompt beyond"])
def test_early_exits_rotate_as_the_longest_text_of_the_batch_says(length, going_on):
    """With one set of frequencies for all lengths nothing can switch: that is the reference."""
    switching = backbone("phi3")
    alike = "long_factor" if length > LIMIT else "short_factor"
    fixed = backbone(
        "phi3", rope_parameters={**LONGROPE, "short_factor": LONGROPE[alike], "long_factor": LONGROPE[alike]}
    )
    fixed.load_state_dict(switching.state_dict())
    ids, mask = tiny.left_padded([tiny.token_ids(length, seed=1), tiny.token_ids(5, seed=2)])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    goes_on = torch.zeros_like(mask, dtype=torch.bool)
    goes_on[0, :4] = going_on == "first tokens"
    goes_on[1, -5:] = going_on == "short text"

    def criterion(logits, previous):
        if previous is None:  # all tokens, after pass 0
            return torch.ones(len(logits)).where(goes_on.flatten(), 0)
        return torch.ones(len(logits))

    results = []
    for base in (switching, fixed):
        taken = []
        exit = PonderingExit.read(criterion, 0.5)
        exit.record = taken.append
        model = PonderingForCausalLM.from_base(base, pondering_steps=3)
        with torch.no_grad():
            logits = model(ids, attention_mask=mask, position_ids=positions, pondering_exit=exit).logits
        results.append(logits[mask.bool()])
        assert torch.equal((taken[0] == 3) & mask.bool(), goes_on)
    torch.testing.assert_close(*results)


def test_drafts_follow_where_rotations_stay_as_they_are():
    model = PonderingForCausalLM.from_base(backbone("phi3"), pondering_steps=2)
    ids, mask = ragged_batch()
    with pytest.raises(PonderingError, match="use max_new_tokens=7 or less, or leave it out"):
        generate(model, ids, mask, max_new_tokens=8, num_draft_tokens=2)
    expected = generate(model, ids, mask, max_new_tokens=7)
    assert generate(model, ids, mask, max_new_tokens=7, num_draft_tokens=2) == expected
    ids, mask = tiny.left_padded([tiny.token_ids(18, seed=1), tiny.token_ids(4, seed=2)])  # all beyond it
    assert generate(model, ids, mask, num_draft_tokens=2) == generate(model, ids, mask)


def test_drafts_are_refused_where_every_length_rotates_in_its_own_way():
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    model = tiny.pondering_model(
        "llama", pondering_steps=2, base_changes={"rope_parameters": dynamic, "max_position_embeddings": LIMIT}
    )
    ids = tiny.token_ids(1, 10)
    with pytest.raises(PonderingError, match="'llama' beyond 16 tokens, where its rotary embeddings change"):
        model.generate(ids, max_new_tokens=10, num_draft_tokens=2, **GREEDY)
    expected = model.generate(ids, max_new_tokens=7, **GREEDY)
    assert torch.equal(model.generate(ids, max_new_tokens=7, num_draft_tokens=2, **GREEDY), expected)


def test_a_backbone_without_a_cache_gives_none():
    model = PonderingForCausalLM.from_base(backbone("openai-gpt"), pondering_steps=1)
    ids = tiny.token_ids(1, 5)
    assert model(ids, use_cache=True).past_key_values is None
    torch.testing.assert_close(model(ids, use_cache=True).logits, model(ids, use_cache=False).logits)


@pytest.mark.parametrize("model_type", [*sorted(tiny.CONFIGS), *(name for name in WITH_HOOKS if name != "phi3")])
def test_a_class_says_of_itself_what_the_backbone_s_says(model_type):
    plain = tiny.base_model(model_type) if model_type in tiny.CONFIGS else backbone(model_type)
    model = PonderingForCausalLM.from_base(plain, pondering_steps=1)
    for name in _SAID_BY_CLASSES:
        assert getattr(model, name, None) == getattr(plain, name, None), name
    for name in (
        "_no_split_modules",
        "_skip_keys_device_placement",
        "_keep_in_fp32_modules",
        "_keep_in_fp32_modules_strict",
        "_keys_to_ignore_on_load_unexpected",
        "_keys_to_ignore_on_load_missing",
    ):
        assert getattr(model, name) == getattr(plain, name), name
    for name in ("_tp_plan", "_pp_plan", "_fsdp_plan"):
        plan = getattr(plain, name, None) or {}
        assert (getattr(model, name, None) or {}) == {f"backbone.{key}": value for key, value in plan.items()}, name


def test_a_choice_of_experts_reaches_the_backbone(tmp_path):
    model = tiny.pondering_model("mixtral", pondering_steps=1)
    model.save_pretrained(tmp_path)
    for chosen in ("eager", "batched_mm"):
        loaded = PonderingForCausalLM.from_pretrained(tmp_path, experts_implementation=chosen)
        assert loaded.backbone.config._experts_implementation == chosen
        loaded = PonderingForCausalLM.from_base(tiny.base_model("mixtral", experts_implementation=chosen))
        assert loaded.backbone.config._experts_implementation == chosen
