"""What pondering needs to know of a backbone: what it feeds in, what it puts out, and whether it can ponder at all.

A backbone is one of transformers' own causal language models, used as it is. To support another one that scales its
logits in a way of its own, extend `finish_logits` and `backbone_readout`; to refuse one, extend `REFUSED`.
"""

import functools
import inspect
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from threading import Lock
from typing import Any

import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput, logging

from .pondering_cache import CACHE_NAMES
from .pondering_errors import PonderingError
from .pondering_vocabulary import Readout, replaceable
from .pondering_vocabulary_loss import causal_lm_loss


logger = logging.get_logger(__name__)


# The tests of ponder_hf hold these against their own logits; any other backbone is held against them at first use.
TESTED = frozenset(
    "cohere falcon gemma gemma2 gemma3_text glm gpt2 gpt_bigcode gpt_neo gpt_neox gptj granite llama mistral mixtral "
    "olmo olmo2 opt phi phi3 qwen2 qwen3 smollm3 stablelm starcoder2".split()
)

_PER_LAYER_EMBEDDINGS = "each layer embeds the token ids again, which a pondering embedding does not have"
REFUSED = {
    "blt": "it models bytes in patches, not tokens",
    "gemma3n_text": _PER_LAYER_EMBEDDINGS,
    "gemma4_text": _PER_LAYER_EMBEDDINGS,
    "reformer": "it buckets tokens by hashes of a whole padded sequence",
    "xlm": "it is not a left-to-right language model by default",
    "xlnet": "it permutes the order of the tokens",
}

# Layers that keep a recurrent state or a window of inputs instead of keys and values.
_ATTENTION_LAYERS = ("full_attention", "sliding_attention", "chunked_attention")


def backbone_class(base_config: PretrainedConfig) -> type[PreTrainedModel]:
    """The transformers class of the backbone, or a PonderingError that says why it cannot ponder."""
    model_type = base_config.model_type
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(base_config), None)
    reason = REFUSED.get(model_type)
    if reason is None and base_config.is_encoder_decoder:
        reason = "it is an encoder-decoder; pondering needs a decoder-only language model"
    if reason is None and model_class is None:
        reason = "transformers has no causal language model for it"
    if reason is None:
        reason = _why_not(base_config, model_class)
    if reason is not None:
        raise PonderingError(f"a backbone of model_type {model_type!r} cannot ponder: {reason}")
    return model_class


def _why_not(base_config, model_class):
    other_inputs = any(hasattr(base_config, name) for name in ("vision_config", "audio_config"))
    if other_inputs or base_config.get_text_config(decoder=True) is not base_config:
        return "it is multimodal; use its text model's own configuration"
    if getattr(model_class, "_is_stateful", False):
        return "it keeps a recurrent state, for which caches of several passes are untested"
    other = set(getattr(base_config, "layer_types", None) or ()) - set(_ATTENTION_LAYERS)
    if other:
        return f"layers of type {', '.join(sorted(other))} have caches of their own, untested with several passes"
    if getattr(base_config, "use_bidirectional_attention", None):
        return "`use_bidirectional_attention` lets it see later tokens"
    if getattr(base_config, "add_cross_attention", False):
        return "`add_cross_attention` makes it the decoder of another model"
    if "inputs_embeds" not in inspect.signature(model_class.forward).parameters:
        return "its forward pass takes no `inputs_embeds`"
    return None


def finish_logits(logits: torch.Tensor, base_config: PretrainedConfig) -> torch.Tensor:
    """What some backbones do between the head and the logits. logits: (..., V), returned in the same shape."""
    cap = getattr(base_config, "final_logit_softcapping", None)  # Gemma
    if cap is not None:
        logits = torch.tanh(logits / cap) * cap
    divisor = getattr(base_config, "logits_scaling", None)  # Granite
    if divisor is not None:
        logits = logits / divisor
    factor = getattr(base_config, "logit_scale", None)  # Cohere
    if factor is not None:
        logits = logits * factor
    return logits


@replaceable
def decoder_context(inputs_embeds: torch.Tensor) -> AbstractContextManager:
    """A context to run a backbone's decoder in, on embeddings (B, T, d)."""
    return nullcontext()


@replaceable
def head_context(hidden_states: torch.Tensor) -> AbstractContextManager:
    """A context to run a backbone's head in, on states (B, T, d)."""
    return nullcontext()


