"""generate, however it is called: bad input ends in one clear error before any work."""

import copy

import checkpoints
import pytest
import tiny
import torch
from transformers import AutoTokenizer, DynamicCache, GenerationConfig, StaticCache, pipeline

from ponder_hf import PonderingError, PonderingForCausalLM, conversion
from ponder_hf.modeling.pondering_cache import CACHE_NAME


MODEL = {"model_type": "gpt2", "pondering_steps": 2}  # gpt2 has a table of 64 positions


@pytest.fixture(scope="module")
def model():
    return tiny.pondering_model(**MODEL)


@pytest.fixture
def check_refused(model, monkeypatch):
    """A function that calls generate, checks what it raises and that no pass has run."""

    def run(message, input_ids=None, **kwargs):
        monkeypatch.setattr(model.backbone, "forward", None)
        monkeypatch.setattr(model.backbone.base_model, "forward", None)
        if input_ids is None and "inputs_embeds" not in kwargs:
            input_ids = tiny.token_ids(2, 5)
        with pytest.raises(PonderingError, match=message) as caught:
            model.generate(input_ids, **(kwargs if "generation_config" in kwargs else {"max_new_tokens": 2, **kwargs}))
        assert "\n" not in str(caught.value)

    return run


SETTINGS = {
    "negative S": ({"pondering_steps": -1}, r"`pondering_steps` must be an integer >= 0 .*, got -1"),
    "fractional S": ({"pondering_steps": 1.5}, "`pondering_steps` must be an integer"),
    "S as text": ({"pondering_steps": "3"}, "`pondering_steps` must be an integer"),
    "S as a truth": ({"pondering_steps": True}, "`pondering_steps` must be an integer"),
    "threshold alone": ({"pondering_exit_threshold": 0.1}, "needs `pondering_exit_criterion`: one of 'kl', 'entropy'"),
    "criterion alone": (
        {"pondering_exit_criterion": "kl"},
        "`pondering_exit_criterion` needs `pondering_exit_threshold`.*: give both or none",
    ),
    "criterion": ({"pondering_exit_criterion": "kk"}, "must be one of 'kl', 'entropy', 'argmax' or an object"),
    "criterion object": ({"pondering_exit_criterion": 3}, "must be a name or callable"),
    "threshold as text": (
        {"pondering_exit_criterion": "kl", "pondering_exit_threshold": "0.1"},
        "`pondering_exit_threshold` must be a finite number >= 0, got '0.1'",
    ),
    "negative threshold": (
        {"pondering_exit_criterion": "kl", "pondering_exit_threshold": -0.1},
        "`pondering_exit_threshold` must be a finite number >= 0",
    ),
    "endless threshold": (
        {"pondering_exit_criterion": "kl", "pondering_exit_threshold": float("nan")},
        "`pondering_exit_threshold` must be a finite number >= 0",
    ),
    "negative drafts": ({"num_draft_tokens": -1}, "`num_draft_tokens` must be an integer >= 0"),
    "fractional drafts": ({"num_draft_tokens": 2.0}, "`num_draft_tokens` must be an integer >= 0"),
    "drafts as a truth": ({"num_draft_tokens": True}, "`num_draft_tokens` must be an integer >= 0"),
    "drafts as text": ({"num_draft_tokens": "2"}, "`num_draft_tokens` must be an integer >= 0"),
    "unknown drafts": (
        {"draft_source": "luck"},
        "`draft_source` must be 'own', 'heads', 'prompt_lookup' or an object",
    ),
    "heads that are not there": ({"num_draft_tokens": 2, "draft_source": "heads"}, "the model has none: train them"),
    "drafts with exits": (
        {"num_draft_tokens": 2, "pondering_exit_criterion": "kl", "pondering_exit_threshold": 0.1},
        "`num_draft_tokens` and `pondering_exit_threshold` do not go together",
    ),
    "drafts with a static cache": (
        {"num_draft_tokens": 2, "cache_implementation": "static"},
        "`num_draft_tokens` works with transformers' dynamic cache, not with a static one",
    ),
    "drafts with beams": ({"num_draft_tokens": 2, "num_beams": 3}, "`num_draft_tokens` does not go with beam search"),
    "drafts with beam sampling": (
        {"num_draft_tokens": 2, "num_beams": 3, "do_sample": True},
        "`num_draft_tokens` does not go with beam sample",
    ),
    "drafts with prompt lookup": (
        {"num_draft_tokens": 2, "prompt_lookup_num_tokens": 3},
        "`num_draft_tokens` does not go with assisted generation",
    ),
    "drafts without cache": ({"num_draft_tokens": 2, "use_cache": False}, "`num_draft_tokens` needs the cache"),
}


@pytest.mark.parametrize(("settings", "message"), SETTINGS.values(), ids=SETTINGS)
def test_settings(check_refused, settings, message):
    check_refused(message, **settings)


