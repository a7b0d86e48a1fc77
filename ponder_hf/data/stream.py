"""Blocks that are packed while they are read, for text that should not be in memory as a whole."""

import dataclasses
import itertools
import random

import torch
from torch.utils.data import IterableDataset, get_worker_info

from ponder_hf.modeling import PonderingError

from .packing import Blocks, as_example, not_enough, pack, too_little_text
from .progress import closed_at_exit, read_pieces


class StreamError(PonderingError):
    """What is wrong with a stream. DataLoader remakes a worker's error from its traceback; this finds the message."""

    def __init__(self, message):
        super().__init__(message.rstrip().rpartition("StreamError: ")[2])


@dataclasses.dataclass(eq=False, repr=False)
class StreamedBlocks(IterableDataset):
    """The blocks of some sources, in order or shuffled within a buffer, the same ones in every iteration.

    Trainer counts the steps of a stream, not its passes, and after a resume skips as many batches from its beginning.
    So this one starts over by itself when it ends; with `repeat=False` one iteration is one pass.

    In the workers of a DataLoader each block is in exactly one of them. Every worker reads and tokenises all of the
    text, so one worker keeps that out of the training process and more do not make it faster. Blocks are not divided
    among processes here, because accelerate does that, in either of its ways (`dispatch_batches`).

    sources: of `ponder_hf.data.sources`. start, stop: the blocks of each pass that belong to it. shuffle_buffer: from
    how many blocks the next one is drawn; 0: no shuffling. seed: of the shuffling; each pass is shuffled anew.
    vocab_size: the number of the model's embeddings; None: not checked. name: what messages call the text.
    """

    sources: list
    tokenizer: object
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

    def set_epoch(self, epoch):
        """Begin with another shuffling. Trainer and accelerate call this; for a stream that repeats, always with 0."""
        self.epoch = epoch

    @closed_at_exit
    def __iter__(self):
        worker = get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        try:
            for row in itertools.islice(self._passes(), first, None, step):
                yield as_example(row)
        except PonderingError as error:
            raise StreamError(str(error)) from error

    def split(self, num_blocks):
        """The first blocks of a pass as `Blocks`, and a stream of those after them.

        Raises:
            PonderingError: there are not more than `num_blocks`.
        """
        rows = list(itertools.islice(self._rows(), num_blocks + 1))
        if len(rows) <= num_blocks:
            raise not_enough(self.name, len(rows), num_blocks)
        return Blocks(torch.stack(rows[:num_blocks])), dataclasses.replace(self, start=self.start + num_blocks)

    def _passes(self):
        for number in itertools.count(self.epoch):
            yield from self._shuffled(number)
            if not self.repeat:
                return

    def _shuffled(self, number):
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

    def _rows(self):
        """The blocks of one pass in the order of the text, each (T,)."""
        pieces = read_pieces(self.sources, self.text_field)
        chunks = pack(pieces, self.tokenizer, self.block_size, self.vocab_size)
        is_empty = True
        for row in itertools.islice(itertools.chain.from_iterable(chunks), self.start, self.stop):
            is_empty = False
            yield row.clone()  # not a view, which would keep its whole chunk in memory
        if is_empty:
            raise too_little_text(self.name, self.block_size)
