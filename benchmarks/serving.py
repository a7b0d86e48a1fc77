"""What pondering costs in vLLM, beside the plain backbone there and `generate` and `generate_batch` of transformers.

Run it in the environment that `make vllm` makes, where vLLM is: `.vllm/bin/python -m benchmarks serving`. A LLaMA with
random weights, in float32, compiled by vLLM; every request has a prompt of its own, and pages are not used again.
All ways take turns with the same prompts. The limit is S + 1 plain passes and the vocabulary's own operations, which
plain passes over a prompt do not have: logits of every token, and the weighted sum of embeddings.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, LlamaConfig, LlamaForCausalLM

from benchmarks.machine import described
from ponder_hf import PonderingForCausalLM


TOP_K = 100
PONDERING = {"top-100": TOP_K, "whole": None}
PAGE = 32


def config_of(arguments):
    return LlamaConfig(
        vocab_size=arguments.vocab_size,
        hidden_size=arguments.hidden_size,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.hidden_size // 64,
        num_key_value_heads=arguments.hidden_size // 64,
        intermediate_size=3 * arguments.hidden_size,
        max_position_embeddings=1024,
        bos_token_id=None,
        eos_token_id=None,
    )


def save_models(folder, arguments):
    """Write the plain model, and pondering ones over the K largest logits and over the whole vocabulary."""
    torch.manual_seed(0)
    plain = LlamaForCausalLM(config_of(arguments)).eval()
    plain.save_pretrained(folder / "plain")
    for name, top_k in PONDERING.items():
        PonderingForCausalLM.from_base(
            plain, pondering_steps=arguments.pondering_steps, pondering_top_k=top_k
        ).save_pretrained(folder / name)


def operations_limit(arguments, top_k, length):
    """Multiplications of a pondering request over those of S + 1 plain ones.

    Args:
        top_k: K, or None for the whole vocabulary.
        length: tokens of the prompt.
    """
    width, steps, new = arguments.hidden_size, arguments.pondering_steps, arguments.new_tokens
    table = arguments.vocab_size * width
    tokens = length + new - 1  # the last new token is not fed in
    # Four products of the attention and three of 3 d; and the scores and the sum over the tokens so far.
    passed = arguments.layers * (13 * width**2 * tokens + 2 * width * tokens * (tokens + 1) // 2)
    plain = passed + new * table
    summed = table if top_k is None else top_k * width
    pondering = (steps + 1) * passed + new * table + steps * tokens * (table + summed)
    return pondering / ((steps + 1) * plain)


def prompts_of(batch, length, vocab_size, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocab_size, (batch, length), generator=generator)


def in_vllm(folder, arguments):
    """A function that continues prompts (batch, length) by an engine for the checkpoint in `folder`."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        str(folder),
        dtype="float32",
        skip_tokenizer_init=True,
        max_model_len=1024,
        enable_prefix_caching=False,
        enforce_eager=arguments.eager,
    )
    parameters = SamplingParams(temperature=0, max_tokens=arguments.new_tokens, ignore_eos=True, detokenize=False)

    def run(prompts):
        requests = [{"prompt_token_ids": row} for row in prompts.tolist()]
        llm.generate(requests, parameters, use_tqdm=False)

    return run


def by_generate(model, arguments):
    """The same by `generate` of transformers."""
    options = {"max_new_tokens": arguments.new_tokens, "do_sample": False, "pad_token_id": 0}

    def run(prompts):
        model.generate(prompts, attention_mask=torch.ones_like(prompts), **options)

    return run


