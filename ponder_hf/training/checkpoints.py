"""The folder of a training run: checkpoints that appear whole or not at all, and at the end the model itself.

    OUTPUT/
        checkpoint-500/               whole, always
        _partial-checkpoint-1000/     being written; renamed to checkpoint-1000 as the last thing
        _removed-checkpoint-250/      being deleted
        config.json, model.safetensors, ...     the model after the last step; config.json comes last

Trainer never uploads what begins with an underscore, and does not see it when it looks for checkpoints.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig
from transformers.trainer_utils import get_last_checkpoint

from ponder_hf.conversion.files import CONFIG
from ponder_hf.conversion.whole_folder import flush, flush_entry
from ponder_hf.errors import reading, writing
from ponder_hf.modeling import PonderingError

from .arguments import FREE_ON_RESUME, check_argument_names, current_names
from .options import OPTION_NAMES, TrainOptions


RECORD = "ponder_training.json"  # in every checkpoint: what it was made with
PARTIAL, REMOVED = "_partial-", "_removed-"
_FINAL = "model"
_NAME = re.compile(r"checkpoint-(\d+)")
# Options that say how this call is to be carried out, or where its data now lies, which its fingerprint checks.
_FREE_OPTIONS = frozenset("output resume overwrite merge data validation data_name".split())
# trainer_state.json is the last file that Trainer itself writes.
_NEEDED = ("trainer_state.json", "optimizer.pt", "scheduler.pt")


def checkpoints(output: Path) -> list[Path]:
    """The checkpoints in a run's folder, oldest first."""
    found = [(int(match[1]), path) for path in _entries(output) if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found) if path.is_dir()]


def last_checkpoint(output: Path) -> Path | None:
    """The newest checkpoint in a run's folder, or None."""
    found = get_last_checkpoint(output) if output.is_dir() else None
    return None if found is None else Path(found)


def checkpoint_to_resume(output: Path, resume: str) -> Path:
    """The checkpoint that `resume` means: "last", or a folder.

    Raises:
        PonderingError: there is none, or it is not whole.
    """
    if resume == "last":
        newest = last_checkpoint(output)
        if newest is None:
            raise PonderingError(f"{output} has no checkpoint to resume: leave `resume` out to start")
        checkpoint = newest
    else:
        checkpoint = Path(resume).expanduser()
        if not checkpoint.is_dir() and (output / resume).is_dir():
            checkpoint = output / resume
        if not checkpoint.is_dir():
            raise PonderingError(f"there is no checkpoint {resume}: check the path, or give `resume='last'`")
        if checkpoint.name.startswith((PARTIAL, REMOVED)):
            raise PonderingError(f"{resume} is not whole: a run was ended while it wrote it; give another checkpoint")
    has_engine_state = any(checkpoint.glob("global_step*")) or any(checkpoint.glob("*fsdp*"))
    for name in _NEEDED:
        if not (checkpoint / name).is_file() and not (has_engine_state and name != _NEEDED[0]):
            raise PonderingError(
                f"{checkpoint} cannot be resumed, it has no {name}: give a checkpoint of `ponder-hf train`, or use it "
                "as `source` of a new run"
            )
    return checkpoint


def clean_up(output: Path) -> None:
    """Remove what a run that was killed left half written or half deleted."""
    for path in _entries(output):
        if path.name.startswith((PARTIAL, REMOVED)):
            shutil.rmtree(path, ignore_errors=True)


def publish(partial: Path, checkpoint: Path) -> None:
    """Rename a complete folder to the name of its checkpoint; an older checkpoint of that name goes."""
    flush(partial)
    if checkpoint.exists():
        remove(checkpoint)
    partial.rename(checkpoint)
    flush_entry(checkpoint.parent)


