"""What each pass makes of each token of one text, measured without the logits of the whole text.

The states of all passes are kept as they come by; behind the last pass a few tokens at a time go through the head, in
all passes, so that passes can be held against each other. The distances are those of the early exits.
"""

import math
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional
from transformers import PreTrainedModel

from ponder_hf.evaluation.passes import IGNORED, in_this_thread, pondering_model_in, shifted
from ponder_hf.modeling import PonderingError
from ponder_hf.modeling.pondering_backbone import backbone_decoder, backbone_logits, evaluating
from ponder_hf.modeling.pondering_generate_exits import CRITERIA
from ponder_hf.modeling.pondering_vocabulary import chunk_elements, wide

from .interventions import Intervention, intervening


# Elements of the logits of one pass that live at a time, with those of two other passes; and of the tensors that are
# computed of them, about eight. On a CPU these are so small that they stay in its caches.
_LARGEST_CHUNK = 1 << 23
_LARGEST_PART = {"cpu": 1 << 20, "other": 1 << 23}


@dataclass
class Readings:
    """What the passes 0 .. S make of T tokens. Index t is the prediction made at token t, of token t + 1.

    entropy: (S + 1, T), nats.
    probability, rank: (S + 1, T), of the token that came next, NaN at the last token; the most probable has rank 1.
    divergence: (S + 1, T), KL(p^S || p^i) in nats: what predicting by pass i loses against the last pass, if that one
        is right.
    share: (S + 1, T), of pondering in the input of the pass: |x^i - x^0| / (|x^0| + |x^i - x^0|), from 0 to 1.
    distances: for each exit criterion (S + 1, T), as docs/generation.md has them; infinite where it cannot say yet.
    top_ids, top_probabilities: (S + 1, T, k), the most probable next tokens, falling.
    drafts: (S, T), the token that the model would draft from the passes before the last one.
    """

    entropy: torch.Tensor
    probability: torch.Tensor
    rank: torch.Tensor
    divergence: torch.Tensor
    share: torch.Tensor
    top_ids: torch.Tensor
    top_probabilities: torch.Tensor
    drafts: torch.Tensor
    distances: dict[str, torch.Tensor] = field(default_factory=dict)

    def stops(self, criterion: str, threshold: float) -> torch.Tensor:
        """(T,), the pass behind which each token would stop, if all others ran to their end."""
        below = self.distances[criterion] < threshold
        below[-1] = True
        return below.int().argmax(0)


@torch.no_grad()
def read_passes(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    pondering_steps: int | None = None,
    top_tokens: int = 10,
    intervention: Intervention | Sequence[Intervention] | None = None,
) -> Readings:
    """Measure all passes of a model over one text, by one forward pass.

    Nothing of the model is changed, not even the mode of one of its modules.

    Args:
        model: a PonderingForCausalLM, also one of a checkpoint's own code, wrapped by PEFT or sharded.
        input_ids: (T,).
        pondering_steps: S; None: the model's own.
        top_tokens: k, how many of the most probable tokens are kept.
        intervention: what to change of the pondering embeddings; see `ponder_hf.lenses.interventions`.

    Returns:
        The readings, on the CPU, in float64 and int64.

    Raises:
        PonderingError: the model predicts NaN.
    """
    pondering_model = pondering_model_in(model)
    backbone = pondering_model.backbone
    num_steps = pondering_model.config.pondering_steps if pondering_steps is None else pondering_steps
    reader = _Reader(pondering_model, input_ids.to(model.device), num_steps, top_tokens)
    changed = nullcontext() if intervention is None else intervening(model, intervention, in_all_threads=False)
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.enter_context(changed)
        decoder = backbone_decoder(backbone)
        for hook in (
            decoder.register_forward_pre_hook(in_this_thread(reader.before_pass), with_kwargs=True),
            decoder.register_forward_hook(in_this_thread(reader.after_pass)),
        ):
            stack.callback(hook.remove)
        # One position's logits, for they are made from the states of each pass.
        model(reader.input_ids[None], use_cache=False, logits_to_keep=1, pondering_steps=num_steps)
    return reader.readings()


