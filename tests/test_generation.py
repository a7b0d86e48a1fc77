"""generate: the settings of a call, and the slots of its cache. Equality of results: test_equality.py."""

import inspect

import pytest
import tiny
import torch
from transformers import DynamicCache, GenerationConfig, StaticCache

from ponder_hf import PonderingError, PonderingForCausalLM
from ponder_hf.modeling.pondering_cache import CACHE_NAME, pass_cache, step_cache
from ponder_hf.modeling.pondering_generate import SETTINGS


GREEDY = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def recomputed(model, row, count, **kwargs):
    """Greedy continuation of one row (T,) by whole forward passes and argmax, nothing else."""
    for _ in range(count):
        logits = model(row.unsqueeze(0), use_cache=False, **kwargs).logits[0, -1]
        row = torch.cat([row, logits.argmax().view(1)])
    return row


@pytest.mark.parametrize("model_type", tiny.SPINE)
def test_cached_logits_in_chunks_equal_whole_ones(model_type, float64_throughout):
    model = tiny.pondering_model(model_type, torch.float64, pondering_steps=(tiny.SPINE.index(model_type) + 1) % 6)
    input_ids, mask = tiny.left_padded([tiny.token_ids(12), tiny.token_ids(9), tiny.token_ids(4)])
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        whole = model(input_ids, attention_mask=mask, position_ids=position_ids, use_cache=False).logits
        cache, parts = None, []
        for first, last in ((0, 5), (5, 6), (6, 12)):
            output = model(
                input_ids[:, first:last],
                attention_mask=mask[:, :last],
                position_ids=position_ids[:, first:last],
                past_key_values=cache,
                use_cache=True,
            )
            cache = output.past_key_values
            parts.append(output.logits)
    difference = (torch.cat(parts, dim=1) - whole)[mask.bool()]
    assert difference.abs().max() <= 1e-9 * whole.abs().max()


@pytest.mark.parametrize("steps", range(6))
def test_the_steps_of_a_call_reach_every_token(steps):
    model = tiny.pondering_model("llama", torch.float64)
    row = tiny.token_ids(5)
    with torch.no_grad():
        tokens = model.generate(row.unsqueeze(0), pondering_steps=steps, **GREEDY)
        assert tokens[0].tolist() == recomputed(model, row, 8, pondering_steps=steps).tolist()


def test_the_help_of_generate_says_what_is_about_pondering():
    parameters = inspect.signature(PonderingForCausalLM.generate).parameters
    arguments = PonderingForCausalLM.generate.__doc__.partition("Args:")[2].partition("Returns:")[0]
    for name in SETTINGS:
        assert parameters[name].default is None
        assert f"\n            {name}: " in arguments


@pytest.mark.parametrize("where", ["call", "generation config", "model", "file"])
def test_where_settings_are_said(where, tmp_path):
    model = tiny.pondering_model("llama", pondering_steps=1)
    settings = {**GREEDY, "return_dict_in_generate": True}
    chosen = {"pondering_steps": 3, "pondering_exit_criterion": "kl", "pondering_exit_threshold": 1e9}
    if where == "call":
        model.generation_config.pondering_steps = 2
        settings |= chosen
    elif where == "generation config":
        model.generation_config.pondering_steps = 2
        settings = {"generation_config": GenerationConfig(**settings, **chosen)}
    else:
        for name, value in chosen.items():
            setattr(model.generation_config, name, value)
    if where == "file":
        model.save_pretrained(tmp_path)
        model = PonderingForCausalLM.from_pretrained(tmp_path)
    passes = []
    model.backbone.base_model.register_forward_hook(lambda *_: passes.append(1))
    output = model.generate(tiny.token_ids(1, 5), **settings)
    assert output.pondering_steps_used.tolist() == [[1] * 8]  # all converge after pass 1
    assert len(passes) == 2 * 8
    assert output[CACHE_NAME].layers[3 * 2].get_seq_length() == 12  # S = 3 has slots for pass 3


def test_guidance_ponders_as_often_as_the_call():
    model = tiny.pondering_model("llama", pondering_steps=3)
    passes = []
    model.backbone.base_model.register_forward_hook(lambda *_: passes.append(1))
    model.generate(tiny.token_ids(1, 5), pondering_steps=1, guidance_scale=1.5, **GREEDY)
    assert len(passes) == 2 * 2 * 8  # twice two passes a token


def test_cached_decoding_runs_each_pass_over_new_tokens_only():
    model = tiny.pondering_model("gpt_neox", pondering_steps=3)
    widths = []
    model.backbone.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    model.generate(tiny.token_ids(1, 9), **GREEDY)
    assert widths == [9] * 4 + [1] * 4 * 7


@pytest.mark.deprecated_by_transformers("its assisted decoding calls generate in a way that it deprecates")
def test_an_assistant_that_ponders_keeps_its_own_settings():
    model = tiny.pondering_model("llama", torch.float64, pondering_steps=3)
    assistant = tiny.pondering_model("llama", torch.float64, pondering_steps=1)
    assistant.generation_config.pondering_steps = 2
    seen = []
    assistant.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["pondering_steps"]), with_kwargs=True
    )
    row = tiny.token_ids(6)
    tokens = model.generate(row.unsqueeze(0), assistant_model=assistant, pondering_steps=1, **GREEDY)
    assert tokens[0].tolist() == recomputed(model, row, 8, pondering_steps=1).tolist()
    assert set(seen) == {2}