def backbone_logits(backbone: PreTrainedModel, hidden_states: torch.Tensor) -> torch.Tensor:
    """(..., V), what the backbone itself would put out for its last hidden states (B, T, d) or (n, d).

    The head always sees three dimensions, as hooks on it expect: n tokens are n rows of one token.
    """
    if hidden_states.ndim == 2:
        return backbone_logits(backbone, hidden_states.unsqueeze(1)).squeeze(1)
    with head_context(hidden_states):
        return finish_logits(backbone.get_output_embeddings()(hidden_states), backbone.config)


def embedding_table(backbone: PreTrainedModel, device: torch.device | None = None) -> torch.Tensor:
    """(V, d), every token's embedding as the backbone feeds it in, scaled where its embedding module scales (Gemma).

    A plain embedding gives its weight itself; any other (scaled, quantised, sharded, wrapped by PEFT) is asked for all
    rows, by ids on `device`. Hooks about tokens, such as NEFTune's noise, act on tokens that are fed in and never on
    these rows.
    """
    module = backbone.get_input_embeddings()
    if type(module) is nn.Embedding and _is_bare_embedding(module):
        return module.weight
    embeddings = [part for part in module.modules() if isinstance(part, nn.Embedding)]
    num_rows = embeddings[-1].num_embeddings if embeddings else len(module.weight)
    for part in module.modules():
        for hook in part._forward_pre_hooks.values():
            if len(getattr(hook, "keywords", {}).get("adapter_names", ())) > 1:
                raise PonderingError(
                    "`adapter_names` for several rows does not work with adapters of the embedding, which all rows "
                    "ponder over: call the model once for each adapter"
                )
    ids = torch.arange(num_rows, device=module.weight.device if device is None else device)
    return _rows(module, ids.unsqueeze(0)).squeeze(0)


def _rows(module, ids):
    """What an embedding module gives for ids (1, n) without hooks about tokens: (1, n, d)."""
    module = _without_token_hooks(module)
    # An embedding gives its padding row no gradient; in the pondering sum that row is one like any other.
    embeddings = [part for part in module.modules() if isinstance(part, nn.Embedding)]
    padding = [(part, part.padding_idx) for part in embeddings if part.padding_idx is not None]
    try:
        for part, _ in padding:
            part.padding_idx = None
        return module(ids)
    finally:
        for part, index in padding:
            part.padding_idx = index


# Hooks that these set put a weight in place (sharded, offloaded, normalised) or choose its adapter. All others are
# about the tokens that pass.
_OF_WEIGHTS = (
    "accelerate",
    "deepspeed",
    "peft.tuners",
    "torch",
    "transformers.distributed",
    "transformers.integrations.tensor_parallel",
)


def is_about_weights(hook: Callable) -> bool:
    """Whether a hook was set by a library that holds a module's weights, and not by somebody who looks at tokens."""
    return hook_origin(hook).startswith(tuple(f"{name}." for name in _OF_WEIGHTS))


def hook_origin(hook: Callable) -> str:
    """The module that a hook is defined in, and a dot."""
    while isinstance(hook, functools.partial):
        hook = hook.func
    return f"{getattr(hook, '__module__', None)}."


def hooks_of(module: nn.Module) -> list[Callable]:
    """All hooks before and after the forward pass of a module."""
    return [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]


def _without_token_hooks(module):
    """The module, or where it has hooks about tokens a copy without them that shares all weights.

    A copy, since other threads may embed tokens meanwhile.
    """
    parts = list(module.modules())
    hooks = [hook for part in parts for hook in hooks_of(part)]
    if all(is_about_weights(hook) for hook in hooks):
        return module
    is_fetched = any(is_about_weights(hook) for hook in hooks) or any(hasattr(part, "_hf_hook") for part in parts)
    if not is_fetched and not all(_is_whole(weight) for weight in module.parameters()):
        return module  # by hooks of a library that is not known here
    return _copy_without_token_hooks(module)


