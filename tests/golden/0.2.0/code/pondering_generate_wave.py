"""The wave: the passes of successive tokens in one batched forward pass.

Pass i of a token needs pass i - 1 of the same token, and pass i of the tokens before it. So pass S of token t, pass
S - 1 of token t + 1, ... and pass 0 of token t + S may all run at once, as soon as somebody guesses the tokens t + 1
.. t + S. One such batched forward pass is a tick. While the guesses are right each tick finishes a token; a wrong one
is replaced, what was in flight behind it is abandoned, and the replacement begins again with pass 0:

    tick          n         n + 1     n + 2     n + 3
    pass 0      t + 2       t + 3     t + 4     t + 3'     the guess of t + 3 was wrong
    pass 1      t + 1       t + 2     t + 3       -
    pass 2        t         t + 1     t + 2       -

The cache of the wave is the step cache turned on its side, one batch row a pass. In the step cache pass i of layer l
has a slot of its own (pondering_cache.py). Here all passes of a layer lie in one tensor, so that one forward pass may
run several of them. With B prompts, pass i of prompt b is row

    row(i, b) = i * B + b

and the token of column c lies at the same place in every row: at c, as in an ordinary left-padded batch, whose masks
and positions these are. A token that takes the place of an abandoned draft overwrites what that draft has left.
"""

import inspect
from collections.abc import Callable

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from .pondering_backbone import (
    TESTED,
    are_close,
    check_inputs,
    evaluating,
    in_one_line,
    positions_of,
    run_backbone,
)
from .pondering_errors import PonderingError, untested_version
from .pondering_generate_drafts import OwnPredictions, PendingTokens
from .pondering_vocabulary_embedding import PonderingEmbedding


_GROWTH = 256  # columns that are added at least when there are too few


class _Place:
    """What the running tick reads and writes."""

    def set(self, rows, row_ids, columns, length):
        """rows: a slice, of which the first `length` columns are read. row_ids, columns: (n,), where each writes."""
        self.rows, self.length = rows, length
        self.written = {row_ids.device: (row_ids, columns)}

    def written_on(self, device):
        """(row_ids, columns) on a device: with a device_map layers lie on several."""
        if device not in self.written:
            row_ids, columns = next(iter(self.written.values()))
            self.written[device] = row_ids.to(device), columns.to(device)
        return self.written[device]


class _WaveLayer(DynamicLayer):
    """Keys and values of one layer in all rows."""

    def __init__(self, place, keys, values):
        super().__init__()
        self.place, self.all_keys, self.all_values = place, keys, values
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True

    def update(self, key_states, value_states, *args, **kwargs):
        rows, length = self.place.rows, self.place.length
        row_ids, columns = self.place.written_on(self.all_keys.device)
        # Under autocast a layer may compute them in another dtype than it did for the prompt.
        self.all_keys[row_ids, :, columns] = key_states[:, :, 0].to(self.all_keys.dtype)
        self.all_values[row_ids, :, columns] = value_states[:, :, 0].to(self.all_values.dtype)
        return self.all_keys[rows, :, :length], self.all_values[rows, :, :length]

    def get_seq_length(self):
        return self.place.length - 1

    def get_mask_sizes(self, *args, **kwargs):
        return self.place.length, 0


