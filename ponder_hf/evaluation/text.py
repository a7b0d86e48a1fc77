"""The loss of each pass on blocks of tokens, and on any text that a user names."""

import os
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ponder_hf.data import Blocks, load_blocks
from ponder_hf.data.blocks import choose_block_size
from ponder_hf.data.sources import Names, as_list, find_sources, usual_split
from ponder_hf.modeling import PonderingError
from ponder_hf.modeling.configuration_pondering import check_steps
from ponder_hf.progress import progress_bar

from .load import Loaded, load_for_evaluation, warn_of_untrained
from .passes import IGNORED, PassStatistics, PassSums, check_finite, is_read_apart, measure_passes, ponders


_TOKENS_AT_ONCE = {"cpu": 2048, "other": 16384}  # in the rows that go through the model together
_LARGEST_OUTPUT = 1 << 24  # numbers in the logits of a batch of a plain model


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
    stride: int | None = None,
    pondering_steps: int | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    revision: str | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Measure the loss, perplexity, bits per byte, next-token accuracy and agreement of each pass on text.

    The text is cut into blocks as for training: documents one after another, in rows of `block_size` tokens. The first
    token of a block is not predicted, and what does not fill a last block is left out. So only losses on blocks of the
    same size, by models with the same tokenizer, can be compared; bits per byte also with other tokenizers.

    With a `stride` a window of `block_size` tokens slides over the same text, `stride` tokens at a time, and of each
    window only the tokens are predicted that no window before it has predicted. So all but the first window predict
    with a context of at least `block_size - stride` tokens, which a block has only at its end.

    Args:
        model: a pondering or a plain model, which has one pass: a folder, a Hub id, or a model that is loaded already.
        data: files, folders of files, or ids of data sets, one or a list; see `ponder_hf.data.load_blocks`.
        tokenizer: a tokenizer, or the folder or Hub id that has one. None: the checkpoint's own; a model that is
            loaded already needs one.
        text_field: the field or column that holds the text.
        data_name: the configuration of a data set.
        split: the split of a data set. None: "validation"; of files and folders on this machine "train".
        block_size: tokens in a row. None: as many as the model has positions, at most 2048.
        max_blocks: no more than the first so many blocks of text.
        stride: of a sliding window, from 1 to `block_size - 1`; None: blocks side by side.
        pondering_steps: S, in place of the model's own.
        dtype: to load the weights in. None: as they are stored.
        device: to evaluate on, such as "cuda". None: the accelerator, where there is one; of a model that is loaded
            already, where it is.
        revision: the branch, tag or commit of a model on the Hub.
        progress: whether bars on standard error show how far it is.

    Returns:
        A dict that JSON can hold. `passes` has the figures of each pass 0 .. S (`PassSums.figures`), with standard
        errors over the blocks or windows, `loss` (nats per token), `perplexity`, `bits_per_byte` and `accuracy` are
        the last pass's; `blocks`, `block_size`, `stride` and `tokens` say over how much, `bytes` how long the text of
        these blocks is in UTF-8, as the tokenizer gives it back; further the `source`, its `revision`, the `data`,
        `pondering_steps`, `dtype`, `seconds` and `tokens_per_second`.

    Raises:
        PonderingError: the model, the tokenizer or the data cannot be used, or a loss is no finite number.
    """
    if pondering_steps is not None:
        check_steps("pondering_steps", pondering_steps)
    split = split or usual_split(data)
    find_sources(data, data_name, split, streaming=True)  # a wrong name, before a model is loaded
    loaded = load_for_evaluation(
        model, tokenizer=tokenizer, dtype=dtype, device=device, revision=revision, pondering_steps=pondering_steps
    )
    warn_of_untrained(pondering_steps, loaded)
    config = loaded.model.config
    block_size = choose_block_size(block_size, config)
    if stride is not None and not 1 <= stride < block_size:
        raise PonderingError(f"`stride` must be from 1 to `block_size` - 1, here {block_size - 1}, got {stride}")
    blocks: Any = load_blocks(
        data,
        loaded.tokenizer,
        block_size,
        text_field=text_field,
        name=data_name,
        split=split,
        max_blocks=max_blocks,
        vocab_size=config.vocab_size,
        progress=progress,
    )
    start = time.perf_counter()
    sums = measure_blocks(loaded.model, blocks, pondering_steps, stride, progress)
    seconds = time.perf_counter() - start
    check_finite(sums.losses, loaded.name)
    return {"data": as_list(data), **_figures(loaded, sums, blocks, stride, seconds)}


def evaluate_passes(
    model: PreTrainedModel, blocks: Blocks, pondering_steps: int | None = None, progress: bool = False
) -> list[float]:
    """The mean loss of each pass over these blocks, in nats per token: S + 1 numbers, of a plain model one.

    Args:
        model: any causal language model; each part of it is in its former mode afterwards.
        blocks: as `ponder_hf.data.load_blocks` makes them, (N, T) token ids.
        pondering_steps: S; None: the model's own. Not for a plain model.
        progress: whether a bar on standard error shows how far it is.

    Returns:
        The losses of passes 0 .. S.
    """
    sums = measure_blocks(model, blocks, pondering_steps, progress=progress)
    return (sums.losses.sum(-1) / sums.tokens.sum()).tolist()


def measure_blocks(
    model: PreTrainedModel,
    blocks: Blocks,
    pondering_steps: int | None = None,
    stride: int | None = None,
    progress: bool = False,
) -> PassSums:
    """What each pass predicts of these blocks, or of windows that slide over their tokens (see `evaluate_text`).

    Args:
        model, blocks, pondering_steps, progress: as in `evaluate_passes`.
        stride: of the windows; None: the blocks as they are.

    Returns:
        The sums of each block or window.
    """
    batches = measure_batches(model, blocks, pondering_steps, stride, progress=progress)
    return PassSums.of_all([batch.sums() for batch in batches])


def measure_batches(
    model: PreTrainedModel,
    blocks: Blocks,
    pondering_steps: int | None = None,
    stride: int | None = None,
    entropies: bool = False,
    progress: bool = False,
) -> Iterator[PassStatistics]:
    """What each pass predicts of each token of these blocks or windows, a few rows at a time, in order.

    Args:
        model, blocks, pondering_steps, stride, progress: as in `measure_blocks`.
        entropies: whether they are wanted as well.
    """
    tokens, length = blocks.rows.flatten(), blocks.rows.shape[1]
    num_rows = len(blocks) if stride is None else num_windows(len(tokens), length, stride)
    kind = "cpu" if model.device.type == "cpu" else "other"
    size = max(1, _TOKENS_AT_ONCE[kind] // length)
    if not (ponders(model) or is_read_apart(model)):  # all logits of its batch live at once
        size = max(1, min(size, _LARGEST_OUTPUT // (length * model.config.vocab_size)))
    unit = " blocks" if stride is None else " windows"
    with progress_bar("evaluating", unit, num_rows, shown=progress) as bar:
        for start in range(0, num_rows, size):
            some = slice(start, start + size)
            ids = labels = blocks.rows[some]
            if stride is not None:  # never all of them at once: they are the text many times over
                ids, labels = windows(tokens, length, stride, some)
            ids, labels = ids.long().to(model.device), labels.long().to(model.device)
            yield measure_passes(model, ids, labels=labels, pondering_steps=pondering_steps, entropies=entropies)
            bar.update(len(ids))


def num_windows(num_tokens: int, size: int, stride: int) -> int:
    """How many `windows` there are over so many tokens."""
    return -(-(num_tokens - size) // stride) + 1


def windows(
    tokens: torch.Tensor, size: int, stride: int, chosen: slice = slice(None)
) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows (M, size) over tokens (n,), n >= size, and their labels: each token but the first is predicted once.

    The last window begins where it still is a whole one, so that all are equally long. `chosen`: only some of them.
    """
    last = len(tokens) - size
    numbers = range(num_windows(len(tokens), size, stride))[chosen]
    starts = [min(number * stride, last) for number in numbers]
    rows = torch.stack([tokens[start : start + size] for start in starts])
    labels = rows.clone()
    for number, start, row in zip(numbers, starts, labels, strict=True):
        predicted = (number - 1) * stride + size if number else 1  # how many tokens need no prediction any more
        row[: predicted - start] = IGNORED
    return rows, labels


