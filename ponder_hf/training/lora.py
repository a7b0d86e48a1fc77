"""Which layers of a backbone LoRA adapts by default."""


def default_target_modules(base_config):
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
