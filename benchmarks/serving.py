"""What pondering costs in vLLM: tokens a second over those of the plain backbone, beside transformers' `generate`.

Run it in the environment that `make vllm` makes, where vLLM is: `.vllm/bin/python -m benchmarks serving`. A LLaMA with
random weights, in float32, compiled by vLLM; every request has a prompt of its own, and pages are not used again. The
limit is (S + 1) times the plain model's time.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.machine import described
from ponder_hf import PonderingForCausalLM


def save_models(folder, arguments):
    """Write the plain model, and pondering ones over the K largest logits and over the whole vocabulary."""
    config = LlamaConfig(
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
    torch.manual_seed(0)
    plain = LlamaForCausalLM(config).eval()
    plain.save_pretrained(folder / "plain")
    for name, top_k in (("top-100", 100), ("whole", None)):
        PonderingForCausalLM.from_base(
            plain, pondering_steps=arguments.pondering_steps, pondering_top_k=top_k
        ).save_pretrained(folder / name)


def prompts_of(batch, length, vocab_size, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocab_size, (batch, length), generator=generator)


def seconds(run, repeats):
    """The median time of run(seed), after one that is not counted."""
    times = []
    for seed in range(repeats + 1):
        start = time.perf_counter()
        run(seed)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def measure_vllm(folder, arguments, cases):
    """{(batch, prompt): seconds} of an engine for the checkpoint in `folder`."""
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = LLM(
        str(folder),
        dtype="float32",
        skip_tokenizer_init=True,
        max_model_len=1024,
        enable_prefix_caching=False,
        enforce_eager=arguments.eager,
    )
    parameters = SamplingParams(temperature=0, max_tokens=arguments.new_tokens, ignore_eos=True, detokenize=False)
    found = {}
    for batch, length in cases:

        def run(seed, llm=llm, batch=batch, length=length):
            rows = prompts_of(batch, length, arguments.vocab_size, seed).tolist()
            llm.generate([{"prompt_token_ids": row} for row in rows], parameters, use_tqdm=False)

        found[batch, length] = seconds(run, arguments.repeats)
    llm.llm_engine.engine_core.shutdown()
    cleanup_dist_env_and_memory()
    return found


def measure_transformers(folder, arguments, cases):
    """The same of `generate`."""
    model = PonderingForCausalLM.from_pretrained(folder)
    found = {}
    for batch, length in cases:

        def run(seed, batch=batch, length=length):
            ids = prompts_of(batch, length, arguments.vocab_size, seed)
            options = {"max_new_tokens": arguments.new_tokens, "do_sample": False, "pad_token_id": 0}
            model.generate(ids, attention_mask=torch.ones_like(ids), **options)

        found[batch, length] = seconds(run, arguments.repeats)
    return found


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks serving", description=__doc__.partition("\n")[0])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt", type=int, nargs="+", default=[64, 512])
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--pondering-steps", type=int, default=3)
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocab-size", type=int, default=32000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--eager", action="store_true", help="do not let vLLM compile")
    arguments = parser.parse_args(argv)
    try:
        import vllm
    except ModuleNotFoundError:
        print("serving: vLLM is not installed here; `make vllm`, then .vllm/bin/python -m benchmarks serving")
        return 0
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    cases = [(batch, length) for length in arguments.prompt for batch in arguments.batch]
    with tempfile.TemporaryDirectory() as place:
        save_models(Path(place), arguments)
        in_vllm = {name: measure_vllm(Path(place, name), arguments, cases) for name in ("plain", "top-100", "whole")}
        in_transformers = measure_transformers(Path(place, "top-100"), arguments, cases)
    passes = arguments.pondering_steps + 1
    print(
        f"{described()}; S = {arguments.pondering_steps}, {arguments.new_tokens} new tokens, vLLM {vllm.__version__}"
    )
    print("| prompt | batch | plain, tokens/s | top 100 | whole | top 100, time over S + 1 plain | whole | generate |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for batch, length in cases:
        tokens = batch * arguments.new_tokens
        plain, largest, whole = (in_vllm[name][batch, length] for name in ("plain", "top-100", "whole"))
        rates = " | ".join(f"{tokens / each:.1f}" for each in (plain, largest, whole))
        ratios = " | ".join(f"{each / (passes * plain):.2f}" for each in (largest, whole))
        print(f"| {length} | {batch} | {rates} | {ratios} | {tokens / in_transformers[batch, length]:.1f} |")
    return 0