def _copy_without_token_hooks(module):
    copied = object.__new__(type(module))

    def of_copy(value):
        # Offloading keeps the module in what it puts in the place of its forward pass.
        if isinstance(value, types.MethodType) and value.__self__ is module:
            return types.MethodType(value.__func__, copied)
        if isinstance(value, functools.partial) and any(argument is module for argument in value.args):
            arguments = (copied if argument is module else argument for argument in value.args)
            return functools.partial(value.func, *arguments, **value.keywords)
        return value

    attributes = {name: of_copy(value) for name, value in module.__dict__.items()}
    for name in ("_forward_pre_hooks", "_forward_hooks"):
        attributes[name] = {key: hook for key, hook in attributes[name].items() if is_about_weights(hook)}
    attributes["_modules"] = {
        name: None if part is None else _copy_without_token_hooks(part) for name, part in module._modules.items()
    }
    attributes["_compiled_call_impl"] = None  # would run the module itself, hooks included
    copied.__dict__.update(attributes)
    return copied


# Whose functions around a method leave its result what it is, but for autocast.
_TRANSPARENT = ("torch.", "accelerate.hooks.", "accelerate.utils.operations.")


def is_original(method: Callable | None, homes: Iterable[str]) -> bool:
    """Whether a method is defined in one of these modules, perhaps within autocast, compilation or offloading."""
    while method is not None:
        method = getattr(method, "__func__", method)
        inner = method.func if isinstance(method, functools.partial) else method
        home = f"{getattr(inner, '__globals__', {}).get('__name__') or type(inner).__module__}."
        if home.startswith(tuple(f"{name}." for name in homes)):
            return True
        method = getattr(method, "__wrapped__", None) if home.startswith(_TRANSPARENT) else None
    return False


def warn_of_what_never_runs(backbone: PreTrainedModel) -> None:
    """Say once that the backbone's own forward pass, and so what was put around it, is not part of pondering."""
    has_hooks = not all(is_about_weights(hook) for hook in hooks_of(backbone))
    if has_hooks or not is_original(backbone.forward, ("transformers",)):
        what = "a hook on" if has_hooks else "another forward pass of"
        logger.warning_once(
            f"{what} `model.backbone` never runs, since pondering calls its decoder and its head: put it on `model` "
            "(logits), on `model.backbone.base_model` (hidden states, in every pass) or on "
            "`model.get_output_embeddings()`"
        )


class AdapterRows:
    """PEFT's `adapter_names`, an adapter for each prompt, where rows are not the prompts.

    As a context: within it each adapter is given the name of each row that comes.

    exist: whether any adapter has such names.
    rows: the prompt of each row, a list; None: all prompts in turn, however often.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.rows: list[int] | None = None
        self._handles: list[Any] = []
        self._modules: list[nn.Module] = []
        if hasattr(model, "peft_config"):
            self._modules = [module for module in model.modules() if self._has_names(module)]
        self.exist = bool(self._modules)

    @staticmethod
    def _has_names(module):
        hooks = [hook for hook in hooks_of(module) if hook_origin(hook).startswith("peft.tuners.")]
        for hook in hooks:
            if "adapter_names" not in getattr(hook, "keywords", ()):
                raise PonderingError(
                    f"{type(module).__name__} is given something of its own for each row by PEFT, which drafts and "
                    "exits do not follow: leave out `num_draft_tokens` and `pondering_exit_threshold`"
                )
        return bool(hooks)

    def __enter__(self):
        for module in self._modules:
            self._handles.append(module.register_forward_pre_hook(self._choose, with_kwargs=True))
        return self

    def __exit__(self, *_):
        while self._handles:
            self._handles.pop().remove()

    def _choose(self, module, arguments, kwargs):
        names = kwargs["adapter_names"]
        rows = (index % len(names) for index in range(len(arguments[0]))) if self.rows is None else self.rows
        return arguments, {**kwargs, "adapter_names": [names[row] for row in rows]}


def backbone_readout(backbone: PreTrainedModel) -> Readout | None:
    """The head as a Readout for code that works on its bare weight, or None where only the module itself will do.

    That is so for a head that is wrapped (PEFT), quantised, sharded, moved by hooks, or of a class of its own.
    """
    head = backbone.get_output_embeddings()
    if type(head) is not nn.Linear or not _is_bare(head) or hooks_of(head):
        return None
    config = backbone.config
    factor = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    return Readout(head.weight, head.bias, getattr(config, "final_logit_softcapping", None), factor)


def bare_table(backbone: PreTrainedModel) -> tuple[torch.Tensor, float | torch.Tensor] | None:
    """(weight, scale) of the embedding module, as in `backbone_readout`: rows fed in are scale * weight. Or None."""
    module = backbone.get_input_embeddings()
    if not _is_bare_embedding(module) or getattr(module, "max_norm", None) is not None:
        return None
    if type(module) is nn.Embedding:
        return module.weight, 1.0
    if isinstance(module, nn.Embedding) and type(module).__name__.endswith("ScaledWordEmbedding"):
        scale: Any = module.embed_scale
        return module.weight, scale.to(module.weight.dtype) if torch.is_tensor(scale) else scale
    return None


def _is_bare(module):
    # A forward pass that was replaced may do anything; offloading replaces it to fetch the weight.
    weight = getattr(module, "weight", None)
    return _is_whole(weight) and "forward" not in module.__dict__ and weight.device.type != "meta"


def _is_whole(weight):
    # A shard is a DTensor (FSDP2), carries `ds_id` (ZeRO-3) or has no rows outside its unit's forward pass (FSDP1).
    return type(weight) in (nn.Parameter, torch.Tensor) and not hasattr(weight, "ds_id") and weight.numel() > 0


def _is_bare_embedding(module):
    # Hooks before it may gather what is sharded (FSDP, DeepSpeed): its weight is not there yet.
    return _is_bare(module) and not any(is_about_weights(hook) for hook in module._forward_pre_hooks.values())


def backbone_decoder(backbone: PreTrainedModel) -> PreTrainedModel:
    """The backbone without its head."""
    decoder = backbone.base_model
    # The prefix that the class names may not be there (Llama 4's text model).
    return backbone.get_decoder() if decoder is backbone else decoder


# Of `forward` by class: reading a signature takes a while, and torch.compile cannot.
_PARAMETERS: dict[type, frozenset[str]] = {}


def _parameters(decoder_class):
    if decoder_class not in _PARAMETERS:
        _PARAMETERS[decoder_class] = frozenset(inspect.signature(decoder_class.forward).parameters)
    return _PARAMETERS[decoder_class]


def takes_position_ids(backbone: PreTrainedModel) -> bool:
    """Whether it can be told the positions; models with ALiBi find them in the attention mask."""
    return "position_ids" in _parameters(type(backbone_decoder(backbone)))


def num_positions(backbone: PreTrainedModel) -> int | None:
    """The length of the backbone's table of positions, or None where positions are computed (rotations, ALiBi)."""
    config = backbone.config
    if getattr(config, "alibi", False):
        return None
    for module in backbone.modules():
        # Sinusoids that can be computed anew grow with the text (XGLM).
        if "Rotary" in type(module).__name__ or hasattr(module, "get_embedding"):
            return None
    # MPT's ALiBi is a table, of that length.
    return getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None)


