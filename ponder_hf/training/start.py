"""The model that a run starts from: a plain base, a pondering checkpoint, or a configuration to train from scratch.

What can be checked without its weights is checked first; `load` makes the model.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from ponder_hf.conversion import load_pondering, load_tokenizer, open_checkpoint
from ponder_hf.conversion.checkpoint import Checkpoint, download_small_files
from ponder_hf.conversion.files import CONFIG, read_json
from ponder_hf.conversion.load_model import load_plain, plain_warnings, understand_plain
from ponder_hf.errors import understanding
from ponder_hf.modeling import PonderingConfig, PonderingError, PonderingForCausalLM
from ponder_hf.modeling.pondering_backbone_checkpoint import read_base_config

from .draft_heads import freeze_all_but_heads
from .initialisation import check_initialisation, initialise
from .options import TrainOptions


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """A model that can be made.

    Args:
        kind: "plain", "pondering" or "scratch".
        name: what the user called it.
        config: what it will have.
        num_parameters: of the whole model.
        load: makes it.
        tokenizer: its own, or the one that was asked for.
        path: the folder or Hub id that an adapter can name as its base; None where no such checkpoint exists.
    """

    kind: str
    name: str
    config: PonderingConfig
    num_parameters: int
    load: Callable[[], PonderingForCausalLM]
    tokenizer: PreTrainedTokenizerBase
    path: str | None = None


def find_start(options: TrainOptions) -> Start:
    """The Start that these TrainOptions name.

    Raises:
        PonderingError: there is no such model or no tokenizer, or they cannot be used.
    """
    if options.config is not None:
        return _from_scratch(options)
    found = open_checkpoint(str(options.source), options.revision)
    tokenizer = load_tokenizer(found if options.tokenizer is None else options.tokenizer)
    if found.is_pondering:
        return pondering_start(found, tokenizer, options)
    if options.draft_heads:
        raise PonderingError(
            f"{found.name} is a plain model, which has no passes to put draft heads on: train it to ponder first"
        )
    authors_fields, empty_backbone = understand_plain(found, options.fields)
    for warning in plain_warnings(found, authors_fields):
        logger.warning(warning)
    config = PonderingConfig(empty_backbone.config, **{**authors_fields, **options.fields})
    return Start(
        kind="plain",
        name=found.name,
        config=config,
        num_parameters=_count(config),
        load=lambda: load_plain(found, empty_backbone, options.fields, _dtype(options)),
        tokenizer=tokenizer,
    )


def pondering_start(found: Checkpoint, tokenizer: PreTrainedTokenizerBase, options: TrainOptions) -> Start:
    """The Start that continues the pondering checkpoint `found`, a Checkpoint."""
    with understanding(found.name):
        config = PonderingConfig.from_pretrained(found.folder)
    _set_fields(config, options.fields, found.name)
    if options.draft_heads and config.pondering_steps == 0:
        raise PonderingError(f"{found.name} has 0 pondering steps, and so no passes to put draft heads on")

    def load():
        model = load_pondering(found, _dtype(options))
        _set_fields(model.config, options.fields, found.name)
        return freeze_all_but_heads(model) if options.draft_heads else model

    return Start(
        kind="pondering",
        name=found.name,
        config=config,
        num_parameters=_count(config),
        load=load,
        tokenizer=tokenizer,
        path=found.name if found.revision else str(found.folder.absolute()),
    )


def _set_fields(config, fields, name):
    for field, value in fields.items():
        if field == "pondering_gate" and value != config.pondering_gate:
            raise PonderingError(
                f"`pondering_gate` of {name} is {config.pondering_gate!r}, which is part of its weights and cannot be "
                f"made {value!r}: leave it out, or start from its plain backbone (`ponder_hf.export`)"
            )
        setattr(config, field, value)


def _from_scratch(options):
    folder, raw = _read_config(options.config)
    name = options.config
    with understanding(name):
        if raw.get("model_type") == PonderingConfig.model_type:
            config = PonderingConfig.from_dict({**raw, **options.fields})
        else:
            base_config, fields = read_base_config(folder)
            config = PonderingConfig(base_config, **{**fields, **options.fields})
        num_parameters = _count(config)
    if options.initialisation == "authors":
        check_initialisation(config)
    where = options.tokenizer
    if where is None and folder.is_dir():
        where = folder
    if where is None:
        raise PonderingError(f"{name} has no tokenizer: name one as `tokenizer`, a folder or a Hub id")

    def load():
        model = PonderingForCausalLM(config)
        if options.initialisation == "authors":
            initialise(model)
        return model.to(_dtype(options) or torch.float32)

    return Start("scratch", name, config, num_parameters, load, load_tokenizer(where))


def _read_config(name):
    """The folder (or file) that transformers reads the configuration from, and the contents of the file."""
    path = Path(name).expanduser()
    if path.is_file():
        return path, read_json(path)
    folder = path if path.is_dir() else download_small_files(name)
    if not (folder / CONFIG).is_file():
        raise PonderingError(f"{name} has no {CONFIG}: give one, or the folder or Hub id that has it")
    return folder, read_json(folder / CONFIG)


def _count(config):
    with torch.device("meta"):
        return PonderingForCausalLM(config).num_parameters()


def _dtype(options):
    return None if options.dtype == "auto" else getattr(torch, options.dtype)
