"""Where drafts come from, and which of them are kept: guesses of tokens that a pass makes before the last one does.

A source is called with the last hidden states of passes before the last one, and gives hidden states for the model's
own head to read its drafts from, or None where the passes' own are to be read. It may have a method `token`, which
may put another token in place of a prediction. A draft never changes what is generated, only how fast.
"""

import itertools
import math
from array import array

import torch
from torch import nn
from torch.nn import functional

from .pondering_errors import PonderingError


_BYTES = array("q").itemsize
SOURCE = 0.5  # the rank of a draft that its source puts in place of pass 0's prediction; pass i has rank i


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


class Flight:
    """The tokens of one prompt that are under way: the newest true one and the drafts behind it, oldest first.

    column: of the first. tokens: their ids, in successive columns. stages: the pass that each runs next, falling.
    ranks: who gave each of them. opinions: what else was said of its place so far, {rank: token}.
    num_verdicts, num_hits: how often the last pass met a draft, and how often the draft was right.
    """

    worth = 0.3  # a draft is worth its row in the batch where the ones before it have this chance to be right
    memory = 0.9  # how much of a running mean a new observation leaves

    def __init__(self, column, token):
        self.column, self.tokens, self.stages, self.ranks, self.opinions = column, [token], [0], [None], [{}]
        self.num_verdicts = self.num_hits = 0
        self.hit_rate = 1.0  # of late
        # (later rank, earlier rank): where they differ, how much more often the later one is right, -1 .. 1.
        self.advantages = {}

    def advantage(self, rank, other):
        """How much better than `other` this rank is where they differ. Later passes begin with a good name."""
        return self.advantages.get((rank, other), 0.5 if SOURCE not in (rank, other) else 0.0)

    @property
    def num_worthwhile(self):
        """How many drafts in a row are worth their rows, at the rate of late; never fewer than two."""
        if self.hit_rate >= 1:
            return math.inf
        return 1 + int(math.log(self.worth) / math.log(max(self.hit_rate, self.worth)))

    def settle(self, predicted, num_steps, num_drafts, num_columns, corrects=True, drafted=None):
        """Move on by one tick.

        Args:
            predicted: for each pass, the token that it now predicts to follow the one that it has just run.
            num_steps: S.
            num_drafts: how many drafts may be under way.
            num_columns: drafts stay below this column.
            corrects: whether a pass before the last one may replace a draft that it does not predict. It does so
                unless it was wrong more often than not of late where it differed from whoever gave the draft.
            drafted: the draft that its source would put in place of what pass 0 predicts, or None.

        Returns:
            The next true token, where a token has come out of pass S, or None.
        """
        tokens, stages = self.tokens, self.stages
        final = predicted[num_steps] if stages[0] == num_steps else None
        settled = 0 if final is None else 1
        if final is not None and len(tokens) > 1:
            self._learn(final)
        for index, stage in enumerate(stages):
            is_last, is_final = index + 1 == len(tokens), stage == num_steps
            token, rank = predicted[stage], stage
            opinions = {} if is_last else self.opinions[index + 1]
            opinions[rank] = token
            if is_last:
                may = is_final or (index + 1 - settled <= num_drafts and self.column + index + 1 < num_columns)
                if stage == 0 and not is_final and drafted not in (None, token):
                    opinions[SOURCE] = drafted
                    if self.advantage(SOURCE, 0) >= 0:
                        token, rank = drafted, SOURCE
            else:
                may = tokens[index + 1] != token and (
                    is_final or (corrects and self.advantage(rank, self.ranks[index + 1]) >= 0)
                )
            if may:
                behind = slice(index + 1, None)
                tokens[behind], stages[behind] = [token], [-1]
                self.ranks[behind], self.opinions[behind] = [rank], [opinions]
            if may or is_last:
                break
        self.stages = [stage + 1 for stage in stages[settled:]]
        self.tokens, self.ranks, self.opinions = tokens[settled:], self.ranks[settled:], self.opinions[settled:]
        self.column += settled
        return final

    def _learn(self, final):
        """From the true token in the place of the first draft: how good the draft and the opinions of it were."""
        is_right, opinions = self.tokens[1] == final, self.opinions[1]
        self.num_verdicts += 1
        self.num_hits += is_right
        self.hit_rate += (1 - self.memory) * (is_right - self.hit_rate)
        for other, rank in itertools.combinations(sorted(opinions), 2):
            if opinions[rank] != opinions[other]:
                now = (opinions[rank] == final) - (opinions[other] == final)
                before = self.advantage(rank, other)
                self.advantages[rank, other] = before + (1 - self.memory) * (now - before)
