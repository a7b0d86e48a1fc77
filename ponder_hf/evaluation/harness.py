"""Tasks with questions and answers, by lm-evaluation-harness: from the Hub, or from files on this machine.

The harness's own class for transformers' models does the work, so that its command gives the same numbers for the same
checkpoint. Here is what it leaves to the caller: which tasks, with how many passes, from where, and going on after a
run that was killed.
"""

import contextlib
import hashlib
import json
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ponder_hf.data.tables import import_optional
from ponder_hf.errors import first_line, writing
from ponder_hf.modeling import PonderingError
from ponder_hf.modeling.configuration_pondering import check_steps

from .load import load_for_evaluation, warn_of_untrained
from .published import published_averages
from .tasks import items


TASK_FILES = Path(__file__).with_name("tasks")
# The nine of arXiv 2505.20674, and where the harness describes them: its list of all tasks takes long to read.
PAPER_TASKS = {
    "lambada_openai": "lambada/lambada_openai.yaml",
    "lambada_standard": "lambada/lambada_standard.yaml",
    "piqa": "piqa/piqa.yaml",
    "winogrande": "winogrande/default.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "arc_challenge": "arc/arc_challenge.yaml",
    "sciq": "sciq/sciq.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "race": "race/race.yaml",
}


def evaluate_tasks(
    model: str | os.PathLike | PreTrainedModel,
    tasks: str | Sequence[str],
    *,
    tasks_from: str | os.PathLike | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    pondering_steps: int | Sequence[int] | None = None,
    tokenizer: str | os.PathLike | PreTrainedTokenizerBase | None = None,
    batch_size: int = 1,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    revision: str | None = None,
    bootstrap_iters: int = 100_000,
    progress: bool = False,
) -> dict[str, Any]:
    """Measure a model on tasks of lm-evaluation-harness.

    Every answer is kept until the run is done, so one that was killed and is started again goes on.

    Args:
        model: a pondering or a plain model: a folder, a Hub id, or a model that is loaded already.
        tasks: names of the harness, or "paper" for the nine tasks of the paper.
        tasks_from: a folder with items (see `ponder_hf.evaluation.tasks.items`), NAME.jsonl for each task, or with the
            harness's task files. A task that it has not is the harness's own, whose data comes from the Hub.
        num_fewshot: solved examples before each question. None: what the task says, usually 0.
        limit: no more than the first so many items of each task.
        pondering_steps: S in place of the model's own, or several of them.
        tokenizer: as in `evaluate_text`.
        batch_size: rows that go through the model at once, at most: those of one length, so that nothing is padded.
            On a CPU they go one at a time, and the results are the same to the last digit. On other devices they
            differ by rounding, where kernels add up in another order for more rows.
        dtype, device, revision: as in `evaluate_text`.
        bootstrap_iters: resamplings for the standard errors of what is no mean; the harness's own number.
        progress: whether bars on standard error show how far it is.

    Returns:
        A dict that JSON can hold. `tasks` has for each task its metrics (`acc`, `acc_stderr`, ...); where several S
        were asked for, first each of them as text. `num_fewshot` and `num_items` of each task; `harness`, its version;
        further the `source`, its `revision`, `limit`, `pondering_steps`, `dtype`, `batch_size`; and `published`,
        averages that others published for a model of this name.

    Raises:
        PonderingError: a task, its items, the model or the tokenizer cannot be used, or the model predicts NaN.
    """
    import_optional("lm_eval", "to evaluate tasks", extra="eval")
    steps = _checked_steps(pondering_steps)
    for name, value, least in (("limit", limit, 1), ("num_fewshot", num_fewshot, 0), ("batch_size", batch_size, 1)):
        if value is not None and value < least:
            raise PonderingError(f"`{name}` must be at least {least}, got {value}")
    names = _task_names(tasks)
    with _quiet():
        manager, specs = _find_tasks(names, tasks_from)  # a wrong name, before a model is loaded
        loaded = load_for_evaluation(
            model,
            tokenizer=tokenizer,
            dtype=dtype,
            device=device,
            revision=revision,
            pondering_steps=max(steps or [0]),
        )
        own = loaded.pondering_steps
        settings = {"num_fewshot": num_fewshot, "limit": limit, "bootstrap_iters": bootstrap_iters}
        answers, found = _run(
            loaded, steps or [own], batch_size, progress, task_manager=manager, tasks=specs, **settings
        )
    several = isinstance(pondering_steps, Sequence) and len(steps) > 1
    by_task = {name: {step: result[name] for step, result in answers.items()} for name in next(iter(answers.values()))}
    is_published = loaded.revision is not None and (steps or [own]) == [own]  # a folder may be anybody's
    return {
        "source": loaded.name,
        "revision": loaded.revision,
        "tasks": by_task if several else {name: next(iter(each.values())) for name, each in by_task.items()},
        "pondering_steps": list(steps) if several else (steps or [own])[0],
        **_circumstances(found, list(by_task)),
        "limit": limit,
        "items_from": None if tasks_from is None else str(tasks_from),
        "batch_size": batch_size,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "published": published_averages(loaded.name) if is_published else [],
    }


