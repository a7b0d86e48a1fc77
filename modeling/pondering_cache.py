"""The caches: one key/value cache per pass, all in one of transformers' own cache objects.

A pass reads and writes only its own slots of this step cache. With L layers, layer l of pass i lies at

    slot(i, l) = i * L + l

and a token that stopped pondering after pass j has there what pass min(i, j) computed for it
(pondering_generate_exits.py). So whatever transformers does to every slot of a cache (reorder for beams, crop, repeat,
offload) reaches every pass.

Continuous batching has a paged cache instead, with pages for every layer that the configuration tells transformers'
manager of requests about; each attention layer reads and writes the pages of its own index. Here the manager is told
of (S + 1) L layers, and in pass i layer l is given a view of the cache in which its pages are those of slot(i, l).
Whatever the manager does to pages (share prefixes, fork, evict, offload) reaches every pass.
"""

import copy
import inspect
from dataclasses import fields
from typing import Any

import torch
from transformers import GenerationConfig, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from .pondering_errors import PonderingError, is_older_than


# What transformers calls a cache in `generate`, in its outputs and in its functions: "cache" since 5.24, which takes
# the older name until 6.0 and calls it deprecated. Models and outputs of ours take and have both.
CACHE_NAME = "cache" if "cache" in {field.name for field in fields(CausalLMOutputWithPast)} else "past_key_values"
CACHE_NAMES = ("past_key_values", "cache")


def given_cache(arguments: dict[str, Any]) -> Any:
    """The cache among keyword arguments, under whichever name, or None.

    Raises:
        PonderingError: both names are used, for two caches that are filled or empty alike.
    """
    given = [arguments[name] for name in CACHE_NAMES if arguments.get(name) is not None]
    if len(given) > 1 and given[0] is not given[1]:
        # PEFT puts its learned prefix under one name beside the empty cache of `generate` under the other.
        given = [cache for cache in given if not (isinstance(cache, Cache) and cache.get_seq_length() == 0)]
        if len(given) != 1:
            raise PonderingError("`cache` and `past_key_values` are two names of one argument: give one of them")
    return given[0] if given else None


def are_packed(position_ids: torch.Tensor | None, attention_mask: Any = None) -> bool:
    """Whether rows hold several texts one behind the other, as positions (B, T) that begin anew say.

    transformers keeps such texts apart where there is neither a mask nor a cache.
    """
    if attention_mask is not None or position_ids is None or torch.compiler.is_compiling():
        return False
    return position_ids.ndim == 2 and bool((position_ids.diff(dim=-1) != 1).any())


def step_cache(past_key_values: Cache | None, base_config: PretrainedConfig, num_passes: int) -> Cache:
    """Give back `past_key_values` with slots for `num_passes` passes.

    A missing cache is created, an empty one (as `generate` hands it over) is extended by copies of its own empty
    slots, and a cache in use is checked.

    Raises:
        PonderingError: the cache was filled with another number of passes, is no `Cache`, or one that the backbone
            computes something else with.
    """
    if past_key_values is None:
        past_key_values = DynamicCache(config=base_config)
    elif not isinstance(past_key_values, Cache):
        raise PonderingError(
            f"`past_key_values` must be one of transformers' Cache objects, got {type(past_key_values).__name__}"
        )
    if base_config.model_type == "gpt_neo" and getattr(past_key_values, "is_compileable", False):
        raise PonderingError(
            "a static cache gives other logits with model_type 'gpt_neo', plain models included, as its attention "
            "counts columns from the end of the keys: leave out `cache_implementation`, or give a DynamicCache"
        )
    num_layers = base_config.num_hidden_layers
    layers = past_key_values.layers
    if len(layers) != num_layers * num_passes and past_key_values.get_seq_length() == 0:
        if not layers:  # a bare DynamicCache() appends slots as they come
            layers.extend(past_key_values.layer_class_to_replicate() for _ in range(num_layers))
        if len(layers) == num_layers:
            layers.extend(copy.deepcopy(layers[slot % num_layers]) for slot in range(num_layers * (num_passes - 1)))
    if len(layers) != num_layers * num_passes:
        raise PonderingError(
            f"`past_key_values` holds {len(layers)} slots, but {num_passes} passes of {num_layers} layers need "
            f"{num_layers * num_passes}: it was filled with another `pondering_steps`, by another model, or by PEFT's "
            f"prefix tuning, which needs num_layers={num_layers * num_passes}"
        )
    return past_key_values


def mark_owner(past_key_values: Cache, backbone: PreTrainedModel) -> None:
    """Note on an empty cache which backbone fills it. Waits for no device."""
    owner, weight = getattr(past_key_values, "pondering_owner", None), _own_weight(backbone)
    if owner is not None and (torch.compiler.is_compiling() or owner[0] == _version(weight)):
        return
    # A static cache is filled again and again, by weights that may have been trained since.
    if weight is not None and past_key_values.get_seq_length() == 0:
        past_key_values.pondering_owner = _version(weight), _sample(weight)


