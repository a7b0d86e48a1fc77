"""From what a user names to what Trainer takes: blocks of token ids in memory or streamed, some of them held out."""

import dataclasses
import itertools
import random
from collections.abc import Iterable, Iterator

import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from ponder_hf.modeling import PonderingError

from .packing import pack
from .sources import Names, TextSource, as_list, find_sources, read_pieces
from .text import Piece, closed_at_exit


MOST_TOKENS = 2048  # in a block, unless more are asked for


class Blocks(Dataset):
    """Token ids in rows of equal length, (N, T), as Trainer takes them. Labels are the ids: models shift them."""

    def __init__(self, rows: torch.Tensor) -> None:
        self.rows = rows

    def shuffled(self, seed: int) -> "Blocks":
        """The same rows in an order that the seed decides."""
        order = torch.randperm(len(self.rows), generator=torch.Generator().manual_seed(seed))
        return Blocks(self.rows[order])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return _as_example(self.rows[index])


def _as_example(row: torch.Tensor) -> dict[str, torch.Tensor]:
    """A row of token ids, (T,), as a model takes it."""
    row = row.long()
    return {"input_ids": row, "labels": row}


class StreamError(PonderingError):
    """What is wrong with a stream. DataLoader remakes a worker's error from its traceback; this finds the message."""

    def __init__(self, message: str) -> None:
        super().__init__(message.rstrip().rpartition("StreamError: ")[2])


@dataclasses.dataclass(eq=False, repr=False)
class StreamedBlocks(IterableDataset):
    """The blocks of some sources, in order or shuffled within a buffer, the same ones in every iteration.

    Trainer counts the steps of a stream, not its passes, and after a resume skips as many batches from its beginning.
    So this one starts over by itself when it ends; with `repeat=False` one iteration is one pass.

    In the workers of a DataLoader each block is in exactly one of them. Every worker reads and tokenises all of the
    text, so one worker keeps that out of the training process and more do not make it faster. Blocks are not divided
    among processes here, because accelerate does that, in either of its ways (`dispatch_batches`).

    Args:
        sources: as `find_sources` gives them.
        tokenizer: of transformers.
        block_size: T.
        text_field: the field of .jsonl or the column of a table that holds the text.
        start, stop: the blocks of each pass that belong to it.
        shuffle_buffer: from how many blocks the next one is drawn; 0: no shuffling.
        seed: of the shuffling; each pass is shuffled anew.
        repeat: whether it starts over when it ends.
        vocab_size: the number of the model's embeddings; None: not checked.
        name: what messages call the text.
        epoch: the number of the first pass, for the shuffling.
    """

    sources: list[TextSource]
    tokenizer: PreTrainedTokenizerBase
    block_size: int
    text_field: str = "text"
    start: int = 0
    stop: int | None = None
    shuffle_buffer: int = 0
    seed: int = 0
    repeat: bool = True
    vocab_size: int | None = None
    name: str = "the text"
    epoch: int = 0

    def set_epoch(self, epoch: int) -> None:
        """Begin with another shuffling. Trainer and accelerate call this; for a stream that repeats, always with 0."""
        self.epoch = epoch

    @closed_at_exit
    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        worker = get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        try:
            for row in itertools.islice(self._passes(), first, None, step):
                yield _as_example(row)
        except PonderingError as error:
            raise StreamError(str(error)) from error

    def split(self, num_blocks: int) -> tuple[Blocks, "StreamedBlocks"]:
        """The first blocks of a pass as `Blocks`, and a stream of those after them.

        Raises:
            PonderingError: there are not more than `num_blocks`.
        """
        rows = list(itertools.islice(self._rows(), num_blocks + 1))
        if len(rows) <= num_blocks:
            raise _not_enough(self.name, len(rows), num_blocks)
        return Blocks(torch.stack(rows[:num_blocks])), dataclasses.replace(self, start=self.start + num_blocks)

    def _passes(self) -> Iterator[torch.Tensor]:
        for number in itertools.count(self.epoch):
            yield from self._shuffled(number)
            if not self.repeat:
                return

    def _shuffled(self, number: int) -> Iterator[torch.Tensor]:
        rows = self._rows()
        if not self.shuffle_buffer:
            yield from rows
            return
        generator = random.Random(f"{self.seed} {number}")  # a string, so that (0, 1) and (1, 0) differ
        buffer = list(itertools.islice(rows, self.shuffle_buffer))
        for row in rows:
            index = generator.randrange(len(buffer))
            yield buffer[index]
            buffer[index] = row
        generator.shuffle(buffer)
        yield from buffer

    def _rows(self) -> Iterator[torch.Tensor]:
        """The blocks of one pass in the order of the text, each (T,)."""
        pieces = read_pieces(self.sources, self.text_field)
        chunks = pack(pieces, self.tokenizer, self.block_size, self.vocab_size)
        is_empty = True
        for row in itertools.islice(itertools.chain.from_iterable(chunks), self.start, self.stop):
            is_empty = False
            yield row.clone()  # not a view, which would keep its whole chunk in memory
        if is_empty:
            raise _too_little_text(self.name, self.block_size)


