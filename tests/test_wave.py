"""The wave: what it generates is what plain pondering generates, in whatever way the drafts are right or wrong."""

import random

import numpy as np
import pytest
import tiny
import torch
from drafting import GREEDY, Guesses, check_same

from ponder_hf import PonderingError
from ponder_hf.modeling import pondering_generate_speculation, pondering_generate_wave
from ponder_hf.modeling.pondering_backbone import TESTED
from ponder_hf.modeling.pondering_cache import CACHE_NAME
from ponder_hf.modeling.pondering_generate_drafts import SOURCE, PendingTokens
from ponder_hf.modeling.pondering_generate_wave import Wave, WaveCache, verify_wave_once


def random_prompts(chance, batch_size):
    return tiny.left_padded(
        [tiny.token_ids(chance.randint(1, 14), seed=chance.randrange(1 << 30)) for _ in range(batch_size)]
    )


PROCESSORS = [
    {"repetition_penalty": 1.5},
    {"min_new_tokens": 3},
    {"no_repeat_ngram_size": 2},
    {"bad_words_ids": [[7], [9, 11]]},
    {"repetition_penalty": 1.2, "forced_eos_token_id": 5, "suppress_tokens": [8, 10, 12]},
    {"prefix_allowed_tokens_fn": lambda row, ids: [*range(3 + row, 131, 2 + row % 2), int(ids[-1])]},
]
MANY_EOS = list(range(3, 60, 6))  # so that rows end early and apart from each other


def check_random_case(model, chance):
    """One random call, plain and with drafts: they must give the same tokens and logits."""
    input_ids, mask = random_prompts(chance, chance.randint(1, 4))
    settings = {"attention_mask": mask, "max_new_tokens": chance.randint(3, 14), "do_sample": False, "pad_token_id": 0}
    settings["eos_token_id"] = chance.choice([None, 5, MANY_EOS])
    if chance.random() < 0.4:
        settings |= chance.choice(PROCESSORS)
    settings |= {"pondering_steps": chance.randint(0, 4), "return_dict_in_generate": True, "output_logits": True}
    expected = model.generate(input_ids, **settings)
    probability = chance.choice([None, 0.0, 0.3, 0.6, 0.9, 1.0])
    source = chance.choice(["own", "prompt_lookup", "heads"])
    if probability is not None:
        source = Guesses(expected.sequences.tolist(), probability, chance.random())
    drafted = model.generate(input_ids, num_draft_tokens=chance.randint(1, 6), draft_source=source, **settings)
    check_same(expected, drafted, input_ids.shape[1], settings["eos_token_id"])


def with_heads(model):
    """Random draft heads, for some of the passes."""
    model.add_draft_heads(2)
    for parameter in model.draft_heads.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def spine_model(model_type):
    # Gemma 2 needs eager attention, which turns wholly masked rows of a float64 batch into NaN, in plain models too.
    model = tiny.pondering_model(model_type, torch.float32 if model_type == "gemma2" else torch.float64)
    return with_heads(model)


@pytest.mark.parametrize("model_type", tiny.SPINE)
def test_random_calls_give_what_plain_pondering_gives(model_type):
    chance, model = random.Random(model_type), spine_model(model_type)
    for _ in range(8):
        check_random_case(model, chance)


OTHERS = sorted(TESTED - {*tiny.SPINE, "gpt_neo"})


@pytest.mark.parametrize("model_type", OTHERS)
def test_random_calls_on_the_other_tested_backbones(model_type):
    # The experts of Mixtral have no product in float64.
    dtype = torch.float32 if model_type == "mixtral" else torch.float64
    chance, model = random.Random(model_type), with_heads(tiny.pondering_model(model_type, dtype))
    for _ in range(4):
        check_random_case(model, chance)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", tiny.SPINE)
def test_many_random_calls_give_what_plain_pondering_gives(model_type):
    chance, model = random.Random("again " + model_type), spine_model(model_type)
    for _ in range(30):
        check_random_case(model, chance)


