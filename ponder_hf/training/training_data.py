"""The blocks that a run trains and evaluates on."""

import hashlib
from dataclasses import dataclass

import torch

from ponder_hf.data.blocks import check_apart, choose_block_size, load_blocks, split_held_out
from ponder_hf.data.sources import usual_split


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


def load_training_data(options, tokenizer, config, seed):
    """Read, tokenise and pack what these TrainOptions name.

    Raises:
        PonderingError: something cannot be read, or there is too little of it.
    """
    common = {
        "tokenizer": tokenizer,
        "block_size": choose_block_size(options.block_size, config),
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


def _fingerprint(blocks, is_stream):
    """A hash of all rows, or of a stream's first one; reading that also finds text that is too short."""
    rows = next(iter(blocks))["input_ids"].int() if is_stream else blocks.rows
    return hashlib.sha256(rows.contiguous().numpy().tobytes()).hexdigest()[:16]
