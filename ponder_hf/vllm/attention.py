"""A key/value cache of its own for each pass, in every attention layer of a vLLM model.

vLLM's attention layers enter themselves by name into the engine's forward context, and the engine makes one cache for
every entry. So pass i of layer l gets an entry of its own, whose name has i * L + l where the layer's has l. All
accounting (memory, pages, prefix caching, transfer of caches) is then the engine's own.
"""

import copy
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

from ponder_hf.modeling import PonderingError

from .checks import INSTEAD


class CurrentPass:
    """Which pass runs: set by the loop over the passes, read by every attention layer.

    It is part of what torch.compile traces, together with the loop: vLLM drops the guards that would notice a change.
    """

    index = 0


class AttentionOfPasses(Attention):
    """An attention layer that uses the cache of the current pass. Instances become it, see `give_caches_to_passes`.

    It is the layer of pass 0 itself; `later_passes` are those of passes 1 .. S. None of them has weights.
    """

    current_pass: CurrentPass
    later_passes: nn.ModuleList

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As vLLM's."""
        if self.current_pass.index == 0:
            return super().forward(*args, **kwargs)
        return self.later_passes[self.current_pass.index - 1](*args, **kwargs)


def give_caches_to_passes(
    backbone: nn.Module, num_passes: int, current_pass: CurrentPass, layers_by_name: dict[str, Any]
) -> None:
    """Make every attention layer of the backbone one that has a cache for each pass.

    Args:
        backbone: a model of vLLM's, before its weights are loaded.
        num_passes: S + 1.
        current_pass: what selects the pass.
        layers_by_name: where vLLM's layers enter themselves, `compilation_config.static_forward_context`.

    Raises:
        PonderingError: it has layers that keep something else than keys and values of the tokens.
    """
    layers = [module for module in backbone.modules() if isinstance(module, AttentionLayerBase)]
    if not layers:
        raise PonderingError(f"{type(backbone).__name__} of this vLLM has no attention layers to give caches to")
    for layer in layers:
        if type(layer) is not Attention:
            raise PonderingError(
                f"{type(backbone).__name__} of this vLLM has layers of class {type(layer).__name__}, of which caches "
                f"of several passes are untested: {INSTEAD}"
            )
        later_passes = nn.ModuleList(
            _copy_of_layer(layer, _name_in_pass(layer.layer_name, index, len(layers)), layers_by_name)
            for index in range(1, num_passes)
        )
        layer.__class__ = AttentionOfPasses
        layer.current_pass, layer.later_passes = current_pass, later_passes


def _name_in_pass(name: str, index: int, num_layers: int) -> str:
    """The name of a layer in a pass: its number l, the only integer in it, becomes i * L + l."""
    parts = name.split(".")
    numbers = [place for place, part in enumerate(parts) if part.isdecimal()]
    if len(numbers) != 1:
        raise PonderingError(f"the attention layer {name} of this vLLM has not exactly one number in its name")
    parts[numbers[0]] = str(index * num_layers + int(parts[numbers[0]]))
    return ".".join(parts)


def _copy_of_layer(layer, name, layers_by_name):
    """An attention layer with the same settings and a cache of its own, entered under `name`.

    A copy, since a layer does not keep what it was built with. Only tensors are copied: settings may hold process
    groups, and engines replace them as a whole.
    """
    if name in layers_by_name:
        raise PonderingError(f"two attention layers of this vLLM would be called {name}")
    shared = {id(value): value for value in vars(layer).values() if not isinstance(value, (dict, torch.Tensor))}
    copied = copy.deepcopy(layer, {**shared, id(layer.impl): copy.copy(layer.impl)})
    copied.layer_name = name
    layers_by_name[name] = copied
    return copied
