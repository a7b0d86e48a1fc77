"""Metrics that `evaluate` loads by path, and what Trainer's `compute_metrics` needs.

evaluate.load(ponder_hf.metrics.path("pondering_perplexity")).compute(predictions=texts, model_id="my-checkpoint")
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ponder_hf.modeling import PonderingError


if TYPE_CHECKING:  # torch and transformers take a while to import
    import torch
    from transformers import EvalPrediction


NAMES = ("next_token_accuracy", "pass_agreement", "pondering_perplexity")


def path(name: str) -> str:
    """The folder of a metric, for `evaluate.load`. No network is needed.

    Raises:
        PonderingError: there is no metric of that name.
    """
    if name not in NAMES:
        raise PonderingError(f"there is no metric {name!r}: the metrics are {', '.join(NAMES)}")
    return str(Path(__file__).with_name(name))


def figures(
    texts: Sequence[str],
    model_id: str,
    pondering_steps: int | None = None,
    device: str | None = None,
    progress: bool = False,
) -> list[dict[str, float | None]]:
    """What every metric here is computed from: `PassSums.figures` of texts, each pass 0 .. S.

    Args:
        texts: each alone; the first token of each is not predicted.
        model_id: a folder or a Hub id, of a pondering or a plain model.
        pondering_steps, device: as in `ponder_hf.evaluate_text`.
        progress: whether a bar on standard error shows how far it is.

    Raises:
        PonderingError: the model or the texts cannot be used, or a loss is no finite number.
    """
    from ponder_hf.evaluation import measure_texts
    from ponder_hf.evaluation.load import load_for_evaluation
    from ponder_hf.evaluation.passes import check_finite

    loaded = load_for_evaluation(model_id, device=device, pondering_steps=pondering_steps)
    sums = measure_texts(loaded.model, loaded.tokenizer, texts, pondering_steps, progress)
    check_finite(sums.losses, loaded.name)
    return sums.figures()


def predicted_tokens(logits: Any, labels: "torch.Tensor") -> "torch.Tensor":
    """The most probable token at each position: Trainer's `preprocess_logits_for_metrics`.

    Without it Trainer keeps the logits of the whole evaluation.

    Args:
        logits: (B, T, V), or a tuple that begins with them.
        labels: not read.
    """
    return (logits[0] if isinstance(logits, (tuple, list)) else logits).argmax(-1)


def compute_metrics(prediction: "EvalPrediction") -> dict[str, float]:
    """Next-token accuracy of the last pass: Trainer's `compute_metrics`, beside `predicted_tokens`.

    Args:
        prediction: with `predictions` (N, T), the predicted tokens, and `label_ids` (N, T), not shifted.

    Returns:
        `accuracy`, the share of labelled tokens that were the most probable one, and `accuracy_stderr`, its standard
        error over the rows (`PassSums.figures`), where there are several.
    """
    import torch

    from ponder_hf.evaluation.passes import PassStatistics, shifted

    predictions, labels = torch.as_tensor(prediction.predictions), torch.as_tensor(prediction.label_ids)
    if predictions.shape != labels.shape:
        raise PonderingError(
            f"compute_metrics got predictions of shape {tuple(predictions.shape)} for labels of shape "
            f"{tuple(labels.shape)}: give Trainer `preprocess_logits_for_metrics=ponder_hf.metrics.predicted_tokens`"
        )
    no_losses = torch.zeros(1, *labels.shape, dtype=torch.float64)
    (figures,) = PassStatistics(no_losses, predictions[None], shifted(labels)).sums().figures()
    return {name: value for name in ("accuracy", "accuracy_stderr") if (value := figures[name]) is not None}
