"""Read the checkpoint that a pondering model is made from: a plain one, or one that the method's authors wrote."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils import logging

from .configuration_pondering import PONDERING_FIELDS, PonderingConfig
from .pondering_backbone import backbone_class
from .pondering_errors import PonderingError, did_you_mean


try:  # since 5.0 some backbones have other names in memory than on disk
    from transformers.core_model_loading import revert_weight_conversion
except ImportError:
    revert_weight_conversion = None


logger = logging.get_logger(__name__)

# Where to find a checkpoint and how to load it.
LOADING_ARGUMENTS = frozenset(
    "attn_implementation cache_dir device_map dtype experts_implementation force_download local_files_only "
    "low_cpu_mem_usage max_memory offload_buffers offload_folder proxies revision subfolder token variant".split()
)
# How its config.json is read; everything else that `from_base` takes is a pondering field.
READING_ARGUMENTS = ("authors", "ignore_fields", "ignore_code")
_LOAD_FIRST = "load the plain model with it, by AutoModelForCausalLM.from_pretrained, and give from_base that model"
# Arguments of transformers' from_pretrained that have no meaning here, and what to do instead.
_NOT_HERE = {
    "quantization_config": "make the model from full-precision weights, save it, and load that with from_pretrained "
    "and `quantization_config`",
    "trust_remote_code": "code of a base is never run; `ignore_code=True` reads a checkpoint without its own code",
    "use_safetensors": "only safetensors are read",
    "config": "the base's own configuration is read; pondering fields are arguments by themselves",
    "output_loading_info": "whatever does not fit is an error, so there is nothing to report",
    **dict.fromkeys(
        "adapter_kwargs code_revision device_mesh distributed_config from_flax from_tf generation_config gguf_file "
        "ignore_mismatched_sizes key_mapping load_in_4bit load_in_8bit offload_state_dict state_dict tp_plan tp_size "
        "use_kernels weights_only".split(),
        _LOAD_FIRST,
    ),
}

# The authors' configuration fields: what becomes of each here. None: dropped on purpose.
AUTHORS_FLAGS = {
    "ponderinglm": None,  # llama and gpt_neox: pondering is on. A pondering model always ponders.
    "recurrent_model": None,  # gpt2: the same
    "pondering_steps": lambda value, raw: {"pondering_steps": value},
    "scale_embeds": lambda value, raw: (
        {"embedding_scale": raw.get("n_embd", raw.get("hidden_size")) ** 0.5} if value else {}
    ),
    "mutiply_pondering_steps": lambda value, raw: {"input_scale": float(raw["pondering_steps"])} if value else {},
    "softmax_temperature": lambda value, raw: {"pondering_temperature": value},
    "checkpoint_num_layers": None,  # how many layers they recompute in training
}
# Those of them that say how a model ponders, as in the models that the authors released. Their loader sets them on
# every load, so that a hosted config.json may lack them.
RELEASED_FLAGS = {
    "ponderinglm": True,
    "pondering_steps": 3,
    "scale_embeds": True,
    "mutiply_pondering_steps": True,
}
_SWITCHES = ("ponderinglm", "recurrent_model")
_AUTHORS_MODEL_TYPES = ("gpt2", "gpt_neox", "llama")
# Weights of theirs that no forward pass uses.
AUTHORS_WEIGHTS = {"adapter.weight": None}
# Fields of PonderLM-2, whose models have the same model types. The last one could also be another model's.
_SECOND_GENERATION = ("num_latent_thoughts", "num_jacobi_iterations", "interpolation_use_topk", "interpolation")
# Causal masks and rotary frequencies that transformers once saved as buffers; a model makes its own.
_LEGACY_BUFFERS = (
    ".attn.bias",
    ".attn.masked_bias",
    ".attention.bias",
    ".attention.masked_bias",
    ".rotary_emb.inv_freq",
)

# Fields that configuration files have carried over the years and that transformers still reads or ignores.
_LEGACY_FIELDS = frozenset(
    "architectures attention_bias classifier_dropout head_dim mlp_bias partial_rotary_factor "
    "pretraining_tp rope_scaling rope_theta rotary_emb_base rotary_pct tie_word_embeddings torch_dtype "
    "transformers_version".split()
)


class NeverSaved(str):
    """The name of a model that was made in memory: empty, and as text it says why nothing can be loaded by it.

    TRL's trainers load a reference model by the name of the model that they train, and transformers makes text of it.
    """

    __slots__ = ()

    def __str__(self):
        return (
            "(a pondering model made in memory, so there is no checkpoint to load it from again: save_pretrained it "
            "and load that folder, or give the trainer its ref_model)"
        )

    def __format__(self, specification):  # as part of a longer text, such as a tag of a model card, it stays empty
        return ""

    def __reduce_ex__(self, protocol):  # so does a copy, pickled or in YAML
        return str, ()


def is_authors_config(raw: Mapping[str, Any]) -> bool:
    """Whether a configuration file's contents come from the authors' implementation, with pondering switched on."""
    return any(raw.get(name) for name in _SWITCHES) and "pondering_steps" in raw


def _known_fields(model_type):
    return set(CONFIG_MAPPING[model_type]().to_dict()) | set(PretrainedConfig().to_dict()) | _LEGACY_FIELDS


def _authors_fields(raw):
    """The pondering fields that the authors' configuration `raw` means, and `raw` without their flags."""
    rest = {name: value for name, value in raw.items() if name not in AUTHORS_FLAGS}
    if raw.get("model_type") not in _AUTHORS_MODEL_TYPES:
        raise PonderingError(
            f"a pondering checkpoint of the authors' with model_type {raw.get('model_type')!r}, where gpt2, gpt_neox "
            "and llama are known: remove their flags from config.json to convert it as a plain model"
        )
    known = _known_fields(raw["model_type"])
    for name in rest:
        if name not in known and not name.startswith("_"):
            raise PonderingError(
                f"config.json has the field `{name}`, which is neither the authors' nor transformers': where it means "
                f"nothing, leave it out by `ponder-hf convert --ignore-field {name}`, or by "
                f'from_base(..., ignore_fields=["{name}"])'
            )
    fields = {}
    for name, meaning in AUTHORS_FLAGS.items():
        if name in raw and meaning is not None:
            fields.update(meaning(raw[name], raw))
    return fields, rest


