"""Drafts in `generate`: sampling, processors, stopping, streamers, scores, caches, and what drafts do not go with."""

import itertools
import math

import pytest
import tiny
import torch
from drafting import GREEDY, Guesses, NoDrafts, check_same, ragged
from small_tokenizer import train_tokenizer
from transformers import StaticCache
from transformers.generation import LogitsProcessor, StoppingCriteria, SynthIDTextWatermarkingConfig
from transformers.utils import ModelOutput

from ponder_hf import PonderingError, PonderingForCausalLM
from ponder_hf.modeling import pondering_generate_speculation
from ponder_hf.modeling.pondering_cache import CACHE_NAME
from ponder_hf.modeling.pondering_generate_tokens import GumbelNoise


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)  # whichever test asks for it first
    return tiny.pondering_model("llama", torch.float64, pondering_steps=3)


SAMPLING = {"do_sample": True, "pad_token_id": 0, "max_new_tokens": 8}
WARPERS = [{}, {"temperature": 0.7, "top_k": 20}, {"top_p": 0.8, "repetition_penalty": 1.3}, {"min_p": 0.05}]


# Sampling


@pytest.mark.parametrize("warpers", WARPERS, ids=lambda warpers: " ".join(warpers) or "none")
def test_the_seed_decides_what_is_sampled_whatever_is_drafted(model, warpers):
    input_ids, mask = ragged(5, 9, 2)
    results = []
    for source in (NoDrafts(), "own", "prompt_lookup", None):
        torch.manual_seed(3)
        settings = {**SAMPLING, **warpers, "attention_mask": mask, "eos_token_id": list(range(3, 40, 4))}
        results.append(model.generate(input_ids, num_draft_tokens=3, draft_source=source, **settings).tolist())
    torch.manual_seed(3)
    results.append(
        model.generate(input_ids, num_draft_tokens=2, draft_source=Guesses(results[0], 0.7), **settings).tolist()
    )
    assert all(result == results[0] for result in results)
    torch.manual_seed(4)
    assert model.generate(input_ids, num_draft_tokens=3, **settings).tolist() != results[0]


NUM_SAMPLES = 40_000


