"""Early exits: a token stops as soon as its passes have converged, and passes that are not needed do not run.

A criterion measures after each pass how far a token is from having converged; the token stops when that distance is
below the threshold. With p^i the distribution that pass i predicts (softmax of its logits):

    kl        KL(p^i || p^(i-1)), in nats                                              from pass 1 on
    entropy   the entropy of p^i, in nats                                              from pass 0 on
    argmax    1 - max p^i where pass i and pass i-1 predict the same token, else 1     from pass 1 on

So a threshold of 0 never stops a token, and a larger one stops more of them. Token t runs passes 0 .. j(t), and is
predicted from pass j(t). What slot(i, l) of the step cache holds for it (pondering_cache.py) is what pass min(i, j(t))
computed in layer l, so that a later token finds the last keys and values that there are.

In each pass only the tokens that go on are computed: a batch of the rows that have such tokens, each row shortened to
those. Where a backbone cannot be told which of its tokens a row has left, whole rows are computed, and what has
stopped keeps what it had; the result is the same.
"""

import copy
import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.masking_utils import create_masks_for_generate

from .pondering_backbone import (
    AdapterRows,
    are_close,
    backbone_logits,
    changing_rotations,
    check_inputs,
    evaluating,
    in_one_line,
    positions_of,
    run_backbone,
    takes_cache,
    takes_position_ids,
)
from .pondering_cache import CACHE_NAME, are_packed, pass_cache, step_cache
from .pondering_errors import INSTALL_TESTED, PonderingError, untested_version
from .pondering_vocabulary import chunk_elements, chunks
from .pondering_vocabulary_embedding import PonderingEmbedding


_MASK_ARGUMENTS = {"inputs_embeds", "attention_mask", CACHE_NAME, "position_ids", "and_mask_function"}
_MASKS_CAN_BE_MADE = set(inspect.signature(create_masks_for_generate).parameters) >= _MASK_ARGUMENTS


class KLDivergence:
    """How much a pass has changed the prediction: KL(p^i || p^(i-1)) in nats."""

    def __call__(self, logits: torch.Tensor, previous_logits: torch.Tensor | None) -> torch.Tensor:
        """logits, previous_logits: (n, V) of this pass and the one before, None before pass 1. Returns (n,), >= 0."""
        if previous_logits is None:
            return logits.new_full(logits.shape[:1], math.inf)
        # A token that may not come has a logit of minus infinity: of two such there is no difference.
        least = torch.finfo(logits.dtype).min
        log_p, log_q = (each.log_softmax(-1).clamp(min=least) for each in (logits, previous_logits))
        return (log_p.exp() * (log_p - log_q)).sum(-1).clamp(min=0)


class Entropy:
    """How undecided the prediction of a pass is: its entropy in nats."""

    def __call__(self, logits: torch.Tensor, previous_logits: torch.Tensor | None) -> torch.Tensor:
        """As in KLDivergence; `previous_logits` are not read."""
        log_p = logits.log_softmax(-1).clamp(min=torch.finfo(logits.dtype).min)
        return -(log_p.exp() * log_p).sum(-1).clamp(max=0)


class ArgmaxProbability:
    """How surely a pass predicts the token that the pass before predicted: 1 - max p^i, or 1 where it does not."""

    def __call__(self, logits: torch.Tensor, previous_logits: torch.Tensor | None) -> torch.Tensor:
        """As in KLDivergence. Returns (n,) between 0 and 1."""
        if previous_logits is None:
            return logits.new_ones(logits.shape[:1])
        best, token_ids = logits.max(-1)
        distance = 1 - (best - logits.logsumexp(-1)).exp()
        return distance.where(token_ids == previous_logits.argmax(-1), 1).clamp(min=0)


CRITERIA: dict[str, Callable] = {"kl": KLDivergence, "entropy": Entropy, "argmax": ArgmaxProbability}


