"""Held-out loss of each pass."""

import sys

import torch
from tqdm.auto import tqdm

from ponder_hf.modeling.pondering_backbone import evaluating


_LARGEST_OUTPUT = 1 << 24  # numbers in the logits of all passes of one evaluated batch


@torch.no_grad()
def evaluate_passes(model, blocks, pondering_steps=None, progress=False):
    """The mean loss of each pass over these blocks, in nats per token: S + 1 numbers, of a plain model one.

    Only as many blocks go through the model at once as keep the logits of all passes small.

    Args:
        model: any causal language model; each part of it is in its former mode afterwards.
        blocks: a Blocks.
        pondering_steps: S; None: the model's own. Not for a plain model.
        progress: whether a bar on standard error shows how far it is.
    """
    config = model.config
    ponders = hasattr(config, "pondering_steps")
    steps = pondering_steps if pondering_steps is not None else getattr(config, "pondering_steps", 0)
    num_passes = steps + 1
    per_row = num_passes * blocks.rows.shape[1] * config.vocab_size
    totals = [0.0] * num_passes
    bar = tqdm(total=len(blocks), desc="evaluating", unit=" blocks", disable=not progress, file=sys.stderr)
    with bar, evaluating(model):
        for rows in blocks.rows.split(max(1, _LARGEST_OUTPUT // per_row)):
            ids = rows.long().to(model.device)
            options = {"output_pondering": True, "pondering_steps": steps} if ponders else {}
            output = model(input_ids=ids, labels=ids, use_cache=False, **options)
            losses = output.pondering_losses if ponders else [output.loss]
            totals = [total + len(rows) * loss.item() for total, loss in zip(totals, losses, strict=True)]
            bar.update(len(rows))
    return [total / len(blocks) for total in totals]