class WaveCache:
    """A filled step cache as rows, and back.

    Args:
        past_key_values: a step cache after the prompt. It keeps its tokens as a view of the rows.
        num_layers: L.
        num_passes: S + 1.
        num_columns: how many columns there will be at most.
    """

    def __init__(self, past_key_values: Cache, num_layers: int, num_passes: int, num_columns: int) -> None:
        self.step_cache, self.num_layers, self.num_passes = past_key_values, num_layers, num_passes
        self.prompt_length = past_key_values.get_seq_length()
        self.batch_size = past_key_values.layers[0].keys.shape[0]
        self.max_columns = num_columns
        self.capacity = min(num_columns, self.prompt_length + _GROWTH)
        self.place = _Place()  # set before each tick
        self.layers = Cache(layers=[self._take(layer) for layer in range(num_layers)])

    def _slots(self, layer):
        return [self.step_cache.layers[i * self.num_layers + layer] for i in range(self.num_passes)]

    def _take(self, layer):
        rows, slots = {}, self._slots(layer)
        for name in ("keys", "values"):
            states = torch.cat([getattr(slot, name) for slot in slots])
            first = self.prompt_length - states.shape[2]  # a sliding window has dropped the columns before
            rows[name] = self._with_room(states, first)
            for slot, part in zip(slots, rows[name].split(self.batch_size), strict=True):
                setattr(slot, name, part[:, :, first : self.prompt_length])
        return _WaveLayer(self.place, **rows)

    def _with_room(self, states, first):
        """(rows, H, columns, D) with `capacity` columns, these from `first` on, and one more.

        Rows without a token write to that one, and nothing reads it. Zeros, since a masked value must be a number.
        """
        wide = states.new_zeros(*states.shape[:2], self.capacity + 1, states.shape[3])
        wide[:, :, first : first + states.shape[2]] = states
        return wide

    def reserve(self, length: int) -> int:
        """Make room for so many columns. Gives the column that rows without a token write to."""
        if length > self.capacity:
            self.capacity = min(2 * self.capacity, max(length, self.max_columns))
            for layer in self.layers.layers:
                layer.all_keys, layer.all_values = (
                    self._with_room(states, 0) for states in (layer.all_keys, layer.all_values)
                )
        return self.capacity

    def give_back(self, length: int) -> Cache:
        """The step cache, with the columns up to `length`, which every row must have, behind its own."""
        new = slice(self.prompt_length, length)
        for index, layer in enumerate(self.layers.layers):
            parts = zip(layer.all_keys.split(self.batch_size), layer.all_values.split(self.batch_size), strict=True)
            for slot, (keys, values) in zip(self._slots(index), parts, strict=True):
                slot.update(keys[:, :, new], values[:, :, new])
        return self.step_cache


def check_step_cache(past_key_values: Cache) -> None:
    """Raise unless the wave can take this cache."""
    kinds = {type(layer) for layer in past_key_values.layers} - {DynamicLayer, DynamicSlidingWindowLayer}
    if kinds or getattr(past_key_values, "offloading", False):
        name = next(iter(kinds)).__name__ if kinds else "offloaded"
        raise PonderingError(
            f"`num_draft_tokens` works with transformers' dynamic cache, not with {name} slots: leave out "
            "`past_key_values`, or set num_draft_tokens=0"
        )