def load_blocks(
    sources: Names,
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    *,
    text_field: str = "text",
    name: str | None = None,
    split: str = "train",
    streaming: bool = False,
    repeat: bool = True,
    shuffle_buffer: int = 0,
    seed: int = 0,
    max_blocks: int | None = None,
    vocab_size: int | None = None,
    progress: bool = True,
) -> Blocks | StreamedBlocks:
    """Tokenise text and pack it into blocks of {"input_ids": (T,), "labels": the same}, as Trainer takes them.

    Args:
        sources: files (plain text, .jsonl, either of them as .gz, .parquet), folders of such files, data sets saved by
            `datasets`, or ids of data sets on the Hub: one, or a list of them in the order in which they are read.
        tokenizer: of transformers.
        block_size: T, at least 2.
        text_field: the field of .jsonl or the column of a table that holds the text.
        name: the configuration of a data set.
        split: the split of a data set, or of a folder whose files are named for splits.
        streaming: whether to tokenise during training instead of before it. The blocks are the same.
        repeat: for a stream: it starts over whenever it ends. Trainer resumes only such streams rightly.
        shuffle_buffer: for a stream: from how many blocks the next one is drawn; 0: in the order of the text. Blocks
            in memory are in the order of the text; Trainer shuffles them.
        seed: for a stream: of its shuffling.
        max_blocks: no more than the first so many blocks; None: all.
        vocab_size: the number of the model's embeddings; None: ids are not checked.
        progress: whether a bar on standard error shows the progress. A stream shows none.

    Returns:
        `Blocks`, in memory with four bytes a token, or `StreamedBlocks`.

    Raises:
        PonderingError: something cannot be read, or there is less than one block. Streaming, only what is missing is
            noticed here, and all else when it is met.
    """
    for number, value, least in (
        ("block_size", block_size, 2),
        ("shuffle_buffer", shuffle_buffer, 0),
        ("max_blocks", max_blocks, 1),
    ):
        if value is not None and value < least:
            raise PonderingError(f"`{number}` must be at least {least}, got {value}")
    found = find_sources(sources, name, split, streaming)
    names = as_list(sources)
    label = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
    if not streaming:
        pieces = read_pieces(found, text_field, progress)
        return pack_all(pieces, tokenizer, block_size, label, vocab_size, max_blocks)
    for source in found:
        if source.is_pipe:
            raise PonderingError(
                f"{source.label} is no file but a pipe, which can be read only once, and a stream reads it several "
                "times: leave out `streaming`, or write it to a file"
            )
    return StreamedBlocks(
        found,
        tokenizer,
        block_size,
        text_field=text_field,
        stop=max_blocks,
        shuffle_buffer=shuffle_buffer,
        seed=seed,
        repeat=repeat,
        vocab_size=vocab_size,
        name=label,
    )


def choose_block_size(block_size: int | None, config: PreTrainedConfig) -> int:
    """Tokens in a block: as many as are asked for, or the model's positions, but then not more than MOST_TOKENS.

    Args:
        block_size: what is asked for, or None.
        config: of the model.

    Raises:
        PonderingError: more are asked for than the model has positions.
    """
    positions = getattr(config, "max_position_embeddings", None)
    if block_size and positions and block_size > positions:
        raise PonderingError(
            f"`block_size` is {block_size}, but the model has only {positions} positions: use at most that"
        )
    return block_size or min(MOST_TOKENS, positions or MOST_TOKENS)


