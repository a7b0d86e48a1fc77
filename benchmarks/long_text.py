"""Memory over a long text: generated in chunks, each of which goes on from the cache of the one before.

    python -m benchmarks long_text

The cache must take exactly S + 1 times the bytes of the plain model's, and the process nothing more for tokens that
lie behind it. A tiny model, as only memory is looked at.
"""

import argparse
import ctypes
import gc
import sys

import psutil
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from benchmarks.machine import described
from ponder_hf import PonderingForCausalLM


def give_back_free_memory():
    """What nothing holds goes back to the system, as far as the C library can: it is not the cache's."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def main(argv=None):
    """Print one row for each chunk."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=10_000)
    parser.add_argument("--chunk", type=int, default=1000)
    parser.add_argument("--pondering-steps", type=int, default=3)
    parser.add_argument("--hidden-size", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    arguments = parser.parse_args(argv)
    config = GPTNeoXConfig(
        vocab_size=256,
        hidden_size=arguments.hidden_size,
        num_hidden_layers=arguments.layers,
        num_attention_heads=4,
        intermediate_size=4 * arguments.hidden_size,
        max_position_embeddings=arguments.tokens + 64,
    )
    torch.manual_seed(0)
    model = PonderingForCausalLM.from_base(GPTNeoXForCausalLM(config), pondering_steps=arguments.pondering_steps)
    print(described())
    print("\n| tokens so far | cache, MB | over the plain model's | process beyond the cache, MB |")
    print("| --- | --- | --- | --- |")
    sequences, cache = torch.zeros(1, 16, dtype=torch.long), None
    plain_token = 2 * arguments.layers * arguments.hidden_size * 4  # keys and values in float32
    while sequences.shape[1] < arguments.tokens:
        output = model.generate(
            sequences,
            attention_mask=torch.ones_like(sequences),
            past_key_values=cache,
            max_new_tokens=min(arguments.chunk, arguments.tokens - sequences.shape[1]),
            do_sample=True,
            eos_token_id=None,
            pad_token_id=0,
            return_dict_in_generate=True,
        )
        sequences, cache = output.sequences, output.past_key_values
        del output
        give_back_free_memory()
        size = sum(states.nbytes for layer in cache.layers for states in (layer.keys, layer.values))
        beyond = psutil.Process().memory_info().rss - size
        ratio = size / (plain_token * cache.get_seq_length())
        print(f"| {sequences.shape[1]} | {size / 1e6:.2f} | {ratio:.4f} | {beyond / 1e6:.1f} |", flush=True)


if __name__ == "__main__":
    main()
