"""What pondering costs in decoding: time per token over (S+1) times the plain backbone's, prefill, cache.

Greedy `generate` of a model of Pythia-70m's shape with random weights, in float32, interleaved with the plain
backbone's own `generate`; medians. The limit: a pass with top-K reads what a plain token reads, so 1.0; over the whole
vocabulary each of the S pondering steps reads the embedding table as well, unless head and embedding are one matrix.

    python -m benchmarks decode                          the table
    python -m benchmarks decode --compile                static cache and torch.compile as well (minutes)
    python -m benchmarks decode --grow                   how it grows with S, context and batch
    python -m benchmarks decode --parts                  what each part of pondering_vocabulary_cpu.py brings
"""

import argparse
import statistics
import time
from functools import partial

import torch
from transformers import CompileConfig, GPTNeoXConfig, GPTNeoXForCausalLM, StaticCache

from benchmarks.machine import CPU_PARTS, described, without
from ponder_hf import PonderingForCausalLM


GROWTH = {"pondering_steps": (0, 1, 2, 3, 5), "prompt": (64, 512, 1536), "batch": (1, 2, 4, 8, 16)}
VARIANTS = ("top-K", "whole vocabulary", "whole vocabulary, tied")
COMPILED = {"cache_implementation": "static", "compile_config": CompileConfig(mode="default", dynamic=False)}
COMPILED["compile_config"]._compile_all_devices = True


def models_of(arguments, variant):
    """The plain backbone and the pondering model around it."""
    config = GPTNeoXConfig(
        vocab_size=arguments.vocab_size,
        hidden_size=arguments.hidden_size,
        num_hidden_layers=arguments.layers,
        num_attention_heads=8,
        intermediate_size=4 * arguments.hidden_size,
        max_position_embeddings=4096,
        tie_word_embeddings=variant.endswith("tied"),
    )
    torch.manual_seed(0)
    plain = GPTNeoXForCausalLM(config).eval()
    top_k = arguments.top_k if variant.startswith("top") else None
    return plain, PonderingForCausalLM.from_base(
        plain, pondering_steps=arguments.pondering_steps, pondering_top_k=top_k
    )


def read_limit(arguments, variant):
    """By how much more than (S+1) plain tokens a token reads: all weights S+1 times, the embedding table S times."""
    if variant != "whole vocabulary":
        return 1.0
    table = arguments.vocab_size * arguments.hidden_size
    layers = 12 * arguments.layers * arguments.hidden_size**2
    passes = arguments.pondering_steps + 1
    return (passes * (table + layers) + arguments.pondering_steps * table) / (passes * (table + layers))


def prefill_limit(arguments, variant):
    """Multiplications of a pondering prefill over a plain one's, which gives logits for the last position only."""
    length, width, steps = arguments.prefill, arguments.hidden_size, arguments.pondering_steps
    table = arguments.vocab_size * width
    layers = arguments.layers * (12 * width**2 + 2 * length * width)  # attention over the whole square, as computed
    products = 1 if variant.startswith("top") else 2
    return ((steps + 1) * length * layers + table + steps * length * products * table) / (length * layers + table)


