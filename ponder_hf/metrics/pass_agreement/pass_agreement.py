"""Agreement of the passes, as a metric of `evaluate`."""

# The module, not the class: `evaluate` takes the first metric that it finds among a file's names.
from ponder_hf.metrics import pass_metric


class Metric(pass_metric.PassMetric):
    summary = "Share of tokens for which a pass predicts the same as the last one, for every pass of a model."
    figure, plural = "agreement", "agreements"
