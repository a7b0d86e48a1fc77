"""Continuous batching: one paged cache of transformers' for all passes.

transformers' manager of requests makes a paged cache with pages for every layer that the configuration tells it of,
and each attention layer reads and writes the pages of its own index. Here the manager is told of (S + 1) L layers, and
in pass i layer l is given a view of the cache in which its pages are those of slot(i, l) = i * L + l, as in
pondering_cache.py. Whatever the manager does to pages (share prefixes, fork, evict, offload) reaches every pass.
"""

import copy
import inspect

import torch
from transformers import GenerationMixin

from .pondering_errors import PonderingError, is_older_than
from .pondering_prompt import check_prompt


class PassesAsLayers:
    """A pondering model as the manager is shown it: its passes are further layers of the configuration.

    Everything else is the model's own.

    Args:
        model: a PonderingForCausalLM.
        num_steps: S of every request.
    """

    def __init__(self, model, num_steps):
        self.__dict__.update(model=model, num_steps=num_steps)

    def __getattr__(self, name):
        return getattr(self.model, name)

    def __setattr__(self, name, value):
        setattr(self.model, name, value)

    @property
    def config(self):
        """A copy of the backbone's, with (S + 1) L layers."""
        config = copy.deepcopy(self.model.backbone.config)
        kinds = getattr(config, "layer_types", None)
        config.num_hidden_layers *= self.num_steps + 1
        if kinds is not None:
            config.layer_types = list(kinds) * (self.num_steps + 1)
        return config

    def eval(self):
        """As of a module."""
        self.model.eval()
        return self

    def __call__(self, **inputs):
        return self.model(pondering_steps=self.num_steps, **inputs)


def paged_pass(cache, pass_index, num_layers, inputs):
    """A view of the paged cache in which layers 0 .. L-1 are slot(pass_index, 0 .. L-1).

    inputs: keyword arguments of the pass, which say where the cache is to be read and written. Some backbones of
        transformers 5.24 do not hand them on to the cache (GPT-NeoX), or ask it for a length (OPT).
    """
    first = pass_index * num_layers
    view = copy.copy(cache)  # attention asks for an instance of the cache's own class
    needs_inputs = "kwargs" in inspect.signature(cache.update).parameters

    def update(key_states, value_states, layer_idx, **kwargs):
        if needs_inputs and "kwargs" not in kwargs:
            kwargs["kwargs"] = dict(inputs)
        return cache.update(key_states, value_states, layer_idx=first + layer_idx, **kwargs)

    view.update = update
    if not hasattr(view, "get_seq_length"):
        view.get_seq_length = _no_length
    return view


def _no_length():
    # Asked for where positions or a mask are not given, which they are.
    return 0


def start_manager(model, call, generation_config, *args, **kwargs):
    """transformers' `init_continuous_batching` for a pondering model. call: the GenerationCall.

    Raises:
        PonderingError: this transformers is too old for it, or a setting of the call does not go with it.
    """
    if "workload_hints" not in inspect.signature(GenerationMixin.init_continuous_batching).parameters:
        raise PonderingError(
            "continuous batching of pondering models needs a newer transformers (5.20 is known to do): use `generate` "
            "with a left-padded batch, and `transformers serve` without `--continuous-batching`"
        )
    config = model.backbone.config
    if is_older_than(5, 17) and getattr(config, "sliding_window", None) is not None:
        raise PonderingError(
            "continuous batching with a sliding window gives other tokens in older releases of transformers, plain "
            "models included: it needs a newer transformers (5.17 is known to do); use `generate`"
        )
    for name, is_set in (("num_draft_tokens", call.num_draft_tokens), ("pondering_exit_threshold", call.exit)):
        if is_set:
            raise PonderingError(f"`{name}` does not go with continuous batching: leave it out, or use `generate`")
    kept = getattr(getattr(model, "_cached_continuous_batching_manager", None), "model", None)
    if kept is not None and kept.num_steps != call.steps:
        raise PonderingError(
            f"the persistent manager ponders {kept.num_steps} steps, not {call.steps}: call "
            "`destroy_cached_continuous_batching_manager()` first"
        )
    shown = PassesAsLayers(model, call.steps)
    return GenerationMixin.init_continuous_batching(shown, generation_config, *args, **kwargs)


def check_prompts(model, inputs, num_steps, generation_config, kwargs):
    """Raise unless every prompt of `inputs`, a list of lists of token ids, is one that `generate` would take."""
    mask = kwargs.get("attention_mask")
    if mask is not None and not mask.bool().all():
        raise PonderingError("continuous batching takes no padding: give `generate_batch` lists of different lengths")
    kwargs = {name: value for name, value in kwargs.items() if name != "attention_mask"}
    for token_ids in inputs:
        prompt = torch.as_tensor(token_ids, dtype=None if len(token_ids) else torch.long)
        check_prompt(model, prompt.unsqueeze(0), num_steps, generation_config, kwargs)
