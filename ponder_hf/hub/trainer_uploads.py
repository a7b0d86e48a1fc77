"""What a Trainer leaves on the Hub: while it trains, and at the end."""

import logging
import os
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import CommitOperationAdd, HfApi
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.dynamic_module_utils import custom_object_save

from ponder_hf.conversion.files import ADAPTER_CONFIG, CONFIG, files_below, read_json
from ponder_hf.modeling import PonderingError

from .card import CARD, facts_of_folder, hub_id, render, with_training
from .push import push


if TYPE_CHECKING:  # it takes a while to import
    from transformers import Trainer


logger = logging.getLogger(__name__)


class CodeOnPush(TrainerCallback):
    """For transformers' own Trainer: what it uploads while training includes the model's code.

    Trainer copies a fixed list of files from a checkpoint to the folder that it uploads; code is not in it.
    `Trainer(model, args, callbacks=[CodeOnPush()], ...)` is all. `ponder-hf train` has no need of it.
    """

    def on_push_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        if state.is_world_process_zero and model is not None:
            plain = getattr(model, "module", model)
            plain = plain.get_base_model() if hasattr(plain, "get_base_model") else plain
            custom_object_save(plain, args.output_dir, config=plain.config)


def write_card_of_run(folder: Path, trainer: "Trainer", options: Mapping[str, Any]) -> None:
    """Write the model card of a training run into a checkpoint's folder.

    Args:
        folder: of the checkpoint.
        trainer: what it did and measured is told.
        options: what `ponder-hf train` was told, or an empty dict.
    """
    if not any((folder / name).is_file() for name in (CONFIG, ADAPTER_CONFIG)):
        return  # sharded in a way that only its own run reads
    names = options.get("data") or []
    datasets = tuple(name for name in map(hub_id, names) if name)
    validation = next((name for name in map(hub_id, options.get("validation") or []) if name), None)
    facts = facts_of_folder(folder)
    facts = replace(
        with_training(facts, trainer),
        name=Path(trainer.args.output_dir).name,
        datasets=datasets,
        data=tuple(name if hub_id(name) else Path(name).name for name in names),
        evaluated_on=datasets[0] if datasets and options.get("held_out") is not None else validation,
        base_model=hub_id(options.get("source")) or facts.base_model,
    )
    (folder / CARD).write_text(render(facts), encoding="utf-8")


def push_result(
    folder: str | os.PathLike, repository: str, *, token: str | None = None, **settings: Any
) -> dict[str, Any]:
    """Push what a run leaves. An adapter's base that only lies in the run's folder goes to a repository beside it."""
    folder, base_model = Path(folder), None
    if (folder / ADAPTER_CONFIG).is_file():
        base = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
        if hub_id(base) is None and base and Path(base).is_dir():
            base_model = f"{repository}-base"
            push(base, base_model, token=token, private=settings.get("private", False), skip_unsafe=True)
    return push(folder, repository, token=token, base_model=base_model, skip_unsafe=True, **settings)


def push_in_background(folder: Path, repository: str, place_of_state: str | None, **settings: Any) -> Future:
    """Begin to push a checkpoint, and its state below `place_of_state` unless that is None. Returns the future.

    The checkpoint may be deleted meanwhile: what is pushed are hard links to its files.
    """
    kept = folder.with_name(f"_partial-push-{folder.name}")
    shutil.rmtree(kept, ignore_errors=True)
    shutil.copytree(folder, kept, copy_function=_link)
    return _one_by_one().submit(_push_and_remove, kept, repository, place_of_state, settings)


@cache
def _one_by_one() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=1)  # two commits at once would get into each other's way


def _push_and_remove(folder: Path, repository: str, place_of_state: str | None, settings: dict[str, Any]) -> None:
    try:
        push_result(folder, repository, **settings)
        if place_of_state is not None:
            _push_state(folder, repository, place_of_state, **settings)
    except (PonderingError, OSError) as error:  # training goes on; the next checkpoint, or the end, tries again
        logger.warning("a checkpoint could not be uploaded: %s", error)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _push_state(
    folder: Path,
    repository: str,
    place: str,
    *,
    token: str | None = None,
    revision: str | None = None,
    message: str | None = None,
    private: bool | None = None,
) -> None:
    """All files of a checkpoint, the optimiser's too: whoever chose this hub_strategy wants to resume from there."""
    operations = [
        CommitOperationAdd(f"{place}/{path.relative_to(folder).as_posix()}", str(path))
        for path in files_below(folder)
        if path.is_file()
    ]
    HfApi(token=token).create_commit(
        repository, operations, commit_message=f"{message}, checkpoint", revision=revision
    )


def _link(source: str, destination: str) -> None:
    try:
        os.link(source, destination)
    except OSError:
        shutil.copyfile(source, destination)