def timed(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def in_turn(functions, rounds):
    """Median seconds of each function, taken in turn; a first turn warms up."""
    times = [[timed(function) for function in functions] for _ in range(rounds + 1)][1:]
    return [statistics.median(column) for column in zip(*times, strict=True)]


def generator(model, prompt, new_tokens, **settings):
    """A function that generates so many tokens greedily."""

    def run():
        model.generate(
            prompt,
            max_new_tokens=new_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            **settings,
        )

    return run


def print_decoding(arguments, variant, batch, compiled=False):
    """One row: seconds per token of both, and their ratio over (S+1), with the prompt and without it.

    Returns the pondering model's seconds per token and that ratio.
    """
    plain, pondering = models_of(arguments, variant)
    prompt = torch.randint(0, arguments.vocab_size, (batch, arguments.prompt))
    settings = COMPILED if compiled else {}
    counts = (arguments.new_tokens, 1)  # the second is the prompt's own share
    one, one_first, other, other_first = in_turn(
        [generator(plain, prompt, count) for count in counts]
        + [generator(pondering, prompt, count, **settings) for count in counts],
        arguments.rounds,
    )
    passes, new = arguments.pondering_steps + 1, arguments.new_tokens
    alone = (other - other_first) / (one - one_first) / passes
    ratio = other / one / passes
    print(
        f"| {variant}{', static cache and compile' if compiled else ''} | {arguments.pondering_steps} | {batch} "
        f"| {arguments.prompt} + {new} | {1e3 * one / new:.2f} | {1e3 * other / new:.2f} "
        f"| {ratio:.3f} | {alone:.3f} | {read_limit(arguments, variant):.2f} |",
        flush=True,
    )
    return other / new, ratio


def print_prefill(arguments, variant):
    """One row: seconds of a prefill of both, their ratio, and the ratio of their multiplications."""
    plain, pondering = models_of(arguments, variant)
    prompt = torch.randint(0, arguments.vocab_size, (1, arguments.prefill))
    with torch.no_grad():
        one, other = in_turn(
            [lambda model=model: model(prompt, use_cache=True, logits_to_keep=1) for model in (plain, pondering)],
            arguments.rounds,
        )
    limit = prefill_limit(arguments, variant)
    print(
        f"| {variant} | {arguments.pondering_steps} | {arguments.prefill} | {one:.3f} | {other:.3f} "
        f"| {other / one:.2f} | {limit:.2f} | {other / one / limit:.2f} |",
        flush=True,
    )


def within(context, function):
    """A function that runs the other within a context."""

    def run():
        with context():
            function()

    return run


def print_parts(arguments, variant):
    """One row a part of pondering_vocabulary_cpu.py: seconds without it over seconds with all parts."""
    _, model = models_of(arguments, variant)
    drafts = {"draft_source": "own", "num_draft_tokens": 3}
    kinds = {f"decoding, batch {batch}": (batch, arguments.prompt, {}) for batch in arguments.batches}
    kinds["drafts, batch 1"] = (1, arguments.prompt, drafts)
    kinds["exits, batch 1"] = (
        1,
        arguments.prompt,
        {"pondering_exit_threshold": 1e-9, "pondering_exit_criterion": "kl"},
    )
    if arguments.prefill:
        kinds["prefill"] = (1, arguments.prefill, {"max_new_tokens": 1})
    for kind, (batch, length, settings) in kinds.items():
        prompt = torch.randint(0, arguments.vocab_size, (batch, length))
        run = generator(model, prompt, settings.pop("max_new_tokens", arguments.new_tokens), **settings)
        runs = [run, *(within(partial(without, part), run) for part in CPU_PARTS.values())]
        whole, *times = in_turn(runs, arguments.rounds)
        cells = [f"{each / whole:.2f}" for each in times]
        print(f"| {variant} | {kind} | {whole:.2f} | {' | '.join(cells)} |", flush=True)


def cache_bytes(cache):
    """Bytes of all keys and values."""
    return sum(states.nbytes for layer in cache.layers for states in (layer.keys, layer.values))


def print_memory(arguments):
    """The caches of both models after the same prompt."""
    plain, pondering = models_of(arguments, "top-K")
    prompt = torch.randint(0, arguments.vocab_size, (1, arguments.prompt))
    with torch.no_grad():
        sizes = [cache_bytes(model(prompt, use_cache=True).past_key_values) for model in (plain, pondering)]
        static = [StaticCache(model.config.get_text_config(), max_cache_len=256) for model in (plain, pondering)]
        for model, cache in zip((plain, pondering), static, strict=True):
            model(prompt, past_key_values=cache, use_cache=True)
    static_sizes = [cache_bytes(cache) for cache in static]
    print("\n| cache | plain, bytes | pondering, bytes | ratio |\n| --- | --- | --- | --- |")
    for name, (one, other) in (("dynamic", sizes), ("static", static_sizes)):
        print(f"| {name} | {one} | {other} | {other / one:.4f} |")


def plot(grown, path):
    """Draw {what varies: [(value, seconds per token, over (S+1) plain), ...]} into a file."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, len(grown), figsize=(9, 5), sharey="row", layout="constrained")
    labels = {"pondering_steps": "pondering steps S", "prompt": "tokens of the prompt", "batch": "rows of the batch"}
    for column, (name, rows) in zip(axes.T, grown.items(), strict=True):
        values, seconds, ratios = zip(*rows, strict=True)
        column[0].plot(values, [1e3 * each for each in seconds], marker="o")
        column[1].plot(values, ratios, marker="o")
        column[1].axhline(1, color="grey", linewidth=0.8)
        column[1].set_xlabel(labels[name])
    axes[0, 0].set_ylabel("ms a step of the batch")
    axes[1, 0].set_ylabel("over (S + 1) plain steps")
    axes[0, 0].set_ylim(bottom=0)
    axes[1, 0].set_ylim(bottom=0)
    figure.savefig(path, metadata={"Date": None})


def main(argv=None):
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocab-size", type=int, default=50304)
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--pondering-steps", type=int, default=3)
    parser.add_argument("--top-k", type=int, default=100)
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--prefill", type=int, default=1024, help="tokens of the prefill; 0: leave it out")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--variants", nargs="*", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--compile", action="store_true", help="static cache and torch.compile as well")
    parser.add_argument("--parts", action="store_true", help="time without each part of pondering_vocabulary_cpu.py")
    parser.add_argument("--grow", action="store_true", help="vary S, context and batch in turn")
    parser.add_argument(
        "--plot", metavar="FILE", help="with --grow: draw it into this file as well (needs matplotlib)"
    )
    arguments = parser.parse_args(argv)
    print(described())
    if arguments.parts:
        print(f"\n| what | task | seconds | without {' | '.join(CPU_PARTS)} |\n{'| --- ' * (3 + len(CPU_PARTS))}|")
        for variant in arguments.variants:
            print_parts(arguments, variant)
        return
    head = "| what | S | batch | tokens | plain, ms a token | pondering, ms a token | over (S+1) plain "
    print(f"\n{head}| the same without the prompt | limit |\n| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    if arguments.grow:
        grown = {}
        for name, values in GROWTH.items():
            for value in values:
                changed = argparse.Namespace(**{**vars(arguments), name: value})
                found = print_decoding(changed, "top-K", getattr(changed, "batch", 1))
                grown.setdefault(name, []).append((value, *found))
        if arguments.plot:
            plot(grown, arguments.plot)
        return
    for variant in arguments.variants:
        for batch in arguments.batches:
            print_decoding(arguments, variant, batch)
    if arguments.compile:
        print_decoding(arguments, "top-K", arguments.batches[0], compiled=True)
    if arguments.prefill:
        head = "| what | S | prefill | plain, s | pondering, s | ratio | by operation count | over that |"
        print(f"\n{head}\n| --- | --- | --- | --- | --- | --- | --- | --- |")
        for variant in arguments.variants[:2]:
            print_prefill(arguments, variant)
    print_memory(arguments)


if __name__ == "__main__":
    main()