OTHER_KINDS = {
    "top-K": ("gpt_neox", {}, {"pondering_top_k": 5}),
    "gate": ("llama", {}, {"pondering_gate": "zero_init"}),
    "matrix": ("llama", {}, {"pondering_gate": "zero_init_matrix"}),
    "scales": ("llama", {}, {"embedding_scale": 2.0, "input_scale": 3.0, "pondering_temperature": 0.5}),
    "alibi": ("falcon", {"alibi": True}, {}),
    "mixture": ("mixtral", {}, {}),
    "several key heads": ("gpt_bigcode", {}, {}),
    "windows in some layers": ("qwen2", {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 5}, {}),
    "a short window": ("mistral", {"sliding_window": 3}, {}),
}


@pytest.mark.parametrize("kind", OTHER_KINDS.values(), ids=OTHER_KINDS)
def test_other_kinds_of_models(kind):
    model_type, base_changes, fields = kind
    dtype = torch.float32 if model_type == "mixtral" else torch.float64  # its experts have no float64 product
    model = tiny.pondering_model(model_type, dtype, base_changes, **fields)
    if model.pondering_gate is not None:
        torch.nn.init.normal_(model.pondering_gate.weight)
    chance = random.Random(str(kind))
    for _ in range(8):
        check_random_case(with_heads(model), chance)


def test_eager_attention():
    model = tiny.pondering_model("llama", base_changes={"attn_implementation": "eager"})
    assert model.backbone.config._attn_implementation == "eager"
    chance = random.Random(1)
    for _ in range(8):
        check_random_case(with_heads(model), chance)


def test_a_cache_that_outgrows_its_room():
    model = tiny.pondering_model("llama", torch.float64, {"max_position_embeddings": 512}, pondering_steps=2)
    input_ids = tiny.token_ids(2, 5)
    settings = {"max_new_tokens": 300, "return_dict_in_generate": True, "output_logits": True, **GREEDY}
    expected = model.generate(input_ids, **settings)
    source = Guesses(expected.sequences.tolist(), 0.95)
    drafted = model.generate(input_ids, num_draft_tokens=2, draft_source=source, **settings)
    check_same(expected, drafted, 5)


def count_ticks(model):
    """A list that grows with each forward pass of the decoder: (rows, tokens a row)."""
    shapes = []
    model.backbone.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["inputs_embeds"].shape[:2])), with_kwargs=True
    )
    return shapes


def test_right_drafts_cost_one_tick_a_token():
    model = tiny.pondering_model("llama", torch.float64, pondering_steps=3)
    input_ids = tiny.token_ids(1, 6)
    truth = model.generate(input_ids, max_new_tokens=20, **GREEDY).tolist()
    shapes = count_ticks(model)
    source = Guesses(truth, 1.0)
    output = model.generate(
        input_ids,
        max_new_tokens=20,
        num_draft_tokens=3,
        draft_source=source,
        return_dict_in_generate=True,
        **GREEDY,
    )
    assert output.sequences.tolist() == truth
    assert shapes[:4] == [(1, 6)] * 4
    # The first new token comes of the prompt; three ticks until the next is through, then one a token. Passes that
    # have nothing to run are not in the batch.
    ticks = shapes[4:]
    assert len(ticks) == 3 + 19
    assert [rows for rows, _ in ticks] == [1, 2, 3] + [4] * 16 + [3, 2, 1]
    assert output.draft_acceptance_rate == 1.0
    assert output.pondering_steps_used.tolist() == [[3] * 20]


def test_wrong_drafts_cost_no_more_ticks_than_plain_pondering():
    model = tiny.pondering_model("llama", torch.float64, pondering_steps=3)
    input_ids = tiny.token_ids(1, 6)
    truth = model.generate(input_ids, max_new_tokens=10, **GREEDY).tolist()
    shapes = count_ticks(model)
    source = Guesses(truth, 0.0)
    output = model.generate(
        input_ids,
        max_new_tokens=10,
        num_draft_tokens=3,
        draft_source=source,
        return_dict_in_generate=True,
        **GREEDY,
    )
    assert output.sequences.tolist() == truth
    assert len(shapes) == 4 + 4 * 9
    assert output.draft_acceptance_rate < 0.2


