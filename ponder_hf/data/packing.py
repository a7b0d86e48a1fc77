"""From pieces of text to blocks of token ids, as Trainer takes them."""

import itertools

import torch
from torch.utils.data import Dataset

from ponder_hf.modeling import PonderingError


_PIECES_AT_ONCE = 64


class Blocks(Dataset):
    """Token ids in rows of equal length, (N, T), as Trainer takes them. Labels are the ids: models shift them."""

    def __init__(self, rows):
        self.rows = rows

    def shuffled(self, seed):
        """The same rows in an order that the seed decides."""
        order = torch.randperm(len(self.rows), generator=torch.Generator().manual_seed(seed))
        return Blocks(self.rows[order])

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        row = self.rows[index].long()
        return {"input_ids": row, "labels": row}


def pack(pieces, tokenizer, block_size):
    """Yield tensors (n, block_size) of token ids: documents one after another with an eos token between them.

    Together they are the whole sequence of tokens, but for a last block that is not full.

    Args:
        pieces: as `ponder_hf.data.text.read_text` gives them.
        tokenizer: of transformers. Without an eos token, documents follow each other directly.
        block_size: T.
    """
    separator = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    rest, is_first = [], True
    pieces = iter(pieces)
    while batch := list(itertools.islice(pieces, _PIECES_AT_ONCE)):
        encoded = tokenizer([piece.text for piece in batch], add_special_tokens=False, verbose=False)["input_ids"]
        for piece, ids in zip(batch, encoded, strict=True):
            if piece.starts_document and not is_first:
                rest += separator
            rest += ids
            is_first = False
        num_whole = len(rest) // block_size * block_size
        yield torch.tensor(rest[:num_whole], dtype=torch.int32).view(-1, block_size)
        rest = rest[num_whole:]


def pack_all(pieces, tokenizer, block_size, name="the text"):
    """All blocks of `pack` as one `Blocks`.

    Raises:
        PonderingError: there is less than one block; `name` is what the message calls the text.
    """
    rows = torch.cat([torch.empty(0, block_size, dtype=torch.int32), *pack(pieces, tokenizer, block_size)])
    if not len(rows):
        raise PonderingError(f"{name} has fewer tokens than one block of {block_size}: give more text")
    return Blocks(rows)
