"""The model and the tokenizer in a checkpoint, every weight accounted for. Code of its own is never run."""

import logging
import os
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ponder_hf.errors import first_line, fitting, reading, understanding
from ponder_hf.modeling import PonderingConfig, PonderingError, PonderingForCausalLM
from ponder_hf.modeling.pondering_backbone import backbone_class
from ponder_hf.modeling.pondering_backbone_checkpoint import AUTHORS_WEIGHTS, read_base_config, unflagged_weight
from ponder_hf.modeling.pondering_backbone_checkpoint import logger as from_base_logger

from .checkpoint import Checkpoint, download_small_files
from .files import GENERATION_CONFIG, TOKENIZER_CONFIG, has_tokenizer, read_json
from .stored_weights import stored_dtype


# Parameters that any machine has room for.
_SMALL = 1 << 24
# Buffers that transformers once saved and that not every class lists as ignored.
_BUFFERS = (r"\.masked_bias$", r"rotary_emb\.inv_freq$")


def load_pondering(checkpoint: Checkpoint, dtype: torch.dtype | None = None) -> PonderingForCausalLM:
    """Load a pondering checkpoint through ponder_hf's own classes, in evaluation mode.

    Args:
        checkpoint: as `open_checkpoint` gives it.
        dtype: of the weights; None: as they are stored.

    Raises:
        PonderingError: it is not a pondering checkpoint, or its configuration and its weights are not one whole model.
    """
    name = checkpoint.name
    check_pondering(name, checkpoint.config)
    try:
        with understanding(name):
            config = PonderingConfig.from_pretrained(checkpoint.folder)
            with torch.device("meta"):
                empty_model = PonderingForCausalLM(config)
    except PonderingError as error:
        place = f"config.json of {name}"
        message = str(error)
        raise PonderingError(message if message.startswith(place) else f"{place}: {message}") from error
    _check_size(checkpoint, empty_model)
    if (checkpoint.folder / GENERATION_CONFIG).is_file():  # transformers would go on without a broken one
        read_json(checkpoint.folder / GENERATION_CONFIG)
    with reading(name), _what_quantised_weights_need(checkpoint):
        model, report = PonderingForCausalLM.from_pretrained(
            checkpoint.folder,
            config=config,
            dtype=dtype
            or stored_dtype(name, checkpoint.tensors, is_quantised="quantization_config" in checkpoint.config),
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # so that they are reported, and raised below
            output_loading_info=True,
        )
    _check_report(name, report)
    return model.eval()


def load_plain(
    checkpoint: Checkpoint,
    empty_backbone: PreTrainedModel,
    arguments: Mapping[str, Any],
    dtype: torch.dtype | None = None,
) -> PonderingForCausalLM:
    """Load a plain checkpoint as a pondering model, in evaluation mode.

    What may not be as it was meant, `plain_warnings` says.

    Args:
        checkpoint: as `open_checkpoint` gives it.
        empty_backbone: as `understand_plain` gives it.
        arguments: of from_base: pondering fields, and how to read config.json.
        dtype: of the weights; None: as they are stored.

    Raises:
        PonderingError: the weights cannot be used.
    """
    stored = stored_dtype(checkpoint.name, checkpoint.tensors, _unused(checkpoint, empty_backbone))
    with reading(checkpoint.name), fitting(checkpoint.name), _no_second_warning(from_base_logger):
        model = PonderingForCausalLM.from_base(checkpoint.folder, dtype=dtype or stored, **arguments)
    # The base's id on the Hub, for the model card; a path of this machine says nothing elsewhere.
    model.config.base_config._name_or_path = checkpoint.name if checkpoint.revision else ""
    return model.eval()


def understand_plain(
    checkpoint: Checkpoint,
    pondering_fields: Mapping[str, Any],
    **reading_arguments: Any,
) -> tuple[dict[str, Any], PreTrainedModel]:
    """Read the configuration of a plain checkpoint, or of the authors', before any of its weights.

    Args:
        checkpoint: as `open_checkpoint` gives it.
        pondering_fields: those that the model is to have.
        reading_arguments: `authors`, `ignore_fields` and `ignore_code`, as `convert` takes them.

    Returns:
        The pondering fields that an authors' checkpoint means, and the backbone without weights.

    Raises:
        PonderingError: no model that ponders can be built from it.
    """
    with understanding(checkpoint.name):
        base_config, authors_fields = read_base_config(checkpoint.folder, pondering_fields, **reading_arguments)
        PonderingConfig(base_config, **{**authors_fields, **pondering_fields})
        model_class = backbone_class(base_config)
        with torch.device("meta"):
            empty_backbone = model_class(base_config)
    _check_size(checkpoint, empty_backbone)
    return authors_fields, empty_backbone


def _check_size(checkpoint: Checkpoint, empty_model: PreTrainedModel) -> None:
    """Before memory is taken: what is not stored transformers makes as large as the configuration says."""
    stored = sum(tensor.parameter_count for tensor in checkpoint.tensors.values())
    expected = sum(parameter.numel() for parameter in empty_model.parameters())
    if "quantization_config" not in checkpoint.config and stored and expected > 4 * stored + _SMALL:
        raise PonderingError(
            f"config.json of {checkpoint.name} describes a model of {expected:,} parameters, but its weights have "
            f"{stored:,}: they do not belong together, get both again"
        )


