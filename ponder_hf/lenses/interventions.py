"""Change what a model ponders, to see whether it matters: one function for each change.

    from ponder_hf.lenses import interventions

    ponder_hf.lens(model, tokenizer, text, intervention=interventions.scale(0))
    with interventions.intervening(model, interventions.replace_by_noise(seed=0)):
        model(input_ids, labels=input_ids)

An intervention acts on what a step adds to the input, t^i as the model scales and gates it. What replaces it is scaled
and gated in the same way: `replace_by_token` is what the model would add if it were certain of that token.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ponder_hf.evaluation.passes import pondering_model_in
from ponder_hf.modeling import PonderingError
from ponder_hf.modeling.pondering_backbone import embedding_table, evaluating
from ponder_hf.modeling.pondering_vocabulary import wide


Change = Callable[[int, torch.Tensor, Callable[[torch.Tensor], torch.Tensor]], torch.Tensor]


@dataclass(frozen=True)
class Intervention:
    """A change of what the steps add.

    Args:
        name: what results call it.
        change: called with the step i (0 .. S-1), what it adds (B, T, d), and the function that scales and gates an
            embedding (..., d). Gives back what is added instead, of the same shape.
        steps: on which of them it acts; None: all.
        positions: at which tokens it acts, as indices; None: all.
    """

    name: str
    change: Change
    steps: tuple[int, ...] | None = None
    positions: tuple[int, ...] | None = None

    def at(self, steps: Sequence[int] | None = None, positions: Sequence[int] | None = None) -> "Intervention":
        """The same, acting on some steps and at some tokens only.

        Args:
            steps: from 0 to S - 1; None: all.
            positions: of tokens, from 0; None: all.
        """
        return replace(
            self,
            steps=None if steps is None else tuple(steps),
            positions=None if positions is None else tuple(positions),
        )

    def __call__(self, step: int, added: torch.Tensor, finish: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """What step `step` adds instead of `added` (B, T, d); see `change`."""
        if self.steps is not None and step not in self.steps:
            return added
        changed = self.change(step, added, finish).to(added)
        if changed.shape != added.shape:
            raise PonderingError(
                f"the intervention {self.name!r} gave the shape {tuple(changed.shape)}, not {tuple(added.shape)}"
            )
        if self.positions is None:
            return changed
        outside = [place for place in self.positions if not 0 <= place < added.shape[1]]
        if outside:
            raise PonderingError(f"`positions` has {outside[0]}, but the text has only {added.shape[1]} tokens")
        chosen = torch.zeros(added.shape[1], dtype=torch.bool, device=added.device)
        chosen[list(self.positions)] = True
        return changed.where(chosen[:, None], added)


def scale(factor: float) -> Intervention:
    """`factor` times what the steps add; 0 leaves it out."""
    return Intervention(f"scaled by {factor:g}", lambda step, added, finish: added * factor)


def stop_at(pass_index: int) -> Intervention:
    """Stop at a pass: later passes get its input again, so that with all tokens stopped they predict what it does.

    Args:
        pass_index: i, from 0 on; no step from i on adds anything.
    """
    if pass_index < 0:
        raise PonderingError(f"`pass_index` must be at least 0, got {pass_index}")

    def change(step, added, finish):
        return added if step < pass_index else torch.zeros_like(added)

    return Intervention(f"stopped at pass {pass_index}", change)


def replace_by_token(
    model: PreTrainedModel, token: int | str, tokenizer: PreTrainedTokenizerBase | None = None
) -> Intervention:
    """The embedding of one token in place of every pondering embedding.

    Args:
        model: the model that it will act on.
        token: an id, or a text that is one token.
        tokenizer: the model's, for a text, or to be called by its text in results.

    Raises:
        PonderingError: the text is not one token, or the vocabulary has no such id.
    """
    if isinstance(token, str):
        if tokenizer is None:
            raise PonderingError("`token` is a text, which needs a `tokenizer`; or give its id")
        ids = tokenizer(token, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            raise PonderingError(
                f"{token!r} is {len(ids)} tokens to this tokenizer: give a text that is one, or an id"
            )
        name, token_id = repr(token), ids[0]
    else:
        name, token_id = f"token {token}" if tokenizer is None else repr(tokenizer.decode([token])), token
    with torch.no_grad():
        table = embedding_table(pondering_model_in(model).backbone, model.device)
        if not 0 <= token_id < len(table):
            raise PonderingError(f"`token` must be from 0 to {len(table) - 1}, got {token_id}")
        embedding = table[token_id].clone()
    return Intervention(name, lambda step, added, finish: finish(embedding.to(added)).expand_as(added))


def replace_by_mean(model: PreTrainedModel) -> Intervention:
    """The mean embedding of the whole vocabulary in place of every pondering embedding.

    Args:
        model: the model that it will act on.
    """
    with torch.no_grad():
        table = embedding_table(pondering_model_in(model).backbone, model.device)
        mean = table.mean(0, dtype=wide(table[:1]).dtype)
    return Intervention("mean embedding", lambda step, added, finish: finish(mean.to(added)).expand_as(added))


def replace_by_noise(seed: int = 0) -> Intervention:
    """Random directions in place of the pondering embeddings, each as long as the one that it replaces.

    Args:
        seed: the same noise for the same seed, step and shape.
    """

    def change(step, added, finish):
        generator = torch.Generator().manual_seed(seed + step)
        length = wide(added).norm(dim=-1, keepdim=True)
        noise = torch.randn(added.shape, generator=generator).to(length)
        return noise * length / noise.norm(dim=-1, keepdim=True)

    return Intervention("noise of the same norm", change)


def replace_by_prompt(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str | Sequence[int],
    pondering_steps: int | None = None,
) -> Intervention:
    """What another text's tokens ponder at the same positions, in place of the text's own.

    Args:
        model: the model that it will act on.
        tokenizer: the model's.
        text: the other text, or its token ids; at least as long as the texts that it will act on.
        pondering_steps: S; None: the model's own.

    Raises:
        PonderingError: the intervention is used on a longer text or with more steps.
    """
    ids = tokenizer(text, verbose=False)["input_ids"] if isinstance(text, str) else list(text)
    recorded: list[torch.Tensor] = []

    def record(step, added, finish):
        recorded.append(added[0])
        return added

    recorder = Intervention("recorded", record)
    with torch.no_grad(), evaluating(model), intervening(model, recorder, in_all_threads=False):
        model(
            torch.tensor([ids], device=model.device),
            use_cache=False,
            logits_to_keep=1,
            pondering_steps=pondering_steps,
        )

    def change(step, added, finish):
        if step >= len(recorded):
            raise PonderingError(f"the other text was pondered over in {len(recorded)} steps: give `pondering_steps`")
        if added.shape[1] > len(ids):
            raise PonderingError(
                f"the other text has {len(ids)} tokens and this one {added.shape[1]}: give one that is as long"
            )
        return recorded[step][: added.shape[1]].to(added).expand_as(added)

    return Intervention("another text's", change)


@contextmanager
def intervening(
    model: PreTrainedModel, intervention: Intervention | Sequence[Intervention], in_all_threads: bool = True
) -> Iterator[PreTrainedModel]:
    """A context in which whole passes of the model, forward and generate, ponder with these interventions, in order.

    Args:
        model: a PonderingForCausalLM, also wrapped by PEFT.
        intervention: one or several.
        in_all_threads: whether also where other threads call the model, as a thread does that generates for a
            streamer; False: for whoever opens this only.

    Raises:
        PonderingError: the model does not ponder; or, while this is open, it drafts or leaves passes early.
    """
    pondering_model: Any = pondering_model_in(model)
    if not hasattr(pondering_model, "finish_embedding"):
        raise PonderingError("interventions act on pondering embeddings, which a plain model does not have")
    interventions = [intervention] if isinstance(intervention, Intervention) else list(intervention)
    ponder, finish = pondering_model.ponder, pondering_model.finish_embedding
    owner, place = threading.get_ident(), threading.local()  # of each thread the step that it is at

    def counted(*arguments, **keywords):
        place.step = 0
        try:
            return ponder(*arguments, **keywords)
        finally:
            del place.step

    def changed(embedding):
        if not in_all_threads and threading.get_ident() != owner:
            return finish(embedding)
        if not hasattr(place, "step"):
            raise PonderingError("interventions act on whole passes: leave out drafts and early exits")
        added = finish(embedding)
        for each in interventions:
            added = each(place.step, added, finish)
        place.step += 1
        return added

    if "ponder" in vars(pondering_model) or "finish_embedding" in vars(pondering_model):
        raise PonderingError("the model is intervened in already: give all interventions together, as a list")
    pondering_model.ponder, pondering_model.finish_embedding = counted, changed
    try:
        yield model
    finally:
        del pondering_model.ponder, pondering_model.finish_embedding