class Wave:
    """The model's side of the wave: runs ticks.

    Args:
        model: a PonderingForCausalLM.
        past_key_values: its step cache after the prompt.
        num_steps: S.
        attention_mask: (B, T) of the prompt, or None.
        position_ids: (B, T) of the prompt, or None.
        num_columns: how many columns there will be at most.
        draft_source: see pondering_generate_drafts.py.
        autocast: (whether it is on, its dtype) in which the model's forward pass computes; None: as here and now.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        past_key_values: Cache,
        num_steps: int,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        num_columns: int,
        draft_source: Callable,
        autocast: tuple[bool, torch.dtype] | None = None,
    ) -> None:
        self.model, self.backbone, self.num_steps = model, model.backbone, num_steps
        self.cache = WaveCache(past_key_values, model.config.num_hidden_layers, num_steps + 1, num_columns)
        self.batch_size, self.prompt_length = self.cache.batch_size, self.cache.prompt_length
        self.draft_source, self.autocast = draft_source, autocast
        self.num_ticks = self.num_rows_run = 0
        # Where it computes, which is not where its weights wait while it does not (offloading).
        self.device = past_key_values.layers[0].keys.device
        has_hooks = any(hasattr(part, "_hf_hook") for part in model.modules())
        self.mode = torch.no_grad if has_hooks else torch.inference_mode  # hooks put weights in while a module runs
        self.input_embeddings = model.get_input_embeddings()
        self.embedding = PonderingEmbedding(self.backbone, model.config)
        self.inputs: torch.Tensor | None = None  # x of each row in the coming tick: (rows, d)
        self.row_ids = torch.arange(self.batch_size * (num_steps + 1), device=self.device)
        if position_ids is not None:
            last = position_ids[:, -1].expand(self.batch_size)
        elif attention_mask is not None:
            last = (attention_mask.long().sum(-1) - 1).clamp(min=0)
        else:
            last = torch.full((self.batch_size,), self.prompt_length - 1)
        # What to add to a column to get its position: (rows, 1).
        self.offsets = (last.to(self.device) - (self.prompt_length - 1)).repeat(num_steps + 1).unsqueeze(1)
        self.is_padding: torch.Tensor | None = None
        if attention_mask is not None and not bool(attention_mask.all()):
            self.is_padding = ~attention_mask.to(self.device).bool().repeat(num_steps + 1, 1)
        self.mask_kind = mask_kind(self.backbone)
        self.window = getattr(self.backbone.config, "sliding_window", None)

    def tick(self, pending: list[PendingTokens | None]) -> tuple[int, list[int], torch.Tensor]:
        """Run the next pass of everything that is under way.

        Args:
            pending: the PendingTokens, or None, of each of the B prompts.

        Returns:
            (first, columns, logits): logits (n, B, V) of passes first, first + 1, ..., of the drafts' source but for
            the last pass S; the columns that the tokens of these n * B rows stand in, -1 where there is none and the
            logits are meaningless.
        """
        with self.mode():
            if self.autocast is None:
                return self._tick(pending)
            enabled, dtype = self.autocast
            with torch.autocast(self.device.type, dtype, enabled):
                return self._tick(pending)

    def _tick(self, pending):
        self.num_ticks += 1
        columns, first, last = self._layout(pending)
        size = self.batch_size
        rows = slice(first * size, (last + 1) * size)
        self.num_rows_run += len(columns)
        if first == 0:
            newest = torch.tensor([[0 if one is None else one.tokens[-1]] for one in pending], device=self.device)
            embedded = self.input_embeddings(newest).squeeze(1)
            if self.inputs is None:
                self.inputs = embedded.new_zeros(len(self.row_ids), embedded.shape[1])
            self.inputs[:size] = self.model.first_input(embedded)
        hidden_states = run_backbone(
            self.backbone,
            self.inputs[rows].unsqueeze(1),
            past_key_values=self.cache.layers,
            use_cache=True,
            **self._place(rows, columns),
        ).last_hidden_state.squeeze(1)
        num_pondering = size * (min(last + 1, self.num_steps) - first)
        pondering_states, last_states = hidden_states[:num_pondering], hidden_states[num_pondering:]
        drafted = self.draft_source(pondering_states.view(-1, size, hidden_states.shape[-1]), first)
        # The passes' own predictions are drafts where the source gives none, and what is pondered over, which goes
        # without their logits where it can.
        without_logits = not self.embedding.makes_use_of_logits(pondering_states)
        drafted_states = pondering_states if drafted is None else drafted.flatten(0, 1).to(hidden_states.device)
        states = [drafted_states, last_states]
        if drafted is not None and not without_logits:
            states.insert(0, pondering_states)
        logits = self.embedding.logits(torch.cat(states))
        if num_pondering:
            if without_logits:
                embedding = self.embedding(pondering_states.unsqueeze(0))[0]
            else:
                embedding = self.embedding.of_logits(logits[:num_pondering])
            # The inputs of the passes that follow.
            here, next_pass = (slice(start, start + num_pondering) for start in (rows.start, rows.start + size))
            embedding = self.model.finish_embedding(embedding).to(self.inputs.device)
            self.inputs[next_pass] = self.inputs[here] + embedding
        return first, columns, logits[-len(hidden_states) :].view(-1, size, logits.shape[-1])

    def _layout(self, pending):
        """(column of each row or -1, first pass, last pass) of the passes that have something to run."""
        size = self.batch_size
        first = min(one.next_passes[-1] for one in pending if one is not None)
        last = max(one.next_passes[0] for one in pending if one is not None)
        columns = [-1] * (size * (last - first + 1))
        for prompt, one in enumerate(pending):
            if one is not None:
                for index, pass_index in enumerate(one.next_passes):
                    columns[(pass_index - first) * size + prompt] = one.column + index
        return columns, first, last

    def _place(self, rows, columns):
        """Set the cache's place; the mask and the positions for the backbone."""
        length = max(columns) + 1
        unused = self.cache.reserve(length)
        # A row without a token reads the prompt's last column: one value at least must not be masked.
        first_read = self.prompt_length - 1
        where = torch.tensor(
            [
                [unused if column < 0 else column for column in columns],
                [max(column, first_read) for column in columns],
            ],
            device=self.device,
        )
        writes, reads = where.unsqueeze(-1).unbind()
        self.cache.place.set(rows, self.row_ids[rows], writes[:, 0], length)
        columns_read = torch.arange(length, device=self.device)
        hidden = columns_read > reads
        if self.is_padding is not None:
            hidden[:, : self.prompt_length] |= self.is_padding[rows]
        if self.mask_kind == "flat":
            mask = (~hidden).long()
        elif self.mask_kind == "full":
            mask = self._shaped(hidden)
        else:
            mask = self._shaped(hidden | (columns_read <= reads - self.window))
            if self.mask_kind == "mixed":
                mask = {"full_attention": self._shaped(hidden), "sliding_attention": mask}
        return {"attention_mask": mask, "position_ids": reads + self.offsets[rows]}

    def _shaped(self, hidden):
        """(rows, length) to (rows, 1, 1, length), as attention adds it: every layer would make that of booleans."""
        dtype = self.inputs.dtype
        return hidden.to(dtype).mul_(torch.finfo(dtype).min)[:, None, None]


