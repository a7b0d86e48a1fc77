"""What pondering costs in training: time over (S+1) plain steps, and peak memory of the process.

One optimiser step (forward, backward, AdamW) of a model of Pythia-70m's shape, in float32 on random tokens. Times are
interleaved in one process and given as medians; memory is measured in a process of its own for each row.

    python -m benchmarks train_step              the table
    python -m benchmarks train_step --grow       how time and memory grow with S, T and V
    python -m benchmarks train_step --parts      what each part of pondering_vocabulary_cpu.py brings
"""

import argparse
import resource
import statistics
import subprocess
import sys
import time

import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from benchmarks.machine import CPU_PARTS, described, without
from ponder_hf import PonderingForCausalLM
from ponder_hf.modeling import modeling_pondering, pondering_vocabulary_embedding


VARIANTS = (
    "top-K",
    "whole vocabulary",
    "top-K, checkpointed",
    "whole vocabulary, checkpointed",
    "whole vocabulary, autograd",
)


class Shape:
    """A model and a batch, read from the command line."""

    def __init__(self, arguments):
        self.vocab_size, self.steps = arguments.vocab_size, arguments.pondering_steps
        self.batch, self.length, self.top_k = arguments.batch, arguments.length, arguments.top_k
        self.hidden_size, self.layers = arguments.hidden_size, arguments.layers

    def base(self):
        config = GPTNeoXConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.layers,
            num_attention_heads=8,
            intermediate_size=4 * self.hidden_size,
            max_position_embeddings=max(self.length, 2048),
        )
        torch.manual_seed(0)
        return GPTNeoXForCausalLM(config).train()

    def step_of(self, variant):
        """A function that takes one optimiser step of this variant."""
        model = self.base()
        if variant not in ("plain", "plain, checkpointed"):
            top_k = self.top_k if variant.startswith("top") else None
            model = PonderingForCausalLM.from_base(model, pondering_steps=self.steps, pondering_top_k=top_k)
        if variant.endswith("checkpointed"):
            model.gradient_checkpointing_enable({"use_reentrant": False})
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        tokens = torch.randint(0, self.vocab_size, (self.batch, self.length))

        def step():
            optimizer.zero_grad()
            with _Autograd(variant.endswith("autograd")):
                model(input_ids=tokens, labels=tokens, use_cache=False)["loss"].backward()
            optimizer.step()

        return step


class _Autograd:
    """Within it, nothing but plain autograd: every module asked, every logit kept."""

    def __init__(self, wanted):
        self.modules = (modeling_pondering, pondering_vocabulary_embedding) if wanted else ()

    def __enter__(self):
        self.saved = [module.backbone_readout for module in self.modules]
        for module in self.modules:
            module.backbone_readout = lambda backbone: None

    def __exit__(self, *_):
        for module, function in zip(self.modules, self.saved, strict=True):
            module.backbone_readout = function


def median_times(shape, variants, rounds):
    """Median seconds of a step of each variant, taken in turn."""
    steps = {variant: shape.step_of(variant) for variant in variants}
    times = {variant: [] for variant in variants}
    for turn in range(rounds + 1):
        for variant, step in steps.items():
            start = time.perf_counter()
            step()
            if turn:  # the first turn allocates and warms up
                times[variant].append(time.perf_counter() - start)
    return {variant: statistics.median(values) for variant, values in times.items()}


