"""Next-token accuracy of each pass, as a metric of `evaluate`."""

# The module, not the class: `evaluate` takes the first metric that it finds among a file's names.
from ponder_hf.metrics import pass_metric


class Metric(pass_metric.PassMetric):
    summary = "Share of tokens that were the most probable next one, for every pass of a pondering model."
    figure, plural = "accuracy", "accuracies"
