"""Callbacks for Trainer: what a model's pondering looks like in the logs, and how far the training is."""

import time
from contextlib import ExitStack
from typing import Any

import torch
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerState, TrainingArguments

from .evaluation.passes import in_this_thread, measure_passes, pondering_model_in
from .modeling import PonderingError
from .modeling.pondering_backbone import backbone_decoder
from .progress import progress_bar


@torch.no_grad()
def pondering_statistics(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
) -> dict[str, float]:
    """How `model` ponders over one batch, as a dict of numbers that every logger takes. One forward pass.

    Logits are made a few tokens at a time. Nothing of the model is changed, not even the mode of one of its modules.

    Args:
        model: a PonderingForCausalLM, also wrapped by PEFT or sharded.
        input_ids, attention_mask, labels: (B, T) each. Without labels the tokens themselves are predicted.

    Returns:
        For each pass i of 0 .. S: `pass_{i}_loss` (nats per token), `pass_{i}_entropy` (nats, mean over tokens). For
        each step i of 0 .. S-1: `step_{i}_norm_ratio`, the mean norm of what it adds to its input over the mean norm
        of the token embeddings. With a gate: `gate_mean` and `gate_abs_mean`.
    """
    pondering_model = pondering_model_in(model)
    backbone, gate = pondering_model.backbone, pondering_model.pondering_gate
    real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    inputs: list[torch.Tensor] = []
    statistics: dict[str, float] = {}

    def before_pass(decoder, arguments, keywords):
        inputs.append(keywords["inputs_embeds"])

    def before_gate(module, arguments):
        weight = module.weight.float()
        statistics.update(gate_mean=weight.mean().item(), gate_abs_mean=weight.abs().mean().item())

    with ExitStack() as stack:
        for hook in (
            backbone_decoder(backbone).register_forward_pre_hook(in_this_thread(before_pass), with_kwargs=True),
            *([] if gate is None else [gate.register_forward_pre_hook(in_this_thread(before_gate))]),
        ):
            stack.callback(hook.remove)
        measured = measure_passes(model, input_ids, attention_mask, labels, entropies=True)

    entropies: Any = measured.entropies
    token_norm = _mean_norm(inputs[0], real)
    num_predicted = max(1, measured.is_predicted.sum().item())
    for index in range(len(inputs)):
        statistics[f"pass_{index}_loss"] = measured.losses[index].sum().item() / num_predicted
        statistics[f"pass_{index}_entropy"] = entropies[index][real].mean().item()
    for index in range(len(inputs) - 1):
        statistics[f"step_{index}_norm_ratio"] = _mean_norm(inputs[index + 1] - inputs[index], real) / token_norm
    return statistics


def _mean_norm(vectors, real):
    return vectors.float().norm(dim=-1)[real].mean().item()


class PonderingCallback(TrainerCallback):
    """Adds `pondering_statistics` of one fixed batch to what Trainer logs whenever it evaluates or every n steps.

    It needs the Trainer that logs: `PonderingCallback(batch).attach(trainer)`, not `callbacks=[...]`.

    Args:
        batch: a dict with `input_ids` and perhaps `attention_mask` and `labels`, (B, T) each; a few rows are enough.
        every: in steps, on top of every evaluation; 0: only then.
    """

    def __init__(self, batch: dict[str, torch.Tensor], every: int = 0) -> None:
        self.batch, self.every = dict(batch), every
        self.trainer: Any = None

    def attach(self, trainer: Trainer) -> "PonderingCallback":
        """Register with a Trainer, whose loggers then get the numbers. Returns the callback."""
        self.trainer = trainer
        trainer.add_callback(self)
        return self

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        raise PonderingError("give PonderingCallback its Trainer: PonderingCallback(batch).attach(trainer)")

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        self._log(model)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        if self.every and state.global_step % self.every == 0 and not control.should_evaluate:
            self._log(model)  # not twice: the evaluation that follows this step will

    def _log(self, model):
        accelerator = self.trainer.accelerator
        model = accelerator.unwrap_model(model)
        batch = {name: tensor.to(accelerator.device) for name, tensor in self.batch.items()}
        with accelerator.autocast():
            statistics = pondering_statistics(model, **batch)
        self.trainer.log(statistics)


class TrainingProgress(TrainerCallback):
    """A bar over the steps with the losses, tokens per second and the time left; another over each evaluation.

    The time of evaluations and checkpoints does not count.

    Args:
        tokens_per_step: in all rows of all processes.
        label: what the bar is called.
    """

    def __init__(self, tokens_per_step: int, label: str = "training") -> None:
        self.tokens_per_step, self.label = tokens_per_step, label
        self.bar: Any = None
        self.evaluation_bar: Any = None
        self.shown: dict[str, str] = {}
        self.start, self.seconds, self.steps = 0.0, 0.0, 0

    @property
    def tokens_per_second(self) -> float:
        return self.steps * self.tokens_per_step / self.seconds if self.seconds else 0.0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.start = time.perf_counter()
        shown = state.is_world_process_zero and not args.disable_tqdm
        self.bar = progress_bar(self.label, "step", state.max_steps, shown=shown, initial=state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        now = time.perf_counter()
        self.seconds += now - self.start
        self.start = now
        self.steps += 1
        self.bar.set_postfix({**self.shown, "tokens/s": f"{self.tokens_per_second:,.0f}"}, refresh=False)
        self.bar.update()

    def on_evaluation_begin(self, args: TrainingArguments, state: TrainerState, batches: Any) -> None:
        """Show the bar of an evaluation over these batches. PonderingTrainer calls it: there is no such event."""
        self._close_evaluation()
        shown = state.is_world_process_zero and not args.disable_tqdm
        total = len(batches) if hasattr(batches, "__len__") else None
        self.evaluation_bar = progress_bar("evaluating", " batches", total, shown=shown, leave=self.bar is None)

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        if self.evaluation_bar is None:  # another Trainer
            self.on_evaluation_begin(args, state, eval_dataloader)
        self.evaluation_bar.update()

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.start = time.perf_counter()
        self._close_evaluation()

    def on_predict(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._close_evaluation()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.start = time.perf_counter()

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: Any, logs: dict | None = None, **kwargs: Any
    ) -> None:
        logged = logs or {}
        self.shown |= {name: f"{logged[name]:.3f}" for name in ("loss", "eval_loss") if name in logged}

    def close(self) -> None:
        """End the bars; what is printed next begins on a line of its own."""
        self._close_evaluation()
        if self.bar is not None:
            self.bar.close()

    def _close_evaluation(self):
        if self.evaluation_bar is not None:
            self.evaluation_bar.close()
        self.evaluation_bar = None