def own_peak_memory():
    """Peak memory of this process in GB. Linux's ru_maxrss would begin at what the parent had when it forked."""
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM")) / 1e9
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def own_process(arguments, variant):
    """(median seconds, peak memory in GB) of a process that takes three steps of this variant; the first warms up."""
    command = [sys.executable, "-m", "benchmarks.train_step", "--memory-of", variant]
    for name in ("vocab_size", "pondering_steps", "batch", "length", "top_k", "hidden_size", "layers"):
        command += [f"--{name.replace('_', '-')}", str(getattr(arguments, name))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds, memory = done.stdout.split()[-2:]
    return float(seconds), float(memory)


def table(arguments, variants):
    """Print one row a variant."""
    shape = Shape(arguments)
    times = median_times(shape, ["plain", *variants], arguments.rounds)
    plain_steps = (shape.steps + 1) * times["plain"]
    for variant in ["plain", *variants]:
        memory = f"{own_process(arguments, variant)[1]:.2f}" if arguments.memory else ""
        ratio = times[variant] / plain_steps
        print(
            f"| {variant} | {shape.steps} | {shape.batch} x {shape.length} | {shape.vocab_size} "
            f"| {times[variant]:.2f} | {ratio:.2f} | {memory} |",
            flush=True,
        )


def print_parts(arguments, variant):
    """One row: seconds without each part of pondering_vocabulary_cpu.py over seconds with all of them."""
    step = Shape(arguments).step_of(variant)
    times = {name: [] for name in ("whole", *CPU_PARTS)}
    for turn in range(arguments.rounds + 1):
        for name, values in times.items():
            with without(CPU_PARTS.get(name, ())):
                start = time.perf_counter()
                step()
            if turn:
                values.append(time.perf_counter() - start)
    whole, *others = (statistics.median(values) for values in times.values())
    print(f"| {variant} | {whole:.2f} | {' | '.join(f'{each / whole:.2f}' for each in others)} |", flush=True)


GROWTH = {
    "pondering_steps": (0, 1, 2, 4, 8),
    "length": (128, 512, 2048),
    "vocab_size": (2000, 16000, 50304, 128000),
}


def growth(arguments, variants):
    """Print one row a value, and what each unit added since the row above, over what a unit added in the whole range.

    Where time or memory is linear in the value, the last two columns stay near 1.
    """
    for name, values in GROWTH.items():
        for variant in variants:
            measured = [
                own_process(argparse.Namespace(**{**vars(arguments), name: value}), variant) for value in values
            ]
            slopes = _slopes(values[0], measured[0], values[-1], measured[-1])
            for index, value in enumerate(values):
                cells = [variant, f"{name} {value}", *(f"{number:.2f}" for number in measured[index])]
                if index:
                    added = _slopes(values[index - 1], measured[index - 1], value, measured[index])
                    cells += [f"{part / whole:.2f}" for part, whole in zip(added, slopes, strict=True)]
                else:
                    cells += ["", ""]
                print(f"| {' | '.join(cells)} |", flush=True)


def _slopes(value, measured, next_value, next_measured):
    return [(after - before) / (next_value - value) for before, after in zip(measured, next_measured, strict=True)]


def main(argv=None):
    """Print the table, or how it grows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocab-size", type=int, default=50304)
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--pondering-steps", type=int, default=3)
    parser.add_argument("--top-k", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--variants", nargs="*", choices=VARIANTS, default=VARIANTS, help="rows beside the plain model"
    )
    parser.add_argument("--no-memory", dest="memory", action="store_false")
    parser.add_argument("--parts", action="store_true", help="time without each part of pondering_vocabulary_cpu.py")
    parser.add_argument("--grow", action="store_true", help="vary S, T and V in turn")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.memory_of:
        step = Shape(arguments).step_of(arguments.memory_of)
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - start)
        print(statistics.median(seconds[1:]), own_peak_memory())
        return
    print(described())
    if arguments.parts:
        print(f"| what | seconds a step | without {' | '.join(CPU_PARTS)} |\n{'| --- ' * (2 + len(CPU_PARTS))}|")
        for variant in arguments.variants:
            print_parts(arguments, variant)
        return
    if arguments.grow:
        print(
            f"d {arguments.hidden_size}, L {arguments.layers}, S {arguments.pondering_steps}, K {arguments.top_k}, "
            f"batch {arguments.batch} x {arguments.length}, V {arguments.vocab_size}, but for the value of each row"
        )
        print("| what | value | seconds a step | peak memory, GB | added seconds a unit | added memory a unit |")
        print("| --- | --- | --- | --- | --- | --- |")
        growth(arguments, ["top-K", "whole vocabulary"])
        return
    print("| what | S | batch | V | seconds a step | over (S+1) plain steps | peak memory, GB |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    table(arguments, arguments.variants)


if __name__ == "__main__":
    main()
