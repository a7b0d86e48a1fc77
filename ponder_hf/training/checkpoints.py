"""The folder of a training run: checkpoints that appear whole or not at all, and at the end the model itself.

    OUTPUT/
        checkpoint-500/               whole, always
        _partial-checkpoint-1000/     being written; renamed to checkpoint-1000 as the last thing
        _removed-checkpoint-250/      being deleted
        config.json, model.safetensors, ...     the model after the last step; config.json comes last

Trainer never uploads what begins with an underscore, and does not see it when it looks for checkpoints.
"""

import os
import re
import shutil
from contextlib import contextmanager
from pathlib import Path

from ponder_hf import PonderingError
from ponder_hf.conversion.files import CONFIG
from ponder_hf.conversion.whole_folder import flush, flush_entry
from ponder_hf.errors import writing


PARTIAL, REMOVED = "_partial-", "_removed-"
_FINAL = "model"
_NAME = re.compile(r"checkpoint-(\d+)")
# trainer_state.json is the last file that Trainer itself writes.
_NEEDED = ("trainer_state.json", "optimizer.pt", "scheduler.pt")


def checkpoints(output):
    """The checkpoints in a run's folder, oldest first."""
    found = [(int(match[1]), path) for path in _entries(output) if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found) if path.is_dir()]


def last_checkpoint(output):
    """The newest checkpoint in a run's folder, or None."""
    return next(iter(reversed(checkpoints(output))), None)


def checkpoint_to_resume(output, resume):
    """The checkpoint that `resume` means: "last", or a folder.

    Raises:
        PonderingError: there is none, or it is not whole.
    """
    if resume == "last":
        checkpoint = last_checkpoint(output)
        if checkpoint is None:
            raise PonderingError(f"{output} has no checkpoint to resume: leave `resume` out to start")
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


def clean_up(output):
    """Remove what a run that was killed left half written or half deleted."""
    for path in _entries(output):
        if path.name.startswith((PARTIAL, REMOVED)):
            shutil.rmtree(path, ignore_errors=True)


def publish(partial, checkpoint):
    """Rename a complete folder to the name of its checkpoint; an older checkpoint of that name goes."""
    flush(partial)
    if checkpoint.exists():
        remove(checkpoint)
    partial.rename(checkpoint)
    flush_entry(checkpoint.parent)


def remove(checkpoint):
    """Delete a checkpoint; however early that ends, nobody takes what is left for one."""
    aside = checkpoint.with_name(REMOVED + checkpoint.name)
    shutil.rmtree(aside, ignore_errors=True)
    checkpoint.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def remove_oldest(output, limit, keep=None):
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
def final_model(output):
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
