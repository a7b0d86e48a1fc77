"""One training run, from what the user asked for to the folder that it leaves."""

import contextlib
import math
import shutil
from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedModel, default_data_collator, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerState

from ponder_hf.callbacks import PonderingCallback, TrainingProgress
from ponder_hf.data.blocks import choose_block_size
from ponder_hf.errors import TrainingStopped, writing
from ponder_hf.modeling import PonderingError
from ponder_hf.modeling.configuration_pondering import PONDERING_FIELDS

from . import lora
from .arguments import wrong_arguments
from .checkpoints import clean_up, last_checkpoint, make_record
from .draft_heads import DraftHeadTrainer
from .options import TrainOptions
from .plan import TrainingPlan, make_plan
from .trainer import PonderingTrainer, RestoreLoggedLoss


def train(options: TrainOptions) -> dict[str, Any]:
    """Run one training.

    Args:
        options: what to train, on what, and how.

    Returns:
        What was done, as a dict that JSON can hold.

    Raises:
        PonderingError: something cannot be used; nothing was written.
        TrainingStopped: it began, and cannot go on: the loss is no finite number, the disk is full, a line of streamed
            data is damaged. Checkpoints stay.
        KeyboardInterrupt: the user ended it; its message says how to go on. Checkpoints stay.
    """
    plan = make_plan(options)
    set_seed(plan.settings.seed)
    model = plan.start.load()
    with _output_folder(plan):
        if plan.options.lora:
            model = _adapted(plan, model)
        trainer, progress = _make_trainer(plan, model)
        try:
            _train(trainer, plan)
            _save(trainer, plan)
        except KeyboardInterrupt as error:
            raise KeyboardInterrupt(_how_to_resume(plan.options)) from error
        except TrainingStopped:
            raise
        except PonderingError as error:
            raise TrainingStopped(f"{error}; {_how_to_resume(plan.options)}") from error
        finally:
            progress.close()
        return _result(trainer, plan, progress)


def _adapted(plan: TrainingPlan, model: PreTrainedModel) -> PreTrainedModel:
    """The model with its adapter; its base is written first, where there is no checkpoint of it yet."""
    options = plan.options
    if plan.checkpoint is not None:
        return lora.load_adapter(plan.checkpoint, model)
    base = lora.base_of_adapter(plan.start, options)
    if base is None:
        base = str(options.folder / lora.BASE)
        if plan.settings.should_save:
            lora.write_base(model, plan.start.tokenizer, options.folder)
    return lora.add_adapter(model, options, base)


@contextlib.contextmanager
def _output_folder(plan: TrainingPlan) -> Iterator[None]:
    """The folder of the run, emptied where that was asked for. It is not left behind with nothing in it."""
    output = plan.options.folder
    # Of several processes one looks after the folder, once all have checked it.
    plan.settings.distributed_state.wait_for_everyone()
    with writing(str(plan.options.output)):
        if not plan.settings.should_save:
            yield
            return
        if plan.options.overwrite and output.is_dir():
            for path in output.iterdir():
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        existed = output.is_dir()
        clean_up(output)
        try:
            yield
        finally:
            if output.is_dir():
                clean_up(output)
            if not existed:
                with contextlib.suppress(OSError):
                    output.rmdir()


def _make_trainer(plan: TrainingPlan, model: PreTrainedModel) -> tuple[PonderingTrainer, TrainingProgress]:
    options, data, settings = plan.options, plan.data, plan.settings
    record = make_record(options, plan.arguments, data.fingerprint)
    trainer_class = DraftHeadTrainer if options.draft_heads else PonderingTrainer
    with wrong_arguments():
        trainer = trainer_class(
            model=model,
            args=settings,
            train_dataset=data.training,
            eval_dataset=data.held_out,
            processing_class=plan.start.tokenizer,
            data_collator=default_data_collator,
            record=record,
            model_is_loaded=plan.checkpoint is not None,
            gate_learning_rate_factor=options.gate_learning_rate_factor,
            sampled_steps=options.sampled_steps,
        )
    # Both print on standard output; that is for results.
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    rows = settings.train_batch_size * settings.gradient_accumulation_steps * settings.world_size
    progress = TrainingProgress(rows * choose_block_size(options.block_size, plan.start.config))
    trainer.add_callback(progress)
    if data.batch is not None:
        PonderingCallback(data.batch).attach(trainer)
    if plan.checkpoint is not None:
        trainer.add_callback(RestoreLoggedLoss(trainer, plan.checkpoint))
    return trainer, progress


def _train(trainer: PonderingTrainer, plan: TrainingPlan) -> None:
    if plan.checkpoint is not None:
        trainer.state = TrainerState.load_from_json(str(plan.checkpoint / "trainer_state.json"))
    if trainer.state.global_step < _total_steps(trainer):  # otherwise Trainer would take one step more
        trainer.train(resume_from_checkpoint=None if plan.checkpoint is None else str(plan.checkpoint))
    if plan.data.held_out is not None and _last_evaluated(trainer) != trainer.state.global_step:
        trainer.evaluate()


def _total_steps(trainer):
    settings = trainer.args
    if settings.max_steps > 0:
        return settings.max_steps
    batches = len(trainer.get_train_dataloader())
    return math.ceil(settings.num_train_epochs * max(1, math.ceil(batches / settings.gradient_accumulation_steps)))


def _last_evaluated(trainer):
    return next((row["step"] for row in reversed(trainer.state.log_history) if "eval_loss" in row), None)


def _save(trainer: PonderingTrainer, plan: TrainingPlan) -> None:
    if plan.options.merge:
        trainer.model = trainer.model_wrapped = trainer.model.merge_and_unload()
    if not trainer.args.push_to_hub:
        trainer.save_model()
        return
    try:
        trainer.push_to_hub()  # saves it first
    except PonderingError as error:
        raise TrainingStopped(f"the model is in {plan.options.output}, but could not be uploaded: {error}") from error


def _how_to_resume(options):
    checkpoint = last_checkpoint(options.folder)
    if checkpoint is None:
        return "there was no checkpoint yet"
    return f"{checkpoint} is whole: `ponder-hf train --output {options.output} --resume` goes on from it"


def _result(trainer: PonderingTrainer, plan: TrainingPlan, progress: TrainingProgress) -> dict[str, Any]:
    history = trainer.state.log_history
    losses = [row["loss"] for row in history if "loss" in row]
    evaluation: dict[str, float] = next((row for row in reversed(history) if "eval_loss" in row), {})
    config = trainer.pondering_model.config
    tokens = trainer.state.global_step * progress.tokens_per_step
    return {
        "output": str(plan.options.folder),
        "source": plan.start.name,
        "started_from": plan.start.kind,
        "resumed_from": None if plan.checkpoint is None else str(plan.checkpoint),
        "model_type": config.base_config.model_type,
        "parameters": plan.start.num_parameters,
        "pondering": {name: getattr(config, name) for name in PONDERING_FIELDS},
        "sampled_steps": plan.options.sampled_steps,
        "steps": trainer.state.global_step,
        "tokens": tokens,
        "tokens_per_second": round(progress.tokens_per_second, 1),
        "loss": losses[-1] if losses else None,
        "evaluation": {key: value for key, value in evaluation.items() if key.startswith("eval_")},
        "draft_heads": plan.options.draft_heads,
        "adapter": plan.options.lora and not plan.options.merge,
        "checkpoints": [path.name for path in sorted(plan.options.folder.glob("checkpoint-*"))],
    }
