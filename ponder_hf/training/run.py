"""One training run, from what the user asked for to the folder that it leaves."""

import contextlib
import math
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub import get_token
from transformers import TrainingArguments, default_data_collator, set_seed
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerState

from ponder_hf import PonderingError
from ponder_hf.callbacks import PonderingCallback
from ponder_hf.conversion import check_tokenizer, load_tokenizer, open_checkpoint
from ponder_hf.conversion.whole_folder import check_destination
from ponder_hf.data.blocks import choose_block_size
from ponder_hf.errors import TrainingStopped, writing
from ponder_hf.modeling.configuration_pondering import PONDERING_FIELDS

from . import adapter
from .arguments import complete_arguments, keep_token_apart, make_arguments, wrong_arguments
from .checkpoints import checkpoint_to_resume, clean_up, last_checkpoint
from .draft_heads import DraftHeadTrainer
from .options import TrainOptions
from .record import check_fields, make_record, resumed_options
from .start import Start, find_start, pondering_start
from .trainer import PonderingTrainer, check_smoothing
from .training_data import TrainingData, load_training_data
from .watch import Progress, ResumeProgress


@dataclass(frozen=True)
class TrainingPlan:
    """Everything that was checked before anything is written.

    arguments: those of `settings` that the recipe or the user says, as JSON can hold them. checkpoint: to resume from,
    or None.
    """

    options: TrainOptions
    arguments: dict
    settings: TrainingArguments
    start: Start
    data: TrainingData
    checkpoint: Path | None


def train(options):
    """Run one training.

    Args:
        options: a TrainOptions.

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


def make_plan(options):
    """Check everything, and read the data. See `train`."""
    options = replace(options, arguments=dict(options.arguments))
    keep_token_apart(options.arguments)
    options.check()
    if options.lora:
        adapter.check_peft()
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
    if options.lora:
        adapter.target_modules(options, start.config)
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
    return pondering_start(open_checkpoint(adapter.stored_base(checkpoint)), tokenizer, replace(options, fields={}))


def _adapted(plan, model):
    """The model with its adapter; its base is written first, where there is no checkpoint of it yet."""
    options = plan.options
    if plan.checkpoint is not None:
        return adapter.load_adapter(plan.checkpoint, model)
    base = adapter.base_of_adapter(plan.start, options)
    if base is None:
        base = str(options.folder / adapter.BASE)
        if plan.settings.should_save:
            adapter.write_base(model, plan.start.tokenizer, options.folder)
    return adapter.add_adapter(model, options, base)


@contextlib.contextmanager
def _output_folder(plan):
    """The folder of the run, emptied where that was asked for. It is not left behind with nothing in it."""
    output = plan.options.folder
    # Of several processes one looks after the folder, once all have checked it.
    plan.settings.distributed_state.wait_for_everyone()
    with writing(plan.options.output):
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


def _make_trainer(plan, model):
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
        )
    # Both print on standard output; that is for results.
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    rows = settings.train_batch_size * settings.gradient_accumulation_steps * settings.world_size
    progress = Progress(rows * choose_block_size(options.block_size, plan.start.config))
    trainer.add_callback(progress)
    if data.held_out is not None:
        PonderingCallback(data.batch).attach(trainer)
    if plan.checkpoint is not None:
        trainer.add_callback(ResumeProgress(trainer, plan.checkpoint))
    return trainer, progress


def _train(trainer, plan):
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


def _save(trainer, plan):
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


def _result(trainer, plan, progress):
    history = trainer.state.log_history
    losses = [row["loss"] for row in history if "loss" in row]
    evaluation = next((row for row in reversed(history) if "eval_loss" in row), {})
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
        "steps": trainer.state.global_step,
        "tokens": tokens,
        "tokens_per_second": round(progress.tokens_per_second, 1),
        "loss": losses[-1] if losses else None,
        "evaluation": {key: value for key, value in evaluation.items() if key.startswith("eval_")},
        "draft_heads": plan.options.draft_heads,
        "adapter": plan.options.lora and not plan.options.merge,
        "checkpoints": [path.name for path in sorted(plan.options.folder.glob("checkpoint-*"))],
    }
