"""Write the plain backbone of a pondering checkpoint as its own checkpoint."""

import os
from typing import Any

from ponder_hf.modeling import PonderingError, PonderingForCausalLM

from .checkpoint import open_checkpoint
from .convert import SHARD_SIZE, check_shard_size
from .files import copy_files, travelling_files
from .load_model import load_pondering, quantised_by
from .stored_weights import warnings_of_nan
from .whole_folder import check_destination, check_space, whole_folder


def export(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    *,
    overwrite: bool = False,
    max_shard_size: int | str = SHARD_SIZE,
    revision: str | None = None,
) -> dict[str, Any]:
    """Write the plain backbone of a pondering checkpoint, with the names and the dtype of its official checkpoints.

    Args:
        source: a folder or a Hub id.
        destination: the folder to write, whole or not at all.
        overwrite: replace a destination that is not empty.
        max_shard_size: of one file of weights, such as "5GB".
        revision: the branch, tag or commit of a model on the Hub.

    Returns:
        What was done, as a dict that JSON can hold. "warnings" says in which ways the plain model is not what the
        pondering model was; it is empty where both predict the same.

    Raises:
        PonderingError: the source or the destination cannot be used; nothing was written.
    """
    check_shard_size(max_shard_size)
    check_destination(destination, overwrite)
    found = open_checkpoint(source, revision)
    path = check_destination(destination, overwrite, found.folder)
    if not found.is_pondering:
        raise PonderingError(f"{found.name} is a plain checkpoint already: there is nothing to export")
    if quantised_by(found) is not None:
        raise PonderingError(
            f"{found.name} is quantised by {quantised_by(found)}: export the full-precision checkpoint"
        )
    names = travelling_files(found.folder)
    check_space(path, found.num_bytes)
    model = load_pondering(found)
    base = model.to_base()
    with whole_folder(destination, overwrite) as folder:
        base.save_pretrained(folder, max_shard_size=max_shard_size)
        copy_files(names, found.folder, folder)
    return {
        "source": found.name,
        "revision": found.revision,
        "destination": str(path),
        "model_type": base.config.model_type,
        "dtype": str(base.dtype).removeprefix("torch."),
        "parameters": base.num_parameters(),
        "files": sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()),
        "warnings": [*lost_by_export(model), *warnings_of_nan(found.name, base.named_parameters())],
    }


def lost_by_export(model: PonderingForCausalLM) -> list[str]:
    """One line for each way in which the plain backbone of `model` predicts differently from it.

    Nothing is lost where pondering changes nothing: without steps, or behind a gate that is still closed.
    """
    config = model.config
    scale = config.embedding_scale * config.input_scale
    ponders = config.pondering_steps > 0
    if model.pondering_gate is not None and not model.pondering_gate.weight.any():
        ponders = False
    lines = []
    if ponders:
        lines.append(
            f"pondering is lost: with S = {config.pondering_steps} the model pondered before each token, the plain "
            "one does not, and its predictions differ"
        )
    if scale != 1:
        lines.append(
            f"the backbone was trained on token embeddings times {scale:g}, which the plain model does not apply: "
            "alone it was never trained"
        )
    return lines