def _circumstances(found: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """What results of the harness must be told with to mean anything."""
    return {
        "num_fewshot": {name: found["n-shot"].get(name) for name in names},
        "num_items": {name: found["n-samples"].get(name, {}).get("effective") for name in names},
        "harness": {"name": "lm-evaluation-harness", "version": version("lm_eval")},
        "task_versions": {name: found["versions"].get(name) for name in names},
    }


def accuracies_average(tasks: dict[str, dict[str, Any]]) -> float | None:
    """The mean of the accuracies of the paper's nine tasks, or None where one of them is missing."""
    found = [tasks[name]["acc"] for name in PAPER_TASKS if "acc" in tasks.get(name, {})]
    return sum(found) / len(found) if len(found) == len(PAPER_TASKS) else None


def _checked_steps(pondering_steps):
    steps = [pondering_steps] if isinstance(pondering_steps, int) else list(pondering_steps or [])
    for step in steps:
        check_steps("pondering_steps", step)
    return list(dict.fromkeys(steps))


def _task_names(tasks):
    names = tasks.split(",") if isinstance(tasks, str) else [name for each in tasks for name in each.split(",")]
    names = [name.strip() for name in names if name.strip()]
    if not names:
        raise PonderingError("`tasks` names no task: give names of lm-evaluation-harness, or paper")
    return list(dict.fromkeys(task for name in names for task in (PAPER_TASKS if name == "paper" else [name])))


def _find_tasks(names, tasks_from):
    """A TaskManager and what it shall load. Items on this machine come first, then task files, then the harness."""
    import lm_eval.tasks

    has_items, folder = [], None if tasks_from is None else Path(tasks_from).expanduser()
    if folder is not None:
        if not folder.is_dir():
            raise PonderingError(f"there is no folder {folder}: `tasks_from` is one with items or task files")
        has_items = [name for name in names if items.find(folder, name)]
    for name in has_items:
        try:
            items.load(items.find(folder, name))
        except items.ItemsError as error:
            raise PonderingError(str(error)) from error
    include = [str(TASK_FILES), *([str(folder)] if folder is not None else [])]
    metadata = {} if folder is None else {"items_folder": str(folder.resolve())}
    own_files = Path(lm_eval.tasks.__file__).parent
    manager = lm_eval.tasks.TaskManager(include_path=include[1:], include_defaults=False, metadata=metadata)
    specs, unknown = [], []
    for name in names:
        if name in has_items:
            shipped = TASK_FILES / f"{name}.yaml"
            specs.append(str(shipped) if shipped.is_file() else _task_of_items(name, folder))
        elif name in manager.all_tasks:
            specs.append(name)
        elif name in PAPER_TASKS:
            specs.append(str(own_files / PAPER_TASKS[name]))
        else:
            specs.append(name)
            unknown.append(name)
    if unknown:  # the whole list of the harness
        manager = lm_eval.tasks.TaskManager(include_path=include[1:], metadata=metadata)
        for name in unknown:
            if name not in manager.all_tasks:
                raise _unknown_task(name, manager.all_tasks, folder)
    return manager, specs


def _task_of_items(name, folder):
    """A task for items of a name that no task file here knows."""
    item = items.load(items.find(folder, name))[0]
    is_choice = "gold" in item
    if "context_options" in item:
        texts = {"doc_to_text": "gold", "doc_to_target": "continuation", "doc_to_choice": "context_options"}
    elif is_choice:
        texts = {"doc_to_text": "context", "doc_to_target": "gold", "doc_to_choice": "choices"}
    else:
        texts = {"doc_to_text": "context", "doc_to_target": "{{' '+continuation}}"}
    accuracy = {"metric": "acc", "aggregation": "mean", "higher_is_better": True}
    return {
        "task": name,
        "custom_dataset": items.read,
        "dataset_kwargs": {"name": name},
        "output_type": "multiple_choice" if is_choice else "loglikelihood",
        "test_split": "test",
        "fewshot_split": "test",
        **texts,
        "metric_list": [accuracy, *([{**accuracy, "metric": "acc_norm"}] if "choices" in item else [])],
    }


def _unknown_task(name, known, folder):
    near = get_close_matches(name, [*(items.names(folder) if folder else []), *PAPER_TASKS, *known], n=3)
    where = f"neither {folder} nor lm-evaluation-harness has" if folder else "lm-evaluation-harness has no"
    hint = f"did you mean {' or '.join(dict.fromkeys(near))}?" if near else "`lm_eval ls tasks` lists them all"
    return PonderingError(f"{where} {'a ' if folder else ''}task {name}: {hint}")


def _run(loaded, steps, batch_size, progress, **settings):
    """The metrics of each task for each S, and all that the harness gave for the last one."""
    from lm_eval.evaluator import simple_evaluate

    from .harness_model import UnpaddedModel

    answers, caches, found = {}, [], None
    for step in steps:
        warn_of_untrained(step, loaded)
        model = UnpaddedModel(loaded.model, loaded.tokenizer, batch_size, progress, loaded.name)
        caches.append(_cache_file(loaded.model, loaded.tokenizer, step, model.batch_size))
        with _pondering(loaded.model, step), _silent(progress), _task_errors():
            found = simple_evaluate(model=model, use_cache=str(caches[-1]), log_samples=False, **settings)
        answers[str(step)] = {name: _metrics(values) for name, values in found["results"].items()}
    for cache in caches:
        Path(f"{cache}_rank0.db").unlink(missing_ok=True)
    return answers, found


def _metrics(values: dict[str, Any]) -> dict[str, Any]:
    """The harness's `acc,none` as `acc`; without what is no number."""
    return {
        name.removesuffix(",none"): value
        for name, value in values.items()
        if isinstance(value, (int, float)) and name != "sample_len"
    }


def _cache_file(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, step: int, batch_size: int) -> Path:
    """Where the answers of a run are kept: under a name that only the very same run has."""
    digest = hashlib.sha256()
    packages = ("torch", "transformers", "lm_eval")
    what = [*(version(name) for name in packages), step, batch_size, str(model.device), model.config.to_dict()]
    digest.update(json.dumps(what, sort_keys=True, default=str).encode())
    backend = getattr(tokenizer, "backend_tokenizer", None)
    digest.update((backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab())).encode())
    digest.update(json.dumps(tokenizer.init_kwargs, sort_keys=True, default=str).encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    folder = Path(constants.HF_HOME) / "ponder_hf" / "answers"
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PonderingError(f"cannot keep answers in {folder}: set HF_HOME to a folder of yours")
    return folder / digest.hexdigest()[:32]


@contextlib.contextmanager
def _pondering(model: Any, steps: int) -> Iterator[None]:
    """While this is open the model's own S is this one: the harness gives its calls no arguments."""
    before = getattr(model.config, "pondering_steps", None)
    if before is None:
        yield
        return
    model.config.pondering_steps = steps
    try:
        yield
    finally:
        model.config.pondering_steps = before


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the harness logs about how it reads tasks."""
    log = logging.getLogger("lm_eval")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


@contextlib.contextmanager
def _silent(progress: bool) -> Iterator[None]:
    """Without what the harness prints while it runs. progress: bars, on standard error, stay.

    Beside the results it collects what they do not need: it asks git about the folder that it runs in, which
    complains where that is no repository, and torch about the machine, which takes seconds.
    """
    import lm_eval.evaluator

    with contextlib.ExitStack() as stack:
        for name in ("get_git_commit_hash", "add_env_info"):
            if hasattr(lm_eval.evaluator, name):
                stack.enter_context(mock.patch.object(lm_eval.evaluator, name, return_value=None))
        nowhere = stack.enter_context(open(os.devnull, "w"))
        stack.enter_context(contextlib.redirect_stdout(sys.stderr if progress else nowhere))
        if not progress:
            stack.enter_context(contextlib.redirect_stderr(nowhere))
        yield


@contextlib.contextmanager
def _task_errors() -> Iterator[None]:
    """What `datasets` raises where the data of a task cannot be had, and the harness where there is too little."""
    try:
        yield
    except items.ItemsError as error:
        raise PonderingError(str(error)) from error
    except (ConnectionError, FileNotFoundError, HfHubHTTPError) as error:  # datasets' own errors are these, too
        raise PonderingError(
            f"the data of a task is not in the cache, and the Hub does not give it ({first_line(error)}): check the "
            "network, or name a folder that has its items with `tasks_from`"
        ) from error
    except ValueError as error:
        if "larger than population" not in str(error):  # of random.sample, by which the harness draws examples
            raise
        raise PonderingError(
            "a task has fewer items than are to stand as examples before a question: lower `num_fewshot`"
        ) from error
