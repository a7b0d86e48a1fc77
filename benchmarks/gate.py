"""Which shape should the zero-initialised gate have: one scalar, one per step, or one per channel?

Pretrains a small GPT-NeoX on ../shared/data/text, converts it with S = 3 and each kind of gate, continues all of them
on the same tokens, and prints held-out losses as a Markdown table.
"""

import argparse
import time
from pathlib import Path

import torch
from torch import nn

from benchmarks.novels import FOLDER, read_blocks, small_backbone
from ponder_hf import PonderingForCausalLM


VOCAB_SIZE, BLOCK, BATCH, STEPS = 2048, 128, 16, 3


class ScalarGate(nn.Module):
    """One factor for everything."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, embedding):
        return embedding * self.weight


class StepGate(nn.Module):
    """One factor a step; counts its calls, S of them a forward pass."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(STEPS))
        self.calls = 0

    def forward(self, embedding):
        self.calls += 1
        return embedding * self.weight[(self.calls - 1) % STEPS]


def train(model, blocks, steps, learning_rate, first=0):
    """Plain AdamW with a warm-up and a cosine to 10 %."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.01)

    def rate(step):
        warm = min(1.0, (step + 1) / 20)
        return warm * (0.55 + 0.45 * torch.cos(torch.tensor(torch.pi * step / steps)).item())

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    for step in range(steps):
        batch = blocks[(torch.arange(BATCH) + (first + step) * BATCH) % len(blocks)]
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()


@torch.no_grad()
def held_out(model, blocks):
    """Mean loss in nats per token."""
    model.eval()
    losses = [model(input_ids=batch, labels=batch).loss for batch in blocks[:128].split(BATCH)]
    return torch.stack(losses).mean().item()


def main(argv=None):
    """Print one row for each seed and gate."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=FOLDER)
    parser.add_argument("--base-steps", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1])
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="of the continued training")
    parser.add_argument("--characters", type=int, default=12_000_000)
    arguments = parser.parse_args(argv)
    training, validation = read_blocks(arguments.data, arguments.characters, VOCAB_SIZE, BLOCK)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {training.numel()} training tokens")
    print("| seed | model | held-out loss before | after | gate | seconds |\n| --- | --- | --- | --- | --- | --- |")
    for seed in arguments.seeds:
        torch.manual_seed(seed)
        base = small_backbone(VOCAB_SIZE, 128, 4, BLOCK)
        train(base, training, arguments.base_steps, 2e-3)
        weights = {key: value.clone() for key, value in base.state_dict().items()}
        for name in ("plain", "no gate", "scalar", "step", "channel"):
            base.load_state_dict(weights)
            model, gate = base, None
            if name != "plain":
                gate_field = "none" if name == "no gate" else "zero_init"
                model = PonderingForCausalLM.from_base(base, pondering_steps=STEPS, pondering_gate=gate_field)
                if name in ("scalar", "step"):
                    model.pondering_gate = ScalarGate() if name == "scalar" else StepGate()
                gate = model.pondering_gate
            before, start = held_out(model, validation), time.perf_counter()
            train(model, training, arguments.steps, arguments.learning_rate, first=arguments.base_steps)
            seconds, after = time.perf_counter() - start, held_out(model, validation)
            shown = "" if gate is None else " ".join(f"{value:.3f}" for value in gate.weight.detach().flatten()[:3])
            if gate is not None and name == "channel":
                shown = f"mean {gate.weight.mean():.3f}, mean of absolute values {gate.weight.abs().mean():.3f}"
            print(f"| {seed} | {name} | {before:.4f} | {after:.4f} | {shown} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
