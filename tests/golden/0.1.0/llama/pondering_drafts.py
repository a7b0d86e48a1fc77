"""Where the drafts of self-speculative generation come from.

A source is called with the last hidden states of passes before the last one, and gives hidden states for the model's
own head to read its drafts from, or None where the passes' own are to be read. It may have a method `token`, which
may put another token in place of a prediction. A draft never changes what is generated, only how fast.
"""

from array import array

import torch
from torch import nn
from torch.nn import functional

from .pondering_errors import PonderingError


_BYTES = array("q").itemsize


def read_source(source, model):
    """The object that `draft_source` means.

    None: the model's trained heads where it has them, else the passes' own predictions. "own", "heads": these.
    "prompt_lookup": what the text repeats, else as None. An object is taken as it is.

    Raises:
        PonderingError: none of these.
    """
    heads = getattr(model, "draft_heads", None)
    if source is None:
        return OwnPredictions() if heads is None else heads
    if source == "own":
        return OwnPredictions()
    if source == "heads":
        if heads is None:
            raise PonderingError("`draft_source` is 'heads', but the model has none: train them, or use 'own'")
        return heads
    if source == "prompt_lookup":
        return PromptLookup(read_source(None, model))
    if isinstance(source, str) or not callable(source):
        raise PonderingError(
            f"`draft_source` must be 'own', 'heads', 'prompt_lookup' or an object like PromptLookup, got {source!r}"
        )
    return source


class OwnPredictions:
    """Each pass's own prediction, nothing trained for it: good on models trained with `intermediate_loss_weight`."""

    def __call__(self, hidden_states, first_pass):
        return None


class DraftHeads(nn.Module):
    """One small residual network a pass, h + down(gelu(up(h))), trained to see what the last pass will see.

    All passes are computed in one batched product. `down` starts at zero, so untrained heads are the passes' own
    predictions.
    """

    def __init__(self, num_passes, hidden_size):
        super().__init__()
        inner_size = 2 * hidden_size
        self.up = nn.Parameter(torch.empty(num_passes, hidden_size, inner_size))
        self.up_bias = nn.Parameter(torch.empty(num_passes, 1, inner_size))
        self.down = nn.Parameter(torch.empty(num_passes, inner_size, hidden_size))
        self.down_bias = nn.Parameter(torch.empty(num_passes, 1, hidden_size))
        self.reset()

    def reset(self):
        """Begin anew."""
        nn.init.normal_(self.up, std=self.up.shape[1] ** -0.5)
        for parameter in (self.up_bias, self.down, self.down_bias):
            nn.init.zeros_(parameter)

    def forward(self, hidden_states, first_pass=0):
        """hidden_states: (n, N, d), of passes first_pass, first_pass + 1, .... Returns the same shape.

        A pass that has no head keeps its own.
        """
        num_passes = len(hidden_states)
        num_heads = min(num_passes, max(0, len(self.up) - first_pass))
        if num_heads < num_passes:
            if num_heads == 0:
                return hidden_states
            return torch.cat([self(hidden_states[:num_heads], first_pass), hidden_states[num_heads:]])
        weights = self.up, self.up_bias, self.down, self.down_bias
        if num_heads < len(self.up):
            weights = (weight[first_pass : first_pass + num_heads] for weight in weights)
        up, up_bias, down, down_bias = weights
        inner = functional.gelu(torch.baddbmm(up_bias, hidden_states, up))
        return hidden_states + torch.baddbmm(down_bias, inner, down)


class PromptLookup:
    """Drafts what followed the last time that the text's newest tokens stood together, as text often repeats itself.

    Args:
        source: what to fall back on, and what corrects the drafts.
        max_ngram_size: how many of the newest tokens are looked up together at most.
        min_ngram_size: at least.
    """

    def __init__(self, source=None, max_ngram_size=4, min_ngram_size=2):
        if not 1 <= min_ngram_size <= max_ngram_size:
            raise PonderingError(
                f"`min_ngram_size` and `max_ngram_size` must be integers with 1 <= min <= max, got {min_ngram_size} "
                f"and {max_ngram_size}"
            )
        self.source = OwnPredictions() if source is None else source
        self.sizes = range(max_ngram_size, min_ngram_size - 1, -1)

    def __call__(self, hidden_states, first_pass):
        return self.source(hidden_states, first_pass)

    def token(self, prompt, pass_index, token_ids, predicted):
        """The draft that follows `token_ids` (a list) of this prompt, where the pass predicts `predicted`."""
        if pass_index > 0:
            return predicted
        # As bytes, which are searched in no time however long the text is.
        text = array("q", token_ids[:-1]).tobytes()
        for size in self.sizes:
            newest = array("q", token_ids[-size:]).tobytes()
            start = text.rfind(newest) if len(token_ids) > size else -1
            while start % _BYTES and start >= 0:  # it begins within a number
                start = text.rfind(newest, 0, start + len(newest) - 1)
            if start >= 0:
                return token_ids[start // _BYTES + size]
        return predicted