def understand_config(
    source: Any,
    raw: dict[str, Any],
    given: Mapping[str, Any] | None = None,
    authors: bool = False,
    ignore_fields: Sequence[str] = (),
    ignore_code: bool = False,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The pondering fields that a config.json already means, and what of it is the backbone's.

    Args:
        source: what messages call it, a text or a path.
        raw: its contents.
        given: the pondering fields that the caller names.
        authors: whether it is the authors' model although the flags are missing that say so.
        ignore_fields: names of fields to leave out.
        ignore_code: whether to read a checkpoint with code of its own as if it had none.

    Raises:
        PonderingError: the model cannot ponder or is not understood.
    """
    model_type = raw.get("model_type")
    _check_model_type(source, raw, ignore_code)
    if ignore_code:
        raw = {name: value for name, value in raw.items() if name != "auto_map"}
    raw = _without_fields(source, raw, ignore_fields)
    if authors:
        steps = (given or {}).get("pondering_steps", RELEASED_FLAGS["pondering_steps"])
        raw = {**RELEASED_FLAGS, "pondering_steps": steps, "mutiply_pondering_steps": steps != 0, **raw}
        raw["ponderinglm"] = True
    if is_authors_config(raw):
        return _authors_fields(raw)
    found = [name for name in (*_SWITCHES, *RELEASED_FLAGS) if name in raw]
    is_off = any(name in raw and not raw[name] for name in _SWITCHES)
    if found and (not is_off or any(raw.get(name) for name in _SWITCHES)):
        switch = "recurrent_model" if model_type == "gpt2" else "ponderinglm"
        missing = switch if "pondering_steps" in raw else "pondering_steps"
        raise PonderingError(
            f"config.json of {source} has the field `{found[0]}` of the authors' models but not `{missing}`: add it "
            f"there, or take what is missing from their released models, by {_AUTHORS_HINT}"
        )
    return {}, {name: value for name, value in raw.items() if not (found and name in AUTHORS_FLAGS)}


_AUTHORS_HINT = "`ponder-hf convert --authors` or from_base(..., authors=True)"
_CODE_HINT = "`ponder-hf convert --ignore-code` or from_base(..., ignore_code=True)"


def unflagged_weight(names: Iterable[str], fields: Mapping[str, Any] | None) -> str | None:
    """A warning about weights that only the authors' models have, where `fields` are not those of one; or None.

    Args:
        names: of the stored weights. fields: what `understand_config` found.
    """
    found = next((name for name in AUTHORS_WEIGHTS if name in names), None)
    if found is None or fields:
        return None
    return (
        f"the weight {found} says that the authors of the method trained this model to ponder, but config.json lacks "
        f"their flags, so it is taken for a plain one: {_AUTHORS_HINT} takes S = 3, embedding_scale = "
        "sqrt(hidden size) and input_scale = S as in their released models, and pondering fields that you name win"
    )


def _check_model_type(source, raw, ignore_code):
    model_type = raw.get("model_type")
    if model_type == PonderingConfig.model_type:
        raise PonderingError(f"{source} is a pondering checkpoint already: load it with from_pretrained")
    distinct = _SECOND_GENERATION[:-1] if model_type not in _AUTHORS_MODEL_TYPES else _SECOND_GENERATION
    second = next((name for name in distinct if name in raw), None)
    if second is not None:
        raise PonderingError(
            f"{source} is a model of PonderLM-2 (config.json has the field `{second}`): it feeds back hidden states "
            "instead of embeddings of what it predicts, which is another method than this one; use its own code"
        )
    auto_map = raw.get("auto_map")
    has_code = isinstance(auto_map, dict) and any(name.startswith(("AutoConfig", "AutoModel")) for name in auto_map)
    if has_code and model_type not in CONFIG_MAPPING:
        raise PonderingError(f"{source} needs code of its own, which is never run here: use a model of transformers")
    if has_code and not ignore_code:
        raise PonderingError(
            f"{source} has code of its own (`auto_map` in config.json), which is never run and would be left behind: "
            f"where transformers' own {model_type} computes the same, say so by {_CODE_HINT}"
        )
    if model_type not in CONFIG_MAPPING:
        raise PonderingError(
            f"{source} is not a model that transformers knows: config.json has "
            + (f"model_type {model_type!r}" if model_type else "no model_type")
        )
    if "quantization_config" in raw:
        raise PonderingError(f"{source} is quantised: convert the full-precision checkpoint, then quantise the result")


def _without_fields(source, raw, names):
    if isinstance(names, str):
        raise PonderingError(f"`ignore_fields` must be a list of names, got {names!r}: write [{names!r}]")
    for name in names:
        if name not in raw:
            raise PonderingError(f"config.json of {source} has no field `{name}` to ignore: check the name")
        if name == "auto_map":
            raise PonderingError(f"`auto_map` is about the code of {source}: leave that behind by {_CODE_HINT}")
        if name in _known_fields(raw["model_type"]):
            raise PonderingError(f"`{name}` is a field of {raw['model_type']} itself, which cannot be ignored")
    return {name: value for name, value in raw.items() if name not in names}


def read_base_config(
    source: Any,
    given: Mapping[str, Any] | None = None,
    authors: bool = False,
    ignore_fields: Sequence[str] = (),
    ignore_code: bool = False,
    **loading: Any,
) -> tuple[PretrainedConfig, dict[str, Any]]:
    """The backbone's configuration of the checkpoint `source`, and the pondering fields that it already means.

    Arguments as in `understand_config`; `loading` says where to find it.
    """
    raw, _ = PretrainedConfig.get_config_dict(source, **loading)
    fields, rest = understand_config(source, raw, given, authors, ignore_fields, ignore_code)
    config_class = CONFIG_MAPPING[rest.pop("model_type")]
    base_config = config_class.from_dict(rest)
    backbone_class(base_config)
    return base_config, fields


def load_backbone(
    source: Any, base_config: PretrainedConfig, fields: Mapping[str, Any] | None = None, **loading: Any
) -> PreTrainedModel:
    """The plain model in `source`, every weight accounted for; safetensors only.

    fields: what `read_base_config` found; a warning says where weights tell more than config.json.

    Raises:
        PonderingError: the checkpoint lacks a weight, or has one of another shape or one that the model does not know.
    """
    loading.setdefault("dtype", "auto")
    try:
        backbone, report = AutoModelForCausalLM.from_pretrained(
            source,
            config=base_config,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that they are reported, and raised below
            **loading,
        )
    except OSError as error:
        if "safetensors" not in str(error):
            raise
        raise PonderingError(
            f"{source} has no safetensors files, and pickled weights are never read: `ponder-hf convert "
            f"{source} DEST` says by which command to make safetensors of them"
        ) from error
    for key, stored, expected in sorted(report["mismatched_keys"]):
        raise PonderingError(
            f"{source} has the weight {key} with shape {tuple(stored)}, where its config.json means "
            f"{tuple(expected)}: get both from the same checkpoint"
        )
    missing = sorted(report["missing_keys"])
    if missing:
        raise PonderingError(
            f"{source} lacks {_some(missing)}: it is not a whole {type(backbone).__name__} checkpoint"
        )
    unknown = sorted(
        key for key in report["unexpected_keys"] if key not in AUTHORS_WEIGHTS and not key.endswith(_LEGACY_BUFFERS)
    )
    if unknown:
        raise PonderingError(f"{source} has {_some(unknown)}, which {type(backbone).__name__} does not know")
    warning = unflagged_weight(report["unexpected_keys"], fields)
    if warning is not None:
        logger.warning(f"{source}: {warning}")
    return backbone


def names_in_memory(model: PreTrainedModel, state_dict: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    """A state dict with the names on disk renamed to those that the model has in memory (GPT-NeoX's `embed_out`).

    Raises:
        PonderingError: a weight is stored in another form than the model holds it in (experts one by one, say).
    """
    own = model.state_dict()
    if revert_weight_conversion is None or own.keys() >= state_dict.keys():
        return state_dict
    names = {id(tensor): name for name, tensor in own.items()}
    on_disk = revert_weight_conversion(model, own)
    converted = [name for name in state_dict if name in on_disk and id(on_disk[name]) not in names]
    if converted:
        raise PonderingError(
            f"the state dict has {_some(converted)} in its form on disk, which only from_pretrained reads"
        )
    return {
        name if name in own else names.get(id(on_disk.get(name)), name): tensor for name, tensor in state_dict.items()
    }


def split_arguments(arguments: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Part the arguments of `from_base` into those of loading, those of reading config.json, and pondering fields.

    Raises:
        PonderingError: one is none of them, or would have no meaning.
    """
    arguments = dict(arguments)
    old_name = arguments.pop("torch_dtype", None)  # as transformers calls it, too
    if old_name is not None:
        arguments.setdefault("dtype", old_name)
    for name, harmless in (("trust_remote_code", False), ("use_safetensors", True)):
        if name in arguments and arguments[name] in (None, harmless):
            del arguments[name]
    loading, reading, fields = {}, {}, {}
    for name, value in arguments.items():
        if name in _NOT_HERE:
            raise PonderingError(f"from_base takes no `{name}`: {_NOT_HERE[name]}")
        if name in LOADING_ARGUMENTS:
            loading[name] = value
        elif name in READING_ARGUMENTS:
            reading[name] = value
        elif name in PONDERING_FIELDS:
            fields[name] = value
        else:
            known = (*PONDERING_FIELDS, *READING_ARGUMENTS, *sorted(LOADING_ARGUMENTS))
            hint = did_you_mean(name, known, "it takes")
            raise PonderingError(f"`{name}` is not a pondering field, nor another argument of from_base: {hint}")
    return loading, reading, fields


def _some(keys):
    return f"the weight {keys[0]}" + (f" and {len(keys) - 1} more" if len(keys) > 1 else "")