def without_inference_tensors(model: nn.Module) -> None:
    """Make every tensor that a module has replaced in inference mode (some rotations do) a usual one."""
    for part in model.modules():
        for name, value in [*part.named_buffers(recurse=False, remove_duplicate=False), *part.__dict__.items()]:
            if torch.is_tensor(value) and value.is_inference():
                setattr(part, name, value.clone())


def mask_kind(backbone: PreTrainedModel) -> str:
    """What kind of mask the backbone's layers take when each row of a batch stands at a column of its own.

    "full": (rows, 1, 1, columns). "window": the same, for sliding windows in all layers. "mixed": both, as a dict by
    the kind of layer. "flat": (rows, columns), for attention that makes its own masks or biases.
    """
    config = backbone.config
    if config.model_type == "gpt_neo":
        raise PonderingError(
            "`num_draft_tokens` does not work with model_type 'gpt_neo', whose local attention counts columns from "
            "the end of the cache: set num_draft_tokens=0"
        )
    kinds = set(getattr(config, "layer_types", None) or ())
    if "chunked_attention" in kinds:
        raise PonderingError("`num_draft_tokens` does not work with chunked attention: set num_draft_tokens=0")
    has_windows = "sliding_attention" in kinds or (not kinds and getattr(config, "sliding_window", None) is not None)
    decoder = backbone.base_model
    has_alibi = getattr(config, "alibi", False) or "position_ids" not in inspect.signature(decoder.forward).parameters
    if has_alibi or config._attn_implementation not in ("sdpa", "eager"):
        if has_windows:
            raise PonderingError(
                f"`num_draft_tokens` needs attn_implementation 'sdpa' or 'eager' with sliding windows, "
                f"not {config._attn_implementation!r}"
            )
        return "flat"
    if not has_windows:
        return "full"
    return "mixed" if kinds else "window"


def verify_wave_once(model: PreTrainedModel) -> None:
    """Check the wave against plain pondering at the first drafted call of an untested backbone or transformers.

    Raises:
        PonderingError: the wave does not give what plain pondering gives.
    """
    name, version = model.backbone.config.model_type, untested_version()
    if (name in TESTED and version is None) or getattr(model, "_wave_is_verified", False):
        return
    where = f"with model_type {name!r}" if version is None else f"under transformers {version}"
    try:
        with evaluating(model):
            found, expected = _compare_wave(model)
    except PonderingError:  # which says it already
        raise
    except Exception as error:
        raise PonderingError(
            f"`num_draft_tokens` does not work {where} ({in_one_line(error)}): set num_draft_tokens=0"
        ) from error
    if not are_close(found, expected):
        raise PonderingError(
            f"`num_draft_tokens` does not work {where}, where passes of several tokens in one batch "
            "give something else than by themselves: set num_draft_tokens=0"
        )
    model._wave_is_verified = True


@torch.no_grad()
def _compare_wave(model):
    """Logits (2, 2, V) of two tokens behind two prompts, one of them padded: by the wave, and by whole passes."""
    ids, mask = check_inputs(model)
    position_ids = positions_of(mask)
    whole = model(ids, attention_mask=mask, position_ids=position_ids, use_cache=False, pondering_steps=1).logits
    prompt, new = slice(0, 4), ids[:, 4:]
    cache = model(
        ids[:, prompt],
        attention_mask=mask[:, prompt],
        position_ids=position_ids[:, prompt],
        use_cache=True,
        pondering_steps=1,
    ).past_key_values
    wave = Wave(model, cache, 1, mask[:, prompt], None, 6, OwnPredictions())
    pending = [PendingTokens(4, token) for token in new[:, 0].tolist()]
    wave.tick(pending)
    for one, token in zip(pending, new[:, 1].tolist(), strict=True):
        one.tokens, one.next_passes = [one.tokens[0], token], [1, 0]
    first = wave.tick(pending)[2][1]
    for one in pending:
        one.column, one.tokens, one.next_passes = 5, one.tokens[1:], [1]
    second = wave.tick(pending)[2][0]
    return torch.stack([first, second], dim=1), whole[:, 4:]
