"""The blocks that a run trains and evaluates on."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch

from ponder_hf import PonderingError
from ponder_hf.data.blocks import check_apart, load_blocks, split_held_out


MOST_TOKENS = 2048  # in a block, unless more are asked for
_SHOWN_TOKENS = 2048  # of the batch that PonderingCallback looks at


@dataclass(frozen=True)
class TrainingData:
    """training: Blocks or StreamedBlocks. held_out: Blocks, or None. fingerprint: tells other training data apart."""

    training: torch.utils.data.Dataset
    held_out: torch.utils.data.Dataset | None
    fingerprint: str

    @property
    def batch(self):
        """A few held-out rows for PonderingCallback."""
        rows = self.held_out.rows[: max(1, _SHOWN_TOKENS // self.held_out.rows.shape[1])].long()
        return {"input_ids": rows, "labels": rows}


def block_size_of(options, config):
    """Tokens in a block: as asked for, or the model's positions, but not more than MOST_TOKENS.

    Raises:
        PonderingError: more are asked for than the model has positions.
    """
    positions = getattr(config, "max_position_embeddings", None)
    if options.block_size and positions and options.block_size > positions:
        raise PonderingError(
            f"--block-size is {options.block_size}, but the model has only {positions} positions: use at most that"
        )
    return options.block_size or min(MOST_TOKENS, positions or MOST_TOKENS)


def load_training_data(options, tokenizer, config, seed):
    """Read, tokenise and pack what these TrainOptions name.

    Raises:
        PonderingError: something cannot be read, or there is too little of it.
    """
    common = {
        "tokenizer": tokenizer,
        "block_size": block_size_of(options, config),
        "text_field": options.text_field,
        "name": options.data_name,
        "vocab_size": config.vocab_size,
    }
    held_out = None
    if options.validation:
        split = options.validation_split or usual_split(options.validation)
        check_apart(
            options.data,
            options.validation,
            name=options.data_name,
            split=options.split,
            held_out_name=options.data_name,
            held_out_split=split,
        )
        held_out = load_blocks(options.validation, split=split, **common)
    training = load_blocks(
        options.data,
        split=options.split,
        streaming=options.streaming,
        shuffle_buffer=options.shuffle_buffer,
        seed=seed,
        **common,
    )
    if options.held_out is not None:
        training, held_out = split_held_out(training, options.held_out)
    return TrainingData(training, held_out, _fingerprint(training, options.streaming))


def usual_split(names):
    """The split to evaluate on where none is named: "train" of what all lies here, else "validation"."""
    # What lies here was put together by the user, and the default of everything local is the split "train".
    return "train" if all(Path(name).expanduser().exists() for name in names) else "validation"


def _fingerprint(blocks, is_stream):
    """A hash of all rows, or of a stream's first one; reading that also finds text that is too short."""
    rows = next(iter(blocks))["input_ids"].int() if is_stream else blocks.rows
    return hashlib.sha256(rows.contiguous().numpy().tobytes()).hexdigest()[:16]
