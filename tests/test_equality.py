"""However `generate` goes about it, on every backbone of the spine: the tokens and logits of whole forward passes.

The reference knows no cache, no padding and no `generate`: one forward pass over each row alone, in float64. Prompts,
S, sizes of chunks and the like are random, other ones for each backbone and way.
"""

import random

import pytest
import tiny
import torch
from drafting import HalfWrong

from ponder_hf.modeling.pondering_cache import CACHE_NAME
from ponder_hf.modeling.pondering_generate_tokens import GumbelNoise


COUNT = 6  # new tokens
WANTED = {"max_new_tokens": COUNT, "pad_token_id": 0, "return_dict_in_generate": True, "output_logits": True}
GREEDY = {**WANTED, "do_sample": False, "eos_token_id": None}
MANY_EOS = list(range(3, 60, 4))  # so that beams end at different lengths
WINDOWS = ("mistral", "gemma2", "gemma3_text")  # of 8 tokens


def random_rows(chance, batch_size, longest=13):
    """Left-padded prompts of random lengths: (input_ids, attention_mask)."""
    return tiny.left_padded(
        [tiny.token_ids(chance.randint(1, longest), seed=chance.randrange(1 << 30)) for _ in range(batch_size)]
    )


def repeating_row(chance, longest=6):
    """One prompt that repeats itself, with padding before it."""
    row = tiny.token_ids(chance.randint(1, longest), seed=chance.randrange(1 << 30)).repeat(2)
    ids, mask = tiny.left_padded([row, tiny.token_ids(len(row) + chance.randint(0, 2))])
    return ids[:1], mask[:1]


def longer(ids, mask, *parts):
    """These tokens with more behind them: (input_ids, attention_mask)."""
    ids = torch.cat([ids, *parts], dim=1)
    return ids, torch.cat([mask, mask.new_ones(len(ids), ids.shape[1] - mask.shape[1])], dim=1)


def whole_logits(model, row, tokens, steps):
    """Logits (n, V) that predict the tokens (n,) behind a row (T,): one whole forward pass."""
    text = torch.cat([row, tokens[:-1]]).unsqueeze(0)
    return model(text, use_cache=False, pondering_steps=steps).logits[0, len(row) - 1 :]


def check_output(model, output, ids, mask, steps, noise=None):
    """Logits of each new token are those of whole forward passes, and the token is the best (with noise on top)."""
    count = len(output.logits)
    assert count == COUNT
    assert output.pondering_steps_used.tolist() == [[steps] * COUNT] * len(ids)
    for index, tokens in enumerate(output.sequences[:, -count:]):
        expected = whole_logits(model, ids[index][mask[index].bool()], tokens, steps)
        logits = torch.stack([step[index] for step in output.logits])
        assert (logits - expected).abs().max() <= 1e-9 * expected.abs().max()
        if noise is not None:
            places = [(index, ids.shape[1] + column) for column in range(count)]
            expected = expected + noise.rows(places, expected.shape[1])
        assert tokens.tolist() == expected.argmax(-1).tolist()


# Ways to generate. Each gives back what it generated and the prompt that it then went on from.


def plain(model, chance, **settings):
    ids, mask = random_rows(chance, chance.randint(1, 4))
    return model.generate(ids, attention_mask=mask, **settings), ids, mask


def without_cache(model, chance, **settings):
    return plain(model, chance, use_cache=False, **settings)


def in_chunks(model, chance, **settings):
    return plain(model, chance, prefill_chunk_size=chance.randint(1, 6), **settings)


def static_cache(model, chance, **settings):
    return plain(model, chance, cache_implementation="static", **settings)


def embeddings(model, chance, **settings):
    ids, mask = random_rows(chance, chance.randint(1, 4))
    embeds = model.get_input_embeddings()(ids)
    return model.generate(inputs_embeds=embeds, attention_mask=mask, **settings), ids, mask


def conversation(model, chance, **settings):
    first, ids, mask = plain(model, chance, **settings)
    ids, mask = longer(ids, mask, first.sequences[:, -COUNT:], tiny.token_ids(len(ids), chance.randint(1, 5)))
    return model.generate(ids, attention_mask=mask, past_key_values=first[CACHE_NAME], **settings), ids, mask