def split_held_out(
    blocks: Blocks | StreamedBlocks, share_or_count: float | int
) -> tuple[Blocks | StreamedBlocks, Blocks]:
    """Hold some blocks out: the last ones of `Blocks`, the first ones of each pass of `StreamedBlocks`.

    The two parts have no block in common. The document in which the cut lies is in both, with its two ends.

    Args:
        blocks: of `load_blocks`.
        share_or_count: a number of blocks, or, not for a stream, a share of them between 0 and 1.

    Returns:
        What is left to train on, of the kind that was given, and the held-out `Blocks`.

    Raises:
        PonderingError: there are too few blocks, or the number cannot be used.
    """
    is_share = isinstance(share_or_count, float)
    if is_share and isinstance(blocks, StreamedBlocks):
        raise PonderingError("how long a stream is is not known: hold out a number of its blocks, not a share")
    if not (0 < share_or_count < 1 if is_share else share_or_count >= 1):
        raise PonderingError(f"a share between 0 and 1 or a number of blocks can be held out, got {share_or_count}")
    if isinstance(blocks, StreamedBlocks):
        held_out, training = blocks.split(int(share_or_count))
        return training, held_out
    count = max(1, round(share_or_count * len(blocks))) if is_share else int(share_or_count)
    if count >= len(blocks):
        raise _not_enough("the text", len(blocks), count)
    return Blocks(blocks.rows[:-count]), Blocks(blocks.rows[-count:])


def check_apart(
    sources: Names,
    held_out: Names,
    *,
    name: str | None = None,
    split: str = "train",
    held_out_name: str | None = None,
    held_out_split: str = "train",
) -> None:
    """Refuse held-out text that is trained on as well.

    Args:
        sources, held_out: as `load_blocks` takes them.
        name, split, held_out_name, held_out_split: of data sets on either side.

    Raises:
        PonderingError: a file or data set is on both sides. Equal text in two files goes unnoticed.
    """
    training = {source.place for source in find_sources(sources, name, split, streaming=True)}
    for source in find_sources(held_out, held_out_name, held_out_split, streaming=True):
        if source.place in training:
            raise PonderingError(f"{source.label} is both trained on and held out: give it on one side only")


def pack_all(
    pieces: Iterable[Piece],
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    name: str = "the text",
    vocab_size: int | None = None,
    max_blocks: int | None = None,
) -> Blocks:
    """All blocks of `pack`, or the first `max_blocks` of them, as one `Blocks`.

    Raises:
        PonderingError: there is less than one block; `name` is what the message calls the text.
    """
    found, missing = [torch.empty(0, block_size, dtype=torch.int32)], max_blocks
    for rows in pack(pieces, tokenizer, block_size, vocab_size):
        found.append(rows[:missing])
        if missing is not None:
            missing -= len(found[-1])
            if missing == 0:
                break
    rows = _joined(found)
    if not len(rows):
        raise _too_little_text(name, block_size)
    return Blocks(rows)


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    """Tensors of rows, (N_i, T), as one, (N, T). The list is emptied meanwhile, so that they are not there twice."""
    joined = parts[0].new_empty(sum(map(len, parts)), parts[0].shape[1])
    end = len(joined)
    while parts:
        part = parts.pop()
        joined[end - len(part) : end] = part
        end -= len(part)
    return joined


def _too_little_text(name: str, block_size: int) -> PonderingError:
    """The error about a text that does not fill one block."""
    return PonderingError(f"{name} has fewer tokens than one block of {block_size}: give more text")


def _not_enough(name: str, num_blocks: int, num_held_out: int) -> PonderingError:
    """The error about a text from which so many blocks cannot be held out."""
    return PonderingError(
        f"{name} has {num_blocks} blocks, which leaves none to train on when {num_held_out} are held out: give more "
        "text, or hold out fewer"
    )
