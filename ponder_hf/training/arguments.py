"""transformers' TrainingArguments: the recipe's values, those asked for over them, and what cannot be asked for."""

import contextlib
import dataclasses
import difflib
import os
from collections.abc import Iterable, Iterator
from typing import Any

from transformers import TrainingArguments

from ponder_hf.errors import first_line
from ponder_hf.modeling import PonderingError


# What the command line says in its own words, or what would do nothing; each with what to say instead.
NOT_ARGUMENTS = {
    "output_dir": "it is `output`",
    "resume_from_checkpoint": "it is `resume`",
    "do_train": "training is what this command does",
    "do_eval": "`validation` or `held_out` switches evaluation on",
    "do_predict": "there is nothing to predict",
    "parallelism_config": "it takes an object, not text: use a script with Trainer",
    "use_cache": "training never keeps a cache",
    "use_liger_kernel": "its kernels replace the backbone's loss, which a pondering model does not use",
}
# Where a later release of transformers renamed an argument: the old name means the new one.
RENAMED = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}
# The method's authors' recipe, for lack of a better one for every start; learning rates are by size, below.
RECIPE: dict[str, Any] = {
    "adam_beta1": 0.9,
    "adam_beta2": 0.95,
    "weight_decay": 0.1,
    "lr_scheduler_type": "cosine_with_min_lr",
    "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
    "warmup_steps": 0.01,
    "num_train_epochs": 1,
    "logging_steps": 10,
    "logging_first_step": True,
    "save_total_limit": 3,
    # The trainer checks every loss itself, and stops.
    "logging_nan_inf_filter": False,
    "report_to": "none",
}
# Draft heads learn fast, and from any text.
HEADS_RECIPE: dict[str, Any] = {"learning_rate": 2e-3, "weight_decay": 0.0, "max_steps": 600}
_SCRATCH_RATES = ((100e6, 1e-3), (300e6, 6e-4), (float("inf"), 3e-4))  # up to so many parameters
_CONTINUED = 1 / 3
_LORA_RATE = 2e-4
# What may differ when a run is resumed: how long, how often, where to, and how it is carried out. Everything else is
# part of the optimiser's or the data's state, and Trainer would silently keep or silently mix it.
FREE_ON_RESUME = frozenset(
    "max_steps num_train_epochs logging_strategy logging_steps logging_first_step eval_strategy eval_steps "
    "eval_on_start eval_delay eval_accumulation_steps per_device_eval_batch_size save_strategy save_steps "
    "save_total_limit save_on_each_node save_only_model load_best_model_at_end metric_for_best_model "
    "greater_is_better report_to run_name project trackio_space_id trackio_bucket_id trackio_static_space_id "
    "push_to_hub hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision disable_tqdm log_level "
    "log_level_replica log_on_each_node dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers "
    "dataloader_prefetch_factor skip_memory_metrics include_num_input_tokens_seen ddp_backend ddp_timeout use_cpu "
    "activation_checkpointing activation_checkpointing_kwargs gradient_checkpointing gradient_checkpointing_kwargs "
    "torch_empty_cache_steps debug".split()
)


def argument_names() -> tuple[str, ...]:
    """The fields of TrainingArguments that can be asked for."""
    return tuple(
        each.name for each in dataclasses.fields(TrainingArguments) if each.init and each.name not in NOT_ARGUMENTS
    )


def check_argument_names(names: Iterable[str]) -> None:
    """Raise a PonderingError for a name that is no field of TrainingArguments, with the nearest one that is."""
    known = argument_names()
    for name in names:
        if name in NOT_ARGUMENTS:
            raise PonderingError(f"`{name}` cannot be given: {NOT_ARGUMENTS[name]}")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f", did you mean `{near[0]}`?" if near else ""
            raise PonderingError(f"`{name}` is not a training argument of this transformers{hint}")


def learning_rate(kind: str, num_parameters: int, lora: bool) -> float:
    """The recipe's peak learning rate.

    From scratch it is the authors': 1e-3 at 70M parameters to 3e-4 from 410M on. A trained model goes on with a third
    of that; an adapter takes peft's customary 2e-4 whatever the model's size.
    """
    if lora:
        return _LORA_RATE
    rate = next(rate for most, rate in _SCRATCH_RATES if num_parameters <= most)
    return rate if kind == "scratch" else rate * _CONTINUED


def current_names(arguments: dict[str, Any]) -> dict[str, Any]:
    """These arguments by the names that this release of transformers prefers."""
    known = argument_names()
    return {RENAMED[name] if RENAMED.get(name) in known else name: value for name, value in arguments.items()}


def complete_arguments(
    given: dict[str, Any], kind: str, num_parameters: int, lora: bool, evaluates: bool, draft_heads: bool = False
) -> dict[str, Any]:
    """The recipe's arguments with those that were `given` over them, as a dict that JSON can hold.

    Args:
        given: fields of TrainingArguments that were asked for.
        kind: what is started from: "plain", "pondering" or "scratch".
        num_parameters: of the model.
        lora: an adapter is trained.
        evaluates: there is something to evaluate on.
        draft_heads: only draft heads are trained.
    """
    check_argument_names(given)
    arguments: dict[str, Any] = {**RECIPE, "learning_rate": learning_rate(kind, num_parameters, lora)}
    if draft_heads:
        arguments.update(HEADS_RECIPE)
        if "num_train_epochs" in given:
            del arguments["max_steps"]
    if evaluates:
        arguments["eval_strategy"] = "steps"
        arguments["eval_steps"] = given.get("save_steps", 500)
    if "lr_scheduler_type" in given and "lr_scheduler_kwargs" not in given:
        del arguments["lr_scheduler_kwargs"]  # they are of the recipe's own schedule
    return {**arguments, **current_names(given)}


def keep_token_apart(arguments: dict[str, Any]) -> None:
    """Move `hub_token` from the arguments, which are stored with every checkpoint, to the environment."""
    token = arguments.pop("hub_token", None)
    if token is not None:
        os.environ["HF_TOKEN"] = token


def make_arguments(output: str | os.PathLike, arguments: dict[str, Any]) -> TrainingArguments:
    """TrainingArguments for a run that writes to `output`.

    Raises:
        PonderingError: a value is wrong, or two contradict each other.
    """
    with wrong_arguments():
        return TrainingArguments(output_dir=str(output), **arguments)


@contextlib.contextmanager
def wrong_arguments() -> Iterator[None]:
    """Translate what transformers raises where arguments are wrong or ask for what is not installed."""
    try:
        yield
    except PonderingError:
        raise
    except (ValueError, TypeError, KeyError, ImportError, RuntimeError, NotImplementedError) as error:
        raise PonderingError(f"the training arguments cannot be used: {first_line(error)}") from error