def test_the_slots_are_laid_out_as_the_formula_says():
    """slot(i, l) = i * L + l: what pass i wrote for layer l."""
    model = tiny.pondering_model("llama", pondering_steps=2)
    input_ids = tiny.token_ids(1, 5)
    written = []
    for layer in model.backbone.model.layers:
        layer.self_attn.k_proj.register_forward_hook(lambda module, args, output: written.append(output))
    with torch.no_grad():
        cache = model(input_ids, use_cache=True).past_key_values
    assert len(cache.layers) == len(written) == 3 * 2
    for slot, keys in enumerate(written):
        values_per_head = cache.layers[slot].keys.norm(dim=-1)  # rotation keeps norms
        torch.testing.assert_close(values_per_head, keys.view(1, 5, 2, 8).transpose(1, 2).norm(dim=-1))
    view = pass_cache(cache, 1, 2)
    assert view.layers[0] is cache.layers[2]
    assert view.layers[1] is cache.layers[3]


@pytest.mark.parametrize("given", ["none", "bare", "of the backbone"])
def test_an_empty_cache_gets_slots_for_every_pass(given):
    config = tiny.base_config("mistral")  # sliding windows: the kind of each slot must be repeated as well
    caches = {"none": None, "bare": DynamicCache(), "of the backbone": DynamicCache(config=config)}
    cache = step_cache(caches[given], config, 4)
    kinds = [type(layer) for layer in cache.layers]
    assert len(kinds) == 8
    assert kinds == kinds[:2] * 4
    assert len({id(layer) for layer in cache.layers}) == 8


def test_a_cache_of_other_steps_or_no_cache_is_refused():
    model = tiny.pondering_model("llama", pondering_steps=2)
    input_ids = tiny.token_ids(1, 5)
    cache = model(input_ids, use_cache=True).past_key_values
    with pytest.raises(PonderingError, match="holds 6 slots, but 4 passes of 2 layers need 8"):
        model(input_ids, past_key_values=cache, use_cache=True, pondering_steps=3)
    with pytest.raises(PonderingError, match="`past_key_values` must be one of transformers' Cache objects"):
        model(input_ids, past_key_values=((torch.zeros(1),),), use_cache=True)


@pytest.mark.parametrize("use_cache", [None, True, False])
@pytest.mark.parametrize("steps", [0, 2])
def test_a_cache_that_is_given_is_used_in_training_too(steps, use_cache):
    model = tiny.pondering_model("llama", pondering_steps=steps).train()
    input_ids = tiny.token_ids(2, 7)
    whole = model(input_ids, use_cache=False)
    assert whole.past_key_values is None
    cache = model(input_ids[:, :4], use_cache=True).past_key_values
    rest = model(input_ids[:, 4:], past_key_values=cache, use_cache=use_cache)
    torch.testing.assert_close(rest.logits, whole.logits[:, 4:], rtol=1e-4, atol=1e-5)
    assert cache.get_seq_length() == 7


def test_a_static_cache_is_refused_where_attention_counts_from_its_end():
    model, ids = tiny.pondering_model("gpt_neo", pondering_steps=1), tiny.token_ids(1, 9)
    static = StaticCache(config=model.config.base_config, max_cache_len=20)
    for settings in ({"cache_implementation": "static"}, {"past_key_values": static}):
        with pytest.raises(PonderingError, match="static cache gives other logits"):
            model.generate(ids, **GREEDY, **settings)
    with pytest.raises(PonderingError, match="static cache gives other logits"):
        model(ids, past_key_values=static)
    model.generate(ids, **GREEDY)


def test_assisted_decoding_refuses_a_cache_that_is_filled():
    """transformers feeds in again what the cache holds: other logits, of plain models too."""
    model = tiny.pondering_model("llama", torch.float64, pondering_steps=1)
    first = model.generate(tiny.token_ids(1, 5), return_dict_in_generate=True, **GREEDY)
    ids, cache = torch.cat([first.sequences, tiny.token_ids(1, 3)], 1), first[CACHE_NAME]
    length = cache.get_seq_length()
    for assisted in (
        {"prompt_lookup_num_tokens": 2},
        {"assistant_model": model.to_base()},
        {"assistant_early_exit": 1},
        {"generation_config": GenerationConfig(prompt_lookup_num_tokens=2)},
    ):
        with pytest.raises(PonderingError, match="`past_key_values` does not go with assisted generation"):
            model.generate(ids, past_key_values=cache, **{**GREEDY, **assisted})
        assert cache.get_seq_length() == length


@pytest.mark.parametrize("model_type", ["llama", "mistral"])
def test_the_cache_takes_s_plus_1_times_the_memory_of_the_plain_one(model_type):
    model = tiny.pondering_model(model_type, pondering_steps=3)
    ids, sizes, caches = tiny.token_ids(1, 5), [], [None, None]
    for _ in range(4):  # goes on in chunks, beyond the sliding window
        sizes.append([])
        for index, which in enumerate((model, model.to_base())):
            output = which.generate(ids, return_dict_in_generate=True, **{CACHE_NAME: caches[index]}, **GREEDY)
            caches[index] = output[CACHE_NAME]
            sizes[-1].append(sum(layer.keys.nbytes + layer.values.nbytes for layer in caches[index].layers))
        ids = torch.cat([ids, tiny.token_ids(1, 8, seed=len(sizes))], dim=1)  # the same tokens for both
    assert all(pondering == 4 * plain for pondering, plain in sizes)
    if model_type == "mistral":  # all layers slide
        assert sizes[-1] == sizes[-2]
