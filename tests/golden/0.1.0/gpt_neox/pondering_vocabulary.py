"""The pondering embedding over the whole vocabulary, recomputed in the backward pass.

Where there is a flash kernel for it (pondering_attention.py), that does the work. Elsewhere chunks of tokens meet the
whole vocabulary one after another, and a (tokens, vocabulary) tensor exists for one chunk at a time only. Backward,
with g the gradient of t:

    dp = g E^T      dlogits = p * (dp - <g, t>) / temperature      dhidden = dscores W      dW = dscores^T hidden
    dE = p^T g
"""

from functools import partial

import torch
from torch.autograd.function import once_differentiable

from .pondering_attention import can_attend, can_go_backward, vocabulary_attention, vocabulary_attention_backward
from .pondering_linear import few_rows_sum, is_few
from .pondering_readout import (
    Readout,
    add_product,
    chunks,
    compute_dtype,
    needs_plain_operations,
    often_differentiable,
    wide_dtype,
    zero_gradients,
)


_FEW_TOKENS = 16


class _VocabularyEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_states, weight, bias, table, cap, factor, temperature):
        dtype = compute_dtype(hidden_states)
        device_type = hidden_states.device.type
        ctx.set_materialize_grads(False)
        with torch.autocast(device_type, enabled=False):
            inputs = [
                tensor if tensor is None else tensor.to(dtype) for tensor in (hidden_states, weight, bias, table)
            ]
            hidden, readout = inputs[0], Readout(inputs[1], inputs[2], cap, factor)
            normaliser = None
            if can_attend(hidden, readout, inputs[3]):
                embedding, normaliser = vocabulary_attention(hidden, readout, inputs[3], temperature)
            else:
                embedding = hidden.new_empty(len(hidden), table.shape[1])
                for part in chunks(hidden, len(table)):
                    weights = probabilities(readout.finish(readout.scores(hidden[part])), temperature)
                    torch.mm(weights.to(dtype), inputs[3], out=embedding[part])
        ctx.save_for_backward(hidden_states, weight, bias, table, embedding, normaliser)
        ctx.settings = (cap, factor, temperature, dtype)
        return embedding

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        if gradient is None:
            return (None,) * 7
        hidden_states, weight, bias, table, embedding, normaliser = ctx.saved_tensors
        cap, factor, temperature, dtype = ctx.settings
        hidden, rows, values = hidden_states.to(dtype), weight.to(dtype), table.to(dtype)
        readout = Readout(rows, bias if bias is None else bias.to(dtype), cap, factor)
        gradient = gradient.to(dtype)
        needs = ctx.needs_input_grad
        if normaliser is not None and can_go_backward(dtype, needs[:4]):
            found = vocabulary_attention_backward(
                gradient, hidden, readout, values, temperature, embedding, normaliser
            )
            tensors = zip(found, (hidden_states, weight, table), strict=True)
            for_hidden, for_weight, for_table = (each.to(tensor.dtype) for each, tensor in tensors)
            return for_hidden, for_weight, None, for_table, None, None, None
        wide = wide_dtype(dtype)
        hidden_gradient = torch.empty_like(hidden) if needs[0] else None
        buffers = zero_gradients((rows, readout.bias, values), needs[1:4])
        weight_gradient, bias_gradient, table_gradient = buffers
        mean = (gradient.to(wide) * embedding.to(wide)).sum(-1, keepdim=True)
        for part in chunks(hidden, len(table)):
            scores = readout.scores(hidden[part])
            weights = probabilities(readout.finish(scores), temperature)
            if readout.cap is None:  # nothing below reads them: two tensors of a chunk's size are alive, not three
                scores = None
            if needs[3]:
                add_product(table_gradient, weights.to(dtype), gradient[part])
            if not any(needs[:3]):
                continue
            score_gradient = (gradient[part] @ values.t()).to(wide).sub_(mean[part]).mul_(weights).div_(temperature)
            del weights
            score_gradient = readout.finish_backward(score_gradient, scores)
            if needs[2]:
                bias_gradient += score_gradient.sum(0)
            score_gradient = score_gradient.to(dtype)
            if needs[0]:
                torch.mm(score_gradient, rows, out=hidden_gradient[part])
            if needs[1]:
                add_product(weight_gradient, score_gradient, hidden[part])
        gradients = (hidden_gradient, *buffers)
        inputs = (hidden_states, weight, bias, table)
        return *(g if g is None else g.to(i.dtype) for g, i in zip(gradients, inputs, strict=True)), None, None, None


def _plain(hidden_states, weight, bias, table, cap, factor, temperature, dtype):
    """The same with all probabilities at once, by operations that torch differentiates; the plain reference."""
    with torch.autocast(hidden_states.device.type, enabled=False):
        readout = Readout(weight.to(dtype), bias if bias is None else bias.to(dtype), cap, factor)
        logits = readout.finish(readout.scores(hidden_states.to(dtype)))
        return probabilities(logits, temperature).to(dtype) @ table.to(dtype)


def probabilities(logits, temperature):
    """The softmax of logits / temperature, in float32 or wider."""
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    return torch.softmax(logits if temperature == 1 else logits / temperature, dim=-1)


def weighted_sum(weights, table):
    """weights @ table: (n, V), (V, d) to (n, d), in the dtype of `table`. Few rows are summed in the fastest way."""
    product = few_rows_sum if _are_few(weights) else torch.mm
    return product(weights.to(table.dtype), table)


def makes_use_of_logits(hidden_states, readout, table):
    """Whether the embedding of hidden states (n, d_h) is computed faster from its logits, where these cost little.

    Few tokens read all of head and table, whichever way, and meet them faster in two products. Unless both are the
    same matrix: the flash kernel reads it once.
    """
    if not can_attend(hidden_states, readout, table):
        return True
    return _are_few(hidden_states) and readout.weight.data_ptr() != table.data_ptr()


def _are_few(states):
    return len(states) <= _FEW_TOKENS and is_few(states)


def vocabulary_embedding(hidden_states, readout, table, temperature):
    """softmax over the whole vocabulary, and the weighted sum of all embeddings.

    Args:
        hidden_states: (n, d_h), the last hidden states of a pass.
        readout: the head as a Readout.
        table: (V, d), a plain embedding matrix.
        temperature: > 0.

    Returns:
        (n, d), in the dtype that the product of `hidden_states` with the head has.
    """
    inputs = (hidden_states, readout.weight, readout.bias, table)
    settings = {"cap": readout.cap, "factor": readout.factor, "temperature": temperature}
    plain = partial(_plain, **settings, dtype=compute_dtype(hidden_states))
    if needs_plain_operations(*inputs):
        return plain(*inputs)
    embedding = _VocabularyEmbedding.apply(*inputs, *settings.values())
    return often_differentiable(plain, embedding, *inputs)
