"""From what a user names to what Trainer takes: blocks of token ids, some of them held out."""

from transformers import PreTrainedConfig

from ponder_hf.modeling import PonderingError

from .packing import Blocks, not_enough, pack_all
from .progress import read_pieces
from .sources import as_list, find_sources
from .stream import StreamedBlocks


MOST_TOKENS = 2048  # in a block, unless more are asked for


def load_blocks(
    sources,
    tokenizer,
    block_size,
    *,
    text_field="text",
    name=None,
    split="train",
    streaming=False,
    repeat=True,
    shuffle_buffer=0,
    seed=0,
    max_blocks=None,
    vocab_size=None,
    progress=True,
):
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


def split_held_out(blocks, share_or_count):
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
        held_out, training = blocks.split(share_or_count)
        return training, held_out
    count = max(1, round(share_or_count * len(blocks))) if is_share else share_or_count
    if count >= len(blocks):
        raise not_enough("the text", len(blocks), count)
    return Blocks(blocks.rows[:-count]), Blocks(blocks.rows[-count:])


def check_apart(sources, held_out, *, name=None, split="train", held_out_name=None, held_out_split="train"):
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