def plain_warnings(checkpoint: Checkpoint, authors_fields: Mapping[str, Any]) -> list[str]:
    """What may be another model than it is taken for: lines about a plain checkpoint that `understand_plain` read."""
    warnings = [unflagged_weight(checkpoint.tensors, authors_fields)]
    tokenizer_config = checkpoint.folder / TOKENIZER_CONFIG
    code = read_json(tokenizer_config).get("auto_map") if tokenizer_config.is_file() else None
    if code:
        warnings.append(
            f"the tokenizer of {checkpoint.name} has code of its own (`auto_map` in {TOKENIZER_CONFIG}), which is "
            "never run and stays behind: where transformers has no class for it, use the tokenizer of the source"
        )
    return [warning for warning in warnings if warning is not None]


@contextmanager
def _no_second_warning(logger: logging.Logger) -> Iterator[None]:
    """Within it `from_base` does not log what `plain_warnings` says, so that nobody reads it twice."""
    owner = threading.get_ident()  # other threads may load other models meanwhile

    def is_of_others(record: logging.LogRecord) -> bool:
        return threading.get_ident() != owner

    logger.addFilter(is_of_others)
    try:
        yield
    finally:
        logger.removeFilter(is_of_others)


def _unused(checkpoint: Checkpoint, empty_backbone: PreTrainedModel) -> set[str]:
    """The stored tensors that are no weights: the model's class ignores them, or they are dropped here."""
    expected = set(empty_backbone.state_dict())
    prefix = empty_backbone.base_model_prefix
    ignored = (*(empty_backbone._keys_to_ignore_on_load_unexpected or ()), *_BUFFERS, *map(re.escape, AUTHORS_WEIGHTS))
    return {
        name
        for name in checkpoint.tensors
        if any(re.search(pattern, name) for pattern in ignored)
        # The patterns are loose: "attn.bias", a mask of GPT-2's, is also found in "c_attn.bias", a weight.
        and not {name, f"{prefix}.{name}"} & expected
    }


def load_tokenizer(source: Checkpoint | str | os.PathLike) -> PreTrainedTokenizerBase:
    """Load a checkpoint's tokenizer.

    Args:
        source: a checkpoint as `open_checkpoint` gives it; or a folder or a Hub id, where only the tokenizer need lie.

    Returns:
        The tokenizer, as `AutoTokenizer` makes it.

    Raises:
        PonderingError: there is none, or its files are broken.
    """
    if isinstance(source, Checkpoint):
        name, folder = source.name, source.folder
    else:
        name, folder = str(source), Path(source).expanduser()
        if not folder.is_dir():
            folder = download_small_files(name)
    if not has_tokenizer(folder):
        raise PonderingError(f"{name} has no tokenizer: put its tokenizer.json and tokenizer_config.json there")
    with reading(name), understanding(name, "the tokenizer"):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, name: str) -> None:
    """Refuse a tokenizer that can give ids for which the model has no embedding.

    Args:
        tokenizer: the tokenizer.
        config: of the model.
        name: what messages call the tokenizer.

    Raises:
        PonderingError: it has more entries than the model has embeddings.
    """
    num_entries = max([len(tokenizer) - 1, *tokenizer.get_vocab().values()]) + 1
    if num_entries > config.vocab_size:
        raise PonderingError(
            f"the tokenizer of {name} has {num_entries} entries, the model only {config.vocab_size} embeddings: use "
            "the model's own tokenizer"
        )


def quantised_by(checkpoint: Checkpoint) -> str | None:
    """What the weights are quantised by ("torchao"), or None."""
    settings = checkpoint.config.get("quantization_config")
    return settings.get("quant_method", "an unknown method") if isinstance(settings, dict) else None


@contextmanager
def _what_quantised_weights_need(checkpoint: Checkpoint) -> Iterator[None]:
    """Translate what transformers raises where the package is missing that a quantised checkpoint needs."""
    try:
        yield
    except (ImportError, ValueError) as error:
        method = quantised_by(checkpoint)
        if method is None:
            raise
        raise PonderingError(
            f"{checkpoint.name} is quantised by {method}, which does not work here ({first_line(error)}): install it, "
            "or use the full-precision checkpoint"
        ) from error


def check_pondering(name: str, config: Mapping[str, Any]) -> None:
    """Raise a PonderingError unless the contents of a config.json are those of a pondering checkpoint."""
    kind = config.get("model_type", "unknown")
    if kind != PonderingConfig.model_type:
        raise PonderingError(
            f"{name} is no pondering checkpoint but a plain one (model_type {kind!r}): "
            f"convert it first, with `ponder_hf.convert({name!r}, DEST)`"
        )


def _check_report(name: str, report: Mapping[str, Any]) -> None:
    for key, stored, expected in sorted(report["mismatched_keys"]):
        raise PonderingError(
            f"{name} has the weight {key} with shape {tuple(stored)}, where its config.json means {tuple(expected)}: "
            "get both from the same checkpoint"
        )
    for key in sorted(report["missing_keys"]):
        raise PonderingError(f"{name} lacks the weight {key}: it is not a whole pondering checkpoint")
    for key in sorted(report["unexpected_keys"]):
        raise PonderingError(f"{name} has the weight {key}, which its config.json has no place for: check both files")
