"""The pondering embedding over the K most probable tokens, as cheap as its arithmetic.

Only K of V logits of a token carry a gradient. So the one product over the vocabulary, which finds them, needs no
gradient, and everything after it is sparse: a bag of K rows of the embedding table forward, bags of K rows of the head
backward. Neither a (tokens, vocabulary) nor a (tokens, K, d) tensor is kept.
"""

import math
from functools import partial

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

from .pondering_readout import (
    CHUNK_ELEMENTS,
    Readout,
    chunks,
    compute_dtype,
    needs_plain_operations,
    often_differentiable,
)


_FEW_ROWS = 32  # of so few, as in decoding, topk itself is fastest
_MANY_ROWS = 1024
_ALIGNMENT = 32
_TILES_A_CHUNK = 3  # what stays in the cache until it has been looked at, and is still large enough for the product


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


def _candidates(scores, block, num_blocks):
    """Indices (n, m) of few elements in each row of (n, V), among which are as many largest as blocks are taken.

    On a CPU topk looks at every element, one by one. The maxima of blocks are found faster, and the largest elements
    lie in the blocks with the largest maxima.
    """
    num_rows, size = scores.shape
    tail, stride = size % block, size // block  # a block's elements are a stride apart, which vectorises the maximum
    maxima = scores[:, : size - tail].unflatten(1, (block, stride)).amax(1)
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
    if hidden_states.device.type == "cpu" and len(hidden_states) and not torch.compiler.is_compiling():
        width = CHUNK_ELEMENTS["cpu"] // min(len(hidden_states), _MANY_ROWS)
        if 16 * top_k <= width < vocab_size:
            parts = hidden_states.split(_MANY_ROWS)
            return _joined([_largest_in_tiles(part, readout, top_k, width // _TILES_A_CHUNK) for part in parts])
    return _largest_in_chunks(hidden_states, readout, top_k)


def _largest_in_chunks(hidden_states, readout, top_k):
    parts = [hidden_states[part] for part in chunks(hidden_states, len(readout.weight))] or [hidden_states]
    return _joined([largest(readout.scores(part), top_k) for part in parts])


def _largest_in_tiles(hidden_states, readout, top_k, width):
    """The same, where about `width` scores of a token are there at once.

    Each tile is a sample of the vocabulary, every so many-th token, so the scores seen so far tell a floor below which
    the K largest of all hardly ever lie. Of a tile only what is above the floor is kept, and now and then that is cut
    down and the floor raised. Tokens whose floor proves too high are done again, in chunks.
    """
    dtype = compute_dtype(hidden_states)
    hidden_states = hidden_states.to(dtype)
    num_rows, vocab_size = len(hidden_states), len(readout.weight)
    num_tiles = -(-vocab_size // width)
    width = -(-vocab_size // (num_tiles * _ALIGNMENT)) * _ALIGNMENT
    scores = hidden_states.new_empty(num_rows, width)  # written again and again: new memory costs time
    above = torch.empty(num_rows, width, dtype=torch.bool)
    best, num_cuts = None, 0
    for tile in range(num_tiles):
        weight = readout.weight[tile::num_tiles].to(dtype)
        torch.mm(hidden_states, weight.t(), out=scores[:, : len(weight)])
        if readout.bias is not None:
            scores[:, : len(weight)] += readout.bias[tile::num_tiles]
        scores[:, len(weight) :] = -math.inf
        if best is None:
            best = _Best(largest(scores, _quota(top_k, 1 / num_tiles) + 1)[0], num_tiles, width)
        # What is not a number counts as above, so that it is not lost.
        best.add(tile, scores, torch.le(scores, best.floor, out=above).logical_not_())
        seen, is_full = tile + 1, best.is_full()
        num_cuts += bool(is_full)
        if num_cuts > 2:  # tiles that are no samples of each other: they would take longer, and more memory
            return _largest_in_chunks(hidden_states, readout, top_k)
        if seen & tile == 0 or seen == num_tiles or is_full:  # after 1, 2, 4, 8 ... tiles
            exact = best.refine(_quota(top_k, seen / num_tiles))
    values, token_ids = best.values, best.token_ids
    again = (~exact).nonzero().flatten()
    if len(again):
        values[again], token_ids[again] = _largest_in_chunks(hidden_states[again], readout, top_k)
    return values, token_ids


def _quota(top_k, fraction):
    """So many largest of a random part of the vocabulary hardly ever miss one of the K largest of all."""
    expected = top_k * fraction
    return min(top_k, math.ceil(expected + 5 * math.sqrt(expected)) + 3)


class _Best:
    """The largest scores of n tokens so far, and what was found above the floor since they were compared.

    values, token_ids: (n, k). floor: (n, 1). found: groups of eight neighbours with something above the floor, since
    eight booleans are looked at as one integer; their rows, first token ids and scores. counts: (n,), of the groups.
    """

    def __init__(self, some_scores, num_tiles, width):
        self.num_tiles, self.groups_a_row = num_tiles, width // 8
        least = torch.finfo(some_scores.dtype).min  # a floor of minus infinity would count what only fills a row
        self.floor = self._as_floor(some_scores.amin(-1, keepdim=True)).clamp(min=least)
        self.values = some_scores[:, :0]
        self.token_ids = torch.empty(len(some_scores), 0, dtype=torch.long)
        self._forget()

    @staticmethod
    def _as_floor(scores):
        # A token whose scores have something that is not a number is done again: nothing more is noted of it.
        return scores.nan_to_num(nan=math.inf, posinf=math.inf, neginf=-math.inf)

    def _forget(self):
        self.found, self.counts = [], torch.zeros(len(self.floor), dtype=torch.long)

    def is_full(self):
        """Whether some token has found as much as fills a tile: all together need the memory of a few tiles."""
        return self.counts.amax() > self.groups_a_row

    def add(self, tile, scores, above):
        """Note what is above the floor. scores, above: (n, width)."""
        groups = above.view(torch.int64).flatten().nonzero().flatten()
        rows = groups // self.groups_a_row
        token_ids = tile + 8 * self.num_tiles * (groups - self.groups_a_row * rows)
        self.found.append((rows, token_ids, scores.view(-1, 8).index_select(0, groups)))
        self.counts += torch.bincount(rows, minlength=len(self.counts))

    def refine(self, num_kept):
        """Keep so many scores a token and raise the floor to the least of them.

        Returns (n,): whether they are the largest so far, as none lies below the floor that was.
        """
        rows, token_ids, scores = (torch.cat(tensors) for tensors in zip(*self.found, strict=True))
        self._forget()
        groups, places = (scores <= self.floor[rows]).logical_not_().nonzero(as_tuple=True)
        order = rows[groups].int().argsort()
        groups, places = groups[order], places[order]
        rows, num_before = rows[groups], self.values.shape[1]
        counts = torch.bincount(rows, minlength=len(self.floor))
        columns = num_before + torch.arange(len(rows)) - (counts.cumsum(0) - counts)[rows]
        added = max(int(counts.amax()), num_kept - num_before)
        values = functional.pad(self.values, (0, added), value=-math.inf)
        values[rows, columns] = scores[groups, places]
        ids = functional.pad(self.token_ids, (0, added))
        ids[rows, columns] = token_ids[groups] + self.num_tiles * places
        self.values, chosen = values.topk(num_kept, dim=-1, sorted=False)
        self.token_ids = ids.gather(1, chosen)
        lowest = self.values.amin(-1, keepdim=True)
        exact = (lowest >= self.floor).flatten()
        self.floor = torch.maximum(self.floor, self._as_floor(lowest))
        return exact


def _joined(pairs):
    return tuple(torch.cat(tensors) for tensors in zip(*pairs, strict=True))


class _ChosenScores(torch.autograd.Function):
    """scores[n, k] = hidden_states[n] . weight[token_ids[n, k]] + bias[token_ids[n, k]], computed before."""

    @staticmethod
    def forward(ctx, hidden_states, weight, bias, token_ids, scores):
        ctx.save_for_backward(hidden_states, weight, bias, token_ids)
        ctx.set_materialize_grads(False)
        return scores

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        if gradient is None:
            return (None,) * 5
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


class _Bags(torch.autograd.Function):
    """functional.embedding_bag with weights that need gradients; for half precision torch has no kernel on GPUs.

    token_ids, weights: (n, K). table: (V, d). Gives (n, d).
    """

    @staticmethod
    def forward(ctx, token_ids, table, weights):
        ctx.save_for_backward(token_ids, table, weights)
        return functional.embedding_bag(token_ids, table, per_sample_weights=weights, mode="sum")

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        token_ids, table, weights = ctx.saved_tensors
        table_gradient = weight_gradient = None
        if ctx.needs_input_grad[1]:
            with torch.enable_grad():
                rows = table.detach().requires_grad_()
                bags = functional.embedding_bag(token_ids, rows, per_sample_weights=weights.detach(), mode="sum")
            (table_gradient,) = torch.autograd.grad(bags, rows, gradient)
        if ctx.needs_input_grad[2]:
            weight_gradient = torch.empty_like(weights)
            for part in chunks(gradient, weights.shape[1] * table.shape[1]):
                weight_gradient[part] = (table[token_ids[part]] @ gradient[part].unsqueeze(-1)).squeeze(-1)
        return None, table_gradient, weight_gradient


def _weighted_bags(token_ids, table, weights):
    """(n, d), the weighted sums of rows of `table` (V, d). token_ids, weights: (n, K)."""
    if weights.requires_grad and weights.device.type != "cpu" and weights.dtype in (torch.float16, torch.bfloat16):
        return _Bags.apply(token_ids, table, weights)
    return functional.embedding_bag(token_ids, table, per_sample_weights=weights, mode="sum")


def _plain(hidden_states, weight, bias, table, token_ids, cap, factor, temperature, dtype):
    """The embedding of chosen tokens (n, K) by operations that torch differentiates: (n, K, d) tensors are kept."""
    with torch.autocast(hidden_states.device.type, enabled=False):
        rows, states = weight.to(dtype)[token_ids], hidden_states.to(dtype).unsqueeze(-1)
        scores = (rows @ states).squeeze(-1)
        if bias is not None:
            scores = scores + bias.to(dtype)[token_ids]
        weights = torch.softmax(Readout(weight, bias, cap, factor).finish(scores) / temperature, dim=-1)
        return (weights.to(table.dtype).unsqueeze(-2) @ table[token_ids]).squeeze(-2)


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
    inputs = (hidden_states, readout.weight, readout.bias, table)
    settings = {"cap": readout.cap, "factor": readout.factor, "temperature": temperature}
    plain = partial(_plain, **settings, dtype=compute_dtype(hidden_states))
    if needs_plain_operations(*inputs):
        return plain(*inputs, readout.scores(hidden_states).topk(top_k, dim=-1, sorted=False).indices)
    with torch.no_grad():
        scores, token_ids = _largest_of_head(hidden_states, readout, top_k)
    scores = _ChosenScores.apply(*inputs[:3], token_ids, scores)
    weights = torch.softmax(readout.finish(scores) / temperature, dim=-1).to(table.dtype)
    embedding = _weighted_bags(token_ids, table, weights)
    return often_differentiable(partial(plain, token_ids=token_ids), embedding, *inputs)


def top_k_of_scores(scores, readout, table, temperature, top_k):
    """top_k_embedding without gradients, from all scores (n, V) of the head. Returns (n, d)."""
    scores, token_ids = largest(scores, top_k)
    weights = torch.softmax(readout.finish(scores) / temperature, dim=-1).to(table.dtype)
    return functional.embedding_bag(token_ids, table, per_sample_weights=weights, mode="sum")
