"""transformers' Trainer with what pondering and safe checkpoints need on top of it."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import HubStrategy
from transformers.utils.hub import PushInProgress

from ponder_hf.callbacks import TrainingProgress
from ponder_hf.errors import TrainingStopped
from ponder_hf.evaluation.passes import PassSums, reading_passes, shifted
from ponder_hf.hub.trainer_uploads import push_in_background, push_result, write_card_of_run
from ponder_hf.modeling import PonderingConfig, PonderingError, PonderingForCausalLM

from .checkpoints import PARTIAL, RECORD, final_model, last_checkpoint, publish, remove_oldest
from .gate import (
    check_factor,
    check_gate_in_checkpoint,
    default_factor,
    gate_group,
    separate_gate,
    trained_gate,
)
from .sampled_steps import Rule, check_rule_of_model, steps_at


_PROGRESS = "loss_since_log"


def check_smoothing(settings: TrainingArguments, config: PonderingConfig) -> None:
    """Raise where Trainer would smooth labels and leave a part of the loss out without a word.

    Args:
        settings: TrainingArguments.
        config: a PonderingConfig.

    Raises:
        PonderingError: the loss of the model has a part that a smoothed loss has not.
    """
    if not settings.label_smoothing_factor:
        return
    parts = {
        "intermediate_loss_weight": config.intermediate_loss_weight,
        "output_router_logits": getattr(config.base_config, "output_router_logits", False),
    }
    for name, value in parts.items():
        if value:
            raise PonderingError(
                f"label_smoothing_factor goes with the logits of the last pass alone, and {name} is {value}: "
                "set one of them to 0"
            )


@contextlib.contextmanager
def cache_setting_kept(config: PreTrainedConfig) -> Iterator[None]:
    """Trainer sets `use_cache` to False, and a model that is saved afterwards would say so in its config.json."""
    missing = object()
    before = getattr(config, "use_cache", missing)
    try:
        yield
    finally:
        if before is not missing:
            config.use_cache = before
        elif hasattr(config, "use_cache"):
            del config.use_cache


class PonderingTrainer(Trainer):
    """A Trainer for pondering models.

    - Evaluation gives the loss of each pass: `eval_pass_0_loss` .. `eval_pass_{S}_loss`, in nats per token, and its
      next-token accuracy and its agreement with the last pass: `eval_pass_0_accuracy`, `eval_pass_0_agreement` ...
      `eval_loss` is the last one, whatever `intermediate_loss_weight` is.
    - A gate of factors has a learning rate of its own and no weight decay (see `separate_gate`), unless `optimizers`
      gives an optimiser, which stays as it is. Trainer logs the model's as `learning_rate`, and this as
      `gate_learning_rate`.
    - A loss that is no finite number ends the training, and weights that are none are never saved.
    - A checkpoint appears whole or not at all, with the code of the model in it; so does the model at the end.
    - Resuming goes on with the loss that was summed since the last log, so that it logs what an unbroken run does.
    - What is uploaded while training includes the code.

    Args:
        record: what to store in every checkpoint, as a dict that JSON can hold.
        model_is_loaded: the model has the weights of the checkpoint to resume from already. Trainer itself would copy
            names on disk to names in memory, which are not always the same.
        gate_learning_rate_factor: times the learning rate of the model is that of its gate; > 0. None:
            GATE_LEARNING_RATE_FACTOR, where the model has a gate of factors from 0 that learns; 1 for random signs,
            which do not decay either; a matrix learns as the rest.
        sampled_steps: S of each training step: "growing", 1, 2, ... up to the model's S, each for an equal
            part of the run; or weights of S = 0, 1, ... to draw it by, from the seed and the number of the step. None:
            always the model's S. Evaluation always has the model's.
    """

    def __init__(
        self,
        *args: Any,
        record: dict[str, Any] | None = None,
        model_is_loaded: bool = False,
        gate_learning_rate_factor: float | None = None,
        sampled_steps: Rule | None = None,
        **kwargs: Any,
    ) -> None:
        self.record, self.model_is_loaded = record or {}, model_is_loaded
        self._staging: Path | None = None
        self._pass_sums: list[torch.Tensor] | None = None
        self._reads_loss_only = True  # of an evaluation: nobody asks for logits
        model: Any = kwargs.get("model", args[0] if args else None)
        with cache_setting_kept(model.config):
            super().__init__(*args, **kwargs)
        check_smoothing(self.args, model.config)
        if sampled_steps is not None:
            check_rule_of_model(sampled_steps, model.config)
        self.sampled_steps = sampled_steps
        can_separate = self.optimizer is None and bool(trained_gate(model))
        factor = gate_learning_rate_factor or default_factor(getattr(model.config, "pondering_gate", "none"))
        self._separates_gate, self._gate_factor = can_separate and factor is not None, factor or 1.0
        if gate_learning_rate_factor is not None:
            check_factor(gate_learning_rate_factor)
            if not can_separate:
                raise PonderingError(
                    "`gate_learning_rate_factor` is for a model with a gate that learns, and for an optimizer that "
                    "Trainer makes: leave it out"
                )

    @property
    def pondering_model(self) -> PonderingForCausalLM:
        """The PonderingForCausalLM within all wrappers."""
        model = self.accelerator.unwrap_model(self.model)
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    # The gate's learning rate

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(model)
        model = self.model if model is None else model
        # A gate may have been frozen meanwhile; under FSDP it may be hidden, which separate_gate refuses in words.
        is_wanted = self._separates_gate and (self.is_fsdp_enabled or trained_gate(model))
        if is_wanted and not (hasattr(optimizer, "param_groups") and gate_group(optimizer)):
            separate_gate(optimizer, model, self._gate_factor)
        return optimizer

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        is_scaled = isinstance(self.lr_scheduler, torch.optim.lr_scheduler.LambdaLR)  # all groups by one factor
        if "learning_rate" in logs and is_scaled and gate_group(self.optimizer):
            logs = {**logs, "gate_learning_rate": logs["learning_rate"] * self._gate_factor}
        if "loss" in logs and self.sampled_steps is not None:
            logs = {**logs, "training_pondering_steps": self._steps_at(self.state.global_step - 1)}
        super().log(logs, *args, **kwargs)

    # Losses

    def _steps_at(self, step):
        """S of a training step. The number of the step stands still while gradients of several batches are summed."""
        most, seed = self.pondering_model.config.pondering_steps, self.args.seed
        return steps_at(self.sampled_steps, most, seed, step, self.state.max_steps)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.sampled_steps is not None:
            inputs = {**inputs, "pondering_steps": self._steps_at(self.state.global_step)}
        loss = super().training_step(model, inputs, *args, **kwargs)
        if not torch.isfinite(loss):
            self._stop(f"the loss of step {self.state.global_step + 1} is {loss.item()}")
        return loss

    def _stop(self, what):
        checkpoint = last_checkpoint(Path(self.args.output_dir))
        rate = self.args.learning_rate
        retry = f"train anew with a `learning_rate` below {rate:g}"
        if checkpoint is not None:
            retry = f"start from {checkpoint}, the last checkpoint, with a `learning_rate` below {rate:g}"
        raise TrainingStopped(f"{what}, so training stopped: {retry}, or check the data")

    def compute_loss(
        self, model: PreTrainedModel, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        if self._pass_sums is None or not return_outputs:
            return super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)
        # The mean over this batch: blocks are equally long, so the number of items in all batches has no say.
        kwargs.pop("num_items_in_batch", None)
        targets = shifted(inputs["labels"])
        given = {**inputs, "use_cache": False}
        if self._reads_loss_only and self.label_smoother is None and self.compute_loss_func is None:
            given["logits_to_keep"] = 1  # nobody reads all of them
        with reading_passes(self.pondering_model, targets) as read:
            loss, outputs = super().compute_loss(model, given, return_outputs=True, **kwargs)
        # One line a row, so that rows which a last batch was filled up with are cut as they are for `eval_loss`.
        sums = read[0].sums()
        rows = torch.cat([sums.losses, sums.hits, sums.agreements, sums.tokens[None]]).T.float().contiguous()
        self._pass_sums.append(self.accelerator.gather_for_metrics(rows).cpu())
        return loss, outputs

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, TrainingProgress):
                callback.on_evaluation_begin(self.args, self.state, dataloader)
        said = self.args.prediction_loss_only if prediction_loss_only is None else prediction_loss_only
        self._reads_loss_only = bool(said)
        self._pass_sums = []
        try:
            output = super().evaluation_loop(dataloader, description, prediction_loss_only, *args, **kwargs)
            rows = torch.cat(self._pass_sums).double() if self._pass_sums else None
        finally:
            self._pass_sums = None
        prefix = kwargs.get("metric_key_prefix", "eval")
        if rows is not None and rows[:, -1].any():
            losses, hits, agreements = rows[:, :-1].T.chunk(3)
            figures = PassSums(losses, hits, agreements, rows[:, -1]).figures()
            for index, each in enumerate(figures):
                logged = ("loss", "accuracy", "agreement")
                output.metrics.update({f"{prefix}_pass_{index}_{name}": each[name] for name in logged})
        return output

    # Checkpoints

    def _get_output_dir(self, trial):
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _save_checkpoint(self, model, trial):
        """Let Trainer write the checkpoint into a folder of another name, and rename that when it is complete."""
        output = Path(self._get_output_dir(trial))
        checkpoint = output / f"checkpoint-{self.state.global_step}"
        partial = output / f"{PARTIAL}{checkpoint.name}"
        self._check_weights()
        if self.args.should_save:
            shutil.rmtree(partial, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._staging = partial
        try:
            super()._save_checkpoint(model, trial)
            if self.args.should_save:
                self._complete(partial / checkpoint.name, checkpoint)
        finally:
            self._staging = None
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            publish(partial / checkpoint.name, checkpoint)
            shutil.rmtree(partial, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(checkpoint))
        if self.args.should_save:
            remove_oldest(output, self.args.save_total_limit, self.state.best_model_checkpoint)

    def _complete(self, folder, checkpoint):
        """Write what Trainer does not, and name the checkpoint as it will be called."""
        if self.state.best_global_step == self.state.global_step:
            self.state.best_model_checkpoint = str(checkpoint)
            self.state.save_to_json(str(folder / "trainer_state.json"))
        progress = {}
        if hasattr(self, "_tr_loss"):
            progress = {_PROGRESS: self._tr_loss.item(), "last_logged_step": self._globalstep_last_logged}
        write_card_of_run(folder, self, self.record.get("options", {}))
        (folder / RECORD).write_text(json.dumps({**self.record, **progress}, indent=2), encoding="utf-8")

    def _check_weights(self):
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad and not torch.isfinite(parameter).all():
                self._stop(f"after step {self.state.global_step} the weight {name} is no finite number")

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        if self._separates_gate:
            check_gate_in_checkpoint(resume_from_checkpoint)
        if not self.model_is_loaded or self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self):
        if self.is_fsdp_enabled or self.is_deepspeed_enabled or self.model is not self.pondering_model:
            super()._load_best_model()
            return
        # from_pretrained knows the names on disk.
        best = type(self.model).from_pretrained(self.state.best_model_checkpoint, dtype=self.model.dtype)
        self.model.load_state_dict(best.state_dict())

    def resume_progress(self, checkpoint: str | os.PathLike) -> None:
        """Go on with the loss that the run had summed up since it last logged; called when training begins."""
        stored = json.loads((Path(checkpoint) / RECORD).read_text(encoding="utf-8"))
        if _PROGRESS in stored and hasattr(self, "_tr_loss"):
            self._tr_loss += stored[_PROGRESS]
            self._globalstep_last_logged = stored["last_logged_step"]

    # The model at the end, and uploads

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As Trainer does; the output folder itself gets the model whole or not at all."""
        if output_dir is not None and Path(output_dir) != Path(self.args.output_dir):
            super().save_model(output_dir, _internal_call=True)
            return
        self._check_weights()
        folder = final_model(Path(self.args.output_dir)) if self.args.should_save else contextlib.nullcontext()
        with folder as partial:
            self.accelerator.wait_for_everyone()
            partial = partial or Path(self.args.output_dir) / f"{PARTIAL}model"
            super().save_model(str(partial), _internal_call=True)
            if self.args.should_save:
                (partial / TRAINING_ARGS_NAME).unlink(missing_ok=True)  # a pickle, which loading has no need of
                write_card_of_run(partial, self, self.record.get("options", {}))
            self.accelerator.wait_for_everyone()
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def push_to_hub(
        self,
        commit_message: str = "End of training",
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> dict[str, Any] | None:
        """Save the model and push it with its code, tokenizer and card, in one commit. Returns what was done."""
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self._finish_current_push()
        settings = self._push_settings(commit_message, token, revision)
        return push_result(self.args.output_dir, self.hub_model_id, **settings)

    def _push_settings(self, message, token=None, revision=None):
        return {
            "message": message,
            "token": token or self.args.hub_token,
            "revision": revision or self.args.hub_revision,
            "private": self.args.hub_private_repo,
        }

    def _push_from_checkpoint(self, checkpoint_folder):
        """Push the checkpoint as a whole model, where Trainer copies a fixed list of files without the code."""
        strategy, pushing = self.args.hub_strategy, self.push_in_progress
        busy = pushing is not None and not pushing.is_done()
        if self._staging is not None or not self.is_world_process_zero() or strategy == HubStrategy.END:
            return  # _staging: the checkpoint has not its name yet
        if busy and not self.args.hub_always_push:
            return
        folder, place = Path(checkpoint_folder), None
        if strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            place = "last-checkpoint" if strategy == HubStrategy.CHECKPOINT else folder.name
        settings = self._push_settings(f"Training in progress, step {self.state.global_step}")
        job = push_in_background(folder, self.hub_model_id, place, **settings)
        self.push_in_progress = PushInProgress([*(pushing.jobs if busy else ()), job])


class RestoreLoggedLoss(TrainerCallback):
    """Restores what PonderingTrainer stores in a checkpoint and Trainer does not, as soon as training begins."""

    def __init__(self, trainer: PonderingTrainer, checkpoint: str | os.PathLike) -> None:
        self.trainer, self.checkpoint = trainer, checkpoint

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.trainer.resume_progress(self.checkpoint)
