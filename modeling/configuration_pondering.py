"""Configuration of a pondering language model: the backbone's own configuration plus how it ponders."""

import difflib
import math

from .pondering_errors import PonderingError
from .pondering_version import check_transformers


try:
    from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig
except ImportError as error:
    check_transformers(error)  # a version that lacks one of these is outside the range, which says more
    raise


FORMAT_VERSION = 1  # raised whenever an older release could misread a newer checkpoint
GATES = ("none", "zero_init")

AUTO_MAP = {
    "AutoConfig": "configuration_pondering.PonderingConfig",
    "AutoModel": "modeling_pondering.PonderingModel",
    "AutoModelForCausalLM": "modeling_pondering.PonderingForCausalLM",
}


def check_steps(name, value):
    """Raise unless `value` is a number of pondering steps: an integer >= 0."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise PonderingError(f"`{name}` must be an integer >= 0 (0: no pondering), got {value!r}")


def _check_heads(name, value):
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise PonderingError(f"`{name}` must be an integer >= 0 (0: no draft heads), got {value!r}")


def _check_top_k(name, value):
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise PonderingError(f"`{name}` must be an integer >= 1, or null for the whole vocabulary, got {value!r}")


def _is_finite_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _check_positive(name, value):
    if not _is_finite_number(value) or value <= 0:
        raise PonderingError(f"`{name}` must be a finite number > 0, got {value!r}")


def _check_not_negative(name, value):
    if not _is_finite_number(value) or value < 0:
        raise PonderingError(f"`{name}` must be a finite number >= 0, got {value!r}")


def _check_gate(name, value):
    if value not in GATES:
        raise PonderingError(f"`{name}` must be one of {', '.join(map(repr, GATES))}, got {value!r}")


def _check_format(name, value):
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise PonderingError(f"`{name}` must be an integer >= 1, got {value!r}")
    if value > FORMAT_VERSION:
        raise PonderingError(
            f"`{name}` is {value}, but this code reads formats up to {FORMAT_VERSION}: "
            "use the code that ships with the checkpoint (trust_remote_code=True) or a newer ponder_hf"
        )


# One line a field: the value that it has when nothing is said, and what it must be.
PONDERING_FIELDS = {
    "pondering_steps": (3, check_steps),
    "pondering_top_k": (None, _check_top_k),
    "pondering_temperature": (1.0, _check_positive),
    "embedding_scale": (1.0, _check_positive),
    "input_scale": (1.0, _check_positive),
    "pondering_gate": ("none", _check_gate),
    "intermediate_loss_weight": (0.0, _check_not_negative),
    "draft_heads": (0, _check_heads),
    "pondering_format_version": (FORMAT_VERSION, _check_format),
}


class _OfBackbone:
    """An attribute that is read from and written to the backbone's configuration, so that it exists only once."""

    def __set_name__(self, owner, name):
        self.name = name

    def __get__(self, config, owner=None):
        if config is None:
            return self
        if "base_config" not in config.__dict__:
            raise AttributeError(self.name)
        return getattr(config.base_config, self.name)

    def __set__(self, config, value):
        setattr(config.base_config, self.name, value)


