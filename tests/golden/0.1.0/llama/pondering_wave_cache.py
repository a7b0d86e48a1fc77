"""The cache of the wave: the step cache turned on its side, one batch row a pass.

In the step cache pass i of layer l has a slot of its own (pondering_cache.py). Here all passes of a layer lie in one
tensor, so that one forward pass may run several of them. With B prompts, pass i of prompt b is row

    row(i, b) = i * B + b

and the token of column c lies at the same place in every row: at c, as in an ordinary left-padded batch. A token that
takes the place of an abandoned draft overwrites what that draft has left.
"""

import torch
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from .pondering_errors import PonderingError


_GROWTH = 256  # columns that are added at least when there are too few


class _WaveLayer(DynamicLayer):
    """Keys and values of one layer in all rows. `place` says what the running tick writes and reads."""

    def __init__(self, place, keys, values):
        super().__init__()
        self.place, self.all_keys, self.all_values = place, keys, values
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True

    def update(self, key_states, value_states, *args, **kwargs):
        place = self.place
        row_ids, columns = place.on(self.all_keys.device)
        # Under autocast a layer may compute them in another dtype than it did for the prompt.
        self.all_keys[row_ids, :, columns] = key_states[:, :, 0].to(self.all_keys.dtype)
        self.all_values[row_ids, :, columns] = value_states[:, :, 0].to(self.all_values.dtype)
        return self.all_keys[place.rows, :, : place.length], self.all_values[place.rows, :, : place.length]

    def get_seq_length(self):
        return self.place.length - 1

    def get_mask_sizes(self, *args, **kwargs):
        return self.place.length, 0


class _Place:
    """Where a tick reads and writes. rows: a slice. row_ids, columns: (n,). length: columns that are read."""

    rows = row_ids = columns = length = copies = None

    def on(self, device):
        """(row_ids, columns) on a device: with a device_map layers lie on several."""
        if device not in self.copies:
            self.copies[device] = self.row_ids.to(device), self.columns.to(device)
        return self.copies[device]


class WaveCache:
    """A filled step cache as rows, and back.

    Args:
        past_key_values: a step cache after the prompt. It keeps its tokens as a view of the rows.
        num_layers: L.
        num_passes: S + 1.
        num_columns: how many columns there will be at most.
    """

    def __init__(self, past_key_values, num_layers, num_passes, num_columns):
        self.step_cache, self.num_layers, self.num_passes = past_key_values, num_layers, num_passes
        self.prompt_length = past_key_values.get_seq_length()
        self.batch_size = past_key_values.layers[0].keys.shape[0]
        self.max_columns = num_columns
        self.capacity = min(num_columns, self.prompt_length + _GROWTH)
        self._place = _Place()
        self.layers = Cache(layers=[self._take(layer) for layer in range(num_layers)])

    def _take(self, index):
        slots = [self.step_cache.layers[i * self.num_layers + index] for i in range(self.num_passes)]
        rows = {}
        for name in ("keys", "values"):
            states = torch.cat([getattr(slot, name) for slot in slots])
            # One column more than can be used: rows without a token write there, and nothing reads it. Zeros, since
            # a masked value still must be a number.
            rows[name] = states.new_zeros(*states.shape[:2], self.capacity + 1, states.shape[3])
            first = self.prompt_length - states.shape[2]  # a sliding window has dropped the columns before
            rows[name][:, :, first : self.prompt_length] = states
            for i, slot in enumerate(slots):
                part = rows[name][i * self.batch_size : (i + 1) * self.batch_size]
                setattr(slot, name, part[:, :, first : self.prompt_length])
        return _WaveLayer(self._place, **rows)

    def reserve(self, length):
        """Make room for so many columns. Gives the column that rows without a token write to."""
        if length > self.capacity:
            self._grow(min(2 * self.capacity, max(length, self.max_columns)))
        return self.capacity

    def set_place(self, rows, row_ids, columns, length):
        """Say what the next forward pass writes and reads; see _Place."""
        place = self._place
        place.rows, place.row_ids, place.columns, place.length = rows, row_ids, columns, length
        place.copies = {row_ids.device: (row_ids, columns)}

    def _grow(self, capacity):
        self.capacity = capacity
        for layer in self.layers.layers:
            for name in ("all_keys", "all_values"):
                old = getattr(layer, name)
                new = old.new_zeros(*old.shape[:2], self.capacity + 1, old.shape[3])
                new[:, :, : old.shape[2]] = old
                setattr(layer, name, new)

    def give_back(self, length):
        """Append columns up to `length`, which every row must have, to the step cache."""
        new = slice(self.prompt_length, length)
        for index, layer in enumerate(self.layers.layers):
            for i in range(self.num_passes):
                rows = slice(i * self.batch_size, (i + 1) * self.batch_size)
                slot = self.step_cache.layers[i * self.num_layers + index]
                slot.update(layer.all_keys[rows, :, new], layer.all_values[rows, :, new])
        return self.step_cache


def check_step_cache(past_key_values):
    """Raise unless the wave can take this cache."""
    kinds = {type(layer) for layer in past_key_values.layers} - {DynamicLayer, DynamicSlidingWindowLayer}
    if kinds or getattr(past_key_values, "offloading", False):
        name = next(iter(kinds)).__name__ if kinds else "offloaded"
        raise PonderingError(
            f"`num_draft_tokens` works with transformers' dynamic cache, not with {name} slots: leave out "
            "`past_key_values`, or set num_draft_tokens=0"
        )