def sampled_pairs(model, prompt, count, **settings):
    """How often each pair of tokens was sampled as the second and third after this prompt, (V, V).

    Two more are generated behind them, so that drafts are under way all the time.
    """
    vocab_size, length = model.config.vocab_size, prompt.shape[1]
    counts = torch.zeros(vocab_size * vocab_size)
    settings = {
        "max_new_tokens": 5,
        "do_sample": True,
        "top_k": 0,
        "pad_token_id": 0,
        "eos_token_id": None,
        **settings,
    }
    for size in [4000] * (count // 4000):
        tokens = model.generate(prompt.expand(size, -1), **settings)[:, length + 1 : length + 3]
        counts += torch.bincount(tokens[:, 0] * vocab_size + tokens[:, 1], minlength=vocab_size * vocab_size)
    return counts.view(vocab_size, vocab_size)


def exact_pairs(model, prompt):
    """The probability of each such pair, (V, V), by whole forward passes over all texts that begin with the prompt."""
    vocab_size = model.config.vocab_size
    pairs = torch.tensor(list(itertools.product(range(vocab_size), repeat=2)))
    with torch.no_grad():
        texts = torch.cat([prompt.expand(len(pairs), -1), pairs], dim=1)
        first, second, third = model(texts, use_cache=False).logits[:, -3:].softmax(-1).unbind(1)
    joint = first.gather(1, pairs[:, :1]) * second.gather(1, pairs[:, 1:]) * third
    return joint.view(vocab_size, vocab_size, vocab_size).sum(0)


def deviation(counts, expected):
    """Pearson's statistic of these counts, in standard deviations from what it should be: (chi2 - n) / sqrt(2 n)."""
    wanted = (expected * counts.sum()).flatten()
    counts = counts.flatten()
    order = wanted.argsort()
    groups, last = torch.zeros_like(order), 0
    total = 0.0
    for index in order.tolist():  # pairs that are too rare to count are put together
        groups[index] = last
        total += wanted[index].item()
        if total >= 20:
            last, total = last + 1, 0.0
    if total < 20:
        groups[groups == last] = last - 1
    count = int(groups.max()) + 1
    wanted = torch.zeros(count, dtype=wanted.dtype).index_add_(0, groups, wanted)
    counts = torch.zeros(count, dtype=counts.dtype).index_add_(0, groups, counts)
    statistic = ((counts - wanted) ** 2 / wanted).sum().item()
    return (statistic - (count - 1)) / math.sqrt(2 * (count - 1))


@pytest.fixture(scope="module")
def small_model():
    """A vocabulary so small that every pair of tokens is counted."""
    return tiny.pondering_model("llama", base_changes={"vocab_size": 8, "num_hidden_layers": 1}, pondering_steps=2)


@pytest.mark.slow
def test_samples_are_of_the_distribution_of_plain_pondering(small_model):
    """Five standard deviations are passed by chance once in a million runs."""
    prompt = torch.tensor([[5, 3, 6, 4]])
    torch.manual_seed(0)
    counts = sampled_pairs(small_model, prompt, NUM_SAMPLES, num_draft_tokens=2)
    assert counts.sum() == NUM_SAMPLES
    assert abs(deviation(counts, exact_pairs(small_model, prompt))) < 5


def test_that_test_would_notice_one_percent(small_model):
    """Two pairs of tokens whose probabilities are wrong by one percent: as many samples as above must show it."""
    expected = exact_pairs(small_model, torch.tensor([[5, 3, 6, 4]]))
    torch.manual_seed(0)
    samples = torch.multinomial(expected.flatten(), NUM_SAMPLES, replacement=True)
    counts = torch.bincount(samples, minlength=64).view(8, 8).float()
    wrong = expected.clone()
    largest = expected.flatten().argsort(descending=True)[:2]
    wrong.view(-1)[largest[0]] -= 0.01
    wrong.view(-1)[largest[1]] += 0.01
    assert abs(deviation(counts, expected)) < 5
    assert deviation(counts, wrong) > 5


@pytest.mark.slow
def test_a_wrong_rule_of_acceptance_is_noticed(small_model, monkeypatch):
    """Keeping every draft that the last pass looks at must fail the test above."""

    def lenient(self, predicted, num_steps, *args, **kwargs):
        if self.next_passes[0] == num_steps and len(self.tokens) > 1:
            predicted = {**predicted, num_steps: self.tokens[1]}
        return advance(self, predicted, num_steps, *args, **kwargs)

    advance = pondering_generate_speculation.PendingTokens.advance
    monkeypatch.setattr(pondering_generate_speculation.PendingTokens, "advance", lenient)
    prompt = torch.tensor([[5, 3, 6, 4]])
    torch.manual_seed(0)
    counts = sampled_pairs(small_model, prompt, NUM_SAMPLES, num_draft_tokens=2)
    assert deviation(counts, exact_pairs(small_model, prompt)) > 5


def test_samples_are_the_best_of_scores_and_noise_by_whole_forward_passes(model):
    prompts, mask = ragged(5, 9)
    torch.manual_seed(7)
    tokens = model.generate(
        prompts, attention_mask=mask, num_draft_tokens=3, **{**SAMPLING, "top_k": 0, "eos_token_id": None}
    )
    torch.manual_seed(7)
    noise = GumbelNoise(2, torch.device("cpu"))
    for prompt in range(2):
        row = prompts[prompt][mask[prompt].bool()]
        for column in range(9, 17):
            logits = model(row.unsqueeze(0), use_cache=False).logits[0, -1].float()
            best = (logits + noise.rows([(prompt, column)], len(logits))[0]).argmax()
            assert tokens[prompt, column] == best
            row = torch.cat([row, best.view(1)])


def test_noise_of_different_places_is_independent_and_stays():
    torch.manual_seed(0)
    noise = GumbelNoise(20, torch.device("cpu"))
    places = list(itertools.product(range(20), range(20)))
    rows = noise.rows(places, 500)
    assert torch.equal(rows, noise.rows(places, 500))
    correlation = torch.corrcoef(rows) - torch.eye(len(rows))
    assert correlation.abs().max() < 6 / math.sqrt(500)
    assert abs(rows.mean() - 0.5772) < 0.02
    assert abs(rows.var() - math.pi**2 / 6) < 0.05


# What transformers' loop does around each token


class Recording(LogitsProcessor):
    """A processor with a state: it must see every final token once, in order, and no drafts."""

    def __init__(self):
        self.lengths = []

    def __call__(self, input_ids, scores):
        self.lengths.append(input_ids.shape[1])
        scores[:, len(self.lengths) % 7 + 3] += 5.0
        return scores


def test_a_processor_with_a_state_sees_final_scores_only(model):
    input_ids = tiny.token_ids(1, 6)
    results = []
    for drafts in (0, 3):
        processor = Recording()
        settings = {**GREEDY, "max_new_tokens": 12, "logits_processor": [processor], "repetition_penalty": 1.2}
        results.append((model.generate(input_ids, num_draft_tokens=drafts, **settings).tolist(), processor.lengths))
    assert results[0] == results[1]


@pytest.mark.parametrize(
    "kind",
    [
        {"guidance_scale": 1.7},
        {"watermarking_config": SynthIDTextWatermarkingConfig(ngram_len=3, keys=[3, 5, 7], context_history_size=8)},
        {"logits_processor": [Recording()]},
    ],
    ids=lambda kind: next(iter(kind)),
)
def test_a_processor_with_a_state_is_right_or_refused(model, kind):
    """Its state is of the batch, whose prompts go at their own speed while tokens are drafted."""
    settings = {**GREEDY, "max_new_tokens": 20, **kind}
    if "logits_processor" not in kind:  # our own was used up
        row = tiny.token_ids(1, 10)
        expected = model.generate(row, **settings)
        assert model.generate(row, num_draft_tokens=3, **settings).tolist() == expected.tolist()
    input_ids, mask = ragged(10, 8)
    with pytest.raises(PonderingError, match="for 2 prompts at once"):
        model.generate(input_ids, attention_mask=mask, num_draft_tokens=3, **settings)


class StopAt(StoppingCriteria):
    """Stops each row at a length of its own, without an eos token, and records what it was called with."""

    def __init__(self, lengths):
        self.lengths, self.calls = lengths, []

    def __call__(self, input_ids, scores, **kwargs):
        self.calls.append(input_ids.tolist())
        return torch.tensor([input_ids.shape[1] >= length for length in self.lengths])


def test_a_tokenizer_may_come_along(model):
    """As `transformers serve` gives it with every request; it is for stop strings."""
    tokenizer = train_tokenizer("", 257, 64)  # a byte is a token, more of them than the model has
    given, prompt = {**GREEDY, "max_new_tokens": 10, "tokenizer": tokenizer}, tiny.token_ids(1, 5)
    whole = model.generate(prompt, **given)
    assert model.generate(prompt, num_draft_tokens=3, **given).tolist() == whole.tolist()
    given["stop_strings"] = tokenizer.decode(whole[0, 7:9])
    expected = model.generate(prompt, **given)
    assert expected.shape[1] < whole.shape[1]
    assert model.generate(prompt, num_draft_tokens=3, **given).tolist() == expected.tolist()


@pytest.mark.parametrize("lengths", [(11,), (14, 11, 17), (11, 30, 12)], ids=str)
def test_stopping_criteria_are_asked_as_transformers_asks_them(model, lengths):
    input_ids, mask = ragged(*[9, 4, 6][: len(lengths)])
    results = []
    for drafts in (0, 3):
        criterion = StopAt(lengths)
        settings = {**GREEDY, "attention_mask": mask, "max_new_tokens": 15, "stopping_criteria": [criterion]}
        results.append((model.generate(input_ids, num_draft_tokens=drafts, **settings).tolist(), criterion.calls))
    assert results[0][0] == results[1][0]
    if len(lengths) == 1:
        assert results[0][1] == results[1][1]


class Streamer:
    """Collects what it is given."""

    def __init__(self):
        self.pieces, self.ended = [], False

    def put(self, value):
        self.pieces.append(value.tolist())

    def end(self):
        self.ended = True


@pytest.mark.parametrize("lengths", [(6,), (6, 3, 9)], ids=["one row", "ragged"])
@pytest.mark.parametrize("eos", [None, list(range(3, 60, 5))], ids=["no eos", "eos"])
def test_a_streamer_gets_each_token_once_and_in_order(model, lengths, eos):
    input_ids, mask = ragged(*lengths)
    results = []
    for drafts in (0, 3):
        streamer = Streamer()
        settings = {**GREEDY, "eos_token_id": eos, "attention_mask": mask, "max_new_tokens": 12, "streamer": streamer}
        tokens = model.generate(input_ids, num_draft_tokens=drafts, **settings)
        assert streamer.ended
        results.append((tokens.tolist(), streamer.pieces))
    assert results[0] == results[1]


@pytest.mark.parametrize("eos", [None, list(range(3, 60, 5))], ids=["no eos", "eos"])
def test_scores_and_logits_are_those_of_plain_pondering(model, eos):
    input_ids, mask = ragged(6, 3, 9)
    outputs = [
        model.generate(
            input_ids,
            attention_mask=mask,
            num_draft_tokens=drafts,
            max_new_tokens=10,
            return_dict_in_generate=True,
            output_scores=True,
            output_logits=True,
            repetition_penalty=1.3,
            **{**GREEDY, "eos_token_id": eos},
        )
        for drafts in (0, 3)
    ]
    plain, drafted = outputs
    check_same(plain, drafted, 9, eos)
    scored = [ModelOutput(sequences=output.sequences, logits=output.scores) for output in outputs]
    check_same(*scored, 9, eos)
    assert drafted.pondering_steps_used.tolist() == plain.pondering_steps_used.tolist()
    assert 0 <= drafted.draft_acceptance_rate <= 1


# Prompts and caches


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "mistral"])
@pytest.mark.parametrize("eos", [None, list(range(3, 60, 5))], ids=["no eos", "eos"])
@pytest.mark.parametrize("lengths", [(12,), (12, 5, 9)], ids=["one row", "ragged"])
def test_a_conversation_goes_on_from_the_cache_of_a_drafted_one(model_type, lengths, eos):
    model = tiny.pondering_model(model_type, torch.float64, pondering_steps=2)
    input_ids, mask = ragged(*lengths)
    settings = {**GREEDY, "eos_token_id": eos, "return_dict_in_generate": True, "output_logits": True}
    outputs = []
    for drafts in (0, 2):
        first = model.generate(
            input_ids, attention_mask=mask, num_draft_tokens=drafts, **{**settings, "max_new_tokens": 9}
        )
        # Where rows ended at different lengths, the drafted cache has the columns that all of them have.
        if eos is None or drafts == 0:
            assert first[CACHE_NAME].get_seq_length() == first.sequences.shape[1] - 1
        longer = torch.cat([first.sequences, tiny.token_ids(len(lengths), 3, seed=5)], dim=1)
        longer_mask = torch.cat([mask, mask.new_ones(len(lengths), longer.shape[1] - mask.shape[1])], dim=1)
        second = model.generate(
            longer,
            attention_mask=longer_mask,
            past_key_values=first[CACHE_NAME],
            num_draft_tokens=drafts,
            **{**settings, "max_new_tokens": 9},
        )
        outputs.append((first, second, longer.shape[1]))
    plain, drafted = outputs
    check_same(plain[0], drafted[0], input_ids.shape[1], eos)
    check_same(plain[1], drafted[1], plain[2], eos)


