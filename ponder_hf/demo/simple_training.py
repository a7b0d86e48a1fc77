"""Train on blocks with Trainer in one call, for the demo and for experiments: no checkpoints, no resume."""

import statistics
import tempfile
import time
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel, Trainer, TrainingArguments, default_data_collator
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from ponder_hf.callbacks import TrainingProgress
from ponder_hf.data import Blocks
from ponder_hf.evaluation import evaluate_passes
from ponder_hf.training.gate import default_factor, separate_gate, trained_gate
from ponder_hf.training.trainer import cache_setting_kept


# TrainingArguments' fields as training a language model here wants them; `train` takes any other value of any of them.
DEFAULTS: dict[str, Any] = {
    "adam_beta2": 0.95,
    "dataloader_pin_memory": False,
    "disable_tqdm": False,
    "logging_nan_inf_filter": False,
    "logging_steps": 10,
    "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
    "lr_scheduler_type": "cosine_with_min_lr",
    "report_to": "none",
    "save_strategy": "no",
    "train_sampling_strategy": "sequential",
    "weight_decay": 0.01,
}


@dataclass
class Run:
    """What one training run recorded.

    Args:
        losses: (step, training loss), a mean over the steps since the one before.
        passes: (step, loss of each pass on held-out blocks).
        step_seconds: of each step, evaluations not counted.
        tokens_per_step: in all rows of a step.
    """

    losses: list[tuple[int, float]] = field(default_factory=list)
    passes: list[tuple[int, list[float]]] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    tokens_per_step: int = 0

    @property
    def tokens_per_second(self) -> float:
        """By the median step, so that a moment in which the machine was busy does not count."""
        return self.tokens_per_step / statistics.median(self.step_seconds)


class _Recorder(TrainingProgress):
    """Fills in a Run beside the progress bar."""

    def __init__(self, run, label, held_out, evaluate_every):
        super().__init__(run.tokens_per_step, label)
        self.run, self.held_out, self.evaluate_every = run, held_out, evaluate_every

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        super().on_train_begin(args, state, control)
        self._evaluate(state, model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        before = self.seconds
        super().on_step_end(args, state, control)
        self.run.step_seconds.append(self.seconds - before)
        is_last = state.global_step == args.max_steps
        if is_last or (self.evaluate_every and state.global_step % self.evaluate_every == 0):
            self._evaluate(state, model)

    def on_log(self, args, state, control, logs=None, **kwargs):
        super().on_log(args, state, control, logs)
        if "loss" in logs:
            self.run.losses.append((state.global_step, logs["loss"]))

    def _evaluate(self, state, model):
        if self.evaluate_every:
            self.run.passes.append((state.global_step, evaluate_passes(model, self.held_out)))
        self.start = time.perf_counter()


def train(
    model: PreTrainedModel,
    blocks: Blocks,
    label: str = "training",
    held_out: Blocks | None = None,
    evaluate_every: int = 0,
    **arguments: Any,
) -> Run:
    """Train a model on blocks with transformers' Trainer, in their order. It is in evaluation mode afterwards.

    A gate of factors has a learning rate of its own; see `separate_gate`.

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
    with tempfile.TemporaryDirectory(prefix="ponder-hf-") as folder, cache_setting_kept(model.config):
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
        factor = default_factor(getattr(model.config, "pondering_gate", "none"))
        if factor is not None and trained_gate(model):
            separate_gate(trainer.create_optimizer(), model, factor)
        try:
            trainer.train()
        finally:
            recorder.close()
    model.eval()
    return run
