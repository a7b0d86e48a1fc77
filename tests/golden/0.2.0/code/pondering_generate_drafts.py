"""Drafts: where guesses of coming tokens are from, and which of them are run on.

A source is called with the last hidden states of passes before the last one, and gives hidden states for the model's
own head to read its drafts from, or None where the passes' own are to be read. It may have a method `token`, which
may put another token in place of a prediction. A draft never changes what is generated, only how fast.

PendingTokens is the policy, for one prompt: a pass that predicts another token than the one that is under way may
replace it, if it has been right often enough where they differed.
"""

import itertools
import math
from array import array
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from .pondering_errors import PonderingError


_BYTES = array("q").itemsize


def read_source(source: str | Callable | None, model: nn.Module) -> Callable:
    """The object that `draft_source` means.

    Args:
        source: None: the model's trained heads where it has them, else the passes' own predictions. "own", "heads":
            these. "prompt_lookup": what the text repeats, else as None. An object is taken as it is.
        model: a PonderingForCausalLM.

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

    def __call__(self, hidden_states: torch.Tensor, first_pass: int) -> None:
        """As at the head of this file."""


class DraftHeads(nn.Module):
    """One small residual network a pass, h + down(gelu(up(h))), trained to see what the last pass will see.

    All passes are computed in one batched product. `down` starts at zero, so untrained heads are the passes' own
    predictions.
    """

    def __init__(self, num_passes: int, hidden_size: int) -> None:
        super().__init__()
        inner_size = 2 * hidden_size
        self.up = nn.Parameter(torch.empty(num_passes, hidden_size, inner_size))
        self.up_bias = nn.Parameter(torch.empty(num_passes, 1, inner_size))
        self.down = nn.Parameter(torch.empty(num_passes, inner_size, hidden_size))
        self.down_bias = nn.Parameter(torch.empty(num_passes, 1, hidden_size))
        self.reset()

    def reset(self) -> None:
        """Begin anew."""
        nn.init.normal_(self.up, std=self.up.shape[1] ** -0.5)
        for parameter in (self.up_bias, self.down, self.down_bias):
            nn.init.zeros_(parameter)

    def forward(self, hidden_states: torch.Tensor, first_pass: int = 0) -> torch.Tensor:
        """hidden_states: (n, N, d), of passes first_pass, first_pass + 1, .... Returns the same shape.

        A pass that has no head keeps its own.
        """
        num_heads = min(len(hidden_states), max(0, len(self.up) - first_pass))
        if num_heads == 0:
            return hidden_states
        weights: tuple[torch.Tensor, ...] = (self.up, self.up_bias, self.down, self.down_bias)
        if num_heads < len(self.up):
            weights = tuple(weight[first_pass : first_pass + num_heads] for weight in weights)
        up, up_bias, down, down_bias = weights
        states, others = hidden_states[:num_heads], hidden_states[num_heads:]
        inner = functional.gelu(torch.baddbmm(up_bias, states, up))
        drafted = states + torch.baddbmm(down_bias, inner, down)
        return torch.cat([drafted, others]) if len(others) else drafted


class PromptLookup:
    """Drafts what followed the last time that the text's newest tokens stood together, as text often repeats itself.

    Args:
        source: what to fall back on, and what corrects the drafts; None: the passes' own predictions.
        max_ngram_size: how many of the newest tokens are looked up together at most.
        min_ngram_size: at least.
    """

    def __init__(self, source: Callable | None = None, max_ngram_size: int = 4, min_ngram_size: int = 2) -> None:
        if not 1 <= min_ngram_size <= max_ngram_size:
            raise PonderingError(
                f"`min_ngram_size` and `max_ngram_size` must be integers with 1 <= min <= max, got {min_ngram_size} "
                f"and {max_ngram_size}"
            )
        self.source = OwnPredictions() if source is None else source
        self.sizes = range(max_ngram_size, min_ngram_size - 1, -1)

    def __call__(self, hidden_states: torch.Tensor, first_pass: int) -> torch.Tensor | None:
        """As of the source to fall back on."""
        return self.source(hidden_states, first_pass)

    def token(self, prompt: int, pass_index: int, token_ids: list[int], predicted: int) -> int:
        """The draft that follows `token_ids` of this prompt, where the pass predicts `predicted`."""
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


SOURCE = 0.5  # the rank of a draft that its source puts in place of pass 0's prediction; pass i has rank i


class PendingTokens:
    """The tokens of one prompt that are under way: the newest true one and the drafts behind it, oldest first.

    Attributes:
        column: of the first one in the cache.
        tokens: their ids, in successive columns.
        next_passes: the pass that each runs next, falling.
        drafters: the rank of who gave each of them; None for the true one.
        guesses: what has been predicted for the place of each so far, {rank: token}.
        num_verdicts, num_hits: how often the last pass met a draft, and how often the draft was right.
    """

    worth = 0.3  # a draft is worth its row in the batch where the ones before it have this chance to be right
    memory = 0.9  # how much of a running mean a new observation leaves

    def __init__(self, column: int, token: int) -> None:
        self.column, self.tokens, self.next_passes = column, [token], [0]
        self.drafters: list[Any] = [None]
        self.guesses: list[dict[float, int]] = [{}]
        self.num_verdicts = self.num_hits = 0
        self.hit_rate = 1.0  # of late
        # (later rank, earlier rank): where they differ, how much more often the later one is right, -1 .. 1.
        self.advantages: dict[tuple[float, float], float] = {}

    def advantage(self, rank: float, other: float) -> float:
        """How much better than `other` this rank is where they differ. Later passes begin with a good name."""
        return self.advantages.get((rank, other), 0.5 if SOURCE not in (rank, other) else 0.0)

    @property
    def num_worthwhile(self) -> float:
        """How many drafts in a row are worth their rows, at the rate of late; never fewer than two."""
        if self.hit_rate >= 1:
            return math.inf
        return 1 + int(math.log(self.worth) / math.log(max(self.hit_rate, self.worth)))

    def advance(
        self,
        predicted: dict[int, int],
        num_steps: int,
        num_drafts: float,
        num_columns: int,
        corrects: bool = True,
        drafted: int | None = None,
    ) -> int | None:
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
        tokens, passes = self.tokens, self.next_passes
        final = predicted[num_steps] if passes[0] == num_steps else None
        settled = 0 if final is None else 1
        if final is not None and len(tokens) > 1:
            self._learn(final)
        for index, rank in enumerate(passes):
            is_last, is_final = index + 1 == len(tokens), rank == num_steps
            token = predicted[rank]
            drafter: float = rank
            guesses = {} if is_last else self.guesses[index + 1]
            guesses[rank] = token
            if is_last:
                may = is_final or (index + 1 - settled <= num_drafts and self.column + index + 1 < num_columns)
                if rank == 0 and not is_final and drafted not in (None, token):
                    guesses[SOURCE] = drafted
                    if self.advantage(SOURCE, 0) >= 0:
                        token, drafter = drafted, SOURCE
            else:
                may = tokens[index + 1] != token and (
                    is_final or (corrects and self.advantage(rank, self.drafters[index + 1]) >= 0)
                )
            if may:
                behind = slice(index + 1, None)
                tokens[behind], passes[behind] = [token], [-1]
                self.drafters[behind], self.guesses[behind] = [drafter], [guesses]
            if may or is_last:
                break
        self.next_passes = [number + 1 for number in passes[settled:]]
        self.tokens, self.drafters, self.guesses = tokens[settled:], self.drafters[settled:], self.guesses[settled:]
        self.column += settled
        return final

    def _learn(self, final):
        """From the true token in the place of the first draft: how good the draft and the other guesses were."""
        is_right, guesses = self.tokens[1] == final, self.guesses[1]
        self.num_verdicts += 1
        self.num_hits += is_right
        self.hit_rate += (1 - self.memory) * (is_right - self.hit_rate)
        for other, rank in itertools.combinations(sorted(guesses), 2):
            if guesses[rank] != guesses[other]:
                now = (guesses[rank] == final) - (guesses[other] == final)
                before = self.advantage(rank, other)
                self.advantages[rank, other] = before + (1 - self.memory) * (now - before)
