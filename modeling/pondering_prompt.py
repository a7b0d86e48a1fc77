"""What `generate` is given to go on from, checked before any work is done."""

import torch

from .pondering_errors import PonderingError


def check_prompt(model, inputs, num_steps, generation_config, kwargs):
    """Raise unless the model can go on from this prompt.

    Args:
        inputs, generation_config, kwargs: as `generate` got them.
        num_steps: S of the call.

    Raises:
        PonderingError: the prompt is empty, has ids outside the vocabulary or more tokens than the model has
            positions, or the cache was filled by another model or with another number of passes.
    """
    input_ids = inputs if inputs is not None else kwargs.get("input_ids")
    if torch.is_tensor(input_ids) and not torch.is_floating_point(input_ids):
        _check_token_ids(input_ids, model.get_input_embeddings().weight.shape[0])


def _check_token_ids(input_ids, vocab_size):
    if input_ids.ndim != 2:
        raise PonderingError(
            f"`input_ids` must have the shape (batch, tokens), got {tuple(input_ids.shape)}: "
            "make one prompt a batch of one"
        )
    if input_ids.shape[1] == 0:
        raise PonderingError("the prompt is empty: give at least one token")
    low, high = input_ids.min().item(), input_ids.max().item()
    if low < 0 or high >= vocab_size:
        raise PonderingError(
            f"the prompt has token id {low if low < 0 else high}, but the vocabulary goes from 0 to {vocab_size - 1}: "
            "use the model's own tokenizer"
        )
