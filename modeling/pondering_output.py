"""What PonderingForCausalLM returns."""

from collections import OrderedDict
from dataclasses import dataclass

import torch
from transformers.modeling_outputs import CausalLMOutputWithPast


_READS_ALL = frozenset(("logits", "items", "keys", "values", "to_tuple"))


@dataclass
class PonderingCausalLMOutput(CausalLMOutputWithPast):
    """CausalLMOutputWithPast of the last pass, and with `output_pondering=True` also of the earlier ones.

    pondering_logits: tuple of S tensors (B, T, V), the logits of passes 0 .. S-1.
    pondering_losses: tuple of S + 1 scalars, the losses of passes 0 .. S, where labels were given.

    In training, where the loss never needs the logits whole, `logits` are made when they are first read: by name, or
    by reading all items. Reading the loss alone, as Trainer does, never makes them.
    """

    pondering_logits: tuple[torch.FloatTensor, ...] | None = None
    pondering_losses: tuple[torch.FloatTensor, ...] | None = None

    def make_logits_on_demand(self, make):
        """`make()` gives the logits; called at most once, when they are first read."""
        self.__dict__["_make_logits"] = make

    def __getattribute__(self, name):
        if name in _READS_ALL:
            fields = super().__getattribute__("__dict__")
            if "_make_logits" in fields:
                self.logits = fields.pop("_make_logits")()
                for key in list(OrderedDict.keys(self)):  # the logits come second, wherever they were made
                    if key not in ("loss", "logits"):
                        self.move_to_end(key)
        return super().__getattribute__(name)

    def __getitem__(self, key):
        if key in ("loss", 0) and self.loss is not None:
            return self.loss
        return super().__getitem__(key)