class PonderingExit:
    """When tokens stop pondering.

    Args:
        criterion: called with (logits (n, V) of a pass, logits (n, V) of the pass before or None before pass 1), both
            in float32 or wider, gives the distances (n,) from convergence.
        threshold: a token stops where its distance is below.
        record: called once a forward pass with the steps (B, T) that each position took.
    """

    def __init__(
        self,
        criterion: Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor],
        threshold: float,
        record: Callable[[torch.Tensor], Any] | None = None,
    ) -> None:
        self.criterion, self.threshold, self.record = criterion, threshold, record

    @classmethod
    def read(cls, criterion: str | Callable | None, threshold: float | None) -> "PonderingExit | None":
        """From what a user gave; None where no threshold was given.

        Raises:
            PonderingError: the criterion is unknown or missing, or the threshold is no number >= 0.
        """
        known = ", ".join(map(repr, CRITERIA))
        if isinstance(criterion, str) and criterion not in CRITERIA:
            raise PonderingError(
                f"`pondering_exit_criterion` must be one of {known} or an object of your own, got {criterion!r}"
            )
        if criterion is not None and not isinstance(criterion, str) and not callable(criterion):
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
            raise PonderingError(f"`pondering_exit_threshold` needs `pondering_exit_criterion`: one of {known}")
        return cls(CRITERIA[criterion]() if isinstance(criterion, str) else criterion, threshold)

    def converged(self, logits: torch.Tensor, previous_logits: torch.Tensor | None) -> torch.Tensor:
        """(n,) booleans, from logits (n, V) of a pass and of the one before."""
        distances = self.criterion(logits, previous_logits)
        if not torch.is_tensor(distances) or distances.shape != logits.shape[:1]:
            shape = tuple(distances.shape) if torch.is_tensor(distances) else type(distances).__name__
            raise PonderingError(
                "`pondering_exit_criterion` must give one distance a token, a tensor of shape "
                f"{tuple(logits.shape[:1])}, got {shape}"
            )
        return distances < self.threshold


class _CompletedCache(Cache):
    """The slots of one pass: what is written is completed by what stopped tokens computed last.

    active: an _ActiveTokens. last_states: a list for each layer: keys, values (B, H, T, D) as last computed, and what
    else `update` was given.
    """

    active = last_states = None

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        active, last = self.active.on(key_states.device), self.last_states[layer_idx]
        if not active.is_everything:
            key_states, value_states = active.put(last[0], key_states), active.put(last[1], value_states)
        last[:] = key_states, value_states, args, kwargs
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return (keys, values) if active.has_all_rows else (keys[active.rows], values[active.rows])


class _ActiveTokens:
    """The tokens of a pass: some rows of a batch (all with `keeps_rows`), and in each of them some positions.

    rows: (b,) indices. mask: (b, T) booleans, which tokens of these rows go on. positions: (b, t) indices of the
    tokens that are computed, where a row with fewer names its first one again; None: all T. places: (n,), where the
    tokens that go on are among the b * t that are computed.
    """

    def __init__(self, mask, may_shorten, keeps_rows):
        self.rows = _indices(mask.any(1) | keeps_rows)
        self.mask = mask[self.rows]
        self.has_all_rows = len(self.rows) == len(mask)
        self.is_everything = self.has_all_rows and bool(self.mask.all())
        self.positions = None
        count, kept = int(self.mask.sum(1).max()), self.mask
        if may_shorten and count < mask.shape[1]:
            order = torch.argsort(~self.mask, dim=1, stable=True)[:, :count]
            self.positions = order.where(self.mask.gather(1, order), order[:, :1])
            kept = torch.arange(count) < self.mask.sum(1, keepdim=True)
        self.places = _indices(kept)
        self.copies = {self.rows.device: self}

    def on(self, device):
        """The same on a device, which then need not wait for what was decided here."""
        if self.is_everything:  # then none of the indices is read
            return self
        if device not in self.copies:
            self.copies[device] = there = copy.copy(self)
            for name in ("rows", "mask", "positions", "places"):
                tensor = getattr(self, name)
                setattr(there, name, None if tensor is None else tensor.to(device, non_blocking=True))
        return self.copies[device]

    def take(self, value, dim):
        """The part of (B or 1, ..., T, ...) that the pass computes on, with T at `dim`; `dim` None: whole rows.

        Anything but a tensor is given back as it is.
        """
        if not torch.is_tensor(value):
            return value
        here = self.on(value.device)
        if not here.has_all_rows and len(value) > 1:
            value = value[here.rows]
        if here.positions is None or dim is None:
            return value
        index = here.positions.view(len(here.rows), *[1] * (dim - 1), -1, *[1] * (value.ndim - dim - 1))
        return torch.take_along_dim(value.expand(len(here.rows), *value.shape[1:]), index, dim)

    def put(self, old, new):
        """`old` (B, H, T, D) with the states (b, H, t, D) of the pass in the place of the tokens that go on."""
        old = old.clone()
        if self.positions is None:
            old[self.rows] = new.where(self.mask[:, None, :, None], old[self.rows])
        else:
            old[self.rows[:, None], :, self.positions] = new.transpose(1, 2)
        return old

    def results(self, hidden_states):
        """(b, t, d) of the pass to (n, d): the tokens that go on, row by row."""
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        return flat if self.is_everything else flat[self.on(flat.device).places]


