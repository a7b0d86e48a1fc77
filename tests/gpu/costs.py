"""What pondering costs on the device, over the plain backbone: training, prefill, decoding, drafts, exits.

Each table is a generator of rows, so that what was measured before something fails is kept.
"""

import gc
import time

import torch
from transformers import CompileConfig

from ponder_hf.modeling import pondering_generate_speculation, pondering_vocabulary

from .generation_checks import Graph
from .machine import forget_memory, peak_memory, seconds
from .shape import always_right


VARIANTS = ("plain", "top-K", "whole vocabulary")
TABLES = {}  # by name: (title, function of (shape, device) that gives rows)


def table(name, title):
    """Register a generator of rows as a table."""

    def register(function):
        TABLES[name] = (title, function)
        return function

    return register


def fresh(device):
    """Leave nothing of the row before."""
    gc.collect()
    forget_memory(device)


def number(value, digits=2):
    return None if value is None else round(value, digits)


def training_seconds(shape, device, variant, half):
    """(seconds, peak memory in GB) of one AdamW step of this variant."""
    fresh(device)
    model = shape.model(device, torch.float32, variant.partition(",")[0]).train()
    if variant.endswith("checkpointed"):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=device.type == "cuda")
    ids = shape.tokens(device, shape.rows, shape.length)

    def step():
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=half):
            loss = model(input_ids=ids, labels=ids, use_cache=False)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return seconds(step, device, shape.rounds + 2), peak_memory(device)


def or_too_large(function, *arguments):
    """What the function gives, or None where memory does not suffice."""
    try:
        return function(*arguments)
    except torch.OutOfMemoryError:
        return None


@table("train", "A training step: forward, backward, AdamW with float32 weights")
def training(shape, device):
    kinds = ("", ", checkpointed")
    for half in (True, False):
        plain = {}
        for variant in [name + kind for kind in kinds for name in VARIANTS]:
            if not half and variant.endswith("checkpointed"):
                continue
            measured = or_too_large(training_seconds, shape, device, variant, half)
            if variant.startswith("plain") and measured:
                plain[variant.partition(",")[2]] = measured[0]
            base = plain.get(variant.partition(",")[2])
            yield {
                "what": variant,
                "computed in": "bfloat16 (autocast)" if half else "float32",
                "batch": f"{shape.rows} x {shape.length}",
                "ms a step": number(1e3 * measured[0], 1) if measured else "out of memory",
                "over (S + 1) plain steps": number(measured[0] / base / shape.passes) if measured and base else None,
                "peak memory, GB": number(measured[1]) if measured else None,
            }


@table("chunks", "How many scores are there at once: the training step by the size of a chunk")
def chunk_sizes(shape, device):
    sizes = pondering_vocabulary.CHUNK_ELEMENTS
    kept = dict(sizes)
    try:
        for exponent in (24, 26, 28):
            sizes[device.type] = 2**exponent
            measured = or_too_large(training_seconds, shape, device, "whole vocabulary", True)
            yield {
                "what": "whole vocabulary",
                "computed in": "bfloat16 (autocast)",
                "elements of a chunk": f"2^{exponent}",
                "ms a step": number(1e3 * measured[0], 1) if measured else "out of memory",
                "peak memory, GB": number(measured[1]) if measured else None,
            }
    finally:
        sizes.clear()
        sizes.update(kept)


@table("prefill", "Prefill: a prompt through all passes, logits of its last token, bfloat16")
def prefill(shape, device):
    for batch in shape.batches:
        plain = None
        for variant in VARIANTS:
            fresh(device)
            model, ids = shape.model(device, torch.bfloat16, variant), shape.tokens(device, batch, shape.length)

            def run(model=model, ids=ids):
                with torch.no_grad():
                    model(ids, use_cache=True, logits_to_keep=1)

            taken = seconds(run, device, shape.rounds + 2)
            plain = taken if variant == "plain" else plain
            yield {
                "what": variant,
                "tokens": f"{batch} x {shape.length}",
                "ms": number(1e3 * taken, 1),
                "over (S + 1) plain": number(taken / plain / shape.passes),
                "peak memory, GB": number(peak_memory(device)),
            }


def generate_settings(new_tokens, **settings):
    return {"max_new_tokens": new_tokens, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **settings}


_KNOWN = {}  # of this process: what plain pondering takes is asked for in several tables


def plain_pondering(shape, device, model, batch):
    """seconds_a_token of a top-K model without drafts and exits; whatever its weights, it takes the same."""
    if batch not in _KNOWN:
        _KNOWN[batch] = seconds_a_token(shape, device, model, batch)
    return _KNOWN[batch]


def seconds_a_token(shape, device, model, batch, **settings):
    """Of greedy `generate`, without what the prompt takes."""
    ids = shape.tokens(device, batch, shape.prompt)
    mask = torch.ones_like(ids)
    taken = []
    for count in (shape.new_tokens + 1, 1):
        wanted = generate_settings(count, **settings)
        taken.append(seconds(lambda s=wanted: model.generate(ids, attention_mask=mask, **s), device, shape.rounds))
    return (taken[0] - taken[1]) / shape.new_tokens


