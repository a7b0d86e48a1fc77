"""Speed of a question of lm-evaluation-harness: pondering with S steps against S + 1 times the plain model.

    python -m benchmarks task_speed

One row goes through the model as the harness sends it: all logits of the last pass are asked for. Plain and pondering
model take turns, and the least processor time of several turns counts, for a machine may be busy with other work. The
shape is that of SmolLM2-135M, with random weights, and the row as long as a question of HellaSwag with five examples.
"""

import argparse
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.machine import described
from ponder_hf import PonderingForCausalLM


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks task_speed", description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=485)
    parser.add_argument("--pondering-steps", type=int, default=3)
    parser.add_argument("--turns", type=int, default=5)
    arguments = parser.parse_args(argv)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    plain = LlamaForCausalLM(config).eval()
    model = PonderingForCausalLM.from_base(plain, pondering_steps=arguments.pondering_steps)
    row = torch.randint(config.vocab_size, (1, arguments.tokens))
    seconds: dict[str, list[float]] = {"plain": [], "pondering": []}
    for _ in range(arguments.turns):
        for name, each in (("plain", plain), ("pondering", model)):
            start = time.process_time()
            with torch.no_grad():
                each(row).logits.log_softmax(-1)
            seconds[name].append(time.process_time() - start)
    best = {name: min(times) for name, times in seconds.items()}
    passes = arguments.pondering_steps + 1
    print(described())
    print(f"plain: {best['plain']:.2f} s; S = {arguments.pondering_steps}: {best['pondering']:.2f} s")
    print(f"{best['pondering'] / best['plain'] / passes:.2f} of {passes} times the plain model")
