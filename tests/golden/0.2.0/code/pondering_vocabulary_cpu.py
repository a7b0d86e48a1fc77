"""What only makes CPUs faster. Without this file and its import in modeling_pondering.py all is the same, but slower.

- PyTorch has a flash attention kernel for CPUs, which computes the pondering embedding over the whole vocabulary where
  queries are hidden states, keys the rows of the head, and values the rows of the embedding table. It goes through
  blocks of the vocabulary that stay in the processor's caches, so no (tokens, vocabulary) tensor is ever written, and
  a head that is tied to the embedding table is read once. scaled_dot_product_attention runs the same kernel but keeps
  the logsumexp to itself, which is needed here to join parts of the vocabulary and to go backward.
- BLAS libraries pack the weight for a product x W^T of a few rows, which takes longer than the product. W x^T, the
  same numbers turned on their side, is computed without. For a single row they use one thread; cut into a part a
  thread, the weight is read by all of them.
- topk looks at every element, one by one. Comparisons with a floor are vectorised.

Each function here does what another file's `replaceable` function of the same arguments does, or gives None where it
would be no faster. The last lines put them there.
"""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers.utils import logging

from .pondering_backbone import decoder_context, head_context
from .pondering_vocabulary import CHUNK_ELEMENTS, Readout, compute_dtype, product_with_head
from .pondering_vocabulary_embedding import (
    largest_of_head,
    makes_use_of_logits,
    vocabulary_gradients,
    vocabulary_sum,
    weighted_sum,
)


logger = logging.get_logger(__name__)

_FEW_TOKENS = 256  # with fewer, the kernel has too few blocks of queries for all threads

_FORWARD = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
_BACKWARD = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward", None)


def can_attend(hidden_states: torch.Tensor, readout: Readout, table: torch.Tensor) -> bool:
    """Whether the flash kernel can compute it: on a CPU, no cap on the logits, head and table equally wide."""
    if hidden_states.device.type == "cpu" and _FORWARD is None and not torch.compiler.is_compiling():
        logger.warning_once(
            "this torch has no flash attention kernel for CPUs: pondering over the whole vocabulary computes it in "
            "chunks, which takes longer"
        )
    return (
        _FORWARD is not None
        and hidden_states.device.type == "cpu"
        and hidden_states.dtype in (torch.float32, torch.float64, torch.bfloat16)
        and len(hidden_states) > 0
        and readout.cap is None
        and readout.weight.shape == table.shape
        and readout.weight.is_contiguous()  # the kernel itself does not ask
        and table.is_contiguous()
    )


