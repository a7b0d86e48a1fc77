"""Perplexity of each pass, as a metric of `evaluate`."""

# The module, not the class: `evaluate` takes the first metric that it finds among a file's names.
from ponder_hf.metrics import pass_metric


class Metric(pass_metric.PassMetric):
    summary = "Perplexity of every pass of a pondering model over all tokens of the texts."
    figure, plural = "perplexity", "perplexities"