def takes_cache(backbone: PreTrainedModel) -> bool:
    """Whether its decoder keeps keys and values at all; OpenAI GPT, for one, runs the whole text for every token."""
    return any(name in _parameters(type(backbone_decoder(backbone))) for name in CACHE_NAMES)


def changing_rotations(backbone: PreTrainedModel) -> tuple[str, int] | None:
    """(kind, length): rotary embeddings that turn otherwise in texts longer than `length`. None: always alike.

    kind: "longrope", with one set of frequencies up to there and another beyond, or "dynamic", where each length
        beyond has its own. Which it is depends on the largest position among all that run together.
    """
    config = backbone.config
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    if not isinstance(parameters, dict):
        return None
    by_layer = [part for part in parameters.values() if isinstance(part, dict)]
    for part in by_layer or [parameters]:
        kind, length = str(part.get("rope_type", part.get("type"))), config.max_position_embeddings
        if kind == "longrope":
            name = "original_max_position_embeddings"
            return kind, part.get(name) or getattr(config, name, None) or length
        if "dynamic" in kind:
            return "dynamic", length
    return None


def run_backbone(
    backbone: PreTrainedModel,
    inputs_embeds: torch.Tensor,
    position_ids: torch.Tensor | None = None,
    past_key_values: Any = None,
    **kwargs: Any,
) -> ModelOutput:
    """One forward pass of the decoder without its head. inputs_embeds: (B, T, d). Returns transformers' output."""
    decoder = backbone_decoder(backbone)
    parameters = _parameters(type(decoder))
    if "position_ids" in parameters:
        kwargs["position_ids"] = position_ids
    if past_key_values is not None:
        kwargs["cache" if "cache" in parameters else "past_key_values"] = past_key_values
    with decoder_context(inputs_embeds):
        return decoder(inputs_embeds=inputs_embeds, return_dict=True, **kwargs)


# Of each module that is being evaluated: by how many, and the mode that it had before.
_MODES: dict[nn.Module, list] = {}
_MODES_LOCK = Lock()


