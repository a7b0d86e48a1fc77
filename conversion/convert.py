"""Make a pondering checkpoint from a plain one, or from one that the method's authors wrote."""

import json
import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

from ponder_hf.modeling import PonderingError
from ponder_hf.modeling.configuration_pondering import PONDERING_FIELDS, unknown_field

from .checkpoint import Checkpoint, open_checkpoint
from .files import TOKENIZER_CONFIG, copy_files, has_tokenizer, read_json, travelling_files
from .load_model import load_plain, plain_warnings, understand_plain
from .stored_weights import warnings_of_nan
from .whole_folder import check_destination, check_space, whole_folder


SHARD_SIZE = "5GB"


def convert(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    *,
    overwrite: bool = False,
    max_shard_size: int | str = SHARD_SIZE,
    revision: str | None = None,
    authors: bool = False,
    ignore_fields: Collection[str] = (),
    ignore_code: bool = False,
    **pondering_fields: Any,
) -> dict[str, Any]:
    """Write a pondering checkpoint that holds the weights of a plain one, in their dtype.

    Args:
        source: a folder or a Hub id: a causal language model of transformers, or a checkpoint of the authors', whose
            own pondering fields are kept where `pondering_fields` does not say otherwise.
        destination: the folder to write, whole or not at all.
        overwrite: replace a destination that is not empty.
        max_shard_size: of one file of weights, such as "5GB".
        revision: the branch, tag or commit of a model on the Hub.
        authors: it is a model of the authors' whose config.json lacks their flags: S = 3, embedding_scale =
            sqrt(hidden size) and input_scale = S, where neither config.json nor `pondering_fields` say otherwise.
        ignore_fields: names of fields of config.json to leave out.
        ignore_code: leave the source's own code behind.
        pondering_fields: see PonderingConfig.

    Returns:
        What was done, as a dict that JSON can hold. "warnings" says what may not be as it was meant.

    Raises:
        PonderingError: the source, the destination or a field cannot be used; nothing was written.
    """
    for name, value in pondering_fields.items():
        if name not in PONDERING_FIELDS:
            raise unknown_field(name)
        PONDERING_FIELDS[name][1](name, value)
    check_shard_size(max_shard_size)
    check_destination(destination, overwrite)
    found = open_checkpoint(source, revision)
    path = check_destination(destination, overwrite, found.folder)
    if found.is_pondering:
        raise PonderingError(
            f"{found.name} is a pondering checkpoint already: use it as it is, or get its plain backbone first, with "
            f"`ponder_hf.export({found.name!r}, DEST)`"
        )
    reading_arguments = {"authors": authors, "ignore_fields": ignore_fields, "ignore_code": ignore_code}
    authors_fields, empty_backbone = understand_plain(found, pondering_fields, **reading_arguments)
    names = travelling_files(found.folder)
    check_space(path, found.num_bytes)
    model = load_plain(found, empty_backbone, {**pondering_fields, **reading_arguments})
    tokenizer_class = _unnamed_tokenizer(found) if has_tokenizer(found.folder) else None
    if tokenizer_class is not None:
        model.config.tokenizer_class = tokenizer_class
    not_numbers = warnings_of_nan(found.name, model.named_parameters())
    with whole_folder(destination, overwrite) as folder:
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        copy_files(names, found.folder, folder)
        if tokenizer_class is not None:
            _name_tokenizer(folder / TOKENIZER_CONFIG, tokenizer_class)
    return {
        "source": found.name,
        "revision": found.revision,
        "destination": str(path),
        "model_type": model.config.base_config.model_type,
        "authors_checkpoint": bool(authors_fields),
        "pondering": {name: getattr(model.config, name) for name in PONDERING_FIELDS},
        "dtype": str(model.dtype).removeprefix("torch."),
        "parameters": model.num_parameters(),
        "files": sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()),
        "warnings": [*plain_warnings(found, authors_fields), *not_numbers],
    }


def _unnamed_tokenizer(found: Checkpoint) -> str | None:
    """The class of the tokenizer where its own files do not name it, but config.json or the model_type; or None."""
    tokenizer_config = found.folder / TOKENIZER_CONFIG
    if tokenizer_config.is_file() and read_json(tokenizer_config).get("tokenizer_class") is not None:
        return None
    named = found.config.get("tokenizer_class") or TOKENIZER_MAPPING_NAMES.get(found.config.get("model_type"))
    return "PreTrainedTokenizerFast" if named == "TokenizersBackend" else named  # as transformers 4.57 calls it, too


def _name_tokenizer(path: Path, tokenizer_class: str) -> None:
    """Name the class in tokenizer_config.json, where every transformers finds it without the model's configuration."""
    settings = read_json(path) if path.is_file() else {}
    path.write_text(json.dumps({**settings, "tokenizer_class": tokenizer_class}, indent=2) + "\n", encoding="utf-8")


def check_shard_size(size: int | str) -> None:
    """Raise a PonderingError unless `size` is a number of bytes, or one with a unit such as "5GB"."""
    if not (isinstance(size, int) and size > 0) and not re.fullmatch(r"[1-9]\d*(\.\d+)?\s*[KMGT]B", str(size), re.I):
        raise PonderingError(f"`max_shard_size` must be a size such as 5GB or 500MB, got {size!r}")
