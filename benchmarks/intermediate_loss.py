"""What the loss of the earlier passes costs, and what it buys: loss of each pass, and how often it is already right.

Trains the same small model with each weight and prints one row a weight and seed. "Agree" is the share of held-out
positions at which a pass already has the argmax of the last one: what early exits and drafts live on.
"""

import argparse
import time

from benchmarks.machine import described
from benchmarks.novels import add_shape_arguments, losses_and_agreement, read_blocks, trained_model


def main(argv=None):
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_shape_arguments(parser)
    parser.add_argument("--pondering-steps", type=int, default=3)
    parser.add_argument("--weights", type=float, nargs="*", default=[0.0, 0.03, 0.1, 0.3, 1.0])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1])
    arguments = parser.parse_args(argv)
    training, held_out = read_blocks(arguments.data, arguments.characters, arguments.vocab_size, arguments.block)
    print(described())
    print(
        f"d {arguments.hidden_size}, L {arguments.layers}, V {arguments.vocab_size}, S {arguments.pondering_steps}, "
        f"{arguments.steps} steps of {arguments.batch} x {arguments.block} tokens, {len(held_out)} held-out blocks"
    )
    print("| weight | seed | last pass | every pass | agree | seconds |\n| --- | --- | --- | --- | --- | --- |")
    for seed in arguments.seeds:
        for weight in arguments.weights:
            start = time.perf_counter()
            model = trained_model(
                arguments,
                training,
                seed,
                pondering_steps=arguments.pondering_steps,
                intermediate_loss_weight=weight,
            )
            seconds = time.perf_counter() - start
            losses, agreement = losses_and_agreement(model, held_out[:256])
            print(
                f"| {weight:g} | {seed} | {losses[-1]:.4f} | {' '.join(f'{loss:.3f}' for loss in losses)} "
                f"| {' '.join(f'{share:.0%}' for share in agreement)} | {seconds:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