def cropped(model, chance, **settings):
    # transformers cannot crop a window once it is full, in plain models neither: it has lost what came before.
    windows = model.config.base_config.model_type in WINDOWS
    ids, mask = random_rows(chance, chance.randint(1, 4), longest=1 if windows else 13)
    first = model.generate(ids, attention_mask=mask, **settings)
    cache, number = first[CACHE_NAME], chance.randint(1, COUNT - 1)
    cache.crop(-number)
    kept = first.sequences[:, ids.shape[1] : cache.get_seq_length()]
    ids, mask = longer(ids, mask, kept, tiny.token_ids(len(ids), chance.randint(1, 5)))
    return model.generate(ids, attention_mask=mask, past_key_values=cache, **settings), ids, mask


def prompt_lookup(model, chance, **settings):
    ids, mask = repeating_row(chance)
    return model.generate(ids, attention_mask=mask, prompt_lookup_num_tokens=3, **settings), ids, mask


def own_base_assists(model, chance, **settings):
    ids, mask = repeating_row(chance)
    return model.generate(ids, attention_mask=mask, assistant_model=model.to_base(), **settings), ids, mask


def another_model_assists(model, chance, **settings):
    ids, mask = repeating_row(chance)
    base_type = model.config.base_config.model_type
    assistant = tiny.pondering_model(base_type, torch.float64, pondering_steps=chance.randint(0, 3))
    return model.generate(ids, attention_mask=mask, assistant_model=assistant, **settings), ids, mask


def drafted(way):
    """The same with drafts."""

    def generate(model, chance, **settings):
        source = chance.choice(["own", "prompt_lookup", HalfWrong(chance.random())])
        return way(model, chance, num_draft_tokens=chance.randint(1, 5), draft_source=source, **settings)

    return generate


WAYS = {
    "in one go": plain,
    "without a cache": without_cache,
    "in chunks": in_chunks,
    "static cache": static_cache,
    "embeddings": embeddings,
    "conversation": conversation,
    "cropped cache": cropped,
    "prompt lookup": prompt_lookup,
    "assisted by its base": own_base_assists,
    "assisted by another": another_model_assists,
    "drafts": drafted(plain),
    "drafts in chunks": drafted(in_chunks),
    "drafts in a conversation": drafted(conversation),
}


@pytest.mark.deprecated_by_transformers("its assisted decoding calls generate in a way that it deprecates")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("model_type", tiny.SPINE)
def test_greedy_search(model_type, way, float64_throughout):
    chance = random.Random(f"{model_type} {way}")
    model = tiny.pondering_model(model_type, torch.float64, pondering_steps=3)
    steps = chance.randint(0, 5)
    with torch.no_grad():
        output, ids, mask = WAYS[way](model, chance, pondering_steps=steps, **GREEDY)
        check_output(model, output, ids, mask, steps)


@pytest.mark.parametrize("way", ["in one go", "in chunks", "static cache"])
@pytest.mark.parametrize("model_type", tiny.SPINE)
def test_sampling(model_type, way, float64_throughout):
    """Logits behind sampled tokens are those of whole forward passes, and a cache changes no token."""
    chance = random.Random(f"sampling {model_type} {way}")
    model = tiny.pondering_model(model_type, torch.float64, pondering_steps=3)
    steps = chance.randint(0, 5)
    settings = {**WANTED, "do_sample": True, "top_k": 20, "eos_token_id": None, "pondering_steps": steps}
    with torch.no_grad():
        torch.manual_seed(3)
        output, ids, mask = WAYS[way](model, chance, **settings)
        torch.manual_seed(3)
        uncached = model.generate(ids, attention_mask=mask, use_cache=False, **settings)
        assert output.sequences.tolist() == uncached.sequences.tolist()
        for index, tokens in enumerate(output.sequences[:, -COUNT:]):
            expected = whole_logits(model, ids[index][mask[index].bool()], tokens, steps)
            logits = torch.stack([step[index] for step in output.logits])
            assert (logits - expected).abs().max() <= 1e-9 * expected.abs().max()