def test_prompts_as_embeddings_and_in_chunks(model):
    input_ids = tiny.token_ids(1, 11)
    settings = {**GREEDY, "max_new_tokens": 9}
    expected = model.generate(input_ids, **settings).tolist()
    assert model.generate(input_ids, num_draft_tokens=3, prefill_chunk_size=4, **settings).tolist() == expected
    embeddings = model.get_input_embeddings()(input_ids)
    tokens = model.generate(inputs_embeds=embeddings, num_draft_tokens=3, **settings)
    assert tokens[0].tolist() == expected[0][11:]


def test_several_sequences_of_one_prompt(model):
    torch.manual_seed(0)
    tokens = model.generate(tiny.token_ids(1, 5), num_return_sequences=4, num_draft_tokens=3, **SAMPLING)
    assert len({tuple(row) for row in tokens.tolist()}) == 4


def test_the_setting_in_a_generation_config(model):
    config = model.generation_config
    settings = {**GREEDY, "max_new_tokens": 6, "return_dict_in_generate": True}
    try:
        config.num_draft_tokens = 2
        assert "draft_acceptance_rate" in model.generate(tiny.token_ids(1, 5), **settings)
        assert "draft_acceptance_rate" not in model.generate(tiny.token_ids(1, 5), num_draft_tokens=0, **settings)
    finally:
        del config.num_draft_tokens


