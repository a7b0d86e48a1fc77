"""Adaptive pondering of a trained model: passes a token and held-out loss, for each criterion and some thresholds.

    python -m benchmarks adaptive --model FOLDER --text FILE

Each row pairs what the passes that run cost with what stopping early costs in nats. Teacher-forced: every token of the
text stops by itself, and later tokens read what it left in the cache, exactly as in generation.
"""

import argparse
import gzip
import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer

from benchmarks.machine import described
from ponder_hf import PonderingForCausalLM
from ponder_hf.modeling.pondering_generate_exits import CRITERIA, PonderingExit


THRESHOLDS = {
    "kl": (0.003, 0.01, 0.03, 0.1, 0.3),
    "entropy": (0.3, 1.0, 2.0, 3.0, 4.0),
    "argmax": (0.3, 0.6, 0.8, 0.9, 1.0),
}


def read_blocks(path, tokenizer, count, length):
    """(count, length) token ids from the beginning of a text file, plain or gzip."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        ids = tokenizer(file.read(12 * count * length), return_tensors="pt")["input_ids"][0]
    rows = min(count, len(ids) // length)
    return ids[: rows * length].view(rows, length)


@torch.no_grad()
def measured(model, blocks, batch, exit=None):
    """Mean loss in nats per token, and passes per token."""
    losses, passes = [], []
    position_ids = torch.arange(blocks.shape[1]).unsqueeze(0)
    for rows in blocks.split(batch):
        taken = []
        recording = None if exit is None else exit.recording(taken.append)
        losses.append(
            model(rows, position_ids=position_ids, labels=rows, pondering_exit=recording, use_cache=False).loss
        )
        steps = taken[0].float() if taken else torch.full(rows.shape, float(model.config.pondering_steps))
        passes.append(steps.mean() + 1)
    return torch.stack(losses).mean().item(), torch.stack(passes).mean().item()


def main(argv=None):
    """Print one row for each criterion and threshold."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a trained pondering checkpoint with its tokenizer")
    parser.add_argument("--text", type=Path, help="text that it has not seen, plain or gzip")
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--criteria", nargs="*", choices=list(CRITERIA), default=list(CRITERIA))
    arguments = parser.parse_args(argv)
    if arguments.model is None or arguments.text is None:
        print("adaptive: left out, since it needs --model FOLDER and --text FILE", file=sys.stderr)
        return
    # The loss of the last pass alone, however it was trained.
    model = PonderingForCausalLM.from_pretrained(arguments.model, intermediate_loss_weight=0.0).eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model, trust_remote_code=False)
    blocks = read_blocks(arguments.text, tokenizer, arguments.blocks, arguments.length)
    print(described())
    print("| criterion | threshold | passes a token | loss, nats | more than with all passes |")
    print("| --- | --- | --- | --- | --- |")
    whole, passes = measured(model, blocks, arguments.batch)
    print(f"| none | | {passes:.2f} | {whole:.4f} | |")
    for criterion in arguments.criteria:
        for threshold in THRESHOLDS[criterion]:
            exit = PonderingExit.read(criterion, threshold)
            loss, passes = measured(model, blocks, arguments.batch, exit)
            print(
                f"| {criterion} | {threshold} | {passes:.2f} | {loss:.4f} | {100 * (loss / whole - 1):+.2f} % |",
                flush=True,
            )


if __name__ == "__main__":
    main()
