"""Everything about a run that is checked, and the data that is read, before anything is written."""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import get_token
from transformers import PreTrainedConfig, PreTrainedTokenizerBase, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks

from ponder_hf.conversion import check_tokenizer, load_tokenizer, open_checkpoint
from ponder_hf.conversion.whole_folder import check_destination
from ponder_hf.data import Blocks, StreamedBlocks, check_apart, load_blocks, split_held_out
from ponder_hf.data.blocks import choose_block_size
from ponder_hf.data.sources import usual_split
from ponder_hf.modeling import PonderingError

from . import lora
from .arguments import complete_arguments, keep_token_apart, make_arguments, wrong_arguments
from .checkpoints import check_fields, checkpoint_to_resume, last_checkpoint, resumed_options
from .gate import check_gate_in_checkpoint, check_optimizer_name, default_factor
from .options import TrainOptions
from .sampled_steps import check_rule_of_model
from .start import Start, find_start, pondering_start
from .trainer import check_smoothing


_SHOWN_TOKENS = 2048  # of the batch that PonderingCallback looks at


@dataclass(frozen=True)
class TrainingData:
    """What a run trains and evaluates on.

    Args:
        training: to train on.
        held_out: to evaluate on, or None.
        fingerprint: tells other training data apart.
    """

    training: Blocks | StreamedBlocks
    held_out: Blocks | None
    fingerprint: str

    @property
    def batch(self) -> dict[str, torch.Tensor] | None:
        """A few held-out rows for PonderingCallback, (B, T); None where nothing is held out."""
        if self.held_out is None:
            return None
        rows = self.held_out.rows[: max(1, _SHOWN_TOKENS // self.held_out.rows.shape[1])].long()
        return {"input_ids": rows, "labels": rows}


@dataclass(frozen=True)
class TrainingPlan:
    """A run that can begin.

    Args:
        options: what was asked for; of a resumed run, as its checkpoint has it.
        arguments: those of `settings` that the recipe or the user says, as JSON can hold them.
        settings: for Trainer.
        start: the model that can be made.
        data: tokenised, or about to be.
        checkpoint: to resume from, or None.
    """

    options: TrainOptions
    arguments: dict[str, Any]
    settings: TrainingArguments
    start: Start
    data: TrainingData
    checkpoint: Path | None


def make_plan(options: TrainOptions) -> TrainingPlan:
    """Check everything, and read the data. Nothing is written.

    Raises:
        PonderingError: something cannot be used.
    """
    options = replace(options, arguments=dict(options.arguments))
    keep_token_apart(options.arguments)
    options.check()
    if options.lora:
        lora.check_peft()
    checkpoint = record = None
    if options.resume is None:
        _check_output(options)
        start = find_start(options)
        arguments = complete_arguments(
            options.arguments, start.kind, start.num_parameters, options.lora, options.evaluates, options.draft_heads
        )
    else:
        checkpoint = checkpoint_to_resume(options.folder, options.resume)
        fields = options.fields
        options, arguments, record = resumed_options(options, checkpoint)
        start = _resumed_start(options, checkpoint)
        check_fields(fields, start.config, checkpoint)
    options = _with_gate_factor(options, start)
    if options.sampled_steps is not None:
        check_rule_of_model(options.sampled_steps, start.config)
    if checkpoint is not None and options.gate_learning_rate_factor is not None:
        check_gate_in_checkpoint(checkpoint)
    if options.lora:
        lora.target_modules(options, start.config)
    check_tokenizer(start.tokenizer, start.config, options.tokenizer or start.name)
    choose_block_size(options.block_size, start.config)
    settings = make_arguments(options.folder, arguments)
    _check_settings(options, settings)
    check_smoothing(settings, start.config)
    data = load_training_data(options, start.tokenizer, start.config, settings.data_seed or settings.seed)
    if record is not None and record["fingerprint"] != data.fingerprint:
        raise PonderingError(
            f"`data` is not what {checkpoint} was made with: give the same text in the same order, or start a new run "
            f"with {checkpoint} as `source`"
        )
    return TrainingPlan(options, arguments, settings, start, data, checkpoint)


def _check_output(options):
    try:
        check_destination(options.output, options.overwrite, options.source if _is_folder(options.source) else None)
    except PonderingError as error:
        if last_checkpoint(options.folder) is not None and not options.overwrite:
            raise PonderingError(
                f"{options.output} has checkpoints of a run: give `resume` to continue it, `overwrite` to begin anew, "
                "or another folder"
            ) from error
        raise


def _with_gate_factor(options, start):
    """The options with the factor that this run has and keeps when resumed; None: its gate learns as the rest."""
    factor = options.gate_learning_rate_factor
    if start.config.pondering_gate == "none":
        if factor is not None:
            raise PonderingError(
                f"`gate_learning_rate_factor` is for a gate, which {start.name} does not have: leave it out, or make "
                "a plain model ponder with `pondering_gate='zero_init'`"
            )
        return options
    if factor is None and not options.draft_heads:
        return replace(options, gate_learning_rate_factor=default_factor(start.config.pondering_gate))
    return options


def _is_folder(name):
    return name is not None and Path(name).expanduser().is_dir()


def _check_settings(options, settings):
    if options.streaming and settings.max_steps < 1:
        raise PonderingError("`streaming` needs `max_steps`: how much data there is is not known")
    if settings.per_device_train_batch_size < 1 or settings.gradient_accumulation_steps < 1:
        raise PonderingError("`per_device_train_batch_size` and `gradient_accumulation_steps` must be at least 1")
    if options.draft_heads and settings.world_size > 1:
        raise PonderingError("`draft_heads` trains in one process: start it without a launcher")
    if options.draft_heads and settings.label_smoothing_factor:
        raise PonderingError(
            "`label_smoothing_factor` does nothing with `draft_heads`, which learn no labels: leave it out"
        )
    if options.gate_learning_rate_factor is not None:
        check_optimizer_name(settings)
    if settings.learning_rate <= 0:
        raise PonderingError(f"`learning_rate` must be > 0, got {settings.learning_rate}")
    if settings.max_steps < 1 and settings.num_train_epochs <= 0:
        raise PonderingError(f"`num_train_epochs` must be > 0, got {settings.num_train_epochs}")
    if settings.eval_strategy != "no" and not options.evaluates:
        raise PonderingError("`eval_strategy` needs something to evaluate on: give `validation` or `held_out`")
    with wrong_arguments():
        get_reporting_integration_callbacks(settings.report_to)  # whether they are known and installed
    if settings.push_to_hub and get_token() is None:
        raise PonderingError("`push_to_hub` needs a token: set HF_TOKEN, or log in with `hf auth login`")


def _resumed_start(options, checkpoint):
    tokenizer = load_tokenizer(checkpoint)
    if not options.lora:
        found = open_checkpoint(checkpoint)
        return pondering_start(found, tokenizer, replace(options, dtype="auto", fields={}))
    return pondering_start(open_checkpoint(lora.stored_base(checkpoint)), tokenizer, replace(options, fields={}))


def load_training_data(
    options: TrainOptions, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, seed: int
) -> TrainingData:
    """Read, tokenise and pack what these TrainOptions name.

    Raises:
        PonderingError: something cannot be read, or there is too little of it.
    """
    common: dict[str, Any] = {
        "tokenizer": tokenizer,
        "block_size": choose_block_size(options.block_size, config),
        "text_field": options.text_field,
        "name": options.data_name,
        "vocab_size": config.vocab_size,
    }
    held_out: Any = None
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