def remove(checkpoint: Path) -> None:
    """Delete a checkpoint; however early that ends, nobody takes what is left for one."""
    aside = checkpoint.with_name(REMOVED + checkpoint.name)
    shutil.rmtree(aside, ignore_errors=True)
    checkpoint.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def remove_oldest(output: Path, limit: int | None, keep: str | os.PathLike | None = None) -> None:
    """Delete the oldest checkpoints above `limit`, but neither the newest nor `keep`."""
    if not limit or limit < 0:
        return
    found = checkpoints(output)
    for checkpoint in found[:-1]:
        if len(found) <= limit:
            break
        if keep is None or checkpoint != Path(keep):
            remove(checkpoint)
            found.remove(checkpoint)


@contextmanager
def final_model(output: Path) -> Iterator[Path]:
    """A context that gives a folder to save a model in, and moves its files into `output` at the end.

    config.json comes last and an older one goes first, so that a folder with a config.json holds a whole model.
    """
    partial = output / f"{PARTIAL}{_FINAL}"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with writing(output):
            partial.mkdir(parents=True)
            yield partial
            flush(partial)
            marks = [CONFIG, "adapter_config.json"]
            for name in marks:
                (output / name).unlink(missing_ok=True)
            for path in sorted(partial.iterdir(), key=lambda path: path.name in marks):
                _replace(path, output / path.name)
            flush_entry(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _replace(path, destination):
    if destination.is_dir():
        shutil.rmtree(destination)
    os.replace(path, destination)


def _entries(output):
    return list(output.iterdir()) if output.is_dir() else []


def make_record(options: TrainOptions, arguments: dict[str, Any], fingerprint: str) -> dict[str, Any]:
    """The record of a run, as a dict that JSON can hold."""
    return {"options": options.as_dict(), "arguments": arguments, "fingerprint": fingerprint}


def read_record(checkpoint: Path) -> dict[str, Any]:
    """The record in a checkpoint.

    Raises:
        PonderingError: there is none, because something else wrote the checkpoint.
    """
    path = checkpoint / RECORD
    if not path.is_file():
        raise PonderingError(
            f"{checkpoint} has no {RECORD}, `ponder-hf train` did not write it: use it as `source` of a new run"
        )
    with reading(path):
        return json.loads(path.read_text(encoding="utf-8"))


def resumed_options(options: TrainOptions, checkpoint: Path) -> tuple[TrainOptions, dict[str, Any], dict[str, Any]]:
    """The options and arguments of the run that goes on from a checkpoint, and its record.

    What is given again must say what the record says, unless it may differ.

    Raises:
        PonderingError: something given contradicts the checkpoint.
    """
    record = read_record(checkpoint)
    stored = {**TrainOptions().as_dict(), **record["options"]}  # one that is newer than the checkpoint was not said
    given = {name: getattr(options, name) for name in options.given if name in OPTION_NAMES}
    for name, value in given.items():
        if name not in _FREE_OPTIONS and value != stored[name]:
            raise _contradiction(name, value, stored[name], checkpoint)
    check_argument_names(options.arguments)
    arguments = dict(record["arguments"])
    for name, value in current_names(options.arguments).items():
        if name not in FREE_ON_RESUME and value != arguments.get(name, value):
            raise _contradiction(name, value, arguments[name], checkpoint)
        if name not in FREE_ON_RESUME and name not in arguments:
            raise PonderingError(
                f"`{name}` was not given when {checkpoint} was made: leave it out, or start a new run with "
                f"{checkpoint} as `source`"
            )
        arguments[name] = value
    return replace(options, **{**stored, **given}), arguments, record


def check_fields(fields: dict[str, Any], config: PreTrainedConfig, checkpoint: Path) -> None:
    """Raise a PonderingError for pondering fields that are not those of the checkpoint's configuration."""
    for name, value in fields.items():
        if value != getattr(config, name):
            raise _contradiction(name, value, getattr(config, name), checkpoint)


def _contradiction(name, value, stored, checkpoint):
    return PonderingError(
        f"`{name}` is {value}, but {checkpoint} was made with {stored}: leave it out, or start a new run with "
        f"{checkpoint} as `source`"
    )
