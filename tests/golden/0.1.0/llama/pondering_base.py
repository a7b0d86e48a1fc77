"""Read the checkpoint that a pondering model is made from: a plain one, or one that the method's authors wrote."""

from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig

from .configuration_pondering import PONDERING_FIELDS, PonderingConfig, unknown_field
from .pondering_backbone import backbone_class
from .pondering_errors import PonderingError


try:  # since 5.0 some backbones have other names in memory than on disk
    from transformers.core_model_loading import revert_weight_conversion
except ImportError:
    revert_weight_conversion = None


# Where to find a checkpoint and how to load it; everything else that `from_base` takes is a pondering field.
LOADING_ARGUMENTS = frozenset(
    "attn_implementation cache_dir device_map dtype force_download local_files_only revision subfolder token".split()
)
_CONFIG_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")

# The authors' configuration fields: what becomes of each here. None: dropped on purpose.
AUTHORS_FLAGS = {
    "ponderinglm": None,  # llama and gpt_neox: pondering is on. A pondering model always ponders.
    "recurrent_model": None,  # gpt2: the same
    "pondering_steps": lambda value, raw: {"pondering_steps": value},
    "scale_embeds": lambda value, raw: {"embedding_scale": _hidden_size(raw) ** 0.5} if value else {},
    "mutiply_pondering_steps": lambda value, raw: {"input_scale": float(raw["pondering_steps"])} if value else {},
    "softmax_temperature": lambda value, raw: {"pondering_temperature": value},
    "checkpoint_num_layers": None,  # how many layers they recompute in training
}
# Weights of theirs that no forward pass uses.
AUTHORS_WEIGHTS = {"adapter.weight": None}
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


def _hidden_size(raw):
    return raw["n_embd"] if "n_embd" in raw else raw["hidden_size"]


def is_authors_config(raw):
    """Whether a configuration file's contents come from the authors' implementation, with pondering switched on."""
    return bool(raw.get("ponderinglm") or raw.get("recurrent_model")) and "pondering_steps" in raw


def authors_fields(raw):
    """The pondering fields that the authors' configuration `raw` means, and `raw` without their flags.

    Raises:
        PonderingError: a field is neither theirs nor transformers'.
    """
    rest = {name: value for name, value in raw.items() if name not in AUTHORS_FLAGS}
    if raw.get("model_type") not in ("gpt2", "gpt_neox", "llama"):
        raise PonderingError(
            f"a pondering checkpoint of the authors' with model_type {raw.get('model_type')!r}, where gpt2, gpt_neox "
            "and llama are known: remove their flags from config.json to convert it as a plain model"
        )
    known = set(CONFIG_MAPPING[raw["model_type"]]().to_dict()) | set(PretrainedConfig().to_dict()) | _LEGACY_FIELDS
    for name in rest:
        if name not in known and not name.startswith("_"):
            raise PonderingError(
                f"config.json has the field `{name}`, which is neither the authors' nor transformers'"
            )
    fields = {}
    for name, meaning in AUTHORS_FLAGS.items():
        if name in raw and meaning is not None:
            fields.update(meaning(raw[name], raw))
    return fields, rest


def read_base_config(source, **loading):
    """The backbone's configuration of the checkpoint `source`, and the pondering fields that it already means."""
    raw, _ = PretrainedConfig.get_config_dict(source, **{k: v for k, v in loading.items() if k in _CONFIG_ARGUMENTS})
    model_type = raw.get("model_type")
    if model_type == PonderingConfig.model_type:
        raise PonderingError(f"{source} is a pondering checkpoint already: load it with from_pretrained")
    if "auto_map" in raw and model_type not in CONFIG_MAPPING:
        raise PonderingError(f"{source} needs code of its own, which is never run here: use a model of transformers")
    if model_type not in CONFIG_MAPPING:
        raise PonderingError(
            f"{source} is not a model that transformers knows: config.json has "
            + (f"model_type {model_type!r}" if model_type else "no model_type")
        )
    if "quantization_config" in raw:
        raise PonderingError(f"{source} is quantised: convert the full-precision checkpoint, then quantise the result")
    fields = {}
    if is_authors_config(raw):
        fields, raw = authors_fields(raw)
    config_class = CONFIG_MAPPING[model_type]
    raw.pop("model_type", None)
    base_config = config_class.from_dict(raw)
    backbone_class(base_config)
    return base_config, fields


def load_backbone(source, base_config, **loading):
    """The plain model in `source`, every weight accounted for; safetensors only.

    Raises:
        PonderingError: the checkpoint lacks a weight, or has one of another shape or one that the model does not know.
    """
    loading.setdefault("dtype", "auto")
    backbone, report = AutoModelForCausalLM.from_pretrained(
        source,
        config=base_config,
        use_safetensors=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # so that they are reported, and raised below
        **loading,
    )
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
    return backbone


def names_in_memory(model, state_dict):
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


def split_arguments(arguments):
    """Part the keyword arguments of `from_base` into loading arguments and pondering fields."""
    loading = {name: value for name, value in arguments.items() if name in LOADING_ARGUMENTS}
    fields = {name: value for name, value in arguments.items() if name not in LOADING_ARGUMENTS}
    for name in fields:
        if name not in PONDERING_FIELDS:
            raise unknown_field(name)
    return loading, fields


def _some(keys):
    return f"the weight {keys[0]}" + (f" and {len(keys) - 1} more" if len(keys) > 1 else "")
