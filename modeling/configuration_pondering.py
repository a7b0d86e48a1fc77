"""Configuration of a pondering language model: the backbone's own configuration plus how it ponders."""

import inspect
import math
from typing import Any

import transformers

from .pondering_errors import PonderingError, check_transformers, did_you_mean


try:
    from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig
except ImportError as error:
    check_transformers(error)  # a version that lacks one of these is outside the range, which says more
    raise


FORMAT_VERSION = 1  # raised whenever an older release could misread a newer checkpoint
GATES = ("none", "zero_init", "zero_init_matrix", "random_signs")

AUTO_MAP = {
    "AutoConfig": "configuration_pondering.PonderingConfig",
    "AutoModel": "modeling_pondering.PonderingModel",
    "AutoModelForCausalLM": "modeling_pondering.PonderingForCausalLM",
}


def _check_integer(name: str, value: Any, least: int, meaning: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise PonderingError(f"`{name}` must be an integer >= {least}{meaning}, got {value!r}")


def check_steps(name: str, value: Any) -> None:
    """Raise a PonderingError unless `value` is a number of pondering steps: an integer >= 0."""
    _check_integer(name, value, 0, " (0: no pondering)")


def _check_heads(name: str, value: Any) -> None:
    _check_integer(name, value, 0, " (0: no draft heads)")


def _check_top_k(name: str, value: Any) -> None:
    if value is not None:
        _check_integer(name, value, 1, ", or null for the whole vocabulary")


def _is_finite_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _check_positive(name: str, value: Any) -> None:
    if not _is_finite_number(value) or value <= 0:
        raise PonderingError(f"`{name}` must be a finite number > 0, got {value!r}")


def _check_not_negative(name: str, value: Any) -> None:
    if not _is_finite_number(value) or value < 0:
        raise PonderingError(f"`{name}` must be a finite number >= 0, got {value!r}")


def _check_gate(name: str, value: Any) -> None:
    if value not in GATES:
        raise PonderingError(f"`{name}` must be one of {', '.join(map(repr, GATES))}, got {value!r}")


def _check_format(name: str, value: Any) -> None:
    _check_integer(name, value, 1)
    if value > FORMAT_VERSION:
        raise PonderingError(
            f"`{name}` is {value}, but this code reads formats up to {FORMAT_VERSION}: "
            "use the code that ships with the checkpoint (trust_remote_code=True) or a newer ponder_hf"
        )


# What each field must be. What it is when nothing is said stands in the signature of PonderingConfig.
_CHECKS = {
    "pondering_steps": check_steps,
    "pondering_top_k": _check_top_k,
    "pondering_temperature": _check_positive,
    "embedding_scale": _check_positive,
    "input_scale": _check_positive,
    "pondering_gate": _check_gate,
    "intermediate_loss_weight": _check_not_negative,
    "draft_heads": _check_heads,
    "pondering_format_version": _check_format,
}


# What is about the checkpoint as a whole. With what begins with an underscore it stays with the outer configuration.
_OWN_FIELDS = frozenset(_CHECKS) | frozenset(
    "architectures auto_map base_config custom_pipelines distributed_config model_type name_or_path "
    "quantization_config transformers_version transformers_weights".split()
)
# What transformers says of a class of configurations, or asks about what one holds under a private name.
_OF_CLASSES = frozenset(
    "attribute_map base_config_key extra_config_files extra_files has_no_defaults_at_init is_composition "
    "is_heterogeneous keys_to_ignore_at_inference sub_configs sub_configs_defaults".split()
)
# Copied into `to_dict()`, which tools read without knowing of a backbone (PEFT's prompt learning).
_SHOWN_IN_DICT = (
    "vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "max_position_embeddings tie_word_embeddings"
).split()
_ROPE_FIELDS = ("rope_theta", "partial_rotary_factor", "rope_scaling")


def _is_own(name):
    return name in _OWN_FIELDS or name.startswith("_")


class _OfBackbone:
    """An attribute that is read from and written to the backbone's configuration, so that it exists only once.

    While transformers' constructor runs there is no backbone yet, and what it sets is set aside.
    """

    def __init__(self, name):
        self.name, self.inherited = name, getattr(PretrainedConfig, name, None)

    def __get__(self, config, owner=None):
        if config is None:
            return self.inherited
        if "base_config" in config.__dict__:
            return _read(config.base_config, self.name)
        if self.name in config.__dict__:
            return config.__dict__[self.name]
        return self.inherited.__get__(config) if isinstance(self.inherited, property) else self.inherited

    def __set__(self, config, value):
        if "base_config" in config.__dict__:
            _write(config.base_config, self.name, value)
        elif isinstance(self.inherited, property):
            self.inherited.__set__(config, value)
        else:
            config.__dict__[self.name] = value


def _read(base_config, name):
    """A field of the backbone's configuration, also under the name that it had before transformers 5."""
    if name in _ROPE_FIELDS and not hasattr(base_config, name):
        parameters = getattr(base_config, "rope_parameters", None)
        if isinstance(parameters, dict) and name in parameters:
            return parameters[name]
    return getattr(base_config, name)


def _write(base_config, name, value):
    """Set a field of the backbone's configuration; see `_read`.

    Raises:
        PonderingError: the name stands for several fields.
    """
    before = getattr(base_config, "rope_parameters", None)
    by_layer = isinstance(before, dict) and any(isinstance(part, dict) for part in before.values())
    if name == "rope_scaling" and isinstance(getattr(type(base_config), name, None), property):
        # Since transformers 5 a deprecated name, under which a base frequency that is not said again would be lost.
        value = {"rope_type": "default"} if value is None else dict(value)
        if isinstance(before, dict) and not by_layer:
            kept = {key: before[key] for key in ("rope_theta", "partial_rotary_factor") if key in before}
            value = {**kept, **value}
        base_config.rope_parameters = value
        if hasattr(base_config, "standardize_rope_params"):
            base_config.standardize_rope_params()
    elif name in _ROPE_FIELDS and isinstance(before, dict) and not hasattr(base_config, name):
        if by_layer:
            raise PonderingError(f"`{name}` differs by the kind of layer in this backbone: set `rope_parameters`")
        base_config.rope_parameters = {**before, name: value}
    else:
        setattr(base_config, name, value)


class PonderingConfig(PretrainedConfig):
    """How a causal language model ponders (arXiv 2505.20674).

    Every other field that is read, written, deleted or given by name is the backbone's: it is that of `base_config`,
    an object that the backbone shares, so a change acts as it does on the plain model, also on a model that is built.
    This holds for what transformers gives every configuration (`use_cache`, `output_hidden_states`, `dtype`,
    `id2label` ...), for a backbone's other names of a field (`n_embd`), and for the old names of rotary embeddings
    (`rope_scaling`, `rope_theta`). Own fields beside those below are what describes the checkpoint: `architectures`,
    `auto_map`, `name_or_path`, `quantization_config` and all names that begin with an underscore. The choices of
    attention and experts are written to both, as transformers reads both. A name that nobody knows is kept, as
    transformers keeps it on any configuration, and on the backbone's; one that is nearly a pondering field's is
    refused. In config.json a field of the backbone stands within `base_config` (`dtype` beside it, where tools look
    for it). `to_dict()` also has copies of its sizes, for tools; `from_dict` refuses copies that contradict it.

    Args:
        base_config: the backbone's configuration, a config object or a dict with `model_type`. Required.
        pondering_steps: S, the number of extra forward passes before a token is predicted. 0 is the plain backbone.
        pondering_top_k: the pondering embedding sums over the K most probable tokens only; None: whole vocabulary.
        pondering_temperature: of the softmax that weights the embeddings.
        embedding_scale: factor on token and pondering embeddings (sqrt(hidden_size) in the authors' larger models).
        input_scale: factor on the token embedding before pass 0 (S in the authors' larger models).
        pondering_gate: "none": x + t as in the paper. "zero_init": x + g * t with a learned g that starts at 0.
            "zero_init_matrix": x + G t with a learned (d, d) matrix G that starts at 0. "random_signs": x + g * t with
            a learned g whose factors start at 1 or -1, drawn from torch's random state; for training from scratch.
        intermediate_loss_weight: weight of the mean of the losses of passes 0 .. S-1 in the training loss.
        draft_heads: how many passes have a draft head (pondering_generate_drafts.py); one for each of S is best.
        pondering_format_version: of the checkpoint format; a newer one than this code knows is refused.
        kwargs: fields of the backbone.

    Raises:
        PonderingError: a field has a wrong type or value; at construction and at any later assignment.
            Or the installed transformers is too old.
    """

    model_type = "pondering"
    sub_configs = {"base_config": AutoConfig}
    has_no_defaults_at_init = True
    keys_to_ignore_at_inference = [
        "past_key_values",
        "cache",
        "pondering_logits",
        "pondering_losses",
        "aux_loss",
        "router_logits",
    ]

    def __init__(
        self,
        base_config: PretrainedConfig | dict[str, Any] | None = None,
        pondering_steps: int = 3,
        pondering_top_k: int | None = None,
        pondering_temperature: float = 1.0,
        embedding_scale: float = 1.0,
        input_scale: float = 1.0,
        pondering_gate: str = "none",
        intermediate_loss_weight: float = 0.0,
        draft_heads: int = 0,
        pondering_format_version: int = FORMAT_VERSION,
        **kwargs: Any,
    ) -> None:
        check_transformers()
        kwargs.pop("auto_map", None)
        chosen = {name: kwargs.pop(name, None) for name in ("attn_implementation", "experts_implementation")}
        of_backbone = {name: kwargs.pop(name) for name in list(kwargs) if not _is_own(name)}
        _check_fields(of_backbone, base_config)
        base_config, of_backbone = _as_config(base_config, of_backbone)
        super().__init__(**kwargs)
        for name in list(self.__dict__):
            if not _is_own(name):  # transformers sets many fields on every configuration, with its own defaults
                del self.__dict__[name]
        self.__dict__["base_config"] = base_config
        for name, value in of_backbone.items():
            setattr(self, name, value)
        for name, implementation in chosen.items():
            # A setter of transformers' that sets it here and on the backbone; dicts may part the two.
            before = getattr(base_config, f"_{name}", None)
            if implementation is not None or before is not None:
                setattr(self, f"_{name}", before if implementation is None else implementation)
        self.pondering_steps = pondering_steps
        self.pondering_top_k = pondering_top_k
        self.pondering_temperature = pondering_temperature
        self.embedding_scale = embedding_scale
        self.input_scale = input_scale
        self.pondering_gate = pondering_gate
        self.intermediate_loss_weight = intermediate_loss_weight
        self.draft_heads = draft_heads
        self.pondering_format_version = pondering_format_version
        self.auto_map = dict(AUTO_MAP)

    def __getattr__(self, name):
        # Only for names that are found nowhere else.
        if _is_own(name) or "base_config" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return _read(self.base_config, name)

    def __setattr__(self, name, value):
        if name in _CHECKS:
            _CHECKS[name](name, value)
            if name == "pondering_top_k" and value is not None:
                check_vocabulary(self, top_k=value)
        elif not _is_own(name) and "base_config" in self.__dict__:
            _check_fields([name], self.base_config)
            if name == "vocab_size":
                check_vocabulary(self, vocab_size=value)
            _write(self.base_config, name, value)
            return
        super().__setattr__(name, value)

    def __delattr__(self, name):
        if _is_own(name) or name in self.__dict__:
            super().__delattr__(name)
        else:
            delattr(self.base_config, name)

    def __eq__(self, other):
        return isinstance(other, PretrainedConfig) and self.to_dict() == other.to_dict()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As transformers'.

        Raises:
            PonderingError: a size stands beside `base_config` as `to_dict` puts it there, but is not the one within.
                Or there is no such pondering field as a keyword names; transformers would leave it out without a word.
        """
        base_config = config_dict.get("base_config")
        _check_fields([name for name in kwargs if not _is_own(name)], base_config)
        if isinstance(base_config, dict):
            model_type = base_config.get("model_type")
            names = CONFIG_MAPPING[model_type].attribute_map if model_type in CONFIG_MAPPING else {}
            within = {names.get(name, name): value for name, value in base_config.items()}
            for name in _SHOWN_IN_DICT:
                one, other = config_dict.get(name), within.get(names.get(name, name))
                if None not in (one, other) and one != other:
                    raise PonderingError(f"`{name}` is {one}, but {other} in `base_config`: change it only there")
        return super().from_dict(config_dict, **kwargs)

    # transformers checks before it saves. What a class of configurations has or checks differently is the backbone's.
    def validate(self) -> None:
        """As transformers'; fields of pondering are checked when they are set."""
        getattr(self.base_config, "validate", list)()

    def _get_generation_parameters(self):
        return getattr(self.base_config, "_get_generation_parameters", dict)()

    def to_dict(self) -> dict[str, Any]:
        """As transformers', with the whole of `base_config` and copies of its sizes; see the class."""
        output = self._without_copies(super().to_dict())
        names, within = self.base_config.attribute_map, output["base_config"]
        shown = {name: within.get(names.get(name, name)) for name in _SHOWN_IN_DICT}
        return {**output, **{name: value for name, value in shown.items() if value is not None}}

    def to_diff_dict(self) -> dict[str, Any]:
        """What goes into config.json: every field once."""
        return self._without_copies(super().to_diff_dict())

    def _without_copies(self, output):
        dtype = output["base_config"].pop("dtype", None) or output.get("dtype")
        output = {name: value for name, value in output.items() if _is_own(name)}
        return output if dtype is None else {**output, "dtype": dtype}

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As transformers', of a configuration that loads again."""
        check_vocabulary(self)
        super().save_pretrained(*args, **kwargs)

    def get_text_config(self, *args: Any, **kwargs: Any) -> PretrainedConfig:
        """The configuration of the decoder that runs in every pass: the backbone's."""
        base_config = self.__dict__.get("base_config")
        return self if base_config is None else base_config.get_text_config(*args, **kwargs)


for _name in dir(PretrainedConfig):
    if not (_is_own(_name) or _name in _OF_CLASSES or callable(getattr(PretrainedConfig, _name))):
        setattr(PonderingConfig, _name, _OfBackbone(_name))


def check_vocabulary(config: PretrainedConfig, top_k: int | None = None, vocab_size: int | None = None) -> None:
    """Raise where `top_k` is more than `vocab_size`; each is the configuration's own where it is not given."""
    top_k = config.__dict__.get("pondering_top_k") if top_k is None else top_k  # not there while it is made
    if top_k is None:
        return
    vocab_size = config.vocab_size if vocab_size is None else vocab_size
    if top_k > vocab_size:
        raise PonderingError(
            f"`pondering_top_k` is {top_k}, but the vocabulary has {vocab_size} entries: "
            f"use at most {vocab_size}, or null for the whole vocabulary"
        )


def unknown_field(name: str) -> PonderingError:
    """The error for a pondering field that does not exist, with the nearest one that does."""
    return PonderingError(f"`{name}` is not a pondering field: {did_you_mean(name, _CHECKS, 'the fields are')}")


def _check_fields(names, base_config):
    """Raise if one of these, which are no field of pondering, was meant to be.

    It was where it begins as they do, or is spelled nearly like one and no field of the backbone. Any other name may
    mean something to somebody.
    """
    for name in names:
        is_own = name.startswith(("pondering_", "intermediate_loss"))
        if is_own or (not _has_field(base_config, name) and did_you_mean(name, _CHECKS, cutoff=0.85)):
            raise unknown_field(name)


def _has_field(base_config, name):
    if not isinstance(base_config, dict):
        return hasattr(base_config, name)
    config_class = (
        CONFIG_MAPPING[base_config["model_type"]] if base_config.get("model_type") in CONFIG_MAPPING else None
    )
    parameters = () if config_class is None else inspect.signature(config_class.__init__).parameters
    return name in base_config or name in parameters or hasattr(config_class, name)


def _as_config(base_config, changes):
    """The backbone's configuration, and those of the `changes` to it that are not in it yet."""
    if getattr(base_config, "model_type", None) == PonderingConfig.model_type:  # also of a checkpoint's own code
        raise PonderingError("`base_config` is itself a pondering configuration: give the plain backbone's")
    if isinstance(base_config, PretrainedConfig):
        return base_config, changes
    if not isinstance(base_config, dict) or "model_type" not in base_config:
        raise PonderingError(
            "`base_config` is required: the backbone's configuration, as a config object or a dict with `model_type`, "
            f"got {type(base_config).__name__} (to make a plain model ponder, use PonderingForCausalLM.from_base)"
        )
    fields = dict(base_config)
    model_type = fields.pop("model_type")
    if model_type not in CONFIG_MAPPING:
        raise PonderingError(f"`base_config` has model_type {model_type!r}, which this transformers does not know")
    config_class = CONFIG_MAPPING[model_type]
    names = config_class.attribute_map
    # Fields of rotary embeddings that are settled in the one field of transformers 5 are changed there, afterwards.
    later = _ROPE_FIELDS if fields.get("rope_parameters") else ()
    now = {name: value for name, value in changes.items() if name not in later}
    replaced = {names.get(name, name) for name in now}
    fields = {name: value for name, value in fields.items() if names.get(name, name) not in replaced}
    return config_class(**fields, **now), {name: changes[name] for name in later if name in changes}


class NoClassifier:
    """Stands where transformers looks for a classifier or a reward model that ponders, and says that there is none."""

    config_class = PonderingConfig

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        raise PonderingError(
            "pondering models only predict tokens: classifiers and reward models of them are not supported; "
            "`ponder-hf export` or `model.to_base()` gives the plain backbone, which transformers makes one of"
        )

    _from_config = from_pretrained


# (the value that it has when nothing is said, the function that checks one) of each field.
PONDERING_FIELDS = {
    name: (inspect.signature(PonderingConfig.__init__).parameters[name].default, check)
    for name, check in _CHECKS.items()
}

PonderingConfig.register_for_auto_class()
# Otherwise transformers would list a hundred configurations that it knows.
for _name in ("SequenceClassification", "TokenClassification", "QuestionAnswering"):
    try:
        _auto_class = getattr(transformers, f"AutoModelFor{_name}", None)
    except ImportError as error:  # they are imported only now
        check_transformers(error)
        raise
    if _auto_class is not None:
        _auto_class.register(PonderingConfig, NoClassifier, exist_ok=True)