def attend(
    hidden_states: torch.Tensor, readout: Readout, table: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """vocabulary_sum. The normaliser is the logsumexp (n,) of logits / temperature, in float32 or wider."""
    if not can_attend(hidden_states, readout, table):
        return None
    scale = readout.factor / temperature
    hidden_states, num_parts = hidden_states.contiguous(), 1
    if len(hidden_states) < _FEW_TOKENS and not torch.compiler.is_compiling():
        num_parts = min(torch.get_num_threads(), len(table))
    even = len(table) - len(table) % num_parts
    found = [_attend(hidden_states, readout, table, scale, num_parts, slice(0, even))]
    if even < len(table):
        found.append(_attend(hidden_states, readout, table, scale, 1, slice(even, None)))
    embedding, normaliser = (torch.cat(parts) for parts in zip(*found, strict=True))
    if len(normaliser) == 1:
        return embedding[0], normaliser[0]
    weights = torch.softmax(normaliser, dim=0).unsqueeze(-1)
    return (embedding * weights).sum(0).to(table.dtype), normaliser.logsumexp(0)


def _attend(hidden_states, readout, table, scale, num_parts, rows):
    """Each part of these rows as a head of an attention: embeddings (parts, n, d) and normalisers (parts, n)."""
    num_tokens, width = hidden_states.shape
    query = hidden_states.view(1, 1, num_tokens, width).expand(1, num_parts, -1, -1)
    key, value = (matrix[rows].view(1, num_parts, -1, width) for matrix in (readout.weight, table))
    mask = None
    if readout.bias is not None:
        mask = (readout.bias[rows] * scale).view(1, num_parts, 1, -1).expand(-1, -1, num_tokens, -1)
    embedding, normaliser = _FORWARD(query, key, value, 0.0, False, attn_mask=mask, scale=scale)
    if readout.bias is not None:  # where all tokens of a part are forbidden, the kernel gives 0 as its normaliser
        is_forbidden = readout.bias[rows].isneginf().view(num_parts, -1).all(1)
        normaliser = normaliser.masked_fill(is_forbidden.view(1, -1, 1), -math.inf)
    return embedding[0], normaliser[0]


def attend_backward(
    gradient: torch.Tensor,
    hidden_states: torch.Tensor,
    readout: Readout,
    table: torch.Tensor,
    temperature: float,
    embedding: torch.Tensor,
    normaliser: torch.Tensor | None,
    needs: Sequence[bool],
) -> tuple[torch.Tensor | None, ...] | None:
    """vocabulary_gradients.

    The kernel has no gradient for a bias, sums in the dtype it is given, and always makes the (V, d) gradients.
    """
    _, needs_head, needs_bias, needs_table = needs
    is_wide = hidden_states.dtype in (torch.float32, torch.float64)
    if normaliser is None or _BACKWARD is None or not is_wide or needs_bias or not (needs_head or needs_table):
        return None
    scale = readout.factor / temperature
    query, key, value, embedding, gradient = (
        matrix[None, None] for matrix in (hidden_states.contiguous(), readout.weight, table, embedding, gradient)
    )
    mask = None
    if readout.bias is not None:
        mask = (readout.bias * scale).view(1, 1, 1, -1).expand(-1, -1, len(hidden_states), -1)
    found = _BACKWARD(
        gradient, query, key, value, embedding, normaliser[None, None], 0.0, False, attn_mask=mask, scale=scale
    )
    for_hidden, for_head, for_table = (each[0, 0] for each in found)
    return for_hidden, for_head, None, for_table


def uses_logits(
    hidden_states: torch.Tensor, readout: Readout, table: torch.Tensor, to_the_bit: bool = False
) -> bool | None:
    """makes_use_of_logits: few tokens read all of head and table, whichever way, and meet them faster in two products.

    Unless both are the same matrix: the flash kernel reads it once.
    """
    if not can_attend(hidden_states, readout, table):
        return None
    return not to_the_bit and _are_few(hidden_states) and readout.weight.data_ptr() != table.data_ptr()


def _are_few(states):
    return len(states) <= 16 and is_few(states)


_MOST_ROWS = 32
# Narrower layers are so quick that looking at each call of a decoder costs more than it saves.
_LEAST_WIDTH, _LEAST_WIDTH_OF_ONE_ROW = 512, 1024


def is_few(states: torch.Tensor) -> bool:
    """Whether (..., d) has so few rows that few_rows_product may be faster than functional.linear."""
    return (
        states.device.type == "cpu"
        and states.dtype == torch.float32
        and 0 < states.numel() <= _MOST_ROWS * states.shape[-1]
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


def few_rows_product(
    states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor | None:
    """product_with_head of few rows."""
    if not is_few(states):
        return None
    columns = states.reshape(-1, states.shape[-1]).t()
    if columns.shape[1] == 1:
        if torch.get_num_threads() == 1 or len(weight) < 2 or not weight.is_contiguous():
            return None
        product = _one_column(weight, columns, min(torch.get_num_threads(), len(weight)))
        product = product if bias is None else product + bias.unsqueeze(1)
    else:
        product = weight @ columns if bias is None else torch.addmm(bias.unsqueeze(1), weight, columns)
    return product.t().contiguous().view(*states.shape[:-1], -1)


def _one_column(weight, column, num_parts):
    even = len(weight) - len(weight) % num_parts
    parts = weight[:even].view(num_parts, -1, weight.shape[1])
    product = torch.bmm(parts, column.expand(num_parts, -1, -1)).view(-1, 1)
    return product if even == len(weight) else torch.cat([product, weight[even:] @ column])


def few_rows_sum(weights: torch.Tensor, table: torch.Tensor) -> torch.Tensor | None:
    """weighted_sum of few rows.

    A part of the table for each thread, since BLAS libraries give a product of so few rows to one; and rows by fours,
    as three cost more than four.
    """
    if not _are_few(weights):
        return None
    weights = weights.to(table.dtype)
    num_rows, num_parts = len(weights), min(torch.get_num_threads(), len(table))
    if num_rows > 1 and num_rows % 4:
        weights = functional.pad(weights, (0, 0, 0, -num_rows % 4))
    even = len(table) - len(table) % num_parts
    parts = weights[:, :even].view(len(weights), num_parts, -1).transpose(0, 1)
    total = torch.bmm(parts, table[:even].view(num_parts, -1, table.shape[1])).sum(0)
    if even < len(table):
        total += weights[:, even:] @ table[even:]
    return total[:num_rows]


class _OnTheirSide(TorchFunctionMode):
    """Within it, every linear layer that a backbone runs over few rows is computed by few_rows_product."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is functional.linear and not kwargs and type(args[1]) in (torch.Tensor, nn.Parameter):
            product = few_rows_product(*args) if args[1].ndim == 2 else None
            if product is not None:
                return product
        return function(*args, **(kwargs or {}))


def fast_layers(states: torch.Tensor) -> AbstractContextManager | None:
    """decoder_context. Where there are several tokens a row nothing changes: texts keep the backbone's own bits."""
    num_rows, length, width = states.shape
    pays = length == 1 and width >= (_LEAST_WIDTH_OF_ONE_ROW if num_rows == 1 else _LEAST_WIDTH)
    return _OnTheirSide() if pays and is_few(states) else None


def fast_head(states: torch.Tensor) -> AbstractContextManager | None:
    """head_context, on states of any width."""
    return _OnTheirSide() if states.shape[1] == 1 and is_few(states) else None


_MANY_ROWS = 1024
_ALIGNMENT = 32
_TILES_A_CHUNK = 3  # what stays in the cache until it has been looked at, and is still large enough for the product


_largest_in_chunks = largest_of_head.function


def largest_by_tiles(
    hidden_states: torch.Tensor, readout: Readout, top_k: int
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """largest_of_head: a product packs the rows of the head anew each time, so many tokens meet it tile by tile.

    Not where K is large.
    """
    vocab_size = len(readout.weight)
    if hidden_states.device.type != "cpu" or len(hidden_states) == 0 or torch.compiler.is_compiling():
        return None
    width = CHUNK_ELEMENTS["cpu"] // min(len(hidden_states), _MANY_ROWS)
    if not 16 * top_k <= width < vocab_size:
        return None
    parts = hidden_states.split(_MANY_ROWS)
    found = [_largest_in_tiles(part, readout, top_k, width // _TILES_A_CHUNK) for part in parts]
    values, token_ids = (torch.cat(tensors) for tensors in zip(*found, strict=True))
    return values, token_ids


def _largest_in_tiles(hidden_states, readout, top_k, width):
    """Values and token ids (n, K), where about `width` scores of a token are there at once.

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
            some = scores.topk(_quota(top_k, 1 / num_tiles) + 1, dim=-1, sorted=False).values
            best = _Best(some, num_tiles, width)
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

    def is_full(self) -> torch.Tensor:
        """Whether some token has found as much as fills a tile: all together need the memory of a few tiles."""
        return self.counts.amax() > self.groups_a_row

    def add(self, tile: int, scores: torch.Tensor, above: torch.Tensor) -> None:
        """Note what is above the floor. scores, above: (n, width)."""
        groups = above.view(torch.int64).flatten().nonzero().flatten()
        rows = groups // self.groups_a_row
        token_ids = tile + 8 * self.num_tiles * (groups - self.groups_a_row * rows)
        self.found.append((rows, token_ids, scores.view(-1, 8).index_select(0, groups)))
        self.counts += torch.bincount(rows, minlength=len(self.counts))

    def refine(self, num_kept: int) -> torch.Tensor:
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


vocabulary_sum.faster, vocabulary_gradients.faster, makes_use_of_logits.faster = attend, attend_backward, uses_logits
product_with_head.faster, weighted_sum.faster = few_rows_product, few_rows_sum
decoder_context.faster, head_context.faster = fast_layers, fast_head
largest_of_head.faster = largest_by_tiles