def by_generate_batch(model, arguments):
    """The same by its continuous batching, with pages for all requests at once."""
    settings = GenerationConfig(
        max_new_tokens=arguments.new_tokens, do_sample=False, pad_token_id=0, eos_token_id=-1, bos_token_id=None
    )

    def run(prompts):
        batch, length = prompts.shape
        pages = batch * (-(-(length + arguments.new_tokens) // PAGE) + 1)
        memory = ContinuousBatchingConfig(
            page_size=PAGE, num_blocks=pages, max_batch_tokens=1024, allow_block_sharing=False
        )
        found = model.generate_batch(prompts.tolist(), settings, continuous_batching_config=memory)
        assert [len(each.generated_tokens) for each in found.values()] == batch * [arguments.new_tokens]

    return run


def seconds(ways, arguments, batch, length):
    """{name: [seconds, one for each round]}; transformers' ways have one round, being far from vLLM's."""
    times, clock = {name: [] for name in ways}, time.process_time if arguments.processor_time else time.perf_counter
    end = time.perf_counter() + arguments.seconds
    for seed in range(arguments.rounds):
        if seed and time.perf_counter() > end:
            break
        prompts = prompts_of(batch, length, arguments.vocab_size, seed)
        for name, run in ways.items():
            if seed and name.startswith("generate"):
                continue
            start = clock()
            run(prompts)
            times[name].append(clock() - start)
    return times


def row(arguments, times, batch, length):
    """One line of the table."""
    tokens, passes = batch * arguments.new_tokens, arguments.pondering_steps + 1
    medians = {name: statistics.median(each) for name, each in times.items()}
    cells = [f"{tokens / median:.0f}" for median in medians.values()]
    for name, top_k in PONDERING.items():
        ratio = statistics.median(
            one / (passes * plain) for one, plain in zip(times[name], times["plain"], strict=True)
        )
        limit = operations_limit(arguments, top_k, length)
        cells.append(f"{ratio:.2f} / {limit:.2f} = {ratio / limit:.2f}")
    cells += [f"{medians[name] / medians['top-100']:.2f}" for name in medians if name.startswith("generate")]
    return f"| {length} | {batch} | {' | '.join(cells)} |"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks serving", description=__doc__.partition("\n")[0])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt", type=int, nargs="+", default=[64, 512])
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--pondering-steps", type=int, default=3)
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocab-size", type=int, default=32000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=45, help="start no other round of a row after so many")
    parser.add_argument(
        "--processor-time",
        action="store_true",
        help="count the processor's time and not the clock's: on a busy machine, with OMP_NUM_THREADS=1",
    )
    parser.add_argument("--eager", action="store_true", help="do not let vLLM compile")
    parser.add_argument("--only-vllm", action="store_true", help="leave transformers out")
    arguments = parser.parse_args(argv)
    try:
        import vllm
    except ModuleNotFoundError:
        print("serving: vLLM is not installed here; `make vllm`, then .vllm/bin/python -m benchmarks serving")
        return 0
    # In one process engines take turns without waiting for each other's messages.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    with tempfile.TemporaryDirectory() as place:
        save_models(Path(place), arguments)
        ways = {name: in_vllm(Path(place, name), arguments) for name in ("plain", *PONDERING)}
        if not arguments.only_vllm:
            model = PonderingForCausalLM.from_pretrained(Path(place, "top-100"))
            ways["generate"] = by_generate(model, arguments)
            ways["generate_batch"] = by_generate_batch(model, arguments)
    print(
        f"{described()}, vLLM {vllm.__version__}; S = {arguments.pondering_steps}, {arguments.layers} layers of width "
        f"{arguments.hidden_size}, {arguments.vocab_size} tokens, {arguments.new_tokens} new ones; "
        "new tokens a second, and time over S + 1 plain passes beside its limit"
    )
    others = [name for name in ways if name.startswith("generate")]
    head = ["prompt", "batch", "plain", "top 100", "whole", *(f"`{name}`" for name in others)]
    head += [f"{name}: time / limit" for name in ("top 100", "whole")]
    head += [f"top 100 over `{name}`" for name in others]
    print(f"| {' | '.join(head)} |\n{'| --- ' * len(head)}|")
    cases = [(batch, length) for length in arguments.prompt for batch in arguments.batch]
    seconds(ways, argparse.Namespace(**{**vars(arguments), "rounds": 1}), *cases[0])  # warms up
    for batch, length in cases:
        print(row(arguments, seconds(ways, arguments, batch, length), batch, length), flush=True)
    return 0
