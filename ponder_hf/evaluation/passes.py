"""What each pass predicts: losses, next-token accuracy, agreement of the passes, without the logits of a whole batch.

`measure_passes` is what everything that evaluates calls: the text of `ponder-hf eval`, Trainer's evaluation, the
callback, the metrics. It reads the hidden states of each pass as they come by, and sends a few tokens at a time
through the head.
"""

import functools
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional
from transformers import PreTrainedModel

from ponder_hf.modeling import PonderingError
from ponder_hf.modeling.pondering_backbone import (
    TESTED,
    backbone_class,
    backbone_decoder,
    backbone_logits,
    evaluating,
)
from ponder_hf.modeling.pondering_vocabulary import chunk_elements, wide


IGNORED = -100  # a label that is not predicted, everywhere in transformers
_LARGEST_CHUNK = 1 << 24  # elements of the logits that live at a time: 64 MiB, and a few temporaries of that size


@dataclass
class PassStatistics:
    """What each pass predicts of one batch. Index t is the prediction made at token t, of token t + 1.

    losses: (S + 1, B, T), nats, in float64; 0 where nothing is predicted.
    predictions: (S + 1, B, T), the most probable next token.
    targets: (B, T), the token that comes next, IGNORED where nothing is predicted.
    entropies: (S + 1, B, T), nats, of every token that is no padding; None where they were not asked for.
    confidences: (S + 1, B, T), the probability of the most probable next token, where one is predicted.
    """

    losses: torch.Tensor
    predictions: torch.Tensor
    targets: torch.Tensor
    entropies: torch.Tensor | None = None
    confidences: torch.Tensor | None = None

    @property
    def is_predicted(self) -> torch.Tensor:
        """(B, T)."""
        return self.targets != IGNORED

    def sums(self) -> "PassSums":
        """The same summed over the tokens of each row."""
        counted = self.is_predicted
        return PassSums(
            losses=self.losses.sum(-1),
            hits=((self.predictions == self.targets) & counted).sum(-1).double(),
            agreements=((self.predictions == self.predictions[-1]) & counted).sum(-1).double(),
            tokens=counted.sum(-1).double(),
        )


@dataclass
class PassSums:
    """Sums over the tokens of each of N rows.

    losses, hits, agreements: (S + 1, N): nats, right predictions, and predictions that are also the last pass's.
    tokens: (N,), how many were predicted.
    """

    losses: torch.Tensor
    hits: torch.Tensor
    agreements: torch.Tensor
    tokens: torch.Tensor

    @classmethod
    def of_all(cls, parts: list["PassSums"]) -> "PassSums":
        """The rows of all parts, one after another."""
        names = ("losses", "hits", "agreements", "tokens")
        return cls(*(torch.cat([getattr(part, name).cpu() for part in parts], -1) for name in names))

    def together(self) -> "PassSums":
        """All rows as one."""
        return PassSums(
            *(each.sum(-1, keepdim=True) for each in (self.losses, self.hits, self.agreements, self.tokens))
        )

    def figures(self, tokens_per_byte: float | None = None) -> list[dict[str, float | None]]:
        """What is known of each pass, with standard errors.

        Tokens of one row are no independent draws: they tell one story. So errors are over rows, as of a sample of
        clusters (the ratio of two sums, Cochran 1977, section 6.4); of a single row there is none.

        Args:
            tokens_per_byte: of the text in UTF-8. None: bits per byte are not known.

        Returns:
            For each pass 0 .. S a dict: `loss` (nats per token), `perplexity`, `accuracy` (share of tokens that were
            the most probable one), `agreement` (share of predictions that are also the last pass's), `bits_per_byte`,
            and for each of them its standard error, as `loss_stderr`; None where it is not known. All of them are NaN
            of a pass that predicts NaN.
        """
        return [self._figures_of(index, tokens_per_byte) for index in range(len(self.losses))]

    def _figures_of(self, index: int, tokens_per_byte: float | None) -> dict[str, float | None]:
        loss, loss_error = ratio(self.losses[index], self.tokens)
        accuracy, accuracy_error = ratio(self.hits[index], self.tokens)
        agreement, agreement_error = ratio(self.agreements[index], self.tokens)
        if math.isnan(loss):  # of NaN, too, some token is called the most probable one
            accuracy = math.nan
        if math.isnan(loss) or bool(self.losses[-1].isnan().any()):
            agreement = math.nan
        perplexity = perplexity_of(loss)
        bits = None if tokens_per_byte is None else tokens_per_byte / math.log(2)
        return {
            "loss": loss,
            "loss_stderr": loss_error,
            "perplexity": perplexity,
            "perplexity_stderr": None if loss_error is None else perplexity * loss_error,
            "bits_per_byte": None if bits is None else loss * bits,
            "bits_per_byte_stderr": None if bits is None or loss_error is None else loss_error * bits,
            "accuracy": accuracy,
            "accuracy_stderr": accuracy_error,
            "agreement": agreement,
            "agreement_stderr": agreement_error,
        }