@torch.no_grad()
def measure_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    pondering_steps: int | None = None,
    progress: bool = False,
) -> PassSums:
    """What each pass predicts of texts that stand alone. The first token of each is not predicted.

    A text longer than the model is read through a window that slides by half its size.

    Args:
        model, pondering_steps, progress: as in `evaluate_passes`.
        tokenizer: adds to each text what it always adds.
        texts: as strings.

    Returns:
        The sums of each text.

    Raises:
        PonderingError: none of the texts has two tokens.
    """
    size = choose_block_size(None, model.config)
    parts = []
    for text in progress_bar("evaluating", " texts", None, shown=progress, iterable=texts):
        ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.long, device=model.device)
        if len(ids) < 2:
            continue
        rows, labels = (ids[None], ids[None]) if len(ids) <= size else windows(ids, size, size // 2)
        sums = [
            measure_passes(model, row[None], labels=label[None], pondering_steps=pondering_steps).sums()
            for row, label in zip(rows, labels, strict=True)
        ]
        parts.append(PassSums.of_all(sums).together())
    if not parts:
        raise PonderingError("none of the texts has two tokens: there is nothing to predict")
    return PassSums.of_all(parts)


def _figures(loaded: Loaded, sums: PassSums, blocks: Blocks, stride: int | None, seconds: float) -> dict[str, Any]:
    num_bytes = _length_in_bytes(blocks.rows, loaded.tokenizer)
    passes = sums.figures(blocks.rows.numel() / num_bytes if num_bytes else None)
    tokens = int(sums.tokens.sum())
    return {
        "source": loaded.name,
        "revision": loaded.revision,
        "pondering_steps": len(passes) - 1,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "block_size": blocks.rows.shape[1],
        "blocks": len(blocks),
        "stride": stride,
        "tokens": tokens,
        "bytes": num_bytes,
        **{name: passes[-1][name] for name in ("loss", "perplexity", "bits_per_byte", "accuracy")},
        "passes": passes,
        "seconds": round(seconds, 3),
        "tokens_per_second": round(tokens / seconds, 1),
    }


def _length_in_bytes(rows: torch.Tensor, tokenizer: PreTrainedTokenizerBase) -> int:
    """Of the text that these tokens spell. Many rows at once, since a character may lie on both sides of a cut."""
    many = max(1, (1 << 20) // rows.shape[1])
    texts = (
        tokenizer.decode(part.flatten().tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for part in rows.split(many)
    )
    return sum(len(text.encode("utf-8", "replace")) for text in texts)