class WrongAtFirst(Guesses):
    """Pass 0 never guesses right, pass 1 always."""

    def token(self, prompt, pass_index, token_ids, predicted):
        truth = self.truth[prompt]
        known = pass_index > 0 and len(token_ids) < len(truth)
        return truth[len(token_ids)] if known else 0


@pytest.mark.parametrize(("corrects", "ticks_per_token"), [(True, 2), (False, 4)])
def test_a_later_pass_corrects_a_wrong_draft(corrects, ticks_per_token, monkeypatch):
    monkeypatch.setattr(pondering_generate_speculation.Speculation, "corrects", corrects)
    model = tiny.pondering_model("llama", torch.float64, pondering_steps=3)
    input_ids = tiny.token_ids(1, 6)
    truth = model.generate(input_ids, max_new_tokens=13, **GREEDY).tolist()
    shapes = count_ticks(model)
    source = WrongAtFirst(truth, 0.0)
    tokens = model.generate(input_ids, max_new_tokens=13, num_draft_tokens=3, draft_source=source, **GREEDY)
    assert tokens.tolist() == truth
    # A token begins its pass 0 anew when pass 1 of the one before it has run: one every two ticks.
    assert len(shapes) - 4 == ticks_per_token * 11 + 4


def test_drafts_that_are_seldom_right_are_drafted_less_far_ahead():
    pending = PendingTokens(0, 0)
    assert pending.num_worthwhile > 3
    for rate, number in [(0.9, 12), (0.7, 4), (0.5, 2), (0.31, 2), (0.2, 2), (0.0, 2)]:
        pending.hit_rate = rate
        assert pending.num_worthwhile == number, rate


def test_the_hit_rate_follows_what_the_last_pass_says():
    pending = PendingTokens(0, 5)
    for _ in range(200):
        pending.tokens, pending.next_passes, pending.drafters, pending.guesses = (
            [5, 6],
            [1, 0],
            [None, 0],
            [{}, {0: 6}],
        )
        pending.advance({1: 7, 0: 8}, 1, 3, 1000)
    assert pending.hit_rate < 1e-6
    assert (pending.num_verdicts, pending.num_hits) == (200, 0)


@pytest.mark.parametrize("who_is_right", ["the source", "pass 0", "pass 1"])
def test_a_prompt_learns_whom_to_trust(who_is_right):
    """S = 2. Pass 0, its source and pass 1 always differ, and one of them says what the last pass will say."""
    speakers = {"pass 0": 0, "the source": SOURCE, "pass 1": 1}
    pending, truth, count = PendingTokens(0, 0), 7, 0
    tokens = {speaker: truth if who_is_right == speaker else number for number, speaker in enumerate(speakers)}
    predicted = {0: tokens["pass 0"], 1: tokens["pass 1"], 2: truth}
    for _ in range(60):
        count += pending.advance(predicted, 2, 2, 1000, drafted=tokens["the source"]) is not None
        if count == 10:
            verdicts, hits = pending.num_verdicts, pending.num_hits
    assert pending.num_hits - hits == pending.num_verdicts - verdicts > 10
    best = speakers[who_is_right]
    for other in set(speakers.values()) - {best}:
        assert pending.advantage(max(best, other), min(best, other)) * (1 if best > other else -1) > 0


class Oracle:
    """A made-up model: pass i of a text predicts a token that depends on the whole text, the last pass with noise."""

    def __init__(self, seed, num_steps, agreement):
        self.seed, self.num_steps, self.agreement = seed, num_steps, agreement

    def predict(self, text, index):
        final = random.Random(f"{self.seed} {text}").randrange(5)
        if index == self.num_steps:
            return final
        chance = random.Random(f"{self.seed} {index} {text}")
        return final if chance.random() < self.agreement else chance.randrange(5)


