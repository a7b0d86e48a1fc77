"""The pondering embedding over the whole vocabulary as an attention, by PyTorch's flash kernel for CPUs.

Queries are hidden states, keys the rows of the head, values the rows of the embedding table. The kernel goes through
blocks of the vocabulary that stay in the processor's caches, so no (tokens, vocabulary) tensor is ever written, and a
head that is tied to the embedding table is read once. scaled_dot_product_attention runs the same kernel but keeps the
logsumexp to itself, which is needed here to join parts of the vocabulary and to go backward.
"""

import torch
from transformers.utils import logging


logger = logging.get_logger(__name__)

_FEW_TOKENS = 256  # with fewer, the kernel has too few blocks of queries for all threads

_FORWARD = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
_BACKWARD = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward", None)


def can_attend(hidden_states, readout, table):
    """Whether vocabulary_attention can compute it: on a CPU, no cap on the logits, head and table equally wide."""
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


def can_go_backward(dtype, needs):
    """Whether vocabulary_attention_backward should be used.

    It has no gradient for a bias, sums in the dtype it is given, and always makes the (V, d) gradients.

    Args:
        needs: whether hidden states, head, bias and table need gradients.
    """
    _, head, bias, table = needs
    return _BACKWARD is not None and dtype in (torch.float32, torch.float64) and (head or table) and not bias


def vocabulary_attention(hidden_states, readout, table, temperature):
    """softmax over the whole vocabulary, and the weighted sum of all embeddings. No gradients.

    Args:
        hidden_states: (n, d).
        readout: the head as a Readout without cap; weight (V, d), of the dtype of `hidden_states`.
        table: (V, d), of the same dtype.
        temperature: > 0.

    Returns:
        (embedding, normaliser): (n, d), and the logsumexp (n,) of logits / temperature, in float32 or wider.
    """
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
    return embedding[0], normaliser[0]


def vocabulary_attention_backward(gradient, hidden_states, readout, table, temperature, embedding, normaliser):
    """The gradients of hidden states (n, d), head (V, d) and table (V, d).

    Args:
        gradient: (n, d), of the embedding.
        hidden_states, readout, table, temperature: what vocabulary_attention was given.
        embedding, normaliser: what it returned.
    """
    scale = readout.factor / temperature
    query, key, value, embedding, gradient = (
        matrix[None, None] for matrix in (hidden_states.contiguous(), readout.weight, table, embedding, gradient)
    )
    mask = None
    if readout.bias is not None:
        mask = (readout.bias * scale).view(1, 1, 1, -1).expand(-1, -1, len(hidden_states), -1)
    gradients = _BACKWARD(
        gradient, query, key, value, embedding, normaliser[None, None], 0.0, False, attn_mask=mask, scale=scale
    )
    return tuple(each[0, 0] for each in gradients)
