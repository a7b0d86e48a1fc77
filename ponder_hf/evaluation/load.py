"""A model and its tokenizer, to evaluate, from whatever a user names."""

import logging
import os
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ponder_hf.conversion import Checkpoint, check_tokenizer, load_pondering, load_tokenizer, open_checkpoint
from ponder_hf.conversion.load_model import load_plain, plain_warnings, understand_plain
from ponder_hf.devices import read_device
from ponder_hf.modeling import PonderingError


logger = logging.getLogger(__name__)


@dataclass
class Loaded:
    """pondering_steps: the model's own S, 0 of a plain model. name, revision: what messages and results call it."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    name: str
    revision: str | None
    pondering_steps: int


def load_for_evaluation(
    model: str | os.PathLike | PreTrainedModel,
    *,
    tokenizer: str | os.PathLike | PreTrainedTokenizerBase | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    revision: str | None = None,
    pondering_steps: int | None = None,
) -> Loaded:
    """Load what is not loaded, check that model and tokenizer fit, and move the model to its device.

    Args:
        model, tokenizer, dtype, device, revision: as in `evaluate_text`.
        pondering_steps: with which a plain checkpoint is to ponder; None: 0.

    Raises:
        PonderingError: something cannot be used.
    """
    place = None if device is None and isinstance(model, torch.nn.Module) else read_device(device)
    source: Any = open_checkpoint(model, revision) if isinstance(model, (str, os.PathLike)) else None
    if source is None and (tokenizer is None or dtype is not None or revision is not None):
        raise PonderingError("a loaded model needs a `tokenizer`, and takes no `dtype` and no `revision`")
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        tokenizer = load_tokenizer(tokenizer or source)
    loaded: Any = model if source is None else _load(source, dtype, pondering_steps)
    name = loaded.name_or_path or type(loaded).__name__ if source is None else source.name
    check_tokenizer(tokenizer, loaded.config, name)
    own = getattr(loaded.config, "pondering_steps", 0)
    if source is not None and not source.is_pondering and not understand_plain(source, {})[0]:
        own = 0
    return Loaded(
        model=loaded if place is None else loaded.to(place),
        tokenizer=tokenizer,
        name=name,
        revision=None if source is None else source.revision,
        pondering_steps=own,
    )


def warn_of_untrained(steps: int | None, loaded: Loaded) -> None:
    """Warn of passes that were never trained: more of them than the checkpoint's own."""
    own = loaded.pondering_steps
    if steps is not None and steps > own:
        logger.warning(
            f"`pondering_steps` is {steps}, and {loaded.name} was trained with {own}: passes beyond those were never "
            "trained"
        )


def _load(source: Checkpoint, dtype: torch.dtype | None, pondering_steps: int | None) -> PreTrainedModel:
    """The model in `source`. A plain one is one that ponders 0 steps, unless others are asked for."""
    if source.is_pondering:
        return load_pondering(source, dtype)
    authors_fields, empty_backbone = understand_plain(source, {})
    for warning in plain_warnings(source, authors_fields):
        logger.warning(warning)
    fields = {} if authors_fields else {"pondering_steps": pondering_steps or 0}
    return load_plain(source, empty_backbone, fields, dtype)