@pytest.mark.parametrize("num_steps", range(5))
def test_thousands_of_random_drafts_end_where_they_should(num_steps):
    """The logic of a pending alone, against a made-up model, which also checks that each pass runs on what it must."""
    for seed in range(1000):
        chance = random.Random(seed)
        oracle = Oracle(seed, num_steps, chance.random())
        num_drafts, corrects, num_columns = chance.randint(0, 5), chance.random() < 0.8, chance.randint(2, 12)
        text, pending = [0], PendingTokens(0, 0)
        has_run = {}  # column: passes that have run there, on which text
        while len(text) < num_columns:
            predicted = {}
            for index, stage in enumerate(pending.next_passes):
                seen = (*text[:-1], *pending.tokens[: index + 1])
                column = pending.column + index
                assert len(seen) == column + 1
                assert column < num_columns
                if stage:
                    assert has_run[column] == (seen, stage - 1)
                assert (
                    all(
                        has_run[before][1] >= stage and has_run[before][0] == seen[: before + 1]
                        for before in range(column - 2, column)
                        if before >= 0 and before in has_run
                    )
                    or stage == 0
                )
                predicted[stage] = oracle.predict(seen, stage)
            for index, stage in enumerate(pending.next_passes):
                has_run[pending.column + index] = ((*text[:-1], *pending.tokens[: index + 1]), stage)
            assert len(pending.tokens) - 1 <= min(num_drafts, num_steps)
            drafted = chance.choice([None, predicted.get(0), chance.randrange(5)])
            final = pending.advance(predicted, num_steps, num_drafts, num_columns, corrects, drafted)
            lengths = {len(part) for part in (pending.tokens, pending.next_passes, pending.drafters, pending.guesses)}
            assert len(lengths) == 1
            if final is not None:
                assert final == oracle.predict(tuple(text), num_steps)
                text.append(final)
                assert pending.tokens[0] == final
                assert pending.column == len(text) - 1
        assert pending.num_hits <= pending.num_verdicts < num_columns


@pytest.mark.parametrize("model_type", [*tiny.SPINE, "falcon", "gpt_bigcode"])
def test_the_check_of_untested_backbones_passes_those_that_are_right(model_type, monkeypatch):
    monkeypatch.setattr(pondering_generate_wave, "TESTED", frozenset())
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny.pondering_model(model_type, dtype)
        verify_wave_once(model)
        assert model._wave_is_verified  # or it would be checked again at each call, which is seen in time only


def _seeing_the_next_column(wave):
    # What a backbone is given for a tick; a backbone that reads its mask wrongly cannot be had.
    place = wave._place

    def wrong(rows, columns):
        inputs = place(rows, columns)
        mask = inputs["attention_mask"]
        return {**inputs, "attention_mask": torch.ones_like(mask) if mask.dtype == torch.bool else mask * 0}

    wave._place = wrong


def _one_position_on(wave):
    wave.offsets = wave.offsets + 1


def _in_the_wrong_column(wave):
    set_place = wave.cache.place.set
    wave.cache.place.set = lambda rows, ids, columns, length: set_place(rows, ids, columns - 1, length)


@pytest.mark.parametrize("damage", [_seeing_the_next_column, _one_position_on, _in_the_wrong_column])
def test_an_untested_backbone_on_which_the_wave_is_wrong_is_refused(damage, monkeypatch):
    class Damaged(Wave):
        def __init__(self, *args):
            super().__init__(*args)
            damage(self)

    monkeypatch.setattr(pondering_generate_wave, "TESTED", frozenset())
    monkeypatch.setattr(pondering_generate_wave, "Wave", Damaged)
    # gpt2 learns its positions: rotations would not notice that all of them are one on.
    model = tiny.pondering_model("gpt2")
    with pytest.raises(
        PonderingError, match=r"does not work with model_type 'gpt2', where passes.*num_draft_tokens=0"
    ):
        model.generate(tiny.token_ids(1, 5), num_draft_tokens=2, max_new_tokens=4)


