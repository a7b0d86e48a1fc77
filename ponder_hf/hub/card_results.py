"""Results of `evaluate_tasks` and `evaluate_text` in the `model-index` of a model card, with what they were got by."""

import os
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard

from ponder_hf import __version__
from ponder_hf.conversion.whole_folder import whole_file
from ponder_hf.evaluation.tables import by_steps
from ponder_hf.modeling import PonderingError

from .card import CARD, check, facts_of_folder, render


_HARNESS = "https://github.com/EleutherAI/lm-evaluation-harness"


# Of each pass, in the order of a card.
_FIGURES = ("loss", "perplexity", "bits_per_byte", "accuracy", "agreement")


def eval_results(result: dict[str, Any]) -> list[EvalResult]:
    """A result of `evaluate_tasks`, of `evaluate_text`, or both in one dict, as huggingface_hub's EvalResults.

    One for each task, metric and S, and one for each figure of each pass on the text.
    """
    return [*(_of_tasks(result) if "tasks" in result else ()), *(_of_text(result) if "passes" in result else ())]


def _of_text(result):
    names = [Path(name).name if Path(name).exists() else name for name in result["data"]]  # no path of this machine
    arguments = {"block_size": result["block_size"], "stride": result["stride"], "tokens": result["tokens"]}
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=", ".join(names),
            dataset_name=", ".join(names),
            dataset_args={name: value for name, value in arguments.items() if value is not None},
            metric_type=figure,
            metric_name=f"{figure.replace('_', ' ')} of pass {index}",
            metric_value=round(figures[figure], 4),
            metric_args={"pass": index, "ponder_hf": __version__},
        )
        for index, figures in enumerate(result["passes"])
        for figure in _FIGURES
        if figures[figure] is not None
    ]


def _of_tasks(result):
    harness = result["harness"]
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=name,
            dataset_name=name if result["items_from"] is None else f"{name} (items from files)",
            dataset_args={"num_few_shot": result["num_fewshot"][name], "num_items": result["num_items"][name]},
            metric_type=metric,
            metric_name=metric,
            metric_value=round(value, 4),
            metric_args={"pondering_steps": steps},
            source_name=f"{harness['name']} {harness['version']}",
            source_url=_HARNESS,
        )
        for steps, tasks in by_steps(result)
        for name, metrics in tasks.items()
        for metric, value in metrics.items()
        if not metric.endswith("stderr")
    ]


def write_results(folder: str | os.PathLike, result: dict[str, Any]) -> None:
    """Put results into the card of a checkpoint, which is written where there is none.

    What the card already says of the same task or text, metric, shots, S or pass, and version is replaced; all else
    stays.

    Args:
        folder: the checkpoint.
        result: as `ponder_hf.evaluate_tasks` or `ponder_hf.evaluate_text` gives it, or both in one dict.

    Raises:
        PonderingError: it is no folder, or the card's metadata cannot be used.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise PonderingError(f"{folder} is no folder: results go into the card of a checkpoint on this machine")
    path = folder / CARD
    text = path.read_text(encoding="utf-8") if path.is_file() else render(facts_of_folder(folder))
    check(text)
    card, new = ModelCard(text), eval_results(result)
    data: Any = card.data
    known = [old for old in data.eval_results or [] if not any(old.is_equal_except_value(each) for each in new)]
    data.eval_results = [*known, *new]
    data.model_name = data.model_name or folder.resolve().name
    with whole_file(path) as partial:  # people write into cards, too: never half of one
        card.save(partial)
