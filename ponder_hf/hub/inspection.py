"""What a pondering checkpoint is, told by its files without loading or downloading its weights."""

import math
import os
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError
from huggingface_hub.utils import TensorInfo

from ponder_hf.conversion.checkpoint import download_small_files, find_folder, not_a_model
from ponder_hf.conversion.files import CONFIG, has_tokenizer, read_json
from ponder_hf.conversion.load_model import check_pondering
from ponder_hf.conversion.stored_weights import DTYPE_NAMES, num_bytes, read_headers, shard_names
from ponder_hf.errors import reading, understanding
from ponder_hf.modeling import PonderingConfig, PonderingError
from ponder_hf.modeling.configuration_pondering import PONDERING_FIELDS

from .code import inspect_code


_BACKBONE = ("vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings", "tie_word_embeddings")
_OF_THE_FILES = ("draft_heads", "pondering_format_version")


def inspect_checkpoint(source: str | os.PathLike, revision: str | None = None) -> dict[str, Any]:
    """Say how a checkpoint ponders, what its backbone and its weights are, and whose code it brings.

    Args:
        source: a folder or a Hub id. Of a model on the Hub only small files and the headers of its weights are read.
        revision: the branch, tag or commit of a model on the Hub.

    Returns:
        A dict that JSON can hold; "code" is inspect_code's.

    Raises:
        PonderingError: there is no such checkpoint, it does not ponder, or a file of it is missing or broken.
    """
    name = str(source)
    folder, commit = find_folder(name, revision), None
    if folder is None:
        folder = download_small_files(name, revision)
        commit = folder.name
    if not (folder / CONFIG).is_file():
        raise PonderingError(not_a_model(name, folder))
    config = read_json(folder / CONFIG)
    check_pondering(name, config)
    with understanding(name):
        parsed = PonderingConfig.from_pretrained(folder)
    tensors, files = _headers(name, folder, commit)
    return {
        "source": name,
        "revision": commit,
        "backbone": _backbone(parsed),
        "pondering": {name: getattr(parsed, name) for name in PONDERING_FIELDS if name not in _OF_THE_FILES},
        "draft_heads": parsed.draft_heads,
        "format_version": parsed.pondering_format_version,
        "weights": {
            "parameters": sum(math.prod(tensor.shape) for tensor in tensors.values()),
            "dtypes": sorted({DTYPE_NAMES.get(tensor.dtype, tensor.dtype) for tensor in tensors.values()}),
            "bytes": num_bytes(tensors),
            "files": files,
        },
        "tokenizer": has_tokenizer(folder),
        "code": inspect_code(name, commit),
    }


def _backbone(config: PonderingConfig) -> dict[str, Any]:
    base = config.base_config
    values = {name: getattr(config, name, None) for name in _BACKBONE}
    return {"model_type": base.model_type, "name": base._name_or_path or None, **values}


def _headers(name: str, folder: Path, commit: str | None) -> tuple[dict[str, TensorInfo], list[str]]:
    """Map each stored weight to its TensorInfo, and list the files. Of those on the Hub, the headers are asked for."""
    names = shard_names(folder)
    if commit is None or (names and all((folder / shard).is_file() for shard in names)):
        return read_headers(folder), names or []
    with reading(name):
        try:
            found = HfApi().get_safetensors_metadata(name, revision=commit)
        except (NotASafetensorsRepoError, SafetensorsParsingError) as error:
            raise PonderingError(f"{name} has no weights in safetensors files that can be read") from error
    tensors = {name: tensor for file in found.files_metadata.values() for name, tensor in file.tensors.items()}
    return tensors, sorted(found.files_metadata)
