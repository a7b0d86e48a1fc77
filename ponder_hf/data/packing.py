"""From pieces of text to one sequence of token ids, cut into blocks."""

from collections.abc import Iterable, Iterator

import torch
from transformers import PreTrainedTokenizerBase

from ponder_hf.modeling import PonderingError

from .text import Piece


# What is tokenised at once, whichever is reached first: more is not faster, and the tokenizer's memory grows with it.
_PIECES_AT_ONCE = 1000
_CHARACTERS_AT_ONCE = 1 << 20


def pack(
    pieces: Iterable[Piece], tokenizer: PreTrainedTokenizerBase, block_size: int, vocab_size: int | None = None
) -> Iterator[torch.Tensor]:
    """Yield tensors (n, block_size) of token ids: documents one after another with an eos token between them.

    Together they are the whole sequence of tokens, but for a last block that is not full.

    Args:
        pieces: as `ponder_hf.data.text.read_text` gives them.
        tokenizer: of transformers. Without an eos token, documents follow each other directly.
        block_size: T.
        vocab_size: the number of the model's embeddings.

    Raises:
        PonderingError: the tokenizer gave an id that is not below `vocab_size`.
    """
    separator = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    anchor = _anchor(tokenizer)
    rest: list[int] = []
    is_first = True
    for batch in _batches(pieces):
        for piece, ids in zip(batch, _tokenise(tokenizer, batch, anchor), strict=True):
            if vocab_size is not None:
                _check_ids(ids, vocab_size, piece)
            if piece.starts_document and not is_first:
                rest += separator
            rest += ids
            is_first = False
        num_whole = len(rest) // block_size * block_size
        yield torch.tensor(rest[:num_whole], dtype=torch.int32).view(-1, block_size)
        rest = rest[num_whole:]


def _batches(pieces):
    batch, size = [], 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.text)
        if len(batch) == _PIECES_AT_ONCE or size >= _CHARACTERS_AT_ONCE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _ids(tokenizer, texts):
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]


def _anchor(tokenizer):
    """The tokens of a line break, where the tokenizer puts a space before whatever it is given (LLaMA's); else []."""
    line_break, word, both = _ids(tokenizer, ["\n", "a", "\na"])
    return line_break if both != line_break + word and both[: len(line_break)] == line_break else []


def _tokenise(tokenizer, batch, anchor):
    """The ids of each piece. One that goes on with a document is tokenised behind a line break, which is taken off."""
    goes_on = [bool(anchor) and not piece.starts_document for piece in batch]
    texts = ["\n" * after + piece.text for piece, after in zip(batch, goes_on, strict=True)]
    for piece, after, ids in zip(batch, goes_on, _ids(tokenizer, texts), strict=True):
        if not after:
            yield ids
        elif ids[: len(anchor)] == anchor:
            yield ids[len(anchor) :]
        else:  # the line break became one token with what follows
            yield _ids(tokenizer, [piece.text])[0]


def _check_ids(ids, vocab_size, piece):
    largest = max(ids, default=0)
    if largest >= vocab_size:
        raise PonderingError(
            f"the tokenizer gave the token {largest} for {piece.path} (near line {piece.line}); the model has only "
            f"{vocab_size} embeddings: use the model's own tokenizer"
        )
