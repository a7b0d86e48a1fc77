"""Train on text with transformers' Trainer: blocks of tokens, one set of arguments, the loss of each pass."""

import itertools
import statistics
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from .modeling import PonderingError


# TrainingArguments' fields as training a language model here wants them; `train` takes any other value of any of them.
DEFAULTS = {
    "adam_beta2": 0.95,
    "dataloader_pin_memory": False,
    "disable_tqdm": True,
    "logging_nan_inf_filter": False,
    "logging_steps": 10,
    "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
    "lr_scheduler_type": "cosine_with_min_lr",
    "report_to": "none",
    "save_strategy": "no",
    "train_sampling_strategy": "sequential",
    "weight_decay": 0.01,
}
_PIECES_AT_ONCE = 64
_LARGEST_OUTPUT = 1 << 24  # numbers in the logits of all passes of one evaluated batch


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
        pieces: as `ponder_hf.text.read_text` gives them.
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


@torch.no_grad()
def evaluate_passes(model, blocks):
    """The mean loss of each pass over these blocks, in nats per token: S + 1 numbers, of a plain model one.

    Only as many blocks go through the model at once as keep the logits of all passes small.

    Args:
        model: any causal language model; it is in its former mode afterwards.
        blocks: a Blocks.
    """
    config = model.config
    ponders = hasattr(config, "pondering_steps")
    num_passes = config.pondering_steps + 1 if ponders else 1
    per_row = num_passes * blocks.rows.shape[1] * config.vocab_size
    totals = [0.0] * num_passes
    was_training = model.training
    model.eval()
    try:
        for rows in blocks.rows.split(max(1, _LARGEST_OUTPUT // per_row)):
            ids = rows.long().to(model.device)
            options = {"output_pondering": True} if ponders else {}
            output = model(input_ids=ids, labels=ids, use_cache=False, **options)
            losses = output.pondering_losses if ponders else [output.loss]
            totals = [total + len(rows) * loss.item() for total, loss in zip(totals, losses, strict=True)]
    finally:
        model.train(was_training)
    return [total / len(blocks) for total in totals]


@dataclass
class Run:
    """What one training run recorded.

    losses: (step, training loss), a mean over the steps since the one before. passes: (step, loss of each pass on
    held-out blocks). step_seconds: of each step, evaluations not counted. tokens_per_step: in all rows of a step.
    """

    losses: list = field(default_factory=list)
    passes: list = field(default_factory=list)
    step_seconds: list = field(default_factory=list)
    tokens_per_step: int = 0

    @property
    def tokens_per_second(self):
        """By the median step, so that a moment in which the machine was busy does not count."""
        return self.tokens_per_step / statistics.median(self.step_seconds)


class _Recorder(TrainerCallback):
    """Fills in a Run and shows a progress bar on standard error."""

    def __init__(self, run, label, held_out, evaluate_every):
        self.run, self.label, self.held_out, self.evaluate_every = run, label, held_out, evaluate_every
        self.bar = self.start = None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.bar = tqdm(total=state.max_steps, desc=self.label, unit="step", file=sys.stderr, dynamic_ncols=True)
        self._evaluate(state, model)

    def on_step_begin(self, args, state, control, **kwargs):
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.run.step_seconds.append(time.perf_counter() - self.start)
        self.bar.update()
        if self.evaluate_every and (
            state.global_step % self.evaluate_every == 0 or state.global_step == args.max_steps
        ):
            self._evaluate(state, model)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.run.losses.append((state.global_step, logs["loss"]))
            self.bar.set_postfix_str(f"loss {logs['loss']:.3f}", refresh=False)

    def on_train_end(self, args, state, control, **kwargs):
        self.close()

    def close(self):
        if self.bar is not None:
            self.bar.close()

    def _evaluate(self, state, model):
        if self.evaluate_every:
            self.run.passes.append((state.global_step, evaluate_passes(model, self.held_out)))


@contextmanager
def _cache_setting_kept(config):
    """Trainer sets `use_cache` to False, and a model that is saved afterwards would say so in its config.json."""
    before = vars(config).get("use_cache")
    try:
        yield
    finally:
        if before is None:
            vars(config).pop("use_cache", None)
        else:
            config.use_cache = before


def train(model, blocks, label="training", held_out=None, evaluate_every=0, **arguments):
    """Train a model on blocks with transformers' Trainer, in their order. It is in evaluation mode afterwards.

    Args:
        model: any causal language model.
        blocks: a Blocks.
        label: what the progress bar is called.
        held_out: a Blocks to evaluate on before the first step, every `evaluate_every` steps and after the last one.
        evaluate_every: in steps; 0: never.
        arguments: TrainingArguments' fields, over DEFAULTS. Without `output_dir`, Trainer gets a temporary folder.

    Returns:
        A Run.
    """
    with tempfile.TemporaryDirectory(prefix="ponder-hf-") as folder, _cache_setting_kept(model.config):
        settings = TrainingArguments(**{**DEFAULTS, "output_dir": folder, **arguments})
        run = Run(
            tokens_per_step=settings.train_batch_size * settings.gradient_accumulation_steps * blocks.rows.shape[1]
        )
        recorder = _Recorder(run, label, held_out, evaluate_every)
        trainer = Trainer(
            model, settings, train_dataset=blocks, data_collator=default_data_collator, callbacks=[recorder]
        )
        # Both print on standard output; that is for results.
        trainer.remove_callback(ProgressCallback)
        trainer.remove_callback(PrinterCallback)
        try:
            trainer.train()
        finally:
            recorder.close()
    model.eval()
    return run
