"""Low-rank adapters (LoRA) on a pondering model, by PEFT."""

from ponder_hf import PonderingError
from ponder_hf.conversion.writer import whole_folder
from ponder_hf.errors import first_line, reading


BASE = "base"  # the folder in a run's output with the pondering model that its adapter belongs to


def check_peft():
    """Raise a PonderingError unless peft is installed."""
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise PonderingError("--lora needs peft: pip install 'ponder-hf[train]'") from error


def target_modules(options, config):
    """The names of the modules to adapt: those asked for, or PEFT's usual ones for the backbone."""
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as USUAL

    if options.lora_target_modules:
        return list(options.lora_target_modules)
    model_type = config.base_config.model_type
    if model_type not in USUAL:
        raise PonderingError(
            f"PEFT has no usual target modules for {model_type!r}: name them with --lora-target-modules"
        )
    return list(USUAL[model_type])


def base_of_adapter(start, options):
    """The checkpoint that the adapter can name as its base, or None where it must be written first."""
    is_unchanged = start.kind == "pondering" and not options.fields
    return start.path if is_unchanged else None


def write_base(model, tokenizer, output):
    """Save the pondering model that an adapter belongs to in the run's folder. Returns where."""
    with whole_folder(output / BASE, overwrite=True) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return str(output / BASE)


def add_adapter(model, options):
    """The model as a PeftModel with a new adapter; a gate, which starts closed, is trained whole.

    Raises:
        PonderingError: there are no such modules in the model.
    """
    from peft import LoraConfig, get_peft_model

    gate = ["pondering_gate"] if model.pondering_gate is not None else None
    settings = LoraConfig(
        task_type="CAUSAL_LM",
        r=options.lora_r,
        lora_alpha=options.lora_alpha,
        lora_dropout=options.lora_dropout,
        target_modules=target_modules(options, model.config),
        modules_to_save=gate,
    )
    try:
        return get_peft_model(model, settings)
    except ValueError as error:
        raise PonderingError(f"--lora-target-modules cannot be used: {first_line(error)}") from error


def stored_base(checkpoint):
    """The folder or Hub id of the base of the adapter that lies in a checkpoint."""
    from peft import PeftConfig

    with reading(checkpoint):
        return PeftConfig.from_pretrained(checkpoint).base_model_name_or_path


def load_adapter(checkpoint, model):
    """The model as a PeftModel with the adapter that lies in a checkpoint, to train on."""
    from peft import PeftModel

    return PeftModel.from_pretrained(model, checkpoint, is_trainable=True)
