"""Next-token cross-entropy, as transformers' Trainer and data collators expect it."""

import torch
from torch.nn import functional


def causal_lm_loss(logits, labels, num_items_in_batch=None, ignore_index=-100, shift_labels=None):
    """Cross-entropy of predicting each next token.

    Half-precision logits are raised to float32 first; float32 and float64 stay what they are.

    Args:
        logits: (B, T, V).
        labels: (B, T), not shifted: position t is predicted from position t - 1. `ignore_index` is left out.
        num_items_in_batch: the number of predicted tokens over all micro-batches of an optimiser step. The sum of the
            losses is divided by it, so that gradient accumulation weighs every token alike. None: the mean.
        ignore_index: the label that is not predicted.
        shift_labels: (B, T), already shifted labels; `labels` is not read then.

    Returns:
        A scalar, in nats per token.
    """
    if shift_labels is None:
        shift_labels = functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    flat_logits = logits.reshape(-1, logits.shape[-1])
    flat_labels = shift_labels.reshape(-1).to(logits.device)
    if num_items_in_batch is None:
        return functional.cross_entropy(flat_logits, flat_labels, ignore_index=ignore_index)
    total = functional.cross_entropy(flat_logits, flat_labels, ignore_index=ignore_index, reduction="sum")
    if torch.is_tensor(num_items_in_batch):
        num_items_in_batch = num_items_in_batch.to(total.device)
    return total / num_items_in_batch
