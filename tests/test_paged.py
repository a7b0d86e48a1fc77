"""Continuous batching: requests that share a paged cache get what `generate` gives each of them alone."""

import pytest
import tiny
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from ponder_hf import PonderingError
from ponder_hf.modeling.pondering_cache import paged_pass


GREEDY = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
LENGTHS = (5, 20, 2, 11)


def prompts():
    return [tiny.token_ids(length, seed=length).tolist() for length in LENGTHS]


def alone(model, **settings):
    """What `generate` gives each prompt alone."""
    settings = {**GREEDY, "eos_token_id": None, **settings}
    return [model.generate(torch.tensor([row]), **settings)[0, len(row) :].tolist() for row in prompts()]


def together(model, inputs=None, fields=None, **settings):
    """The same requests in one batch, which is so small that they wait for each other and come in pieces."""
    results = model.generate_batch(
        prompts() if inputs is None else inputs,
        GenerationConfig(**GREEDY, eos_token_id=-1, **(fields or {})),
        continuous_batching_config=ContinuousBatchingConfig(num_blocks=8, page_size=4, max_batch_tokens=16),
        **settings,
    )
    return [result.generated_tokens for result in results.values()]


@pytest.mark.parametrize("model_type", tiny.SPINE)
def test_requests_get_what_they_get_alone(model_type):
    model = tiny.pondering_model(model_type, pondering_steps=2)
    assert together(model) == alone(model)


@pytest.mark.parametrize(
    "fields",
    [{"pondering_top_k": 5}, {"pondering_gate": "zero_init"}, {"pondering_gate": "zero_init_matrix"}],
    ids=str,
)
def test_with_top_k_or_a_gate_and_eager_attention(fields):
    model = tiny.pondering_model("llama", base_changes={"attn_implementation": "eager"}, **fields)
    if model.pondering_gate is not None:
        torch.nn.init.normal_(model.pondering_gate.weight)
    assert together(model) == alone(model)
    assert model.backbone.config._attn_implementation == "eager"


def test_the_steps_of_a_call_are_those_of_its_requests():
    model = tiny.pondering_model("llama", pondering_steps=1)
    assert together(model, pondering_steps=3) == alone(model, pondering_steps=3) != alone(model)
    assert together(model, fields={"pondering_steps": 0}) == alone(model, pondering_steps=0)


def test_a_manager_that_is_kept_keeps_its_steps():
    model = tiny.pondering_model("llama", pondering_steps=1)
    for _ in range(2):
        assert together(model, persistent_manager=True) == alone(model)
    with pytest.raises(PonderingError, match=r"ponders 1 steps, not 2: call `destroy_cached_continuous_batching_m"):
        together(model, pondering_steps=2)
    model.destroy_cached_continuous_batching_manager()
    assert together(model, pondering_steps=2) == alone(model, pondering_steps=2)


def test_a_pass_writes_the_pages_of_its_slots():
    class Cache:
        def update(self, key_states, value_states, layer_idx, kwargs):
            return layer_idx, kwargs

    cache = Cache()
    for index in range(3):
        view = paged_pass(cache, index, 4, {"read_index": index})
        assert isinstance(view, Cache)
        for layer in range(4):
            slot = index * 4 + layer
            assert view.update("keys", "values", layer, kwargs={}) == (slot, {})
            # As GPT-NeoX and OPT call it in transformers 5.24, and attention itself up to 5.23.
            assert view.update("keys", "values", layer) == (slot, {"read_index": index})
            assert view.update(key_states="keys", value_states="values", layer_idx=layer, kwargs={}) == (slot, {})
        assert view.get_seq_length() == 0


REFUSED = {
    "drafts": ({"num_draft_tokens": 2}, "`num_draft_tokens` does not go with continuous batching"),
    "exits": (
        {"pondering_exit_threshold": 0.1, "pondering_exit_criterion": "kl"},
        "`pondering_exit_threshold` does not go with continuous batching",
    ),
    "negative S": ({"pondering_steps": -1}, "`pondering_steps` must be an integer >= 0"),
    "padding": ({"attention_mask": torch.tensor([[0, 1]])}, "continuous batching takes no padding"),
    "no prompt": ({"inputs": [[5, 6], []]}, "the prompt is empty"),
    "an unknown id": ({"inputs": [[5, 6], [500]]}, "has token id 500, but the vocabulary goes from 0 to 130"),
}


@pytest.mark.parametrize(("settings", "message"), REFUSED.values(), ids=REFUSED)
def test_bad_input(settings, message, monkeypatch):
    model = tiny.pondering_model("llama")
    monkeypatch.setattr(model.backbone.base_model, "forward", None)
    with pytest.raises(PonderingError, match=message):
        together(model, **settings)


def test_windows_of_older_releases_are_refused(monkeypatch):
    model = tiny.pondering_model("mistral")
    monkeypatch.setattr("transformers.__version__", "5.11.0")
    with pytest.raises(PonderingError, match=r"with a sliding window .* needs a newer transformers \(5\.17"):
        together(model)


def broken(where):
    """A model whose weights became NaN, or so large that the scores of tokens overflow."""
    model = tiny.pondering_model("llama", torch.bfloat16, pondering_steps=1)
    with torch.no_grad():
        if where == "NaN":
            model.backbone.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
        else:
            model.get_output_embeddings().weight[7] = 1e38
            model.backbone.model.norm.weight.fill_(1e6)
    return model


@pytest.mark.parametrize("where", ["NaN", "infinity"])
def test_what_is_no_distribution_is_an_error(where):
    """As in `generate`: greedy decoding would choose a token all the same."""
    model = broken(where)
    for run in (alone, together):
        with pytest.raises(PonderingError, match="the model predicts NaN or infinity"):
            run(model)
    assert together(model, fields={"remove_invalid_values": True})
    model = tiny.pondering_model("llama", pondering_steps=1)
    assert together(model, persistent_manager=True) == alone(model)
    with torch.no_grad():
        model.backbone.model.norm.weight.fill_(float("nan"))
    with pytest.raises(PonderingError, match="the model predicts NaN or infinity"):
        together(model, persistent_manager=True)


def test_a_server_is_told(caplog):
    """Who starts a manager by hand gets each request's error."""
    model = broken("NaN")
    config = ContinuousBatchingConfig(num_blocks=8, page_size=4, max_batch_tokens=16)
    manager = model.init_continuous_batching(
        GenerationConfig(**GREEDY, eos_token_id=-1), continuous_batching_config=config
    )
    manager.start()
    try:
        manager.add_request(prompts()[0], request_id="one")
        result = manager.get_result(request_id="one", timeout=60)
    finally:
        manager.stop(block=True)
    assert "the model predicts NaN or infinity" in result.error
