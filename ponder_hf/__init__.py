"""ponder_hf: language models that ponder in continuous space before each token (arXiv 2505.20674).

Importing it takes no time: torch and transformers are imported when one of the names below is first used. It does
three things to other classes, once transformers is imported too, before or after it (`auto_classes.py`):

- transformers' AutoConfig, AutoModel and AutoModelForCausalLM know pondering models;
- `push_to_hub` of the pondering classes adds a model card and the tokenizer (`ponder_hf.hub.push_model`);
- `except PonderingError` also catches what a checkpoint's own code raises that was loaded before.
"""

import importlib
from typing import TYPE_CHECKING, Any

from .auto_classes import register_with_transformers


if TYPE_CHECKING:
    from .callbacks import PonderingCallback, pondering_statistics
    from .conversion.convert import convert
    from .conversion.export import export
    from .diagnosis import diagnose
    from .evaluation import evaluate_passes, evaluate_tasks, evaluate_text, measure_passes
    from .hub import CodeOnPush, inspect_checkpoint, inspect_code
    from .hub.push import push
    from .lenses import Lens, lens
    from .modeling import (
        PonderingConfig,
        PonderingError,
        PonderingExit,
        PonderingForCausalLM,
        PonderingModel,
        PromptLookup,
    )
    from .training import PonderingTrainer, TrainOptions, separate_gate, train, train_draft_heads


__version__ = "0.2.1"
__all__ = [
    "CodeOnPush",
    "Lens",
    "PonderingCallback",
    "PonderingConfig",
    "PonderingError",
    "PonderingExit",
    "PonderingForCausalLM",
    "PonderingModel",
    "PonderingTrainer",
    "PromptLookup",
    "TrainOptions",
    "convert",
    "diagnose",
    "evaluate_passes",
    "evaluate_tasks",
    "evaluate_text",
    "export",
    "inspect_checkpoint",
    "inspect_code",
    "lens",
    "measure_passes",
    "pondering_statistics",
    "push",
    "separate_gate",
    "train",
    "train_draft_heads",
]
# Where each of them is.
_NAMES = {
    "callbacks": ("PonderingCallback", "pondering_statistics"),
    "conversion": ("convert", "export"),
    "diagnosis": ("diagnose",),
    "evaluation": ("evaluate_passes", "evaluate_tasks", "evaluate_text", "measure_passes"),
    "hub": ("CodeOnPush", "inspect_checkpoint", "inspect_code", "push"),
    "lenses": ("Lens", "lens"),
    "modeling": (
        "PonderingConfig",
        "PonderingError",
        "PonderingExit",
        "PonderingForCausalLM",
        "PonderingModel",
        "PromptLookup",
    ),
    "training": ("PonderingTrainer", "TrainOptions", "separate_gate", "train", "train_draft_heads"),
}
_MODULES = (*_NAMES, "data", "demo", "devices", "metrics")


if not TYPE_CHECKING:  # a type checker would take every name to be there

    def __getattr__(name: str) -> Any:
        if name in _MODULES:
            return importlib.import_module(f".{name}", __name__)
        for module, names in _NAMES.items():
            if name in names:
                value = globals()[name] = getattr(importlib.import_module(f".{module}", __name__), name)
                return value
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})


register_with_transformers()