@pytest.mark.parametrize(("settings", "message"), SETTINGS.values(), ids=SETTINGS)
def test_settings_in_a_generation_config(check_refused, settings, message):
    config = GenerationConfig(**{"max_new_tokens": 2, **settings})
    check_refused(message, generation_config=config)


def test_a_criterion_of_the_model_may_wait_for_a_threshold():
    model = tiny.pondering_model(**MODEL)
    model.generation_config.pondering_exit_criterion = "kl"
    settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 2}
    settings["return_dict_in_generate"] = True
    prompt = tiny.token_ids(1, 4)
    assert model.generate(prompt, **settings).pondering_steps_used.tolist() == [[2, 2]]
    assert model.generate(prompt, pondering_exit_threshold=1e9, **settings).pondering_steps_used.tolist() == [[1, 1]]
    with pytest.raises(PonderingError, match="needs `pondering_exit_threshold`"):
        model.generate(prompt, pondering_exit_criterion="argmax", **settings)


PROMPTS = {
    "empty": (torch.empty(1, 0, dtype=torch.long), "the prompt is empty"),
    "flat": (torch.tensor([3, 4]), r"must have the shape \(batch, tokens\), got \(2,\)"),
    "negative id": (torch.tensor([[3, -1]]), "has token id -1, but the vocabulary goes from 0 to 130"),
    "id too large": (torch.tensor([[3, 131]]), "has token id 131, but the vocabulary goes from 0 to 130"),
    "fractions": (torch.ones(1, 3), "`input_ids` must be integers"),
    "list": ([[3, 4]], "`input_ids` must be a tensor, got list"),
    "dict": ({"input_ids": torch.tensor([[3]])}, "unpack it"),
    "too long": (tiny.token_ids(1, 65), "the prompt has 65 tokens, but the model has only 64 positions"),
    "too long in the end": (
        tiny.token_ids(1, 64),
        "64 tokens of prompt and 2 new ones .* use max_new_tokens=1 or less",
    ),
}


@pytest.mark.parametrize(("prompt", "message"), PROMPTS.values(), ids=PROMPTS)
def test_prompts(check_refused, prompt, message):
    check_refused(message, prompt)


def test_no_prompt_at_all(check_refused, model, monkeypatch):
    monkeypatch.setattr(model.generation_config, "bos_token_id", None)
    message = "the prompt is empty, and no `bos_token_id` says what begins a text"
    check_refused(message, input_ids=None, inputs_embeds=None)


def test_embeddings(check_refused):
    check_refused("`inputs_embeds` must be a tensor of floating-point numbers, got list", inputs_embeds=[[0.5]])
    check_refused("must be a tensor of floating-point numbers", inputs_embeds=torch.ones(1, 3, 32, dtype=torch.long))
    check_refused("the prompt is empty", inputs_embeds=torch.empty(1, 0, 32))
    check_refused(r"must have the shape \(batch, tokens, 32\)", inputs_embeds=torch.empty(1, 3, 31))
    check_refused("the prompt has 65 tokens", inputs_embeds=torch.empty(1, 65, 32))


def test_masks(check_refused):
    check_refused("row 1 of the prompt is empty", attention_mask=torch.tensor([[1] * 5, [0] * 5]))
    check_refused(r"has the shape \(2, 4\), which does not fit", attention_mask=torch.ones(2, 4))
    check_refused(r"has the shape \(1, 5\), which does not fit", attention_mask=torch.ones(1, 5))
    check_refused(r"must be a tensor of the shape \(2, 5\), got the shape \(5,\)", attention_mask=torch.ones(5))
    check_refused(r"\(2, 5\), got the shape \(2, 1, 5, 5\)", attention_mask=torch.ones(2, 1, 5, 5))
    check_refused(r"must be a tensor of the shape \(2, 5\), got list", attention_mask=[[1] * 5] * 2)


def test_a_prompt_may_fill_the_table_of_positions():
    model = tiny.pondering_model(**MODEL)
    settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert model.generate(tiny.token_ids(1, 60), max_new_tokens=5, **settings).shape == (1, 65)
    ids, mask = tiny.left_padded([tiny.token_ids(62), tiny.token_ids(3)])
    assert model.generate(ids, attention_mask=mask, max_length=65, **settings).shape == (2, 65)


def test_positions_that_are_computed_have_no_end():
    model = tiny.pondering_model("llama")
    ids = tiny.token_ids(1, 64)
    assert model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0).shape == (1, 68)


