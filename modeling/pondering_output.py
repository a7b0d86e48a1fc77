"""What PonderingForCausalLM returns."""

from dataclasses import dataclass

import torch
from transformers.modeling_outputs import CausalLMOutputWithPast

from .pondering_cache import CACHE_NAME, CACHE_NAMES
from .pondering_readout import compute_dtype


class LogitsOnDemand:
    """Stands in an output for logits that nobody may want. Calling it gives them; they are made at most once.

    Whoever computes with it gets them as well: attributes, operators and functions of torch are the tensor's. What
    only hands it on makes nothing: accelerate, which raises each tensor to float32 and moves it to a device, `detach`.

    make: called without arguments, gives the logits (B, T, V).
    dtype: theirs.
    """

    def __init__(self, make, dtype):
        self._make, self.dtype, self._logits = make, dtype, None

    def __call__(self):
        if self._logits is None:
            self._logits, self._make = self._make(), None
        return self._logits

    def float(self):
        return LogitsOnDemand(lambda: self().float(), torch.float32)

    def to(self, *args, **kwargs):
        named = [value for value in (*args, kwargs.get("dtype")) if isinstance(value, torch.dtype)]
        return LogitsOnDemand(lambda: self().to(*args, **kwargs), named[0] if named else self.dtype)

    def detach(self):
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


def logits_on_demand(head, hidden_states):
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
    def logits(self):
        logits = self.__dict__.get("logits")
        if isinstance(logits, LogitsOnDemand):
            self.logits = logits = logits()
        return logits

    @logits.setter
    def logits(self, value):  # called by ModelOutput, which keeps the same value as an item
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

    def get(self, key, default=None):
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
