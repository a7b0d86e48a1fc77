"""Low-rank adapters (LoRA) on a pondering model, by PEFT."""

import difflib
import os
from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ponder_hf.conversion.whole_folder import whole_folder
from ponder_hf.errors import reading
from ponder_hf.modeling import PonderingConfig, PonderingError, PonderingForCausalLM

from .options import TrainOptions
from .start import Start


BASE = "base"  # the folder in a run's output with the pondering model that its adapter belongs to


def default_target_modules(base_config: PreTrainedConfig) -> str | list[str]:
    """`target_modules` for PEFT's LoraConfig: the names that PEFT itself takes for this backbone.

    PEFT looks its defaults up by `model_type`, which is "pondering" here, so a LoraConfig without `target_modules` is
    refused; the backbone's own names work as they do for the backbone.

    Args:
        base_config: the backbone's configuration, `model.config.base_config`.

    Returns:
        A list of names, or "all-linear" for a backbone that PEFT has no defaults for: all linear layers but the head.
    """
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULTS

    names = DEFAULTS.get(base_config.model_type, "all-linear")
    return names if isinstance(names, str) else list(names)


def check_peft() -> None:
    """Raise a PonderingError unless peft is installed."""
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise PonderingError("`lora` needs peft: pip install 'ponder-hf[train]'") from error


def target_modules(options: TrainOptions, config: PonderingConfig) -> str | list[str]:
    """The names of the modules to adapt: those asked for, or PEFT's usual ones for the backbone.

    Raises:
        PonderingError: the model has no such module.
    """
    if options.lora_target_modules:
        _check_modules(options.lora_target_modules, config)
        return list(options.lora_target_modules)
    return default_target_modules(config.base_config)


def _check_modules(names, config):
    with torch.device("meta"):
        model = PonderingForCausalLM(config)
    found = {name for name, module in model.named_modules() if not any(module.children())}
    ends = {name.rpartition(".")[2] for name in found}
    for name in names:
        if not any(each == name or each.endswith(f".{name}") for each in found):
            near = difflib.get_close_matches(name, ends, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(sorted(ends))}"
            raise PonderingError(f"`lora_target_modules` names {name}, which the model does not have: {hint}")


def base_of_adapter(start: Start, options: TrainOptions) -> str | None:
    """The checkpoint that the adapter can name as its base, or None where it must be written first."""
    is_unchanged = start.kind == "pondering" and not options.fields
    return start.path if is_unchanged else None


def write_base(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, output: Path) -> str:
    """Save the pondering model that an adapter belongs to in the run's folder. Returns where."""
    with whole_folder(output / BASE, overwrite=True) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return str(output / BASE)


def add_adapter(model: PonderingForCausalLM, options: TrainOptions, base: str) -> PreTrainedModel:
    """The model as a PeftModel with a new adapter; a gate, which starts closed, is trained whole.

    Args:
        model: the model to adapt.
        options: what was asked for.
        base: the folder or Hub id of the checkpoint that the adapter will name as its base.
    """
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(
        task_type="CAUSAL_LM",
        r=options.lora_r,
        lora_alpha=options.lora_alpha,
        lora_dropout=options.lora_dropout,
        target_modules=target_modules(options, model.config),
        modules_to_save=["pondering_gate"] if model.pondering_gate is not None else None,
    )
    adapted = get_peft_model(model, settings)
    adapted.peft_config["default"].base_model_name_or_path = base
    return adapted


def stored_base(checkpoint: str | os.PathLike) -> str:
    """The folder or Hub id of the base of the adapter that lies in a checkpoint."""
    from peft import PeftConfig

    with reading(checkpoint):
        return PeftConfig.from_pretrained(checkpoint).base_model_name_or_path


def load_adapter(checkpoint: str | os.PathLike, model: PonderingForCausalLM) -> PreTrainedModel:
    """The model as a PeftModel with the adapter that lies in a checkpoint, to train on."""
    from peft import PeftModel

    return PeftModel.from_pretrained(model, checkpoint, is_trainable=True)
