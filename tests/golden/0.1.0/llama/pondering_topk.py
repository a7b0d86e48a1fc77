"""The pondering embedding over the K most probable tokens, as cheap as its arithmetic.

Only K of V logits of a token carry a gradient. So the one product over the vocabulary, which finds them, needs no
gradient, and everything after it is sparse: a bag of K rows of the embedding table forward, bags of K rows of the head
backward. Neither a (tokens, vocabulary) nor a (tokens, K, d) tensor is kept.
"""

import math

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

from .pondering_readout import CHUNK_ELEMENTS, chunks, compute_dtype


_FEW_ROWS = 32  # of so few, as in decoding, topk itself is fastest
_MANY_ROWS = 1024
_ALIGNMENT = 32


def largest(scores, top_k):
    """The K largest of each row in no order, like `scores.topk(K, sorted=False)`: values and indices, both (n, K)."""
    block = _block_size(scores, top_k)
    if block == 1:
        return scores.topk(top_k, dim=-1, sorted=False)
    candidates = _candidates(scores, block, top_k)
    values, indices = scores.gather(1, candidates).topk(top_k, dim=-1, sorted=False)
    return values, candidates.gather(1, indices)


def _block_size(scores, top_k):
    """Into blocks of how many elements _candidates should cut the rows, so that it pays; 1: it does not."""
    if scores.device.type != "cpu" or len(scores) < _FEW_ROWS:
        return 1
    block = 2 ** round(math.log2(scores.shape[1] / top_k) / 2)  # blocks and candidates are about equally many
    return block if block >= 4 else 1


def _candidates(scores, block, num_blocks=None, floor=None):
    """Indices (n, m) of few elements in each row of (n, V), among which are the largest.

    On a CPU topk looks at every element, one by one. The maxima of blocks are found faster, and the largest elements
    lie in the blocks with the largest maxima.

    Args:
        block: elements of a block.
        num_blocks: how many blocks to take, as many as elements are looked for. Or instead
        floor: (n, 1), where all elements above it are looked for, however many they are.
    """
    num_rows, size = scores.shape
    tail, stride = size % block, size // block  # a block's elements are a stride apart, which vectorises the maximum
    maxima = scores[:, : size - tail].unflatten(1, (block, stride)).amax(1)
    if floor is not None:
        num_blocks = int((maxima > floor).sum(-1).max())
    chosen = maxima.topk(num_blocks, dim=-1, sorted=False).indices
    indices = (chosen.unsqueeze(1) + stride * torch.arange(block).unsqueeze(1)).flatten(1)
    if not tail:
        return indices
    return torch.cat([indices, torch.arange(size - tail, size).expand(num_rows, -1)], dim=1)


def _largest_of_head(hidden_states, readout, top_k):
    """The K largest scores of each token and their token ids, both (n, K); all scores are never there at once.

    A product packs the rows of the head anew each time, which on a CPU counts. There many tokens meet the vocabulary
    tile by tile; elsewhere, and where K is large, chunks of tokens meet all of it.
    """
    vocab_size = len(readout.weight)
    if hidden_states.device.type == "cpu" and len(hidden_states):
        width = CHUNK_ELEMENTS["cpu"] // min(len(hidden_states), _MANY_ROWS) // _ALIGNMENT * _ALIGNMENT
        if 16 * top_k <= width < vocab_size:
            parts = hidden_states.split(_MANY_ROWS)
            return _joined([_largest_in_tiles(part, readout, top_k, width) for part in parts])
    parts = [hidden_states[part] for part in chunks(hidden_states, vocab_size)] or [hidden_states]
    return _joined([largest(readout.scores(part), top_k) for part in parts])


def _largest_in_tiles(hidden_states, readout, top_k, width):
    dtype = compute_dtype(hidden_states)
    hidden_states = hidden_states.to(dtype)
    buffer = hidden_states.new_empty(len(hidden_states) * width)  # written again and again: new memory costs time
    values = token_ids = None
    for first in range(0, len(readout.weight), width):
        weight = readout.weight[first : first + width].to(dtype)
        scores = buffer[: len(hidden_states) * len(weight)].view(-1, len(weight))
        torch.mm(hidden_states, weight.t(), out=scores)
        if readout.bias is not None:
            scores += readout.bias[first : first + width]
        if values is None:
            values, token_ids = largest(scores, top_k)
            continue
        found = _candidates(scores, _block_size(scores, top_k), floor=values.amin(-1, keepdim=True))
        values, indices = torch.cat([values, scores.gather(1, found)], dim=1).topk(top_k, dim=-1, sorted=False)
        token_ids = torch.cat([token_ids, found + first], dim=1).gather(1, indices)
    return values, token_ids


def _joined(pairs):
    return tuple(torch.cat(tensors) for tensors in zip(*pairs, strict=True))


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
        scores, token_ids = _largest_of_head(hidden_states, readout, top_k)
    scores = _ChosenScores.apply(hidden_states, readout.weight, readout.bias, token_ids, scores)
    weights = torch.softmax(readout.finish(scores) / temperature, dim=-1).to(table.dtype)
    return functional.embedding_bag(token_ids, table, per_sample_weights=weights, mode="sum")


def top_k_of_scores(scores, readout, table, temperature, top_k):
    """top_k_embedding without gradients, from all scores (n, V) of the head. Returns (n, d)."""
    scores, token_ids = largest(scores, top_k)
    weights = torch.softmax(readout.finish(scores) / temperature, dim=-1).to(table.dtype)
    return functional.embedding_bag(token_ids, table, per_sample_weights=weights, mode="sum")
