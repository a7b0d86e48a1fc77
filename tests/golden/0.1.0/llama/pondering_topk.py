"""The pondering embedding over the K most probable tokens, as cheap as its arithmetic.

Only K of V logits of a token carry a gradient. So the one product over the vocabulary, which finds them, needs no
gradient, and everything after it is sparse: a bag of K rows of the embedding table forward, bags of K rows of the head
backward. Neither a (tokens, vocabulary) nor a (tokens, K, d) tensor is kept.
"""

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

from .pondering_readout import chunks


_BLOCK = 32  # near sqrt(V / K), where blocks and candidates are equally many
_FEW_ROWS = 32


def largest(scores, top_k):
    """The K largest of each row in no order, like `scores.topk(K, sorted=False)`: values and indices, both (n, K).

    On a CPU topk looks at every element, one by one. So first K blocks are found, those with the largest maxima, which
    hold all that is looked for, and then the K largest in them. For a few rows, as in decoding, it does not pay.
    """
    num_rows, size = scores.shape
    if scores.device.type != "cpu" or num_rows < _FEW_ROWS or size < 4 * _BLOCK * top_k or size % _BLOCK:
        return scores.topk(top_k, dim=-1, sorted=False)
    num_blocks = size // _BLOCK
    blocks = scores.view(num_rows, num_blocks, _BLOCK)
    chosen = blocks.amax(-1).topk(top_k, dim=-1, sorted=False).indices
    flat = chosen + num_blocks * torch.arange(num_rows).unsqueeze(1)
    candidates = blocks.view(-1, _BLOCK).index_select(0, flat.flatten()).view(num_rows, -1)
    values, indices = candidates.topk(top_k, dim=-1, sorted=False)
    return values, chosen.gather(1, indices // _BLOCK) * _BLOCK + indices % _BLOCK


class _ChosenScores(torch.autograd.Function):
    """scores[n, k] = hidden_states[n] . weight[token_ids[n, k]] + bias[token_ids[n, k]], computed before."""

    @staticmethod
    def forward(ctx, hidden_states, weight, bias, token_ids, scores):
        ctx.save_for_backward(hidden_states, weight, bias, token_ids)
        return scores

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        hidden_states, weight, bias, token_ids = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        hidden_gradient = weight_gradient = bias_gradient = None
        with torch.enable_grad():
            # A bag of head rows, weighted by the scores' gradients, is the gradient of the hidden states; and the
            # gradient of that bag's rows, with the hidden states coming in from above, is the gradient of the head.
            rows = weight.detach().requires_grad_(needs_weight)
            bags = functional.embedding_bag(token_ids, rows, per_sample_weights=gradient.to(rows.dtype), mode="sum")
        if needs_hidden:
            hidden_gradient = bags.detach().to(hidden_states.dtype)
        if needs_weight:
            (weight_gradient,) = torch.autograd.grad(bags, rows, hidden_states.to(bags.dtype))
        if needs_bias:
            bias_gradient = torch.zeros_like(bias).index_add_(
                0, token_ids.flatten(), gradient.flatten().to(bias.dtype)
            )
        return hidden_gradient, weight_gradient, bias_gradient, None, None


def top_k_embedding(hidden_states, readout, table, temperature, top_k):
    """softmax over the K largest logits, and the weighted sum of their embeddings.

    Args:
        hidden_states: (n, d_h), the last hidden states of a pass.
        readout: the head as a Readout.
        table: (V, d), a plain embedding matrix.
        temperature: > 0.
        top_k: 1 <= K <= V. Among equal logits any may be chosen.

    Returns:
        (n, d), in the dtype of `table`.
    """
    with torch.no_grad():
        found = [largest(readout.scores(hidden_states[part]), top_k) for part in chunks(hidden_states, len(table))]
    scores = torch.cat([values for values, _ in found])
    token_ids = torch.cat([indices for _, indices in found])
    scores = _ChosenScores.apply(hidden_states, readout.weight, readout.bias, token_ids, scores)
    weights = torch.softmax(readout.finish(scores) / temperature, dim=-1).to(table.dtype)
    return functional.embedding_bag(token_ids, table, per_sample_weights=weights, mode="sum")


def top_k_of_scores(scores, readout, table, temperature, top_k):
    """top_k_embedding without gradients, from all scores (n, V) of the head. Returns (n, d)."""
    scores, token_ids = largest(scores, top_k)
    weights = torch.softmax(readout.finish(scores) / temperature, dim=-1).to(table.dtype)
    return functional.embedding_bag(token_ids, table, per_sample_weights=weights, mode="sum")