def test_caches(check_refused, model):
    prompt = tiny.token_ids(1, 5)
    longer = {"input_ids": torch.cat([prompt, prompt], dim=1)}
    plain, other, other_steps = (DynamicCache(config=model.config.base_config) for _ in range(3))
    model.to_base()(prompt, use_cache=True, **{CACHE_NAME: plain})
    PonderingForCausalLM(model.config)(prompt, past_key_values=other, use_cache=True)
    model(prompt, past_key_values=other_steps, pondering_steps=1, use_cache=True)
    check_refused("holds 2 slots, but 3 passes of 2 layers need 6", past_key_values=plain, **longer)
    check_refused("`past_key_values` was filled by another model", past_key_values=other, **longer)
    check_refused("holds 4 slots, but 3 passes of 2 layers need 6", past_key_values=other_steps, **longer)
    check_refused("must be one of transformers' Cache objects", past_key_values=((torch.zeros(1),),), **longer)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_cache_that_the_prompt_does_not_go_on_from(check_refused, model, kind):
    make = {"dynamic": DynamicCache, "static": lambda config: StaticCache(config, max_cache_len=20)}[kind]
    prompt, cache = tiny.token_ids(2, 5), make(config=model.config.base_config)
    longer = torch.cat([prompt, prompt], dim=1)
    with torch.no_grad():
        PonderingForCausalLM.forward(model, prompt, past_key_values=cache, use_cache=True)
    check_refused(
        "holds 5 tokens, but the prompt has only 3: give the whole text", prompt[:, :3], past_key_values=cache
    )
    check_refused("holds 5 tokens, but the prompt has only 5: give the whole text", prompt, past_key_values=cache)
    check_refused("holds 2 rows, but 1 are generated", longer[:1], past_key_values=cache)
    check_refused("holds 2 rows, but 6 are generated", longer, past_key_values=cache, num_beams=3)
    check_refused("needs the text that it holds", input_ids=None, inputs_embeds=None, past_key_values=cache)
    rest, mask = torch.ones(2, 3, 32), torch.ones(2, 8)
    check_refused("must hold the whole text", inputs_embeds=rest, attention_mask=mask, past_key_values=cache)


# Through a pipeline


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pondering GPT-2 with a tokenizer of 20 words."""
    folder = tmp_path_factory.mktemp("prompts")
    checkpoints.save_base(folder / "base", "gpt2", tokenizer=True)
    conversion.convert(folder / "base", folder / "pondering", pondering_steps=2)
    return folder


@pytest.fixture(scope="module")
def generator(folder):
    """A pipeline whose model fails in each forward pass."""
    pondering = str(folder / "pondering")
    generator = pipeline("text-generation", model=pondering, tokenizer=pondering)
    generator.model.backbone.forward = generator.model.backbone.base_model.forward = None
    return generator


@pytest.mark.parametrize(("settings", "message"), SETTINGS.values(), ids=SETTINGS)
def test_settings_in_a_pipeline(generator, settings, message):
    with pytest.raises(PonderingError, match=message):
        generator("once upon", **{"max_new_tokens": 2, "do_sample": False, **settings})


def test_prompts_in_a_pipeline(generator, folder):
    for prompt in ("", [" "], [{"role": "user", "content": ""}]):
        with pytest.raises(PonderingError, match="the prompt is empty"):
            generator(prompt, max_new_tokens=2)
    with pytest.raises(PonderingError, match="the prompt has 65 tokens, but the model has only 64 positions"):
        generator("cat " * 65, max_new_tokens=2)
    tokenizer = AutoTokenizer.from_pretrained(folder / "pondering")
    small = pipeline(
        "text-generation", tiny.pondering_model("gpt2", base_changes={"vocab_size": 9}), tokenizer=tokenizer
    )
    with pytest.raises(
        PonderingError, match="has token id 19, but the vocabulary goes from 0 to 8: use the model's own"
    ):
        small("by the sea", max_new_tokens=2)


def test_whose_cache_it_is_survives_copies_and_training(model, tmp_path):
    """What tells the owner of a cache: the weights, not the object; of now, where a cache is filled again."""
    prompt = tiny.token_ids(1, 5)
    settings = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    returned = {**settings, "return_dict_in_generate": True}
    first = model.generate(prompt, **returned)
    torch.save(first[CACHE_NAME], tmp_path / "cache.pt")
    kept = torch.load(tmp_path / "cache.pt", weights_only=False)
    twin = copy.deepcopy(model)
    expected = model.generate(prompt, **{**settings, "max_new_tokens": 6})
    for cache in (copy.deepcopy(first[CACHE_NAME]), kept):
        assert torch.equal(twin.generate(first.sequences, past_key_values=cache, **settings), expected)
    static = StaticCache(model.config.get_text_config(), max_cache_len=16)
    with torch.no_grad():
        model(prompt, past_key_values=static, use_cache=True)
    weight = twin.get_input_embeddings().weight
    with torch.no_grad():
        weight.mul_(0.9)
    longer = torch.cat([prompt, prompt], dim=1)
    with pytest.raises(PonderingError, match="filled by another model"):
        twin.generate(longer, past_key_values=copy.deepcopy(static), **settings)
    static.reset()
    with torch.no_grad():
        twin(prompt, past_key_values=static, use_cache=True)
    assert torch.equal(twin.generate(longer, past_key_values=static, **settings), twin.generate(longer, **settings))