def ratio(sums: torch.Tensor, counts: torch.Tensor) -> tuple[float, float | None]:
    """The mean over all tokens of N rows, and its standard error over the rows; see `PassSums.figures`.

    Args:
        sums: (N,), over the tokens of each row.
        counts: (N,), how many these were.
    """
    total, rows = counts.sum(), len(sums)
    mean = sums.sum() / total
    if rows < 2 or not torch.isfinite(mean):
        return mean.item(), None
    spread = (sums - mean * counts).square().sum() * rows / (rows - 1)
    return mean.item(), (spread.sqrt() / total).item()


def check_finite(losses: torch.Tensor, name: str) -> None:
    """Raise a PonderingError unless all losses are finite. name: of the model, for the message."""
    if not losses.isfinite().all():
        raise PonderingError(f"{name} predicts NaN or infinity: get its weights again, or use `dtype` float32")


def perplexity_of(loss: float) -> float:
    """exp(loss). Beyond what a float can hold there is nothing left to compare; JSON knows no infinity."""
    return math.exp(min(loss, 700.0))


def shifted(labels: torch.Tensor) -> torch.Tensor:
    """(B, T) labels to the targets of PassStatistics: the label of the next token."""
    return functional.pad(labels[:, 1:], (0, 1), value=IGNORED)


def in_this_thread(hook: Callable) -> Callable:
    """A hook that does nothing where another thread runs its module: one model may serve several threads.

    Args:
        hook: as a module of torch takes it.
    """
    owner = threading.get_ident()

    @functools.wraps(hook)
    def own(*arguments: Any) -> Any:
        return hook(*arguments) if threading.get_ident() == owner else None

    return own


@contextmanager
def reading_passes(
    model: PreTrainedModel, targets: torch.Tensor, entropy_at: torch.Tensor | None = None
) -> Iterator[list[PassStatistics]]:
    """While this is open, one forward pass of a pondering model over one batch is read.

    Args:
        model: a PonderingForCausalLM, also within PEFT's wrapper; whatever wraps it is called by the caller.
        targets: (B, T), as `shifted` gives them.
        entropy_at: (B, T), where entropies are wanted; None: nowhere.

    Yields:
        A list that has one PassStatistics when this is closed.
    """
    backbone = pondering_model_in(model).backbone
    read: list[tuple[torch.Tensor, ...]] = []
    found: list[PassStatistics] = []

    def after_pass(decoder: Any, arguments: Any, output: Any) -> None:
        # Within the forward pass, where sharded weights of the head are gathered.
        with torch.no_grad():
            logits_of = _from_states(backbone, output.last_hidden_state)
            read.append(_predictions(logits_of, backbone.config.vocab_size, targets, entropy_at))

    hook = backbone_decoder(backbone).register_forward_hook(in_this_thread(after_pass))
    try:
        yield found
    finally:
        hook.remove()
    losses, predictions, entropies, confidences = (torch.stack(each) for each in zip(*read, strict=True))
    found.append(PassStatistics(losses, predictions, targets, None if entropy_at is None else entropies, confidences))


