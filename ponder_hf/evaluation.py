"""The loss of each pass: of one batch, of blocks of tokens, and of any text that a user names."""

import logging
import math
import os
import time
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ponder_hf.conversion import Checkpoint, check_tokenizer, load_pondering, load_tokenizer, open_checkpoint
from ponder_hf.conversion.load_model import load_plain, plain_warnings, understand_plain
from ponder_hf.data import Blocks, load_blocks
from ponder_hf.data.blocks import choose_block_size
from ponder_hf.data.sources import Names, as_list, find_sources, usual_split
from ponder_hf.devices import read_device
from ponder_hf.modeling import PonderingError
from ponder_hf.modeling.configuration_pondering import check_steps
from ponder_hf.modeling.pondering_backbone import evaluating
from ponder_hf.progress import progress_bar


logger = logging.getLogger(__name__)

# What a pondering model is called with, beside labels, so that its output has `pondering_losses`. Only one position's
# logits, for the losses never need all of them at once.
FOR_LOSS_OF_EACH_PASS = {"output_pondering": True, "logits_to_keep": 1, "use_cache": False}
_LARGEST_OUTPUT = 1 << 24  # numbers in the logits of all passes of one evaluated batch


def evaluate_text(
    model: str | os.PathLike | PreTrainedModel,
    data: Names,
    *,
    tokenizer: str | os.PathLike | PreTrainedTokenizerBase | None = None,
    text_field: str = "text",
    data_name: str | None = None,
    split: str | None = None,
    block_size: int | None = None,
    max_blocks: int | None = None,
    pondering_steps: int | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    revision: str | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Measure the loss and perplexity of each pass on text.

    The text is cut into blocks as for training: documents one after another, in rows of `block_size` tokens. The first
    token of a block is not predicted, and what does not fill a last block is left out. So only losses on blocks of the
    same size, by models with the same tokenizer, can be compared.

    Args:
        model: a pondering or a plain model, which has one pass: a folder, a Hub id, or a model that is loaded already.
        data: files, folders of files, or ids of data sets, one or a list; see `ponder_hf.data.load_blocks`.
        tokenizer: a tokenizer, or the folder or Hub id that has one. None: the checkpoint's own; a model that is
            loaded already needs one.
        text_field: the field or column that holds the text.
        data_name: the configuration of a data set.
        split: the split of a data set. None: "validation"; of files and folders on this machine "train".
        block_size: tokens in a row. None: as many as the model has positions, at most 2048.
        max_blocks: no more than the first so many blocks.
        pondering_steps: S, in place of the model's own.
        dtype: to load the weights in. None: as they are stored.
        device: to evaluate on, such as "cuda". None: the accelerator, where there is one; of a model that is loaded
            already, where it is.
        revision: the branch, tag or commit of a model on the Hub.
        progress: whether bars on standard error show how far it is.

    Returns:
        A dict that JSON can hold. `loss` (nats per token) and `perplexity` are the last pass's, `passes` has both of
        each pass 0 .. S; `blocks`, `block_size` and `tokens` say over how much; further the `source`, its `revision`,
        the `data`, `pondering_steps`, `dtype`, `seconds` and `tokens_per_second`.

    Raises:
        PonderingError: the model, the tokenizer or the data cannot be used, or a loss is no finite number.
    """
    if pondering_steps is not None:
        check_steps("pondering_steps", pondering_steps)
    place = None if device is None and isinstance(model, torch.nn.Module) else read_device(device)
    split = split or usual_split(data)
    find_sources(data, data_name, split, streaming=True)  # a wrong name, before a model is loaded
    source: Any = open_checkpoint(model, revision) if isinstance(model, (str, os.PathLike)) else None
    if source is None and (tokenizer is None or dtype is not None or revision is not None):
        raise PonderingError("a loaded model needs a `tokenizer`, and takes no `dtype` and no `revision`")
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        tokenizer = load_tokenizer(tokenizer or source)
    loaded: Any = model if source is None else _load(source, dtype, pondering_steps)
    name = loaded.config._name_or_path or type(loaded).__name__ if source is None else source.name
    check_tokenizer(tokenizer, loaded.config, name)
    blocks: Any = load_blocks(
        data,
        tokenizer,
        choose_block_size(block_size, loaded.config),
        text_field=text_field,
        name=data_name,
        split=split,
        max_blocks=max_blocks,
        vocab_size=loaded.config.vocab_size,
        progress=progress,
    )
    loaded = loaded if place is None else loaded.to(place)
    start = time.perf_counter()
    losses = evaluate_passes(loaded, blocks, pondering_steps, progress)
    seconds = time.perf_counter() - start
    if not all(map(math.isfinite, losses)):
        raise PonderingError(f"{name} predicts NaN or infinity: get its weights again, or use `dtype` float32")
    return {
        "source": name,
        "revision": None if source is None else source.revision,
        "data": as_list(data),
        "pondering_steps": len(losses) - 1,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        **_figures(losses, blocks, seconds),
    }


@torch.no_grad()
def evaluate_passes(
    model: PreTrainedModel, blocks: Blocks, pondering_steps: int | None = None, progress: bool = False
) -> list[float]:
    """The mean loss of each pass over these blocks, in nats per token: S + 1 numbers, of a plain model one.

    Only as many blocks go through the model at once as would keep the logits of all passes small.

    Args:
        model: any causal language model; each part of it is in its former mode afterwards.
        blocks: as `ponder_hf.data.load_blocks` makes them, (N, T) token ids.
        pondering_steps: S; None: the model's own. Not for a plain model.
        progress: whether a bar on standard error shows how far it is.

    Returns:
        The losses of passes 0 .. S.
    """
    config = model.config
    ponders = hasattr(config, "pondering_steps")
    steps = pondering_steps if pondering_steps is not None else getattr(config, "pondering_steps", 0)
    settings = {**FOR_LOSS_OF_EACH_PASS, "pondering_steps": steps} if ponders else {"use_cache": False}
    num_passes = steps + 1
    per_row = num_passes * blocks.rows.shape[1] * config.vocab_size
    totals = [0.0] * num_passes
    with progress_bar("evaluating", " blocks", len(blocks), shown=progress) as bar, evaluating(model):
        for rows in blocks.rows.split(max(1, _LARGEST_OUTPUT // per_row)):
            ids = rows.long().to(model.device)
            output = model(input_ids=ids, labels=ids, **settings)
            losses = output.pondering_losses if ponders else [output.loss]
            totals = [total + len(rows) * loss.item() for total, loss in zip(totals, losses, strict=True)]
            bar.update(len(rows))
    return [total / len(blocks) for total in totals]


def _load(source: Checkpoint, dtype: torch.dtype | None, pondering_steps: int | None) -> PreTrainedModel:
    """The model in `source`. A plain one is one that ponders 0 steps, unless others are asked for."""
    if source.is_pondering:
        return load_pondering(source, dtype)
    authors_fields, empty_backbone = understand_plain(source, {})
    for warning in plain_warnings(source, authors_fields):
        logger.warning(warning)
    fields = {} if authors_fields else {"pondering_steps": pondering_steps or 0}
    return load_plain(source, empty_backbone, fields, dtype)


def _figures(losses: list[float], blocks: Blocks, seconds: float) -> dict[str, Any]:
    num_blocks, block_size = blocks.rows.shape
    tokens = num_blocks * (block_size - 1)
    return {
        "block_size": block_size,
        "blocks": num_blocks,
        "tokens": tokens,
        "loss": losses[-1],
        "perplexity": _perplexity(losses[-1]),
        "passes": [{"loss": loss, "perplexity": _perplexity(loss)} for loss in losses],
        "seconds": round(seconds, 3),
        "tokens_per_second": round(tokens / seconds, 1),
    }


def _perplexity(loss: float) -> float:
    # Beyond what a float can hold there is nothing left to compare; JSON knows no infinity.
    return math.exp(min(loss, 700.0))