def test_an_untested_backbone_on_which_the_wave_fails_is_refused(monkeypatch):
    monkeypatch.setattr(pondering_generate_wave, "TESTED", frozenset())
    monkeypatch.setattr(Wave, "tick", lambda *args: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(PonderingError, match=r"does not work with model_type 'llama' \(.*\): set num_draft_tokens=0"):
        tiny.pondering_model("llama").generate(tiny.token_ids(1, 5), num_draft_tokens=2, max_new_tokens=4)


def test_backbones_that_count_columns_their_own_way_are_refused():
    model = tiny.pondering_model("gpt_neo")
    with pytest.raises(PonderingError, match=r"does not work with model_type 'gpt_neo'.*set num_draft_tokens=0"):
        model.generate(tiny.token_ids(1, 5), num_draft_tokens=2, max_new_tokens=4)


def test_a_wave_cache_that_grows_loses_nothing():
    model = tiny.pondering_model("llama", pondering_steps=1)
    cache = model(tiny.token_ids(2, 5), use_cache=True).past_key_values
    wave_cache = WaveCache(cache, 2, 2, 2000)
    room = wave_cache.capacity
    for layer in wave_cache.layers.layers:
        torch.nn.init.normal_(layer.all_keys)
    kept = [layer.all_keys[:, :, :room].clone() for layer in wave_cache.layers.layers]
    assert wave_cache.reserve(room) == room
    assert wave_cache.reserve(room + 1) > room
    for layer, before in zip(wave_cache.layers.layers, kept, strict=True):
        assert torch.equal(layer.all_keys[:, :, :room], before)
        assert layer.all_keys.shape[2] == wave_cache.capacity + 1


def test_what_comes_back_takes_gradients():
    """A tick runs in inference mode, and none of its tensors may get out: autograd refuses them."""
    model = tiny.pondering_model("llama", torch.float64, {"max_position_embeddings": 512}, pondering_steps=2)
    settings = {**GREEDY, "max_new_tokens": 300, "return_dict_in_generate": True}
    output = model.generate(
        tiny.token_ids(2, 5), num_draft_tokens=2, output_logits=True, output_scores=True, **settings
    )
    factor = torch.ones(1, dtype=torch.float64, requires_grad=True)
    (torch.cat(output.logits + output.scores) * factor).sum().backward()
    assert factor.grad is not None
    last = output.sequences[:, -1:]
    model(last, past_key_values=output[CACHE_NAME]).logits.sum().backward()
    assert model.get_input_embeddings().weight.grad.abs().max() > 0


def test_a_module_that_replaces_its_buffer_stays_out_of_inference_mode():
    """As rotations do that change with the length of a text, while a tick runs."""
    model = tiny.pondering_model("llama")
    rotation = model.backbone.model.rotary_emb
    before = rotation.inv_freq
    rotation.register_forward_pre_hook(lambda module, inputs: module.register_buffer("inv_freq", module.inv_freq * 1))
    model.generate(tiny.token_ids(1, 6), num_draft_tokens=2, max_new_tokens=14, **GREEDY)
    assert rotation.inv_freq is not before
    assert not any(tensor.is_inference() for tensor in (*model.buffers(), *model.parameters()))


def test_drafts_under_autocast():
    model = tiny.pondering_model("llama")
    with torch.autocast("cpu", torch.bfloat16):
        tokens = model.generate(tiny.token_ids(1, 6), num_draft_tokens=2, max_new_tokens=9, **GREEDY)
    assert tokens.shape == (1, 15)


class OtherNumbers:
    """A source whose tokens are no ints of Python, or that has none."""

    def __init__(self, kind):
        self.kind = kind

    def __call__(self, hidden_states, first_pass):
        return None

    def token(self, prompt, pass_index, token_ids, predicted):
        return None if self.kind is None else self.kind((predicted + pass_index) % tiny.VOCAB_SIZE)


@pytest.mark.parametrize("kind", [np.int64, torch.tensor, None])
def test_tokens_of_a_source_of_ones_own(kind):
    model = tiny.pondering_model("llama", torch.float64)
    plain, drafted = (
        model.generate(tiny.token_ids(1, 6), max_new_tokens=12, **settings, **GREEDY)
        for settings in ({}, {"num_draft_tokens": 2, "draft_source": OtherNumbers(kind)})
    )
    assert drafted.tolist() == plain.tolist()