class PonderingConfig(PretrainedConfig):
    """How a causal language model ponders (arXiv 2505.20674).

    Args:
        base_config: the backbone's configuration, a config object or a dict with `model_type`. Required.
        pondering_steps: S, the number of extra forward passes before a token is predicted. 0 is the plain backbone.
        pondering_top_k: the pondering embedding sums over the K most probable tokens only; None: whole vocabulary.
        pondering_temperature: of the softmax that weights the embeddings.
        embedding_scale: factor on token and pondering embeddings (sqrt(hidden_size) in the authors' larger models).
        input_scale: factor on the token embedding before pass 0 (S in the authors' larger models).
        pondering_gate: "none": x + t as in the paper. "zero_init": x + g * t with a learned g that starts at 0.
        intermediate_loss_weight: weight of the mean of the losses of passes 0 .. S-1 in the training loss.
        draft_heads: for how many passes there is a draft head (pondering_drafts.py); one for each of S is best.
        pondering_format_version: of the checkpoint format; a newer one than this code knows is refused.

    Raises:
        PonderingError: a field has a wrong type or value; at construction and at any later assignment.
            Or the installed transformers is too old.
    """

    model_type = "pondering"
    sub_configs = {"base_config": AutoConfig}
    has_no_defaults_at_init = True
    keys_to_ignore_at_inference = ["past_key_values", "cache", "pondering_logits", "pondering_losses"]

    vocab_size = _OfBackbone()
    hidden_size = _OfBackbone()
    num_hidden_layers = _OfBackbone()
    num_attention_heads = _OfBackbone()
    max_position_embeddings = _OfBackbone()
    bos_token_id = _OfBackbone()
    eos_token_id = _OfBackbone()
    pad_token_id = _OfBackbone()
    tie_word_embeddings = _OfBackbone()

    def __init__(self, base_config=None, **kwargs):
        check_transformers()
        self.base_config = _as_config(base_config)
        for name, (default, _) in PONDERING_FIELDS.items():
            setattr(self, name, kwargs.pop(name, default))
        for name in kwargs:
            if name.startswith("pondering_"):
                raise unknown_field(name)
        # transformers 4.57 sets these on every configuration, with defaults of its own: keep the backbone's.
        for name in ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings"):
            kwargs.setdefault(name, getattr(self.base_config, name, None))
        # transformers hands both choices of implementation down to the backbone, and None where nothing is said here.
        chosen_attention = getattr(self.base_config, "_attn_implementation", None)
        chosen_experts = getattr(self.base_config, "_experts_implementation", None)
        if chosen_attention is not None:
            kwargs.setdefault("attn_implementation", chosen_attention)
        kwargs.pop("auto_map", None)
        super().__init__(**kwargs)
        if chosen_experts is not None:
            self.base_config._experts_implementation = chosen_experts
        self.auto_map = dict(AUTO_MAP)

    def __setattr__(self, name, value):
        if name in PONDERING_FIELDS:
            PONDERING_FIELDS[name][1](name, value)
            if name == "pondering_top_k" and value is not None and value > self.vocab_size:
                raise PonderingError(
                    f"`pondering_top_k` is {value}, but the vocabulary has {self.vocab_size} entries: "
                    f"use at most {self.vocab_size}, or null for the whole vocabulary"
                )
        super().__setattr__(name, value)

    def get_text_config(self, *args, **kwargs):
        """The configuration of the decoder that runs in every pass: the backbone's."""
        return self.base_config.get_text_config(*args, **kwargs)


def unknown_field(name):
    """The error for a pondering field that does not exist, with the nearest one that does."""
    near = difflib.get_close_matches(name, PONDERING_FIELDS, n=1)
    hint = f"did you mean `{near[0]}`?" if near else f"the fields are {', '.join(PONDERING_FIELDS)}"
    return PonderingError(f"`{name}` is not a pondering field: {hint}")


def _as_config(base_config):
    if isinstance(base_config, PonderingConfig):
        raise PonderingError("`base_config` is itself a pondering configuration: give the plain backbone's")
    if isinstance(base_config, PretrainedConfig):
        return base_config
    if not isinstance(base_config, dict) or "model_type" not in base_config:
        raise PonderingError(
            "`base_config` is required: the backbone's configuration, as a config object or a dict with `model_type`, "
            f"got {type(base_config).__name__} (to make a plain model ponder, use PonderingForCausalLM.from_base)"
        )
    fields = dict(base_config)
    model_type = fields.pop("model_type")
    if model_type not in CONFIG_MAPPING:
        raise PonderingError(f"`base_config` has model_type {model_type!r}, which this transformers does not know")
    return CONFIG_MAPPING[model_type](**fields)


PonderingConfig.register_for_auto_class()
