"""What PonderingForCausalLM returns: the next-token loss, without logits kept whole, and logits made on demand."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers.modeling_outputs import CausalLMOutputWithPast

from .pondering_cache import CACHE_NAME, CACHE_NAMES
from .pondering_vocabulary import (
    Readout,
    add_product,
    chunks,
    compute_dtype,
    needs_plain_operations,
    often_differentiable,
    wide,
    wide_dtype,
    zero_gradients,
)


def causal_lm_loss(
    logits: torch.Tensor,
    labels: torch.Tensor | None,
    num_items_in_batch: int | torch.Tensor | None = None,
    ignore_index: int = -100,
    shift_labels: torch.Tensor | None = None,
) -> torch.Tensor:
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
    logits = wide(logits)
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
    hidden, readout = hidden_states.to(dtype), Readout(weight, bias, cap, factor).to(dtype)
    rows = readout.weight
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
        readout = Readout(weight, bias, cap, factor).to(dtype)
        logits = readout.finish(readout.scores(hidden_states.to(dtype)))
        return functional.cross_entropy(logits, labels, ignore_index=ignore_index, reduction="sum")


def linear_causal_lm_loss(
    hidden_states: torch.Tensor,
    readout: Readout,
    labels: torch.Tensor | None,
    num_items_in_batch: int | torch.Tensor | None = None,
    ignore_index: int = -100,
    shift_labels: torch.Tensor | None = None,
) -> torch.Tensor:
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
    plain: Any = partial(_plain_sum, **settings, dtype=compute_dtype(hidden_states))
    if needs_plain_operations(*inputs):
        total = plain(*inputs)
    else:
        total = _LinearCrossEntropy.apply(*inputs, *settings.values(), torch.is_grad_enabled())
        total = often_differentiable(plain, total, *inputs)
    count = (flat_labels != ignore_index).sum() if num_items_in_batch is None else num_items_in_batch
    return total / (count.to(total.device) if torch.is_tensor(count) else count)


def _shifted(labels, ignore_index):
    return functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]


class LogitsOnDemand:
    """Stands in an output for logits that nobody may want. Calling it gives them; they are made at most once.

    Whoever computes with it gets them as well: attributes, operators and functions of torch are the tensor's. What
    only hands it on makes nothing: accelerate, which raises each tensor to float32 and moves it to a device, `detach`.

    make: called without arguments, gives the logits (B, T, V).
    dtype: theirs.
    """

    def __init__(self, make: Callable[[], torch.Tensor], dtype: torch.dtype) -> None:
        self._make, self.dtype = make, dtype
        self._logits: Any = None

    def __call__(self) -> torch.Tensor:
        if self._logits is None:
            self._logits = self._make()
            del self._make  # and the hidden states that it holds
        return self._logits

    def float(self) -> "LogitsOnDemand":
        return LogitsOnDemand(lambda: self().float(), torch.float32)

    def to(self, *args: Any, **kwargs: Any) -> "LogitsOnDemand":
        named = [value for value in (*args, kwargs.get("dtype")) if isinstance(value, torch.dtype)]
        return LogitsOnDemand(lambda: self().to(*args, **kwargs), named[0] if named else self.dtype)

    def detach(self) -> "LogitsOnDemand":
        return LogitsOnDemand(lambda: self().detach(), self.dtype)

    def __getattr__(self, name):
        if name.startswith("__"):  # asked of any object, by copy and pickle for instance
            raise AttributeError(name)
        return getattr(self(), name)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        def made(value):
            return value() if isinstance(value, cls) else value

        args = [[*map(made, value)] if isinstance(value, (list, tuple)) else made(value) for value in args]
        return function(*args, **{name: made(value) for name, value in (kwargs or {}).items()})

    def __reduce__(self):
        return _itself, (self(),)  # copies and pickles hold the tensor


def _itself(value):
    return value


def _operator(name):
    return lambda self, *args: getattr(self(), name)(
        *(arg() if isinstance(arg, LogitsOnDemand) else arg for arg in args)
    )


# Python looks these up on the class only.
for _name in (
    "add radd sub rsub mul rmul truediv rtruediv floordiv mod pow rpow matmul rmatmul neg abs eq ne lt le gt ge "
    "getitem len iter bool int float contains array"
).split():
    setattr(LogitsOnDemand, f"__{_name}__", _operator(f"__{_name}__"))
LogitsOnDemand.__hash__ = object.__hash__  # type: ignore[method-assign]  # which __eq__ would take away


def logits_on_demand(head: Callable[[torch.Tensor], torch.Tensor], hidden_states: torch.Tensor) -> LogitsOnDemand:
    """A LogitsOnDemand of `head(hidden_states)`, computed as here and now: under this autocast and gradient mode."""
    device_type = hidden_states.device.type
    dtype, enabled = torch.get_autocast_dtype(device_type), torch.is_autocast_enabled(device_type)
    grad_enabled = torch.is_grad_enabled()

    def make():
        with torch.autocast(device_type, dtype=dtype, enabled=enabled), torch.set_grad_enabled(grad_enabled):
            return head(hidden_states)

    return LogitsOnDemand(make, compute_dtype(hidden_states))


@dataclass
class PonderingCausalLMOutput(CausalLMOutputWithPast):
    """CausalLMOutputWithPast of the last pass, and with `output_pondering=True` also of the earlier ones.

    past_key_values, cache: two names of one thing, whichever transformers itself uses.
    pondering_logits: tuple of S tensors (B, T, V), the logits of passes 0 .. S-1.
    pondering_losses: tuple of S + 1 scalars, the losses of passes 0 .. S, where labels were given; also without
        `output_pondering` where the configuration weighs them (`intermediate_loss_weight`).
    aux_loss: of a mixture of experts that was asked for `router_logits`: the sum over the passes of the load-balancing
        loss that the backbone's own class adds. It is in `loss`, weighted as there, and in none of `pondering_losses`.
    router_logits: tuple of (S + 1) L tensors (B * T, experts): those of layer l in pass i at i * L + l.

    In training, where the loss never needs the logits whole, `logits` are made when they are first read: by name, by
    key, by index, as a dict or with the tuple. What only walks through an output and hands it on, as accelerate, DDP,
    FSDP and pytree do by `items()` and `values()`, gets a LogitsOnDemand in their place and makes nothing.
    """

    pondering_logits: tuple[torch.FloatTensor, ...] | None = None
    pondering_losses: tuple[torch.FloatTensor, ...] | None = None
    aux_loss: torch.FloatTensor | None = None
    router_logits: tuple[torch.FloatTensor, ...] | None = None

    @property
    def logits(self) -> torch.Tensor | None:
        logits = self.__dict__.get("logits")
        if isinstance(logits, LogitsOnDemand):
            self.logits = logits = logits()
        return logits

    @logits.setter
    def logits(
        self, value: torch.Tensor | LogitsOnDemand | None
    ) -> None:  # called by ModelOutput, which keeps the same value as an item
        self.__dict__["logits"] = value

    def __post_init__(self):
        """As transformers does it, without reading `logits`: the versions up to 5.0 would make them here."""
        waiting = self.__dict__.get("logits")
        if not isinstance(waiting, LogitsOnDemand):
            super().__post_init__()
            return
        self.__dict__["logits"] = (waiting,)  # in its place among the items
        super().__post_init__()
        self["logits"] = waiting

    def _replace_old_cache_name(self, key):
        # transformers 5.24 asks this of each key, and by itself warns of the old name.
        return CACHE_NAME if key in CACHE_NAMES else key

    def __contains__(self, key):
        return super().__contains__(self._replace_old_cache_name(key))

    def __setitem__(self, key, value):
        super().__setitem__(self._replace_old_cache_name(key), value)

    def __getitem__(self, key):
        key = self._replace_old_cache_name(key)
        if key == 0 and self.loss is not None:  # without the tuple of all items
            return self.loss
        return getattr(self, key) if isinstance(key, str) and key in self else super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        try:
            return self[key]
        except KeyError:
            return default

    def __reduce__(self):
        _ = self.logits  # copies and pickles hold the tensor
        return super().__reduce__()


def _cache_of(output):
    return getattr(output, CACHE_NAME)


def _set_cache_of(output, value):
    setattr(output, CACHE_NAME, value)


# Below the dataclass, in which a property would count as a field's default.
for _name in CACHE_NAMES:
    if _name != CACHE_NAME:
        setattr(PonderingCausalLMOutput, _name, property(_cache_of, _set_cache_of))