class _BackboneInputs:
    """What the backbone is given beside embeddings, for any choice of tokens."""

    def __init__(self, backbone, shape, attention_mask, position_ids, others):
        self.config, self.shape = backbone.config, shape
        self.attention_mask, self.position_ids, self.others = attention_mask, position_ids, others
        self.masks = None
        rotations = changing_rotations(backbone)
        # Where the largest position says how all are rotated, the token that has it must run with the others.
        self.keeps_rows = rotations is not None and (position_ids is None or int(position_ids.max()) >= rotations[1])
        self.may_shorten = (
            _MASKS_CAN_BE_MADE
            and untested_version() is None  # rows as they are need no masks of ours
            and not self.keeps_rows
            and not hasattr(backbone, "create_masks_for_generate")  # a class that makes masks of its own kind
            and shape[1] > 1
            and position_ids is not None
            and takes_position_ids(backbone)
            and backbone.config._attn_implementation in ("eager", "sdpa")
            and not any(torch.is_tensor(value) for value in others.values())
        )

    def of(self, active, inputs_embeds, cache):
        """Keyword arguments of the backbone for a pass over these tokens; `cache` is the pass's own, as it was."""
        mask, dim = self.attention_mask, None
        if active.positions is not None:
            if self.masks is None:  # the same in every pass
                self.masks = create_masks_for_generate(
                    config=self.config,
                    inputs_embeds=inputs_embeds.new_empty(*self.shape, 0),
                    attention_mask=mask,
                    position_ids=self.position_ids,
                    # All are to be seen: asks for a mask that transformers would otherwise leave out.
                    and_mask_function=lambda batch, head, query, key: key >= 0,
                    **{CACHE_NAME: cache},
                )
            mask, dim = self.masks, 2
        if isinstance(mask, dict):
            mask = {kind: active.take(one, dim) for kind, one in mask.items()}
        others = {name: active.take(value, None) for name, value in self.others.items()}
        return {
            "attention_mask": active.take(mask, dim),
            "position_ids": active.take(self.position_ids, 1),
            **others,
        }


def _indices(mask):
    """Where a mask of booleans is true, as if it were flat."""
    return mask.flatten().nonzero().flatten()


