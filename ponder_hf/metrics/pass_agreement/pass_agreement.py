"""Agreement of the passes, as a metric of `evaluate`."""

# One import a line: `evaluate` reads these lines by itself and misreads `import a, b`.
import datasets
import evaluate

from ponder_hf.metrics import figures


_DESCRIPTION = """Share of tokens for which a pass predicts the same as the last one, for every pass of a model."""
_CITATION = "Zeng et al. 2025, Pretraining Language Models to Ponder in Continuous Space, arXiv 2505.20674"
_INPUTS = """
Args:
    predictions (list of str): texts, each alone; the first token of each is not predicted.
    model_id (str): a folder or a Hub id, of a pondering or a plain model, which has one pass.
    pondering_steps (int): S in place of the model's own.
    device (str): such as "cuda". Default: an accelerator, if there is one.
Returns:
    agreements (list of float): one number a pass, 0 .. S.
    stderrs (list of float): their standard errors over the texts, None for one text alone.
    agreement (float): the last pass's.
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS)
class Metric(evaluate.Metric):
    """Agreement of the passes."""

    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": datasets.Value("string")}),
        )

    def _compute(self, predictions, model_id, pondering_steps=None, device=None):
        passes = figures(predictions, model_id, pondering_steps, device)
        return {
            "agreements": [each["agreement"] for each in passes],
            "stderrs": [each["agreement_stderr"] for each in passes],
            "agreement": passes[-1]["agreement"],
        }