@torch.no_grad()
def measure_passes(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    pondering_steps: int | None = None,
    entropies: bool = False,
) -> PassStatistics:
    """What each pass of `model` predicts of one batch, by one forward pass.

    Never more logits live than those of a few tokens of one pass; of a plain model whose type is none of
    `ponder_hf.modeling.pondering_backbone.TESTED` those of the batch. Nothing of the model is changed, not even the
    mode of one of its modules.

    Args:
        model: a PonderingForCausalLM, also wrapped by PEFT or sharded; or a plain causal language model, which has
            one pass.
        input_ids, attention_mask, labels: (B, T) each. Labels are not shifted; without them the tokens themselves are
            predicted.
        pondering_steps: S; None: the model's own. Not for a plain model.
        entropies: whether they are wanted as well.
    """
    if labels is None:
        labels = input_ids if attention_mask is None else input_ids.masked_fill(~attention_mask.bool(), IGNORED)
    targets = shifted(labels)
    entropy_at: torch.Tensor | None = None
    if entropies:
        entropy_at = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        if not ponders(model):
            if is_read_apart(model):
                states = backbone_decoder(model)(**inputs).last_hidden_state
                logits_of, vocab_size = _from_states(model, states), model.config.vocab_size
            else:
                logits = model(**inputs).logits.flatten(0, 1)
                logits_of, vocab_size = logits.__getitem__, logits.shape[-1]
            losses, predictions, found, confidences = _predictions(logits_of, vocab_size, targets, entropy_at)
            found_entropies = found[None] if entropies else None
            return PassStatistics(losses[None], predictions[None], targets, found_entropies, confidences[None])
        read = stack.enter_context(reading_passes(model, targets, entropy_at))
        # One position's logits, for they are made from the states of each pass.
        model(**inputs, logits_to_keep=1, pondering_steps=pondering_steps)
    return read[0]


def ponders(model: PreTrainedModel) -> bool:
    """Whether it is a pondering model, and no plain one."""
    return hasattr(model.config, "pondering_steps")


def is_read_apart(model: PreTrainedModel) -> bool:
    """Whether it is a plain model whose decoder and head are known to give its logits when they are called apart."""
    return model.config.model_type in TESTED and type(model) is backbone_class(model.config)


def pondering_model_in(model: PreTrainedModel) -> Any:
    """The PonderingForCausalLM itself, where PEFT wraps it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _predictions(
    logits_of: Callable[[torch.Tensor], torch.Tensor],
    vocab_size: int,
    targets: torch.Tensor,
    entropy_at: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Losses, most probable tokens, entropies and the probabilities of these tokens of one pass, each (B, T).

    logits_of: from indices of tokens (n,) within the flattened batch to their logits (n, V).
    """
    wanted = targets != IGNORED
    if entropy_at is not None:
        wanted = wanted | entropy_at.bool()
    flat_targets = targets.flatten()
    places = wanted.flatten().nonzero().squeeze(-1)
    losses = torch.zeros(flat_targets.shape, dtype=torch.float64, device=targets.device)
    entropies, confidences, predictions = *(torch.zeros_like(losses) for _ in range(2)), torch.zeros_like(flat_targets)
    for part in places.split(max(1, min(chunk_elements(targets.device), _LARGEST_CHUNK) // vocab_size)):
        logits = wide(logits_of(part)).to(targets.device)
        normaliser = logits.logsumexp(-1)
        counts = flat_targets[part] != IGNORED
        of_target = logits.gather(-1, flat_targets[part].where(counts, 0).unsqueeze(-1)).squeeze(-1)
        losses[part] = (normaliser - of_target).where(counts, 0).double()
        largest, predictions[part] = logits.max(-1)
        confidences[part] = (largest - normaliser).exp().double()
        if entropy_at is not None:
            # Tokens that may not come have logits of minus infinity, and no share in it.
            weighted = logits.softmax(-1) * logits.clamp(min=torch.finfo(logits.dtype).min)
            entropies[part] = (normaliser - weighted.sum(-1)).double()
    found = (losses, predictions, entropies, confidences)
    return tuple(each.view_as(targets) for each in found)  # type: ignore[return-value]


def _from_states(backbone: Any, states: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """The `logits_of` of the states (B, T, d) after a pass."""
    flat = states.flatten(0, 1)
    # The head sees three dimensions, as in any forward pass.
    return lambda part: backbone_logits(backbone, flat[part.to(flat.device)][None])[0]
