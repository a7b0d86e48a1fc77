"""The pondering embedding: a predicted distribution as a weighted sum of token embeddings."""

import torch
from torch import nn


def pondering_embedding(logits, table, temperature=1.0, top_k=None):
    """t = softmax(logits / temperature) @ table, or the same over the K largest logits only (renormalised).

    The softmax of half-precision logits is computed in float32. This is the plain reference, with autograd through
    everything.

    Args:
        logits: (..., V), what the backbone predicts.
        table: (V, d), every token's embedding as the backbone feeds it in.
        temperature: of the softmax, > 0.
        top_k: K, 1 <= K <= V, or None for the whole vocabulary.

    Returns:
        (..., d), in the dtype of `table`.
    """
    scores = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    if top_k is None:
        weights = torch.softmax(scores / temperature, dim=-1).to(table.dtype)
        return weights @ table
    scores, token_ids = scores.topk(top_k, dim=-1)
    weights = torch.softmax(scores / temperature, dim=-1).to(table.dtype)
    return (weights.unsqueeze(-2) @ table[token_ids]).squeeze(-2)


class PonderingGate(nn.Module):
    """g * t, with a learned factor g that starts at 0: before training, pondering changes nothing."""

    def __init__(self, hidden_size):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(hidden_size))

    def forward(self, embedding):
        """embedding: (..., d). Returns the same shape."""
        return embedding * self.weight
