"""Everything that transformers' generate does, tried on a pondering model: what works, and what is refused with what.

    python tests/strategies.py      prints the table of docs/generation.md

Each entry has a function that is given a model and raises where the strategy does not do what it should. A refusal is
an error that says what to use instead.
"""

import importlib.util
import threading

import tiny
import torch
from patience import PATIENCE
from transformers import (
    ContinuousBatchingConfig,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    StaticCache,
    StoppingCriteriaList,
    TextIteratorStreamer,
    TextStreamer,
)

from ponder_hf import PonderingError, PonderingExit


COUNT = 8
PAGES = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=16)  # without it, as much memory as there is
GREEDY = {"max_new_tokens": COUNT, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def make_model(model_type="llama"):
    torch.manual_seed(0)
    return tiny.pondering_model(model_type, torch.float64, pondering_steps=2)


def prompt():
    return tiny.token_ids(1, 6).repeat(1, 2)  # repeats itself, for prompt lookup


def generate(model, input_ids=None, **settings):
    input_ids = prompt() if input_ids is None else input_ids
    return model.generate(input_ids, attention_mask=torch.ones_like(input_ids), **{**GREEDY, **settings})


def recomputed(model, row, count=COUNT):
    """The plain reference: whole forward passes without a cache, and argmax."""
    for _ in range(count):
        row = torch.cat([row, model(row.unsqueeze(0), use_cache=False).logits[0, -1].argmax().view(1)])
    return row


def is_greedy(**settings):
    """A check that generation with these settings gives the tokens of the plain reference."""

    def check(model):
        assert generate(model, **settings)[0].tolist() == recomputed(model, prompt()[0]).tolist()

    return check


def next_logits(model, rows, **settings):
    """Of whole forward passes without a cache over rows (B, T): the logits (B, V) of what comes next, in float32."""
    return model(rows, use_cache=False, **settings).logits[:, -1].float()


def is_sampled(num_rows=1, **settings):
    """A check that sampling takes the tokens that the plain reference draws with the same random numbers."""

    def check(model):
        torch.manual_seed(0)
        found = generate(model, do_sample=True, top_k=9, **settings)
        torch.manual_seed(0)
        rows = prompt().repeat(num_rows, 1)
        for _ in range(COUNT):
            best, token_ids = next_logits(model, rows).topk(9)
            everywhere = torch.full((num_rows, model.config.vocab_size), -torch.inf)
            probabilities = everywhere.scatter(1, token_ids, best).softmax(-1)
            rows = torch.cat([rows, torch.multinomial(probabilities, 1)], dim=1)
        assert found.tolist() == rows.tolist()

    return check


def best_of_beams(model, num_beams, allowed=None, draw=None):
    """The plain reference of beam search: the best row (1, T) of so many beams, by whole forward passes.

    allowed: token ids; None: all. draw: from the scores (beams * V,) of all continuations to the indices of those that
    are looked at, the best of which go on; None: all are.
    """
    rows, totals = prompt(), torch.zeros(1)
    for _ in range(COUNT):
        log_probabilities = next_logits(model, rows).log_softmax(-1)
        if allowed is not None:
            allowed_only = torch.full_like(log_probabilities, -torch.inf)
            allowed_only[:, allowed] = log_probabilities[:, allowed]
            log_probabilities = allowed_only
        scores = (totals[:, None] + log_probabilities).flatten()
        looked_at = torch.arange(len(scores)) if draw is None else draw(scores)
        totals, best = scores[looked_at].topk(num_beams)
        beams, tokens = looked_at[best] // log_probabilities.shape[1], looked_at[best] % log_probabilities.shape[1]
        rows = torch.cat([rows[beams], tokens[:, None]], dim=1)
    return rows[:1]


def beam_search(model):
    assert generate(model, num_beams=3).tolist() == best_of_beams(model, 3).tolist()


def beam_sampling(model):
    size = 3 * model.config.vocab_size

    def draw(scores):  # twice as many continuations as beams; at first all beams but one are empty
        scores = torch.cat([scores, scores.new_full((size - len(scores),), -1e9)])
        return torch.multinomial(scores.softmax(-1), 6)

    torch.manual_seed(0)
    found = generate(model, num_beams=3, do_sample=True, top_k=0)
    torch.manual_seed(0)
    assert found.tolist() == best_of_beams(model, 3, draw=draw).tolist()


def guidance(model):
    found = generate(model, guidance_scale=1.5)[0]
    row, unconditional = prompt(), prompt()[:, -1:]  # which starts from the prompt's last token
    for _ in range(COUNT):
        guided, others = (next_logits(model, each).log_softmax(-1) for each in (row, unconditional))
        token = (others + 1.5 * (guided - others)).argmax(-1, keepdim=True)
        row, unconditional = torch.cat([row, token], dim=1), torch.cat([unconditional, token], dim=1)
    assert found.tolist() == row[0].tolist()
    assert found.tolist() != recomputed(model, prompt()[0]).tolist()


def early_exits(model):
    settings = {"pondering_exit_threshold": 1e-3, "pondering_exit_criterion": "kl"}
    found, steps = generate(model, **settings)[0], []
    pondering_exit = PonderingExit.read("kl", 1e-3)
    pondering_exit.record = steps.append
    row = prompt()
    for _ in range(COUNT):
        row = torch.cat([row, next_logits(model, row, pondering_exit=pondering_exit).argmax(-1, keepdim=True)], dim=1)
    assert found.tolist() == row[0].tolist()
    assert len(set(torch.cat([each[0] for each in steps]).tolist())) > 1  # some tokens stopped before others


def runs(**settings):
    """A check that generation with these settings gives so many tokens."""

    def check(model):
        assert generate(model, **settings).shape[1] == prompt().shape[1] + COUNT

    return check


class _Words:
    """Stands for a tokenizer in streamers: a token is its number."""

    def decode(self, ids, **_):
        return "".join(f" {int(token)}" for token in ids)


def text_streamer(model):
    texts = []

    class Streamer(TextStreamer):
        def on_finalized_text(self, text, stream_end=False):
            texts.append(text)

    tokens = generate(model, streamer=Streamer(_Words(), skip_prompt=True))
    assert "".join(texts).split() == [str(token) for token in tokens[0, -COUNT:].tolist()]


def iterator_streamer(model):
    streamer = TextIteratorStreamer(_Words(), skip_prompt=True, timeout=PATIENCE)
    thread = threading.Thread(target=generate, args=(model,), kwargs={"streamer": streamer})
    thread.start()
    words = "".join(streamer).split()
    thread.join()
    assert words == [str(token) for token in recomputed(model, prompt()[0])[-COUNT:].tolist()]


def stopping_criteria(model):
    criteria = StoppingCriteriaList([MaxLengthCriteria(prompt().shape[1] + 3)])
    assert generate(model, stopping_criteria=criteria)[0].tolist() == recomputed(model, prompt()[0], count=3).tolist()


def logits_processor(model):
    class Only(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return scores.masked_fill(torch.arange(scores.shape[-1]) % 7 != 0, -torch.inf)

    found = generate(model, logits_processor=LogitsProcessorList([Only()]))
    assert found.tolist() == best_of_beams(model, 1, range(0, model.config.vocab_size, 7)).tolist()


def constrained_prefix(model):
    tokens = generate(model, num_beams=3, prefix_allowed_tokens_fn=lambda batch_index, ids: [5, 6, 9])
    assert tokens.tolist() == best_of_beams(model, 3, [5, 6, 9]).tolist()


def ragged_batch(model):
    rows = [tiny.token_ids(length, seed=length) for length in (7, 3)]
    ids, mask = tiny.left_padded(rows)
    tokens = model.generate(ids, attention_mask=mask, **GREEDY)
    for index, row in enumerate(rows):
        assert tokens[index, -COUNT:].tolist() == recomputed(model, row)[-COUNT:].tolist()


def embeddings(model):
    tokens = model.generate(inputs_embeds=model.get_input_embeddings()(prompt()), **GREEDY)
    assert tokens[0].tolist() == recomputed(model, prompt()[0])[-COUNT:].tolist()


def conversation(model):
    first = generate(model, return_dict_in_generate=True)
    longer = torch.cat([first.sequences, tiny.token_ids(1, 3, seed=4)], dim=1)
    tokens = model.generate(longer, past_key_values=first.past_key_values, **GREEDY)
    assert tokens[0].tolist() == recomputed(model, longer[0]).tolist()


def cropping(model):
    first = generate(model, return_dict_in_generate=True)
    first.past_key_values.crop(-5)
    kept = first.sequences[:, : first.past_key_values.get_seq_length() + 1]
    tokens = model.generate(kept, past_key_values=first.past_key_values, **GREEDY)
    assert tokens[0].tolist() == recomputed(model, kept[0]).tolist()


def outputs(model):
    names = ("scores", "logits", "hidden_states", "attentions")
    model.set_attn_implementation("eager")
    output = generate(model, return_dict_in_generate=True, **{f"output_{name}": True for name in names})
    sequences, length = output.sequences, prompt().shape[1]
    assert sequences[0].tolist() == recomputed(model, prompt()[0]).tolist()
    whole = model(sequences[:, :-1], use_cache=False, output_hidden_states=True, output_attentions=True)
    close = {"rtol": 1e-5, "atol": 1e-6}  # LLaMA's norms compute in float32
    for step in range(COUNT):
        last = length - 1 + step
        for name in ("scores", "logits"):
            torch.testing.assert_close(output[name][step], whole.logits[:, last].float(), **close)
        for found, expected in zip(output.hidden_states[step], whole.hidden_states, strict=True):
            torch.testing.assert_close(found[:, -1], expected[:, last], **close)
        for found, expected in zip(output.attentions[step], whole.attentions, strict=True):
            torch.testing.assert_close(found[:, :, -1, : last + 1], expected[:, :, last, : last + 1], **close)


def static_cache_of_the_user(model):
    cache = StaticCache(model.config.get_text_config(), max_cache_len=32)
    assert generate(model, past_key_values=cache)[0].tolist() == recomputed(model, prompt()[0]).tolist()
    assert len(cache.layers) == 3 * model.config.num_hidden_layers


def quantised(kind, tolerance, **cache_config):
    """A check that slots are quantised, each with its own pass's keys, and that S = 0 is the plain model's."""

    def check(model):
        model = model.float()  # hqq has no float64
        settings = {"cache_implementation": "quantized", "return_dict_in_generate": True, "output_logits": True}
        output, unpondered, plain = (
            generate(which, cache_config=dict(cache_config), **settings, **steps)
            for which, steps in ((model, {}), (model, {"pondering_steps": 0}), (model.to_base(), {}))
        )
        exact = generate(model, return_dict_in_generate=True).past_key_values
        num_layers, length = model.config.num_hidden_layers, prompt().shape[1]
        assert {type(layer).__name__ for layer in output.past_key_values.layers} == {kind}
        assert len(output.past_key_values.layers) == 3 * num_layers
        for layer, other in zip(output.past_key_values.layers, exact.layers, strict=True):
            keys = layer._dequantize(layer._quantized_keys)[:, :, :length]  # tokens after it need not be the same
            assert (keys - other.keys[:, :, :length]).abs().max() < tolerance * other.keys.abs().max()
        assert unpondered.sequences.tolist() == plain.sequences.tolist()
        for logits, others in zip(unpondered.logits, plain.logits, strict=True):
            torch.testing.assert_close(logits, others)

    return check


def assisted(model):
    found = generate(model, assistant_model=model.to_base())
    assert found[0].tolist() == recomputed(model, prompt()[0]).tolist()


def custom_loop(model):
    def loop(model, input_ids, **kwargs):
        return type(model)._sample(model, input_ids, **kwargs)

    assert generate(model, custom_generate=loop)[0].tolist() == recomputed(model, prompt()[0]).tolist()


def continuous_batching(model):
    rows = [tiny.token_ids(length, seed=length) for length in (7, 3, 12)]
    results = model.generate_batch(
        [row.tolist() for row in rows],
        GenerationConfig(**{**GREEDY, "eos_token_id": -1}),
        continuous_batching_config=PAGES,
    )
    for row, result in zip(rows, results.values(), strict=True):
        assert result.generated_tokens == recomputed(model, row)[-COUNT:].tolist()


def paged_cache(model):
    rows = tiny.token_ids(2, 6)
    tokens = generate(model, rows, cache_implementation="paged", continuous_batching_config=PAGES)
    assert tokens[0].tolist() == [recomputed(model, row).tolist() for row in rows]  # (1, 2, T)


# What it is, how it is asked for, and the check.
STRATEGIES = {
    "greedy search": ("`do_sample=False`", is_greedy()),
    "sampling": (
        "`do_sample=True`, `temperature`, `top_k`, `top_p`, `min_p`, ...",
        is_sampled(),
    ),
    "beam search": ("`num_beams=3`", beam_search),
    "beam sampling": ("`num_beams=3, do_sample=True`", beam_sampling),
    "several sequences": ("`num_return_sequences=3`", is_sampled(3, num_return_sequences=3)),
    "assisted decoding": ("`assistant_model=...`", assisted),
    "prompt lookup": ("`prompt_lookup_num_tokens=3`", is_greedy(prompt_lookup_num_tokens=3)),
    "streaming text": ("`streamer=TextStreamer(...)`", text_streamer),
    "streaming to an iterator": ("`streamer=TextIteratorStreamer(...)`", iterator_streamer),
    "stopping criteria": ("`stopping_criteria=...`, `stop_strings`, `max_time`", stopping_criteria),
    "logits processors": ("`logits_processor=...`, `repetition_penalty`, ...", logits_processor),
    "constrained prefixes": ("`prefix_allowed_tokens_fn=...`", constrained_prefix),
    "classifier-free guidance": ("`guidance_scale=1.5`", guidance),
    "ragged batches": ("left padding and `attention_mask`", ragged_batch),
    "embeddings as prompt": ("`inputs_embeds=...`", embeddings),
    "the prompt in chunks": ("`prefill_chunk_size=5`", is_greedy(prefill_chunk_size=5)),
    "going on from a cache": ("`past_key_values=...`", conversation),
    "cropping a cache": ("`past_key_values.crop(-5)`", cropping),
    "scores, logits, hidden states, attentions": ("`output_scores=True`, ... (of the last pass)", outputs),
    "dynamic cache": ("the default", is_greedy(cache_implementation="dynamic")),
    "no cache": ("`use_cache=False`", is_greedy(use_cache=False)),
    "static cache": ('`cache_implementation="static"`', is_greedy(cache_implementation="static")),
    "a static cache of one's own": ("`past_key_values=StaticCache(...)`", static_cache_of_the_user),
    "quantised cache": (
        '`cache_implementation="quantized", cache_config={"backend": "fp8"}`',
        quantised("Fp8QuantizedLayer", 0.1, backend="fp8"),
    ),
    "quantised cache of quanto": (
        '`cache_config={"backend": "quanto", "nbits": 4}`',
        quantised("QuantoQuantizedLayer", 0.1, backend="quanto", nbits=4, q_group_size=16, residual_length=4),
    ),
    "quantised cache of hqq": (
        '`cache_config={"backend": "hqq", "nbits": 8, "axis_key": 1, "axis_value": 1}`',
        quantised("HQQQuantizedLayer", 0.02, backend="hqq", nbits=8, axis_key=1, axis_value=1, q_group_size=16),
    ),
    "offloaded cache, without a GPU": ('`cache_implementation="offloaded"`', runs(cache_implementation="offloaded")),
    "a decoding loop of one's own": ("`custom_generate=function`", custom_loop),
    "continuous batching": ("`generate_batch(...)`, of requests of any length", continuous_batching),
    "paged cache": ('`cache_implementation="paged"`', paged_cache),
    "drafts with beams": ("`num_draft_tokens=2, num_beams=3`", runs(num_draft_tokens=2, num_beams=3)),
    "drafts with an assistant": (
        "`num_draft_tokens=2, prompt_lookup_num_tokens=3`",
        runs(num_draft_tokens=2, prompt_lookup_num_tokens=3),
    ),
    "drafts with early exits": (
        '`num_draft_tokens=2, pondering_exit_threshold=0.1, pondering_exit_criterion="kl"`',
        runs(num_draft_tokens=2, pondering_exit_threshold=0.1, pondering_exit_criterion="kl"),
    ),
    "early exits": (
        '`pondering_exit_threshold=1e-3, pondering_exit_criterion="kl"`',
        early_exits,
    ),
    "early exits, hidden states asked for": (
        "`output_hidden_states=True` beside them",
        runs(
            pondering_exit_threshold=0.1,
            pondering_exit_criterion="kl",
            output_hidden_states=True,
            return_dict_in_generate=True,
        ),
    ),
}


# What needs a module that nothing else of the project needs. `make setup` puts them beside the environment.
NEEDS = {"quantised cache of quanto": "optimum.quanto", "quantised cache of hqq": "hqq"}


def is_missing(name):
    """Whether the module that this strategy needs is not there."""
    try:
        return importlib.util.find_spec(NEEDS.get(name, "torch")) is None
    except ModuleNotFoundError:  # the package around it
        return True


def outcome(name):
    """What the table says of a strategy: "yes", or the error with which it is refused."""
    _, check = STRATEGIES[name]
    try:
        with torch.no_grad():
            check(make_model())
    except PonderingError as error:
        return f"refused: {error}"
    return "yes"


def rows():
    """The table as lines of Markdown, one by one."""
    yield "| what | how it is asked for | works |"
    yield "| --- | --- | --- |"
    for name, (how, _) in STRATEGIES.items():
        yield f"| {name} | {how} | {'not tried' if is_missing(name) else outcome(name)} |"


if __name__ == "__main__":
    for row in rows():
        print(row, flush=True)