@contextmanager
def evaluating(module: nn.Module) -> Iterator[nn.Module]:
    """Evaluation mode; each part is in its own former mode afterwards, as some may be frozen in another than the rest.

    module: any nn.Module.
    """
    parts = list(module.modules())
    with _MODES_LOCK:
        for part in parts:
            found = _MODES.setdefault(part, [0, part.training])
            found[0] += 1
        module.eval()
    try:
        yield module
    finally:
        with _MODES_LOCK:
            for part in parts:
                found = _MODES[part]
                found[0] -= 1
                if not found[0]:  # nobody else evaluates it, in another thread or around this
                    part.training = _MODES.pop(part)[1]


def check_inputs(model: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids (2, 6) and their mask: the second row is left-padded by two."""
    ids = torch.arange(2, 14, device=model.device).view(2, 6) % model.config.vocab_size
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    return ids, mask


def positions_of(mask: torch.Tensor) -> torch.Tensor:
    return (mask.cumsum(1) - 1).clamp(min=0)


def are_close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether two tensors are equal but for rounding. What is not a number is not."""
    tolerance = 1e-3 if expected.dtype in (torch.float32, torch.float64) else 1e-1
    return found.shape == expected.shape and bool(
        (found - expected).abs().max() <= tolerance * expected.abs().max().clamp(min=1e-6)
    )


def in_one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".split("\n")[0]


def verify_backbone(backbone: PreTrainedModel) -> None:
    """Hold an untested backbone against itself: embedding, passes and head taken apart must give its own logits.

    Where its own loss is not made of what pondering's is, a warning says so.

    Raises:
        PonderingError: they do not, or a later token changes an earlier prediction. Pondering would be wrong then.
    """
    name = f"a backbone of model_type {backbone.config.model_type!r} cannot ponder"
    ids = torch.arange(1, 7, device=backbone.device).unsqueeze(0) % backbone.config.vocab_size
    other_ids = torch.cat([ids[:, :-1], ids[:, :1]], dim=1)
    try:
        with torch.no_grad(), evaluating(backbone):
            own = _own_output(backbone, ids)
            expected = own.logits
            table, module = embedding_table(backbone, ids.device), backbone.get_input_embeddings()
            strangeness = (_rows(module, ids) - table[ids]).abs().max() / table[ids].abs().max()
            apart = run_backbone(backbone, module(ids), use_cache=False).last_hidden_state
            apart = backbone_logits(backbone, apart)
            other = backbone(input_ids=other_ids, use_cache=False).logits
    except (RuntimeError, TypeError, AttributeError, ValueError, IndexError) as error:
        in_one_line = str(error).split("\n")[0]
        raise PonderingError(f"{name}: it does not run on embeddings alone ({in_one_line})") from error
    tolerance = 1e-4 if expected.dtype in (torch.float32, torch.float64) else 3e-2
    scale = expected.abs().max()
    if table.shape[0] != expected.shape[-1]:
        raise PonderingError(f"{name}: it embeds {table.shape[0]} tokens but predicts {expected.shape[-1]}")
    if not strangeness <= tolerance:
        raise PonderingError(f"{name}: its embedding of a token depends on the tokens around it")
    if apart.shape != expected.shape or not (apart - expected).abs().max() <= tolerance * scale:
        raise PonderingError(f"{name}: it does more between tokens and logits than embedding, decoder and head")
    if not (other - expected)[:, :-1].abs().max() <= tolerance * scale:
        raise PonderingError(f"{name}: its predictions depend on later tokens")
    _compare_loss(backbone, ids, own, tolerance)


def _own_output(backbone, ids):
    """What the backbone's own class gives for ids (1, T), with its loss, and with router logits where it has them."""
    takes = inspect.signature(type(backbone).forward).parameters
    options = {"labels": ids} if "labels" in takes else {}
    if "output_router_logits" in takes:
        options["output_router_logits"] = True
    try:
        return backbone(input_ids=ids, use_cache=False, **options)
    except (RuntimeError, TypeError, AttributeError, ValueError, IndexError):  # of what is not needed to ponder
        return backbone(input_ids=ids, use_cache=False)


def _compare_loss(backbone, ids, own, tolerance):
    if getattr(own, "loss", None) is None:
        return
    expected = causal_lm_loss(own.logits, ids)
    if getattr(own, "router_logits", None):
        try:
            balance, weight = auxiliary_loss(backbone, tuple(own.router_logits))
        except PonderingError:  # raised when the router logits are wanted
            return
        expected = expected if balance is None else expected + weight * balance
    if not (own.loss - expected).abs() <= tolerance * expected.abs():
        logger.warning(
            f"a backbone of model_type {backbone.config.model_type!r} has {own.loss.item():.4f} as its own loss where "
            f"pondering has {expected.item():.4f}: what it adds by itself is left out"
        )


_BALANCING_ARGUMENTS = ["num_experts", "top_k", "attention_mask"]  # after the router logits


def auxiliary_loss(
    backbone: PreTrainedModel,
    router_logits: Sequence[torch.Tensor],
    attention_mask: torch.Tensor | None = None,
    num_passes: int = 1,
) -> tuple[torch.Tensor | None, float | None]:
    """How unevenly a mixture of experts uses its experts, summed over passes, and the weight of that in the loss.

    It is what the backbone's own class adds to its loss, by the function in transformers' file of the backbone.

    Args:
        backbone: the model, of transformers.
        router_logits: (B * T, experts) of each layer that has experts, pass after pass.
        attention_mask: (B, T), 0 where a token is padding; None, and any other kind of mask: every token counts.
        num_passes: how many passes there are.

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
    mask = attention_mask if torch.is_tensor(attention_mask) and attention_mask.ndim == 2 else None
    count = len(router_logits) // num_passes
    passes = [tuple(router_logits[first : first + count]) for first in range(0, len(router_logits), count)]
    return sum(balance(each, *experts, mask) for each in passes), weight


# What plain generation calls of the model for each token, and drafts do not.
_PASSED_BY = ("forward", "__call__", "ponder", "prepare_inputs_for_generation", "_update_model_kwargs_for_generation")
_PACKAGE = __name__.rpartition(".")[0]
_HOMES = (
    f"{_PACKAGE}.modeling_pondering",
    f"{_PACKAGE}.pondering_generate",
    "transformers.generation",
    "torch.nn.modules",
)
_INSTEAD = "do so on the head (`get_output_embeddings()`) or in a logits processor, or set num_draft_tokens=0"


def check_wrapping(model: PreTrainedModel) -> None:
    """Raise unless what stands around the model, which drafts do not call, leaves its logits as they are.

    Raises:
        PonderingError: a hook on the model, or on all modules, or a replaced method might change them.
    """
    for hook in hooks_of(model):
        if not is_about_weights(hook) or hook_origin(hook).startswith("peft."):
            raise _passed_by(f"does not run the hook {_name(hook)} on the model, which")
    for name in ("_global_forward_pre_hooks", "_global_forward_hooks"):
        for hook in getattr(nn.modules.module, name, {}).values():
            raise PonderingError(
                f"`num_draft_tokens` does not run the hook {_name(hook)} of all modules on the model: remove it, or "
                "set num_draft_tokens=0"
            )
    for hook in _offloading_hooks(getattr(model, "_hf_hook", None)):
        if not type(hook).__module__.startswith("accelerate."):
            raise _passed_by(f"does not run accelerate's hook {type(hook).__name__} on the model, which")
    for name in _PASSED_BY:
        method = getattr(model, name, None)
        configuration = peft_config_around(method)
        if getattr(configuration, "is_prompt_learning", False):
            kind = getattr(configuration.peft_type, "value", configuration.peft_type)
            raise PonderingError(
                f"`num_draft_tokens` does not go with PEFT's {kind}, whose virtual tokens drafts do not see: set "
                "num_draft_tokens=0"
            )
        # For adapters PEFT puts in a method that only calls the model's.
        if method is not None and configuration is None and not is_original(method, _HOMES):
            raise _passed_by(f"does not call the model's `{name}`, which was replaced ({_name(method)}) and")


def _passed_by(what):
    return PonderingError(f"`num_draft_tokens` {what} may change what it gives: {_INSTEAD}")


def peft_config_around(method: Callable | None) -> Any:
    """The configuration of the PeftModel whose method stands in the place of a model's own; None where none does."""
    return getattr(getattr(method, "__self__", None), "active_peft_config", None)


def _offloading_hooks(hook):
    if hook is None:
        return []
    return [one for part in hook.hooks for one in _offloading_hooks(part)] if hasattr(hook, "hooks") else [hook]


def _name(function):
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__qualname__", type(function).__name__)
