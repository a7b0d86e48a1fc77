"""Load a pondering checkpoint through ponder_hf's own classes, every weight accounted for. Its code is never run."""

from contextlib import contextmanager

import torch

from ponder_hf import PonderingConfig, PonderingError, PonderingForCausalLM
from ponder_hf.errors import first_line, reading, understanding

from .dtype import stored_dtype


def load_pondering(source, dtype=None):
    """The PonderingForCausalLM in `source`, a Source, in evaluation mode.

    Args:
        dtype: of the weights; None: as they are stored.

    Raises:
        PonderingError: it is not a pondering checkpoint, or its configuration and its weights are not one whole model.
    """
    name = source.name
    check_pondering(name, source.config)
    try:
        with understanding(name):
            config = PonderingConfig.from_pretrained(source.folder)
            with torch.device("meta"):
                PonderingForCausalLM(config)
    except PonderingError as error:
        place = f"config.json of {name}"
        message = str(error)
        raise PonderingError(message if message.startswith(place) else f"{place}: {message}") from error
    with reading(name), _what_quantised_weights_need(source):
        model, report = PonderingForCausalLM.from_pretrained(
            source.folder,
            config=config,
            dtype=dtype or stored_dtype(source),
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # so that they are reported, and raised below
            output_loading_info=True,
        )
    _check_report(name, report)
    return model.eval()


def quantised_by(source):
    """What the weights in `source`, a Source, are quantised by ("torchao"), or None."""
    settings = source.config.get("quantization_config")
    return settings.get("quant_method", "an unknown method") if isinstance(settings, dict) else None


@contextmanager
def _what_quantised_weights_need(source):
    """Translate what transformers raises where the package is missing that a quantised checkpoint needs."""
    try:
        yield
    except (ImportError, ValueError) as error:
        method = quantised_by(source)
        if method is None:
            raise
        raise PonderingError(
            f"{source.name} is quantised by {method}, which does not work here ({first_line(error)}): install it, or "
            "use the full-precision checkpoint"
        ) from error


def check_pondering(name, config):
    """Raise unless the contents of a config.json are those of a pondering checkpoint."""
    kind = config.get("model_type", "unknown")
    if kind != PonderingConfig.model_type:
        raise PonderingError(
            f"{name} is no pondering checkpoint but a plain one (model_type {kind!r}): "
            f"convert it first, with `ponder-hf convert {name} DEST`"
        )


def _check_report(name, report):
    for key, stored, expected in sorted(report["mismatched_keys"]):
        raise PonderingError(
            f"{name} has the weight {key} with shape {tuple(stored)}, where its config.json means {tuple(expected)}: "
            "get both from the same checkpoint"
        )
    for key in sorted(report["missing_keys"]):
        raise PonderingError(f"{name} lacks the weight {key}: it is not a whole pondering checkpoint")
    for key in sorted(report["unexpected_keys"]):
        raise PonderingError(f"{name} has the weight {key}, which its config.json has no place for: check both files")
