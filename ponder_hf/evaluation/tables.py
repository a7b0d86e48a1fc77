"""Results of evaluations as tables for people."""

from collections.abc import Sequence
from typing import Any

from .harness import accuracies_average


def text_table(results: Sequence[dict[str, Any]]) -> str:
    """What `evaluate_text` gave for one or several checkpoints, a row for each pass.

    Losses are comparable between checkpoints with one tokenizer and one block size; bits per byte between all.
    """
    header = ["pass", "loss", "perplexity", "bits/byte", "accuracy", "agreement"]
    several = len(results) > 1
    rows = [["checkpoint", *header] if several else header]
    for result in results:
        for index, figures in enumerate(result["passes"]):
            row = [
                str(index),
                _with_error(figures, "loss", 4),
                _with_error(figures, "perplexity", 2),
                _with_error(figures, "bits_per_byte", 4),
                _with_error(figures, "accuracy", 4),
                f"{figures['agreement']:.4f}",
            ]
            rows.append([result["source"] if index == 0 else "", *row] if several else row)
    return _aligned(rows, left=several)


def tasks_table(results: Sequence[dict[str, Any]]) -> str:
    """What `evaluate_tasks` gave for one or several checkpoints, a row for each task and S.

    Below it: the average over the paper's nine tasks where all are there, and beside it what others published.
    """
    rows = [["checkpoint", "S", "task", "shots", "items", "metric", "value"]]
    notes = []
    for result in results:
        for steps, tasks in by_steps(result):
            for name, metrics in tasks.items():
                for metric in (each for each in metrics if not each.endswith("stderr")):
                    shots, items = result["num_fewshot"].get(name), result["num_items"].get(name)
                    value = _with_error(metrics, metric, 4)
                    rows.append([result["source"], str(steps), name, _shown(shots), _shown(items), metric, value])
            average = accuracies_average(tasks)
            if average is not None:
                notes.append(
                    f"{result['source']}, S = {steps}: {100 * average:.1f} on average over the nine tasks (acc)"
                )
        for each in result["published"]:
            notes.append(
                f"{result['source']}: {each['average']} on average with {each['num_fewshot']} shots, published: "
                f"{each['source']}"
            )
    if len({row[0] for row in rows[1:]}) == 1:
        rows = [row[1:] for row in rows]
    notes.append(f"lm-evaluation-harness {results[0]['harness']['version']}")
    return "\n".join([_aligned(rows, left=True), *notes])


def by_steps(result: dict[str, Any]) -> list[tuple[int, dict[str, dict[str, Any]]]]:
    """The tasks of a result of `evaluate_tasks` for each S: pairs of S and {task: {metric: value}}."""
    steps = result["pondering_steps"]
    if not isinstance(steps, list):
        return [(steps, result["tasks"])]
    return [(step, {name: each[str(step)] for name, each in result["tasks"].items()}) for step in steps]


def _with_error(figures: dict[str, Any], name: str, digits: int) -> str:
    value, error = figures[name], figures.get(f"{name}_stderr")
    if value is None:
        return "-"
    shown = f"{value:.{digits}f}"
    return shown if not isinstance(error, float) else f"{shown} ± {error:.{digits}f}"


def _shown(value: Any) -> str:
    return "-" if value is None else str(value)


def _aligned(rows: list[list[str]], left: bool = False) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) if left else cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