@pytest.mark.parametrize("steps", [0, 1, 5])
@pytest.mark.parametrize("model_type", tiny.SPINE)
def test_sampling_with_drafts(model_type, steps, float64_throughout):
    """Sampled tokens are the best of whole forward passes' logits and the noise of their places, in chunks as well."""
    chance = random.Random(f"drafts {model_type}")
    model = tiny.pondering_model(model_type, torch.float64, pondering_steps=3)
    settings = {**WANTED, "do_sample": True, "top_k": 0, "eos_token_id": None, "pondering_steps": steps}
    with torch.no_grad():
        torch.manual_seed(3)
        drafts = {"num_draft_tokens": chance.randint(1, 5), "draft_source": HalfWrong()}
        output, ids, mask = in_chunks(model, chance, **drafts, **settings)
        torch.manual_seed(3)
        check_output(model, output, ids, mask, steps, noise=GumbelNoise(len(ids), torch.device("cpu")))


@pytest.mark.parametrize("model_type", tiny.SPINE)
def test_beam_search(model_type, float64_throughout):
    """Each row of a ragged batch gets the sequences and scores of its beams alone, without padding and cache."""
    chance = random.Random(f"beams {model_type}")
    model = tiny.pondering_model(model_type, torch.float64, pondering_steps=3)
    steps = chance.randint(0, 5)
    settings = {**beams(chance, steps), "do_sample": False}
    with torch.no_grad():
        for way in ("in one go", "in chunks"):
            output, ids, mask = WAYS[way](model, chance, **settings)
            check_scores(model, output, ids, mask, settings)
            width = ids.shape[1]
            for index, row in enumerate(ids):
                row = row[mask[index].bool()].unsqueeze(0)
                alone = model.generate(row, use_cache=False, **settings)
                expected = alone.sequences[:, row.shape[1] :]  # it may end before those of the other rows
                found = output.sequences[2 * index :][:2, width:][:, : expected.shape[1]]
                assert found.tolist() == expected.tolist()


@pytest.mark.parametrize("model_type", tiny.SPINE)
def test_beam_sampling(model_type, float64_throughout):
    """A cache changes no sequence, and scores are the sums of what whole forward passes say."""
    chance = random.Random(f"beam sampling {model_type}")
    model = tiny.pondering_model(model_type, torch.float64, pondering_steps=3)
    settings = {**beams(chance, chance.randint(0, 5)), "do_sample": True, "top_k": 9}
    with torch.no_grad():
        torch.manual_seed(3)
        output, ids, mask = plain(model, chance, **settings)
        torch.manual_seed(3)
        uncached = model.generate(ids, attention_mask=mask, use_cache=False, **settings)
        assert output.sequences.tolist() == uncached.sequences.tolist()
        check_scores(model, output, ids, mask, settings)


def beams(chance, steps):
    """Settings of beams, of which some end early."""
    return {
        **WANTED,
        "num_beams": 3,
        "num_return_sequences": 2,
        "length_penalty": chance.choice([0.5, 1.0, 2.0]),
        "eos_token_id": MANY_EOS,
        "pondering_steps": steps,
        "output_scores": True,
    }


def check_scores(model, output, ids, mask, settings):
    """Two sequences a prompt: their scores are sums of log-probabilities by whole forward passes over each alone."""
    for index, (sequence, score) in enumerate(zip(output.sequences, output.sequences_scores, strict=True)):
        tokens = sequence[ids.shape[1] :]
        end = next((place + 1 for place, token in enumerate(tokens.tolist()) if token in MANY_EOS), len(tokens))
        tokens, row = tokens[:end], ids[index // 2][mask[index // 2].bool()]
        logits = whole_logits(model, row, tokens, settings["pondering_steps"])
        expected = logits.log_softmax(-1).gather(1, tokens.unsqueeze(1)).sum() / end ** settings["length_penalty"]
        assert (score - expected).abs() <= 1e-9 * expected.abs()