class _Reader:
    """Two hooks on the backbone's decoder, and what they have found."""

    def __init__(self, pondering_model: Any, input_ids: torch.Tensor, num_steps: int, top_tokens: int) -> None:
        self.backbone, self.input_ids, self.num_steps = pondering_model.backbone, input_ids, num_steps
        self.heads = getattr(pondering_model, "draft_heads", None)
        self.top_tokens = min(top_tokens, self.backbone.config.vocab_size)
        self.targets = shifted(input_ids[None])[0]
        self.states: list[torch.Tensor] = []
        self.shares: list[torch.Tensor] = []
        self.found: list[dict[str, Any]] = []

    def before_pass(self, decoder, arguments, keywords):
        hidden_inputs = wide(keywords["inputs_embeds"][0])
        if not self.shares:
            self.first = hidden_inputs
        pondered, own = (hidden_inputs - self.first).norm(dim=-1), self.first.norm(dim=-1)
        self.shares.append((pondered / (pondered + own)).nan_to_num(nan=0.0).double().cpu())

    def after_pass(self, decoder, arguments, output):
        self.states.append(output.last_hidden_state[0])
        if (
            len(self.states) > self.num_steps
        ):  # within the forward pass, where sharded weights of the head are gathered
            size = min(chunk_elements(self.targets.device), _LARGEST_CHUNK) // self.backbone.config.vocab_size
            places = torch.arange(len(self.input_ids), device=self.targets.device)
            self.found = [self._chunk(part) for part in places.split(max(1, size))]

    def readings(self):
        """All chunks as one."""
        parts = {name: torch.cat([chunk[name] for chunk in self.found], 1) for name in self.found[0]}
        if not parts["top_probabilities"].isfinite().all():
            raise PonderingError("the model predicts NaN: get its weights again, or use `dtype` float32")
        distances = {name: parts.pop(name) for name in CRITERIA if name != "entropy"}
        distances = {name: parts["entropy"] if name == "entropy" else distances[name] for name in CRITERIA}
        return Readings(share=torch.stack(self.shares), distances=distances, **parts)

    def _logits(self, states, places):
        # The head sees three dimensions, as in any forward pass.
        return wide(backbone_logits(self.backbone, states[places.to(states.device)][None])[0])

    def _chunk(self, places):
        """Everything about some tokens (n,): a dict of tensors (S + 1, n, ...) on the CPU."""
        last, previous, passes = self._logits(self.states[-1], places), None, []
        for index, states in enumerate(self.states):
            logits = last if index == self.num_steps else self._logits(states, places)
            passes.append(self._measured(logits, previous, last, self.targets[places]))
            previous = logits
        found = {name: torch.stack([each[name] for each in passes]) for name in passes[0]}
        # Not what rounding leaves of the distance of a distribution from itself.
        found["divergence"][-1] = 0
        found["drafts"] = self._drafts(places, found["top_ids"])
        return found

    def _measured(self, *tensors):
        """`_measured_part` of a few tokens after another."""
        elements = _LARGEST_PART.get(tensors[0].device.type, _LARGEST_PART["other"])
        rows = max(1, elements // tensors[0].shape[-1])
        parts = []
        for first in range(0, len(tensors[0]), rows):
            part = slice(first, first + rows)
            parts.append(self._measured_part(*(each if each is None else each[part] for each in tensors)))
        return {name: torch.cat([each[name] for each in parts]) for name in parts[0]}

    def _measured_part(self, logits, previous, last, targets):
        """One pass over some tokens. logits, previous, last: (n, V), targets: (n,)."""
        targets = targets.to(logits.device)
        counts = targets != IGNORED
        chosen = targets.where(counts, 0)
        of_target = logits.gather(-1, chosen[:, None])
        losses = functional.cross_entropy(logits, chosen, reduction="none").double()
        top_logits, top_ids = logits.topk(self.top_tokens)
        found = {
            "entropy": CRITERIA["entropy"]()(logits, None).double(),
            "probability": (-losses).exp().where(counts, math.nan),
            "rank": (1 + (logits > of_target).sum(-1)).double().where(counts, math.nan),
            "divergence": CRITERIA["kl"]()(last, logits).double(),
            "top_ids": top_ids,
            "top_probabilities": (top_logits - logits.logsumexp(-1, keepdim=True)).double().exp(),
        }
        for name, criterion in CRITERIA.items():
            if name != "entropy":
                found[name] = criterion()(logits, previous).double()
        return {name: value.cpu() for name, value in found.items()}

    def _drafts(self, places, top_ids):
        """(S, n): what a trained head makes of each pass but the last, or else what the pass itself predicts."""
        if self.heads is None or not self.num_steps:
            return top_ids[:-1, :, 0]
        device = next(self.heads.parameters()).device
        states = torch.stack([states[places.to(states.device)].to(device) for states in self.states[:-1]])
        drafted, everything = self.heads(states, 0), torch.arange(len(places), device=places.device)
        return torch.stack([self._logits(each, everything).argmax(-1).cpu() for each in drafted])