def seconds_of_graph(shape, device, model, batch):
    """A token of greedy decoding by a CUDA graph of all passes, replayed."""
    ids = shape.tokens(device, batch, shape.prompt)
    count = shape.new_tokens
    graph = Graph(model, ids, shape.prompt + (shape.rounds + 2) * count + 4)

    def run():
        for _ in range(count):
            graph()

    return seconds(run, device, shape.rounds) / count


def graph_rows(shape, device, how, measure):
    for batch in shape.batches:
        plain = None
        for variant in VARIANTS:
            fresh(device)
            taken = measure(shape, device, shape.model(device, torch.bfloat16, variant), batch)
            plain = taken if variant == "plain" else plain
            yield {
                "what": variant,
                "how": how,
                "batch": batch,
                "tokens": f"{shape.prompt} + {shape.new_tokens}",
                "ms a token": number(1e3 * taken),
                "over (S + 1) plain": number(taken / plain / shape.passes),
                "peak memory, GB": number(peak_memory(device)),
            }


@table("decode", "Decoding, greedy, bfloat16, without the prompt's share")
def decoding(shape, device):
    yield from graph_rows(shape, device, "generate", seconds_a_token)
    if device.type == "cuda" or shape.layers < 3:
        yield from graph_rows(shape, device, "one CUDA graph a token, static cache", seconds_of_graph)


def ticks_a_token(model, ids, **settings):
    """Ticks for each token behind the first, and the share of right drafts."""
    kept = []
    run = pondering_generate_speculation.Speculation.run

    def run_and_keep(speculation):
        kept.append(speculation)
        return run(speculation)

    pondering_generate_speculation.Speculation.run = run_and_keep
    try:
        output = model.generate(ids, **settings)
    finally:
        pondering_generate_speculation.Speculation.run = run
    return kept[0].wave.num_ticks / (output.shape[1] - ids.shape[1] - 1), kept[0].acceptance_rate


@table("drafts", "Drafts: the wave, bfloat16, one prompt, S drafts")
def drafts(shape, device):
    for right in (True, False):
        fresh(device)
        model = shape.model(device, torch.bfloat16, "top-K")
        model = always_right(model) if right else model
        plain = plain_pondering(shape, device, model, 1)
        for source in ("own", "heads") if right else ("own",):
            drafting = {"num_draft_tokens": shape.steps, "draft_source": source}
            taken = seconds_a_token(shape, device, model, 1, **drafting)
            ids = shape.tokens(device, 1, shape.prompt)
            settings = generate_settings(shape.new_tokens + 1, attention_mask=torch.ones_like(ids), **drafting)
            ticks, rate = ticks_a_token(model, ids, **settings)
            yield {
                "guesses": ("all right" if right else "of a random model"),
                "source": source,
                "right": f"{rate:.0%}",
                "ticks a token": number(ticks),
                "plain pondering, ms a token": number(1e3 * plain),
                "with drafts, ms a token": number(1e3 * taken),
                "times as fast": number(plain / taken),
            }


@table("exits", "Early exits by KL divergence, bfloat16")
def exits(shape, device):
    for batch in shape.batches[:1]:
        fresh(device)
        model = always_right(shape.model(device, torch.bfloat16, "top-K"))
        plain = plain_pondering(shape, device, model, batch)
        for name, threshold in (("after pass 1, each token", 0.05), ("never", 0.0)):
            exit = {"pondering_exit_criterion": "kl", "pondering_exit_threshold": threshold}
            taken = seconds_a_token(shape, device, model, batch, **exit)
            yield {
                "exits": name,
                "batch": batch,
                "all passes, ms a token": number(1e3 * plain),
                "with exits, ms a token": number(1e3 * taken),
                "over all passes": number(taken / plain),
            }


@table("compiled", "Decoding as `generate` compiles it by itself: static cache, torch.compile, CUDA graphs, bfloat16")
def compiled(shape, device):
    plain = None
    for variant in VARIANTS[:2]:
        fresh(device)
        torch._dynamo.reset()
        model = shape.model(device, torch.bfloat16, variant)
        config = CompileConfig(backend="aot_eager", mode=None) if shape.layers < 3 else CompileConfig()
        config._compile_all_devices = True
        settings = {"cache_implementation": "static", "compile_config": config}
        ids = shape.tokens(device, 1, shape.prompt)
        start = time.perf_counter()
        for _ in range(2):
            model.generate(
                ids, attention_mask=torch.ones_like(ids), **generate_settings(shape.new_tokens + 1, **settings)
            )
        ready = time.perf_counter() - start
        taken = seconds_a_token(shape, device, model, 1, **settings)
        plain = taken if variant == "plain" else plain
        yield {
            "what": variant,
            "batch": 1,
            "seconds until compiled": number(ready, 1),
            "ms a token": number(1e3 * taken),
            "over (S + 1) plain": number(taken / plain / shape.passes),
            "peak memory, GB": number(peak_memory(device)),
        }