REFUSED = {
    "beams": ({"num_beams": 2}, "does not go with beam search"),
    "no cache": ({"use_cache": False}, "needs the cache"),
    "exits": ({"pondering_exit_threshold": 0.1, "pondering_exit_criterion": "kl"}, "do not go together"),
    "hidden states": ({"output_hidden_states": True, "return_dict_in_generate": True}, "one forward pass a token"),
    "static cache": (
        {"cache_implementation": "static"},
        "works with transformers' dynamic cache, not with a static one",
    ),
    "no heads": ({"draft_source": "heads"}, "the model has none: train them, or use 'own'"),
    "an unknown source": ({"draft_source": "luck"}, "`draft_source` must be 'own', 'heads', 'prompt_lookup' or an"),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_what_drafts_do_not_go_with(model, case):
    settings, message = case
    with pytest.raises(PonderingError, match=message):
        model.generate(tiny.token_ids(1, 5), num_draft_tokens=2, max_new_tokens=4, **settings)


def test_a_static_cache_of_the_users_is_refused_before_any_tick(model):
    cache = StaticCache(config=model.config.base_config, max_cache_len=30)
    with pytest.raises(PonderingError, match="works with transformers' dynamic cache"):
        model.generate(tiny.token_ids(1, 5), num_draft_tokens=2, max_new_tokens=4, past_key_values=cache)


def test_a_model_without_steps_has_nothing_to_draft_with_but_generates():
    model = PonderingForCausalLM.from_base(tiny.base_model("llama", torch.float64), pondering_steps=0)
    input_ids = tiny.token_ids(2, 5)
    settings = {**GREEDY, "max_new_tokens": 6}
    expected = model.generate(input_ids, **settings).tolist()
    assert model.generate(input_ids, num_draft_tokens=3, **settings).tolist() == expected
