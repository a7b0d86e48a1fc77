"""One model, used by many threads at once: every call gives what it gives when it runs alone."""

import contextlib
import random
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import tiny
import torch
from patience import PATIENCE
from transformers import LogitsProcessor, LogitsProcessorList, StaticCache

from ponder_hf.callbacks import pondering_statistics
from ponder_hf.conversion import load_model
from ponder_hf.lenses import interventions
from ponder_hf.lenses.readings import read_passes
from ponder_hf.modeling import PonderingExit
from ponder_hf.modeling.pondering_backbone import evaluating
from ponder_hf.modeling.pondering_cache import CACHE_NAME


THREADS = 8
COUNT = 6
GREEDY = {"max_new_tokens": COUNT, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


class Noise(LogitsProcessor):
    """Sampling with a generator of the call's own: the largest of logits and Gumbel noise is a sample.

    The noise of a place in the text is always the same, so that drafts meet it as plain generation does.
    """

    def __init__(self, seed):
        self.seed = seed

    def __call__(self, input_ids, scores):
        generator = torch.Generator().manual_seed(1000 * self.seed + input_ids.shape[1])
        uniform = torch.rand(scores.shape, generator=generator, dtype=scores.dtype)
        return scores - (-uniform.clamp(1e-6, 1 - 1e-6).log()).log()


class Kept:
    """A streamer that keeps what it is given."""

    def __init__(self):
        self.tokens = []

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.tokens.append(-1)


def forward(seed, **options):
    """What a forward pass gives, with labels and without a cache."""

    def call(model):
        ids = tiny.token_ids(2, 7, seed=seed)
        with torch.no_grad():
            output = model(ids, labels=ids, use_cache=False, **options)
        return output.loss, output.logits, output.pondering_logits

    return call


def backward(model):
    """The gradient of the inputs: that of weights is added up in one place, by torch itself."""
    embeds = model.get_input_embeddings()(tiny.token_ids(1, 6)).detach().requires_grad_()
    loss = model(inputs_embeds=embeds, labels=tiny.token_ids(1, 6), pondering_steps=2).loss
    return torch.autograd.grad(loss, embeds)


def leaving(model):
    """A forward pass that tokens leave early, and when each does."""
    steps = []
    pondering_exit = PonderingExit(PonderingExit.read("argmax", 0.9).criterion, 0.9, record=steps.append)
    with torch.no_grad():
        return model(tiny.token_ids(2, 7), pondering_exit=pondering_exit).logits, *steps


def generate(seed=0, rows=1, make=dict, **options):
    """What `generate` gives; `make` makes arguments that belong to one call."""

    def call(model):
        made = make(model) if make is not dict else {}
        prompt = tiny.token_ids(rows, 5 + seed % 3, seed=seed)
        output = model.generate(
            prompt, **{**GREEDY, "return_dict_in_generate": True, "output_logits": True, **options, **made}
        )
        used, streamer = output.pondering_steps_used, made.get("streamer")
        rate = [output.draft_acceptance_rate] if "num_draft_tokens" in options else []
        return output.sequences, output.logits, used, torch.tensor(rate), getattr(streamer, "tokens", None)

    return call


def padded(**options):
    def call(model):
        ids, mask = tiny.left_padded([tiny.token_ids(length, seed=length) for length in (7, 3, 5)])
        return model.generate(ids, attention_mask=mask, **GREEDY, **options)

    return call


def going_on(model):
    """A second turn with the cache of the first."""
    first = model.generate(tiny.token_ids(1, 5), return_dict_in_generate=True, pondering_steps=1, **GREEDY)
    longer = torch.cat([first.sequences, tiny.token_ids(1, 3, seed=4)], dim=1)
    return model.generate(longer, past_key_values=getattr(first, CACHE_NAME), pondering_steps=1, **GREEDY)


def sampled(seed):
    return lambda model: {"logits_processor": LogitsProcessorList([Noise(seed)])}


CALLS = {
    **{f"forward, S = {steps}": forward(steps, pondering_steps=steps) for steps in range(4)},
    "forward of all passes": forward(5, output_pondering=True),
    "forward with hidden states": lambda model: model(tiny.token_ids(1, 7), output_hidden_states=True).hidden_states,
    "forward with exits": leaving,
    "backward": backward,
    **{f"greedy, S = {steps}": generate(steps, pondering_steps=steps) for steps in range(4)},
    "sampled": generate(1, rows=3, make=sampled(1)),
    "sampled otherwise, S = 1": generate(1, rows=3, make=sampled(2), pondering_steps=1),
    "sampled with drafts": generate(1, make=sampled(3), num_draft_tokens=2),
    "beams": generate(2, rows=2, num_beams=3, output_logits=False),
    "drafts": generate(3, rows=2, num_draft_tokens=2),
    "drafts, S = 3": generate(4, num_draft_tokens=3, pondering_steps=3),
    "drafts looked up": generate(5, num_draft_tokens=2, draft_source="prompt_lookup"),
    "exits by kl": generate(6, rows=2, pondering_exit_criterion="kl", pondering_exit_threshold=0.2),
    "exits by entropy": generate(7, pondering_exit_criterion="entropy", pondering_exit_threshold=3.0),
    "exits by argmax, S = 3": generate(
        8, pondering_steps=3, pondering_exit_criterion="argmax", pondering_exit_threshold=0.9
    ),
    "without a cache": generate(9, use_cache=False),
    "a static cache": generate(10, cache_implementation="static"),
    "a static cache of the call's own": generate(
        11, make=lambda model: {"past_key_values": StaticCache(model.config.get_text_config(), max_cache_len=32)}
    ),
    "a streamer": generate(12, make=lambda model: {"streamer": Kept()}),
    "a streamer with drafts": generate(13, num_draft_tokens=2, make=lambda model: {"streamer": Kept()}),
    "padding": padded(),
    "padding, drafts": padded(num_draft_tokens=2),
    "padding, exits": padded(pondering_exit_criterion="kl", pondering_exit_threshold=0.2),
    "guidance": generate(14, guidance_scale=1.5, output_logits=False),
    "another turn": going_on,
    "a lens": lambda model: vars(read_passes(model, tiny.token_ids(5))),
    "a lens, S = 1": lambda model: vars(read_passes(model, tiny.token_ids(6), pondering_steps=1)),
    "statistics of passes": lambda model: pondering_statistics(model, tiny.token_ids(2, 6)),
}
MODELS = {
    "gpt_neox, gate": ("gpt_neox", {"pondering_gate": "zero_init"}),
    "llama, top 5": ("llama", {"pondering_top_k": 5}),
    "gemma3_text": ("gemma3_text", {}),  # windows, a cap, scaled embeddings
}


def make_model(model_type, **fields):
    model = tiny.pondering_model(model_type, torch.float64, pondering_steps=2, **fields)
    if model.pondering_gate is not None:
        torch.nn.init.normal_(model.pondering_gate.weight)
    return model


@contextlib.contextmanager
def changing_places_often():
    """Threads are interrupted a thousand times as often as Python usually does it."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(5e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)


def all_at_once(tasks, threads=THREADS):
    """The results of functions that run in so many threads, which begin together."""
    barrier = threading.Barrier(threads)

    def begin(index):
        barrier.wait(PATIENCE)
        return [task() for task in tasks[index::threads]]

    with changing_places_often(), ThreadPoolExecutor(threads) as pool:
        parts = list(pool.map(begin, range(threads)))
    return [parts[index % threads][index // threads] for index in range(len(tasks))]


def state_of(model):
    """What a call might leave behind: attributes and hooks of every module, the configurations."""
    parts = {name: sorted(vars(part)) for name, part in model.named_modules()}
    hooks = {
        name: (len(part._forward_hooks), len(part._forward_pre_hooks), part.training)
        for name, part in model.named_modules()
    }
    settings = model.generation_config.to_dict()
    return parts, hooks, model.config.to_dict(), settings


def assert_same(name, found, expected):
    """Equal but for rounding in float64, whatever they are made of; what is not a number is at the same places."""
    torch.testing.assert_close(
        found, expected, rtol=1e-9, atol=1e-12, equal_nan=True, msg=lambda text: f"{name}: {text}"
    )


@pytest.mark.parametrize(("model_type", "fields"), MODELS.values(), ids=MODELS)
def test_every_kind_of_call_in_eight_threads(model_type, fields):
    model = make_model(model_type, **fields)
    expected = {name: call(model) for name, call in CALLS.items()}
    before = state_of(model)
    names = [name for name in CALLS for _ in range(2)]
    random.Random(0).shuffle(names)
    found = all_at_once([lambda name=name: CALLS[name](model) for name in names])
    for name, result in zip(names, found, strict=True):
        assert_same(name, result, expected[name])
    assert state_of(model) == before


def test_tokens_are_embedded_alike_while_others_look_at_every_row():
    """Where a hook or padding makes the table be asked for, nothing of the module changes meanwhile."""
    model = make_model("opt")  # its embedding has a padding row, its head is tied to it
    table = model.get_input_embeddings()
    table.register_forward_hook(lambda module, inputs, output: output * 1.5)
    ids = torch.tensor([[0, 5, 0, 9]])
    loss = model(ids, labels=ids).loss
    expected = torch.autograd.grad(loss, table.weight)[0]

    def gradient():
        return torch.autograd.grad(model(ids, labels=ids).loss, table.weight)[0]

    for found in all_at_once([gradient] * 40):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert table.padding_idx == 0


def test_models_that_check_themselves_at_first_use(monkeypatch):
    """Under a newer transformers the first call of generate holds the model against itself, in every thread."""
    ways = [{}, {"num_draft_tokens": 2}, {"pondering_exit_criterion": "kl", "pondering_exit_threshold": 0.05}]
    model = make_model("llama")
    model.generation_config.update(max_new_tokens=COUNT, do_sample=False, pad_token_id=0, suppress_tokens=[5, 9])
    settings, prompt = model.generation_config, tiny.token_ids(1, 6)
    passes = []
    model.backbone.model.register_forward_hook(lambda *_: passes.append(1))
    expected = [model.generate(prompt, **way).tolist() for way in ways]
    without_checks = len(passes)
    passes.clear()
    monkeypatch.setattr("transformers.__version__", "5.31.0")
    found = all_at_once([lambda way=way: model.generate(prompt, **way).tolist() for way in ways * 8])
    assert len(passes) > 8 * without_checks
    assert found == expected * 8
    assert model.generation_config is settings


def test_an_intervention_for_whoever_asks_and_one_for_all():
    model, ids = make_model("llama"), tiny.token_ids(1, 6)
    of_one = [interventions.scale(0), interventions.replace_by_noise(seed=1)]

    def logits():
        with torch.no_grad():
            return model(ids, use_cache=False).logits

    plain, looks = logits(), [vars(read_passes(model, ids[0], intervention=one)) for one in of_one]
    at_work, lock = threading.Event(), threading.Lock()

    def look(index):
        with lock:  # two at a time are refused, and named
            at_work.set()
            return vars(read_passes(model, ids[0], intervention=of_one[index]))

    def answer():
        at_work.wait(PATIENCE)
        return [logits() for _ in range(10)]

    tasks = [lambda: look(0), lambda: look(1), *[answer] * 6]
    for found, expected in zip(all_at_once(tasks), [*looks, *[[plain] * 10] * 6], strict=True):
        assert_same("while others look", found, expected)
    with interventions.intervening(model, interventions.replace_by_noise(seed=2)):
        expected = logits()
        assert not torch.allclose(expected, plain)
        for found in all_at_once([logits] * 24):
            assert_same("within it", found, expected)
    assert torch.equal(logits(), plain)


def test_each_part_has_its_own_mode_again_when_all_have_measured():
    model = make_model("llama").train()
    model.backbone.model.layers[0].eval()
    before = {name: part.training for name, part in model.named_modules()}
    rates = []

    def measure():
        with evaluating(model), evaluating(model.backbone):
            rates.append(pondering_statistics(model, tiny.token_ids(2, 6))["pass_2_loss"])
            assert not any(part.training for part in model.modules())

    all_at_once([measure] * 32)
    assert {name: part.training for name, part in model.named_modules()} == before
    assert len(set(rates)) == 1


def test_loading_silences_only_its_own_thread(caplog):
    def load():
        with load_model._no_second_warning(load_model.from_base_logger):
            load_model.from_base_logger.warning("own")
            with ThreadPoolExecutor(1) as pool:
                pool.submit(load_model.from_base_logger.warning, "another's").result(PATIENCE)

    all_at_once([load] * 16)
    load_model.from_base_logger.warning("later")
    assert [record.getMessage() for record in caplog.records] == ["another's"] * 16 + ["later"]
