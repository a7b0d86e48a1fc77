"""Next-token cross-entropy, as transformers' Trainer and data collators expect it."""

import inspect
from functools import partial

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

from .pondering_errors import PonderingError
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
        shift_labels = _shifted(labels, ignore_index)
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


def _loss_and_gradients(hidden_states, weight, bias, labels, cap, factor, ignore_index, dtype, needs):
    """The summed loss and the gradients of hidden states, weight and bias that are needed, None for the others."""
    hidden, rows = hidden_states.to(dtype), weight.to(dtype)
    readout = Readout(rows, bias if bias is None else bias.to(dtype), cap, factor)
    total = hidden.new_zeros((), dtype=wide_dtype(dtype))
    hidden_gradient = torch.empty_like(hidden) if needs[0] else None
    weight_gradient, bias_gradient = zero_gradients((rows, readout.bias), needs[1:])
    for part in chunks(hidden, len(rows)):
        scores = readout.scores(hidden[part])
        logits = readout.finish(scores)
        normaliser = logits.logsumexp(-1, keepdim=True)
        targets = labels[part].unsqueeze(-1)
        counts = targets != ignore_index
        targets = targets.where(counts, 0)
        # Not in place: compiled by torch 2.11, a result that was changed in place loses its gradient without a word.
        total = total + (normaliser - logits.gather(-1, targets)).where(counts, 0).sum()
        if not any(needs):
            continue
        gradient = (logits - normaliser).exp_()
        gradient.scatter_add_(-1, targets, gradient.new_full((), -1.0).expand_as(targets))
        gradient = readout.finish_backward(gradient.mul_(counts), scores)
        if needs[2]:
            bias_gradient += gradient.sum(0)
        gradient = gradient.to(dtype)
        if needs[0]:
            torch.mm(gradient, rows, out=hidden_gradient[part])
        if needs[1]:
            add_product(weight_gradient, gradient, hidden[part])
    return total, (hidden_gradient, weight_gradient, bias_gradient)


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum of the losses over tokens. Gradients are made with it, chunk by chunk, so nothing is computed twice."""

    @staticmethod
    def forward(ctx, hidden_states, weight, bias, labels, cap, factor, ignore_index, is_differentiated):
        # `needs_input_grad` says what requires gradients, also where nothing is differentiated.
        needs = ctx.needs_input_grad[:3] if is_differentiated else (False, False, False)
        dtype = compute_dtype(hidden_states)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden_states, weight, bias, labels)
        ctx.settings = (cap, factor, ignore_index, dtype, needs)
        with torch.autocast(hidden_states.device.type, enabled=False):
            total, ctx.gradients = _loss_and_gradients(hidden_states, weight, bias, labels, *ctx.settings)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        if gradient is None:
            return (None,) * 8
        gradients, ctx.gradients = ctx.gradients, None  # handed over, so that the head's is never there twice
        if gradients is None:  # a second backward pass through a retained graph
            gradients = _loss_and_gradients(*ctx.saved_tensors, *ctx.settings)[1]
        tensors = ctx.saved_tensors[:3]
        scaled = [g if g is None else g.mul_(gradient).to(t.dtype) for g, t in zip(gradients, tensors, strict=True)]
        return *scaled, None, None, None, None, None


def _plain_sum(hidden_states, weight, bias, labels, cap, factor, ignore_index, dtype):
    """The summed loss with the logits whole; the plain reference of _LinearCrossEntropy."""
    with torch.autocast(hidden_states.device.type, enabled=False):
        readout = Readout(weight.to(dtype), bias if bias is None else bias.to(dtype), cap, factor)
        logits = readout.finish(readout.scores(hidden_states.to(dtype)))
        return functional.cross_entropy(logits, labels, ignore_index=ignore_index, reduction="sum")


def linear_causal_lm_loss(
    hidden_states, readout, labels, num_items_in_batch=None, ignore_index=-100, shift_labels=None
):
    """causal_lm_loss of the head's logits, which are never kept whole.

    Args:
        hidden_states: (B, T, d), the last hidden states of a pass.
        readout: the head as a Readout.
        labels, num_items_in_batch, ignore_index, shift_labels: as in causal_lm_loss.

    Returns:
        A scalar, in nats per token.
    """
    if shift_labels is None:
        shift_labels = _shifted(labels, ignore_index)
    flat_labels = shift_labels.reshape(-1).to(hidden_states.device)
    inputs = (hidden_states.reshape(-1, hidden_states.shape[-1]), readout.weight, readout.bias)
    settings = {"labels": flat_labels, "cap": readout.cap, "factor": readout.factor, "ignore_index": ignore_index}
    plain = partial(_plain_sum, **settings, dtype=compute_dtype(hidden_states))
    if needs_plain_operations(*inputs):
        total = plain(*inputs)
    else:
        total = _LinearCrossEntropy.apply(*inputs, *settings.values(), torch.is_grad_enabled())
        total = often_differentiable(plain, total, *inputs)
    count = (flat_labels != ignore_index).sum() if num_items_in_batch is None else num_items_in_batch
    return total / (count.to(total.device) if torch.is_tensor(count) else count)


_BALANCING_ARGUMENTS = ["num_experts", "top_k", "attention_mask"]  # after the router logits


def auxiliary_loss(backbone, router_logits, attention_mask=None):
    """How unevenly a mixture of experts uses its experts in one pass, and the weight of that in the loss.

    It is what the backbone's own class adds to its loss, by the function in transformers' file of the backbone.

    Args:
        backbone: the model, of transformers.
        router_logits: tuple of (B * T, experts), of each layer that has experts.
        attention_mask: (B, T), 0 where a token is padding; None, and any other kind of mask: every token counts.

    Returns:
        (loss, weight): a scalar and a number; (None, None) where the class adds none.

    Raises:
        PonderingError: the class computes it from something else.
    """
    found = (getattr(inspect.getmodule(each), "load_balancing_loss_func", None) for each in type(backbone).__mro__)
    balance = next((function for function in found if function is not None), None)
    if balance is None:
        return None, None
    config = backbone.config
    weights = [
        getattr(place, name, None)
        for name in ("router_aux_loss_coef", "aux_loss_coef")
        for place in (config, backbone)
    ]
    weight = next((value for value in weights if value is not None), None)
    experts = [getattr(backbone, name, None) for name in ("num_experts", "num_experts_per_tok")]
    if list(inspect.signature(balance).parameters)[1:] != _BALANCING_ARGUMENTS or None in (*experts, weight):
        raise PonderingError(
            f"a backbone of model_type {config.model_type!r} balances its experts in a way of its own, which "
            "pondering does not know: set output_router_logits=False"
        )
    is_mask = torch.is_tensor(attention_mask) and attention_mask.ndim == 2
    return balance(router_logits, *experts, attention_mask if is_mask else None), weight


def _shifted(labels, ignore_index):
    return functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
