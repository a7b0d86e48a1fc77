"""What the metrics of `evaluate` in this folder share: each reads one figure of every pass."""

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate

from ponder_hf.metrics import figures


_CITATION = "Zeng et al. 2025, Pretraining Language Models to Ponder in Continuous Space, arXiv 2505.20674"
_INPUTS = """
Args:
    predictions (list of str): texts, each alone; the first token of each is not predicted.
    model_id (str): a folder or a Hub id, of a pondering or a plain model, which has one pass.
    pondering_steps (int): S in place of the model's own.
    device (str): such as "cuda". Default: an accelerator, if there is one.
Returns:
    {plural} (list of float): one number a pass, 0 .. S.
    stderrs (list of float): their standard errors over the texts, None for one text alone.
    {figure} (float): the last pass's.
"""


class PassMetric(evaluate.Metric):
    """A figure of each pass; a child says which.

    Attributes:
        summary: what it is, in a sentence.
        figure: its name in what `PassSums.figures` gives.
        plural: the name of the list of all passes' in the result.
    """

    summary: str
    figure: str
    plural: str

    def __init_subclass__(cls) -> None:
        cls.__doc__ = cls.summary + "\n" + _INPUTS.format(figure=cls.figure, plural=cls.plural)

    def _info(self) -> Any:
        return evaluate.MetricInfo(
            description=self.summary,
            citation=_CITATION,
            inputs_description=_INPUTS.format(figure=self.figure, plural=self.plural),
            features=datasets.Features({"predictions": datasets.Value("string")}),
        )

    def _compute(
        self,
        predictions: Sequence[str],
        model_id: str,
        pondering_steps: int | None = None,
        device: str | None = None,
    ) -> dict[str, Any]:
        passes = figures(predictions, model_id, pondering_steps, device)
        return {
            self.plural: [each[self.figure] for each in passes],
            "stderrs": [each[f"{self.figure}_stderr"] for each in passes],
            self.figure: passes[-1][self.figure],
        }
