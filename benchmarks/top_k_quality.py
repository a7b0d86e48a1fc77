"""What summing over the K most probable tokens costs in quality, for K from 1 to the whole vocabulary.

First part: the same small model trained and measured with each K. Second part: the one that was trained over the whole
vocabulary, measured with each K without further training.
"""

import argparse
import time

from benchmarks.machine import described
from benchmarks.novels import add_shape_arguments, losses_and_agreement, read_blocks, trained_model


def main(argv=None):
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_shape_arguments(parser)
    parser.add_argument("--pondering-steps", type=int, default=3)
    parser.add_argument("--top-k", type=int, nargs="*", default=[1, 10, 100, 1000])
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    training, held_out = read_blocks(arguments.data, arguments.characters, arguments.vocab_size, arguments.block)
    print(described())
    print(
        f"d {arguments.hidden_size}, L {arguments.layers}, V {arguments.vocab_size}, S {arguments.pondering_steps}, "
        f"{arguments.steps} steps of {arguments.batch} x {arguments.block} tokens, seed {arguments.seed}"
    )
    print("| trained with K | measured with K | last pass | every pass | seconds |\n| --- | --- | --- | --- | --- |")

    def row(trained_with, measured_with, model, seconds):
        model.config.pondering_top_k = measured_with
        losses, _ = losses_and_agreement(model, held_out[:256])
        shown = ["whole vocabulary" if top_k is None else top_k for top_k in (trained_with, measured_with)]
        every_pass = " ".join(f"{loss:.3f}" for loss in losses)
        print(f"| {shown[0]} | {shown[1]} | {losses[-1]:.4f} | {every_pass} | {seconds} |", flush=True)

    for top_k in [*arguments.top_k, None]:
        start = time.perf_counter()
        model = trained_model(
            arguments, training, arguments.seed, pondering_steps=arguments.pondering_steps, pondering_top_k=top_k
        )
        row(top_k, top_k, model, f"{time.perf_counter() - start:.0f}")
    for top_k in arguments.top_k:
        row(None, top_k, model, "")


if __name__ == "__main__":
    main()
