"""What `generate` is given to go on from, checked before any work is done."""

import torch
from transformers.cache_utils import Cache

from .pondering_backbone import num_positions
from .pondering_cache import check_owner, given_cache, step_cache
from .pondering_errors import PonderingError


def check_prompt(model, inputs, num_steps, generation_config, kwargs):
    """Raise unless the model can go on from this prompt.

    Args:
        inputs, generation_config, kwargs: as `generate` got them.
        num_steps: S of the call.

    Raises:
        PonderingError: the prompt is empty, has ids outside the vocabulary or, with the tokens to come, more tokens
            than the model has positions, the mask does not fit, or the cache was filled by another model, with another
            number of passes or with other rows.
    """
    sources = (kwargs, generation_config, model)
    past_length, past_rows = _check_cache(model, given_cache(kwargs), num_steps)
    embeds = kwargs.get("inputs_embeds")
    prompt = inputs if inputs is not None else kwargs.get("input_ids")
    if embeds is not None:
        _check_embeds(embeds, model.embedding_size)
        shape = embeds.shape[:2]
    elif prompt is not None:
        _check_token_ids(prompt, model.get_input_embeddings().weight.shape[0])
        shape = prompt.shape
    else:
        _check_beginning(past_length, sources)
        return
    mask = kwargs.get("attention_mask")
    length = shape[1]
    if mask is not None:
        length = _check_mask(mask, shape, past_length)
    _check_positions(num_positions(model.backbone), length, shape[1], sources)
    if past_length:
        # A mask that also covers the cache says that the prompt is only what follows.
        covers_cache = mask is not None and mask.shape[1] > shape[1]
        if covers_cache and embeds is not None:
            raise PonderingError(
                "`inputs_embeds` must hold the whole text, also what `past_key_values` holds, and `attention_mask` "
                "must be as long as they are"
            )
        _check_continuation(shape, 0 if covers_cache else past_length, past_rows, sources)


def _check_cache(model, past_key_values, num_steps):
    """How many tokens it holds, and in how many rows (None where its slots do not tell)."""
    if past_key_values is None:
        return 0, None
    if isinstance(past_key_values, Cache) and past_key_values.get_seq_length() == 0:
        return 0, None
    step_cache(past_key_values, model.config.base_config, num_steps + 1)
    check_owner(past_key_values, model.backbone)
    keys = getattr(past_key_values.layers[0], "keys", None)
    rows = keys.shape[0] if torch.is_tensor(keys) and keys.ndim == 4 else None
    return int(past_key_values.get_seq_length()), rows


def _check_beginning(past_length, sources):
    """Without a prompt transformers begins with the token that begins a text."""
    if past_length:
        raise PonderingError("`past_key_values` needs the text that it holds, and more: give `input_ids`")
    if _setting("bos_token_id", *sources) is None:
        raise PonderingError(
            "the prompt is empty, and no `bos_token_id` says what begins a text: give at least one token"
        )


def _check_continuation(shape, past_length, past_rows, sources):
    """What a prompt of this shape needs of a cache that holds `past_length` of its tokens."""
    if shape[1] <= past_length:
        raise PonderingError(
            f"`past_key_values` holds {past_length} tokens, but the prompt has only {shape[1]}: give the whole text, "
            "what the cache holds and at least one token more"
        )
    repeats = max(_setting(name, *sources) or 1 for name in ("num_beams", "num_return_sequences"))
    if past_rows is not None and past_rows != shape[0] * repeats:
        raise PonderingError(
            f"`past_key_values` holds {past_rows} rows, but {shape[0] * repeats} are generated: go on with as many "
            "prompts, beams and sequences as it was filled with, or leave it out"
        )


def _check_token_ids(input_ids, vocab_size):
    if not torch.is_tensor(input_ids):
        hint = "unpack it, `generate(**inputs)`" if hasattr(input_ids, "keys") else "make it one"
        raise PonderingError(f"`input_ids` must be a tensor, got {type(input_ids).__name__}: {hint}")
    if torch.is_floating_point(input_ids) or input_ids.dtype == torch.bool:
        raise PonderingError(f"`input_ids` must be integers, got {input_ids.dtype}")
    if input_ids.ndim != 2:
        raise PonderingError(
            f"`input_ids` must have the shape (batch, tokens), got {tuple(input_ids.shape)}: "
            "make one prompt a batch of one"
        )
    if input_ids.numel() == 0:
        raise PonderingError("the prompt is empty: give at least one token")
    low, high = input_ids.min().item(), input_ids.max().item()
    if low < 0 or high >= vocab_size:
        raise PonderingError(
            f"the prompt has token id {low if low < 0 else high}, but the vocabulary goes from 0 to {vocab_size - 1}: "
            f"use the model's own tokenizer, whose {vocab_size} entries it knows"
        )


def _check_embeds(embeds, embedding_size):
    if not torch.is_tensor(embeds) or not torch.is_floating_point(embeds):
        kind = embeds.dtype if torch.is_tensor(embeds) else type(embeds).__name__
        raise PonderingError(f"`inputs_embeds` must be a tensor of floating-point numbers, got {kind}")
    if embeds.ndim != 3 or embeds.shape[-1] != embedding_size:
        raise PonderingError(
            f"`inputs_embeds` must have the shape (batch, tokens, {embedding_size}), got {tuple(embeds.shape)}"
        )
    if embeds.numel() == 0:
        raise PonderingError("the prompt is empty: give at least one token")


def _check_mask(mask, shape, past_length):
    """The number of tokens in the longest row, what the cache holds among them."""
    if not torch.is_tensor(mask) or mask.ndim != 2:
        kind = f"the shape {tuple(mask.shape)}" if torch.is_tensor(mask) else type(mask).__name__
        raise PonderingError(f"`attention_mask` must be a tensor of the shape {tuple(shape)}, got {kind}")
    if mask.shape[0] != shape[0] or mask.shape[1] not in (shape[1], past_length + shape[1]):
        raise PonderingError(
            f"`attention_mask` has the shape {tuple(mask.shape)}, which does not fit a prompt of {tuple(shape)} "
            f"after {past_length} cached tokens"
        )
    counts = (mask != 0).sum(1)
    if (counts == 0).any():
        row = (counts == 0).nonzero()[0].item()
        raise PonderingError(f"row {row} of the prompt is empty: its attention mask leaves no token")
    return int(counts.max())


def _check_positions(limit, length, width, sources):
    """`length` tokens of the longest row and those to come must have positions; `width` counts padding as well."""
    if limit is None:
        return
    if length > limit:
        raise PonderingError(
            f"the prompt has {length} tokens, but the model has only {limit} positions: give a shorter text"
        )
    num_new = _setting("max_new_tokens", *sources)
    if num_new is None:
        max_length = _setting("max_length", *sources)
        num_new = None if max_length is None else max_length - width
    if num_new is not None and length + num_new - 1 > limit:  # the last token needs none
        raise PonderingError(
            f"{length} tokens of prompt and {num_new} new ones are more than the {limit} positions of the model: "
            f"use max_new_tokens={limit - length + 1} or less"
        )


def _setting(name, kwargs, generation_config, model):
    sources = (kwargs.get(name), getattr(generation_config, name, None), getattr(model.generation_config, name, None))
    return next((value for value in sources if value is not None), None)