def check_owner(past_key_values: Cache, backbone: PreTrainedModel) -> None:
    """Raise a PonderingError if the cache is known to have been filled by a backbone with other weights."""
    owner, weight = getattr(past_key_values, "pondering_owner", None), _own_weight(backbone)
    if owner is None or weight is None:
        return
    theirs, own = owner[1].cpu(), _sample(weight).cpu()
    if theirs.dtype != own.dtype or not torch.equal(theirs, own):
        raise PonderingError("`past_key_values` was filled by another model: give the model's own cache, or none")


def _own_weight(backbone):
    # Of which a part tells models apart. None where weights are not at hand (sharded, offloaded).
    weight = backbone.get_input_embeddings().weight
    if type(weight) not in (torch.nn.Parameter, torch.Tensor) or weight.device.type == "meta" or weight.ndim != 2:
        return None
    return weight


def _version(weight):
    # Changes with every change in place, and is known without a look at the numbers.
    if weight is None or torch.compiler.is_compiling() or weight.is_inference():
        return None
    return id(weight), weight._version


def _sample(weight):
    # A copy, so it is what the weight was; on its device, so making it does not wait.
    return weight.detach()[:: max(1, len(weight) // 64), :16].clone()


def pass_cache(past_key_values: Cache, pass_index: int, num_layers: int, cache_class: type[Cache] = Cache) -> Cache:
    """The slots of one pass as a cache of their own: a view, the slots are shared."""
    first = pass_index * num_layers
    view = cache_class(layers=past_key_values.layers[first : first + num_layers])
    if past_key_values.offloading:
        for name in ("offloading", "only_non_sliding", "prefetch_stream"):
            setattr(view, name, getattr(past_key_values, name))
    return view


class PassesAsLayers:
    """A pondering model as the manager is shown it: its passes are further layers of the configuration.

    Everything else is the model's own.

    Args:
        model: a PonderingForCausalLM.
        num_steps: S of every request.

    Attributes:
        watch: the PredictionWatch of the call that runs, or None.
        looks: whether nobody but this will look at what the watch has noted, as in a server.
    """

    CALLS_BETWEEN_LOOKS = 32  # a look waits for the device

    def __init__(self, model: PreTrainedModel, num_steps: int) -> None:
        self.__dict__.update(model=model, num_steps=num_steps, watch=None, looks=False, num_calls=0)

    def serve(self, call: Any, is_alone: bool) -> None:
        """From now on the requests are those of this GenerationCall; is_alone: nobody waits for its end."""
        self.__dict__.update(watch=call.watch, looks=is_alone)

    def __getattr__(self, name):
        return getattr(self.model, name)

    def __setattr__(self, name, value):
        setattr(self.model, name, value)

    @property
    def config(self) -> PretrainedConfig:
        """A copy of the backbone's, with (S + 1) L layers."""
        config = copy.deepcopy(self.model.backbone.config)
        kinds = getattr(config, "layer_types", None)
        config.num_hidden_layers *= self.num_steps + 1
        if kinds is not None:
            config.layer_types = list(kinds) * (self.num_steps + 1)
        return config

    def eval(self) -> "PassesAsLayers":
        """As of a module."""
        self.model.eval()
        return self

    def __call__(self, **inputs: Any) -> Any:
        output = self.model(pondering_steps=self.num_steps, **inputs)
        if self.watch is None or torch.compiler.is_compiling():
            return output
        used = inputs.get("logits_indices")  # the others may be of no token
        is_whole = used is None or inputs.get("logits_to_keep") is not None
        self.watch.note(output.logits if is_whole else output.logits[:, used])
        if self.looks and self.num_calls % self.CALLS_BETWEEN_LOOKS == 0 and not _is_captured(output.logits):
            self.watch.check()
        self.__dict__["num_calls"] += 1
        return output


def _is_captured(tensor):
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def paged_pass(cache: Any, pass_index: int, num_layers: int, inputs: dict[str, Any]) -> Any:
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
    if not hasattr(view, "get_seq_length"):  # asked for where positions or a mask are not given, which they are
        view.get_seq_length = lambda: 0
    return view


def start_manager(
    model: PreTrainedModel,
    call: Any,
    is_alone: bool,
    generation_config: GenerationConfig | None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """transformers' `init_continuous_batching` for a pondering model.

    call: the GenerationCall. is_alone: nobody will look at what was predicted, as no `generate_batch` waits for it.

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
    for each in (shown, kept):
        if each is not None:
            each.serve(call, is_alone)
    return GenerationMixin.init_continuous_batching(shown, generation_config, *args, **kwargs)
