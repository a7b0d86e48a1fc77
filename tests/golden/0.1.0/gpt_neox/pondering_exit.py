"""Adaptive pondering: a token stops as soon as its passes have converged, and passes that are not needed do not run.

A criterion measures after each pass how far a token is from having converged; the token stops when that distance is
below the threshold. With p^i the distribution that pass i predicts (softmax of its logits):

    kl        KL(p^i || p^(i-1)), in nats                                              from pass 1 on
    entropy   the entropy of p^i, in nats                                              from pass 0 on
    argmax    1 - max p^i where pass i and pass i-1 predict the same token, else 1     from pass 1 on

So a threshold of 0 never stops a token, and a larger one stops more of them. A token whose last pass is j is predicted
from pass j, and later tokens read its keys and values of pass j wherever they would read those of a later pass
(pondering_cache.py). Rows of a batch stop one by one: the rows that go on run as a batch of their own.
"""

import math

import torch

from .pondering_errors import PonderingError


class KLDivergence:
    """How much a pass has changed the prediction: KL(p^i || p^(i-1)) in nats."""

    def __call__(self, logits, previous_logits):
        """logits, previous_logits: (n, V) of this pass and the one before, None before pass 1. Returns (n,), >= 0."""
        if previous_logits is None:
            return logits.new_full(logits.shape[:1], math.inf)
        log_p, log_q = logits.log_softmax(-1), previous_logits.log_softmax(-1)
        return (log_p.exp() * (log_p - log_q)).sum(-1).clamp(min=0)


class Entropy:
    """How undecided the prediction of a pass is: its entropy in nats."""

    def __call__(self, logits, previous_logits):
        """As in KLDivergence; `previous_logits` are not read."""
        log_p = logits.log_softmax(-1)
        return -(log_p.exp() * log_p).nan_to_num(nan=0.0).sum(-1).clamp(max=0)


class ArgmaxProbability:
    """How surely a pass predicts the token that the pass before predicted: 1 - max p^i, or 1 where it does not."""

    def __call__(self, logits, previous_logits):
        """As in KLDivergence. Returns (n,) between 0 and 1."""
        if previous_logits is None:
            return logits.new_ones(logits.shape[:1])
        best, token_ids = logits.max(-1)
        distance = 1 - (best - logits.logsumexp(-1)).exp()
        return distance.where(token_ids == previous_logits.argmax(-1), 1).clamp(min=0)


CRITERIA = {"kl": KLDivergence, "entropy": Entropy, "argmax": ArgmaxProbability}


class PonderingExit:
    """When tokens stop pondering.

    criterion: called with (logits (n, V) of a pass, logits (n, V) of the pass before or None before pass 1), both in
        float32 or wider, gives the distances (n,) from convergence.
    threshold: a token stops where its distance is below.
    record: called once a forward pass with the steps (B, T) that each position took.
    """

    def __init__(self, criterion, threshold, record=None):
        self.criterion, self.threshold, self.record = criterion, threshold, record

    @classmethod
    def read(cls, criterion, threshold):
        """From what a user gave; None where no threshold was given.

        Raises:
            PonderingError: the criterion is unknown or missing, or the threshold is no number >= 0.
        """
        if isinstance(criterion, str):
            if criterion not in CRITERIA:
                known = ", ".join(map(repr, CRITERIA))
                raise PonderingError(
                    f"`pondering_exit_criterion` must be one of {known} or an object of your own, got {criterion!r}"
                )
            criterion = CRITERIA[criterion]()
        elif criterion is not None and not callable(criterion):
            raise PonderingError(
                "`pondering_exit_criterion` must be a name or callable with (logits, previous_logits), "
                f"got {criterion!r}"
            )
        if threshold is None:
            return None
        is_number = isinstance(threshold, (int, float)) and not isinstance(threshold, bool)
        if not is_number or not math.isfinite(threshold) or threshold < 0:
            raise PonderingError(f"`pondering_exit_threshold` must be a finite number >= 0, got {threshold!r}")
        if criterion is None:
            raise PonderingError(
                "`pondering_exit_threshold` needs `pondering_exit_criterion`: one of "
                f"{', '.join(map(repr, CRITERIA))} or an object of your own"
            )
        return cls(criterion, threshold)

    def recording(self, record):
        """The same, calling `record` with what happened."""
        return PonderingExit(self.criterion, self.threshold, record)

    def converged(self, logits, previous_logits):
        """(n,) booleans, from logits (n, V) of a pass and of the one before."""
        distances = self.criterion(logits, previous_logits)
        if not torch.is_tensor(distances) or distances.shape != logits.shape[:1]:
            shape = tuple(distances.shape) if torch.is_tensor(distances) else type(distances).__name__
            raise PonderingError(
                "`pondering_exit_criterion` must give one distance a token, a tensor of shape "
                f"{tuple(logits.shape[:1])}, got {shape}"
            )
        return distances < self.threshold