class PassesWithExits:
    """Runs the passes of one forward call over (B, T) tokens, of which each stops when it has converged.

    Args:
        model: a PonderingForCausalLM.
        num_steps: S.
        past_key_values: a step cache, or None.
        exit: when a token stops.

    Attributes after `run`:
        hidden_states: (B, T, d_h), those of each token's last pass.
        steps: (B, T), the index j(t) of that pass.
        logits: (B, T, V) of that pass, where all tokens stopped before pass S and so many fit; otherwise None.
    """

    def __init__(
        self, model: PreTrainedModel, num_steps: int, past_key_values: Cache | None, exit: PonderingExit
    ) -> None:
        self.model, self.num_steps, self.exit = model, num_steps, exit
        self.num_layers = model.config.num_hidden_layers
        if not takes_cache(model.backbone):
            raise PonderingError(
                f"early exits need keys and values of earlier passes, but a backbone of model_type "
                f"{model.backbone.config.model_type!r} keeps none: leave out `pondering_exit_threshold`"
            )
        self.has_own_cache = past_key_values is None
        if self.has_own_cache:  # passes hand keys and values on, through a cache of this call
            past_key_values = step_cache(None, model.config.base_config, num_steps + 1)
        self.past_key_values = past_key_values
        self.last_states: list[list] = [[] for _ in range(self.num_layers)]
        self.embedding = PonderingEmbedding(model.backbone, model.config)
        self.hidden_states: Any = None
        self.logits: torch.Tensor | None = None
        self.adapters = AdapterRows(model)

    def run(
        self,
        hidden_inputs: torch.Tensor,
        attention_mask: torch.Tensor | dict | None = None,
        position_ids: torch.Tensor | None = None,
        **others: Any,
    ) -> "PassesWithExits":
        """hidden_inputs: (B, T, d), what pass 0 reads; the rest goes to the backbone. Gives back itself."""
        shape, device = hidden_inputs.shape[:2], hidden_inputs.device
        if self.has_own_cache and are_packed(position_ids, attention_mask):
            attention_mask = _packed_mask(self.model.backbone, hidden_inputs, position_ids)
        inputs = _BackboneInputs(self.model.backbone, shape, attention_mask, position_ids, others)
        # Who goes on is decided on the device and handed to the host once a pass, where all indices are made of it.
        mask, mask_here = torch.ones(shape, dtype=torch.bool, device=device), torch.ones(shape, dtype=torch.bool)
        padding = torch.zeros_like(mask)
        if torch.is_tensor(attention_mask) and attention_mask.ndim == 2:  # as far as the mask says so
            padding = attention_mask[:, -shape[1] :].to(device) == 0
        self.steps = torch.full(shape, self.num_steps, device=device)
        before = (None, None)
        with self.adapters:
            for index in range(self.num_steps + 1):
                active = _ActiveTokens(mask_here, inputs.may_shorten, inputs.keeps_rows)
                flat = self._run_pass(index, hidden_inputs, active, inputs)
                places = None if active.is_everything else _indices(mask_here).to(device, non_blocking=True)
                self.hidden_states = _replaced(self.hidden_states, places, flat, shape)
                if index == self.num_steps:
                    self.logits = None
                    break
                embedding, logits, stops = self._evaluate(flat, *before, mask_here)
                old = hidden_inputs.flatten(0, 1)
                new = (old if places is None else old[places]) + self.model.finish_embedding(embedding).to(device)
                hidden_inputs = _replaced(hidden_inputs, places, new, shape)
                going_on = _going_on(mask, stops, padding)
                going_on_here = going_on.cpu()
                self.steps = self.steps.masked_fill(mask & ~going_on, index)
                self._keep_logits(logits, mask_here, going_on_here)
                if not going_on_here.any():
                    self._fill(index + 1)
                    break
                still = _indices(going_on_here[mask_here])
                before = (_rows(flat, still), None if logits is None else _rows(logits, still))
                mask, mask_here = going_on, going_on_here
        if self.exit.record is not None:
            self.exit.record(self.steps)
        return self

    def last_logits(self, kept: slice | torch.Tensor) -> torch.Tensor:
        """(B, kept, V), the logits of each token's last pass at some positions; `kept` indexes them."""
        if self.logits is not None:
            return self.logits[:, kept].to(self.hidden_states.dtype)
        return backbone_logits(self.model.backbone, self.hidden_states[:, kept])

    def _run_pass(self, index, hidden_inputs, active, inputs):
        """(n, d_h), the last hidden states of the tokens that go on."""
        cache = pass_cache(self.past_key_values, index, self.num_layers, _CompletedCache)
        cache.active, cache.last_states = active, self.last_states
        if self.adapters.exist:
            self.adapters.rows = active.rows.tolist()
        output = run_backbone(
            self.model.backbone,
            active.take(hidden_inputs, 1),
            past_key_values=cache,
            use_cache=True,
            **inputs.of(active, hidden_inputs, cache),
        )
        # With a device_map the last layer may lie elsewhere.
        return active.results(output.last_hidden_state.to(hidden_inputs.device))

    def _evaluate(self, flat, flat_before, logits_before, mask):
        """Pondering embeddings (n, d), logits (n, V) where they fit one chunk, and who has converged (n,).

        Logits are float32 or wider, whatever the kernel and however many chunks: a criterion measures small changes.
        """
        parts = list(chunks(flat, self.model.config.vocab_size))
        embeddings, stops = [], []
        row_of_tokens = mask.nonzero()[:, 0].tolist() if self.adapters.exist else None
        # In several pieces it would be rounded in another way than it is without exits.
        at_once = len(parts) > 1 and self.embedding.kernel != "plain"
        if at_once:
            embeddings.append(self.embedding(flat.unsqueeze(0))[0])
        for part in parts:
            if self.adapters.exist:
                self.adapters.rows = row_of_tokens[part]
            if at_once:
                logits = self.embedding.wide_logits(flat[part])
            else:
                embedding, logits = self.embedding.with_logits(flat[part])
                embeddings.append(embedding)
            previous = None if logits_before is None else logits_before[part]
            if previous is None and flat_before is not None:
                previous = self.embedding.wide_logits(flat_before[part])
            stops.append(self.exit.converged(logits, previous).to(flat.device))
        self.adapters.rows = row_of_tokens
        return torch.cat(embeddings), logits if len(parts) == 1 else None, torch.cat(stops)

    def _keep_logits(self, logits, mask, going_on):
        stopping, vocab_size = mask & ~going_on, self.model.config.vocab_size
        if logits is None or mask.numel() * vocab_size > chunk_elements(logits.device) or not stopping.any():
            return
        if self.logits is None:
            self.logits = logits.new_empty(*mask.shape, vocab_size)
        places = _indices(stopping).to(logits.device, non_blocking=True)
        self.logits.view(-1, vocab_size)[places] = _rows(logits, _indices(stopping[mask]))

    def _fill(self, first):
        for index in range(first, self.num_steps + 1):
            cache = pass_cache(self.past_key_values, index, self.num_layers)
            for layer_index, (keys, values, args, kwargs) in enumerate(self.last_states):
                cache.update(keys, values, layer_index, *args, **kwargs)


def _rows(tensor, indices):
    return tensor if len(indices) == len(tensor) else tensor[indices.to(tensor.device, non_blocking=True)]


def _replaced(tensor, places, rows, shape):
    """(B, T, d) with `rows` (n, d) at some places of its flattened (B T, d); places None: at all."""
    if places is None:
        return rows.view(*shape, -1)
    return tensor.flatten(0, 1).index_copy(0, places, rows.to(tensor.dtype)).view(*shape, -1)


def _packed_mask(backbone, hidden_inputs, position_ids):
    """The mask of rows of several texts, which transformers only makes by itself where there is no cache."""
    if not _MASKS_CAN_BE_MADE or backbone.config._attn_implementation not in ("eager", "sdpa"):
        raise PonderingError(
            "early exits of packed texts need attn_implementation 'sdpa' or 'eager' and a newer transformers: give "
            "each text a row of its own, padded, with an `attention_mask`"
        )
    make = getattr(backbone, "create_masks_for_generate", create_masks_for_generate)
    return make(
        config=backbone.config,
        inputs_embeds=hidden_inputs[..., :0],
        attention_mask=None,
        position_ids=position_ids,
        **{CACHE_NAME: None},
    )


def _going_on(mask, stops, padding):
    """(B, T) booleans. Padding goes on with its row for as long as all tokens of the row do, and holds up none."""
    undecided = mask.masked_scatter(mask, ~stops) & ~padding
    whole = (undecided | padding).all(1, keepdim=True) & undecided.any(1, keepdim=True)
    return undecided | (padding & mask & whole)


def check_exits_once(model: PreTrainedModel) -> None:
    """Under an untested transformers, hold passes that tokens may leave early against whole passes.

    Raises:
        PonderingError: tokens that stay to the end get other logits.
    """
    version = untested_version()
    if version is None or getattr(model, "_exits_are_verified", False):
        return
    with evaluating(model), torch.no_grad():
        ids, mask = check_inputs(model)
        inputs = {"attention_mask": mask, "position_ids": positions_of(mask), "use_cache": False, "pondering_steps": 1}
        expected = model(ids, **inputs).logits
        try:
            found = model(ids, **inputs, pondering_exit=PonderingExit(_only_the_first_row, 1)).logits
            problem = None if are_close(found[1:, -1], expected[1:, -1]) else "other logits"
        except Exception as error:
            problem = in_one_line(error)
    if problem is not None:
        raise PonderingError(
            f"`pondering_exit_threshold` does not work under transformers {version} ({problem}): leave it out, or "
            f"{INSTALL_TESTED}"
        )
    model._exits_are_verified = True


def _only_the_first_row(logits, previous_logits):
    """An exit criterion: tokens of one row stop after pass 0, where all tokens of two equal rows are there."""
    distances = logits.new_full(logits.shape[:1], 2.0)
    if previous_logits is None:
        distances[: len(distances) // 2] = 0.0
    return distances
