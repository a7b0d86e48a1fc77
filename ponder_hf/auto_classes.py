"""transformers' Auto classes learn of pondering models, whichever of both packages is imported first.

Where transformers is imported already, the pondering classes are imported and registered at once. Where it is not,
that would take seconds which `ponder-hf --help` does not need: it is done when transformers has been imported.
"""

import contextlib
import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any


_MODELING = f"{__package__}.modeling"


def register_with_transformers() -> None:
    """Register now, or when transformers is imported."""
    if _MODELING in sys.modules or any(isinstance(finder, _Watch) for finder in sys.meta_path):
        return  # the package is reloaded
    sys.meta_path.insert(0, _Watch(_MODELING, _register))
    if "transformers" in sys.modules:
        importlib.import_module(_MODELING)
    else:
        sys.meta_path.insert(0, _Watch("transformers", _import_modeling))


class _Watch(importlib.abc.MetaPathFinder):
    """Calls a function at the end of the first import of a module that succeeds, before anyone else can use it."""

    def __init__(self, name: str, then: Callable[[], None]) -> None:
        self.name, self.then = name, then

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != self.name:
            return None
        others = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        found = (finder.find_spec(name, path, target) for finder in others)
        spec = next((each for each in found if each is not None), None)
        if spec is not None and spec.loader is not None:
            self._follow(spec.loader)
        return spec

    def _follow(self, loader: Any) -> None:
        execute = loader.exec_module

        def execute_and_call(module: ModuleType) -> None:
            execute(module)
            if module.__name__ == self.name and self in sys.meta_path:  # archives have one loader for all modules
                self.then()
                sys.meta_path.remove(self)

        loader.exec_module = execute_and_call


def _import_modeling() -> None:
    if _MODELING not in sys.modules:  # otherwise it is what imports transformers
        importlib.import_module(_MODELING)


def _register() -> None:
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    from .modeling import PonderingConfig, PonderingForCausalLM, PonderingModel

    AutoConfig.register(PonderingConfig.model_type, PonderingConfig)
    AutoModel.register(PonderingConfig, PonderingModel)
    AutoModelForCausalLM.register(PonderingConfig, PonderingForCausalLM)
    for model_class in (PonderingModel, PonderingForCausalLM):
        model_class.push_to_hub = _push_to_hub
    _adopt_errors()


def _push_to_hub(self: Any, repo_id: str, **arguments: Any) -> Any:
    """Push the model with its code, card and tokenizer; see ponder_hf.hub.push_model."""
    from .hub import push_model

    return push_model(self, repo_id, **arguments)


def _adopt_errors() -> None:
    """Let `except PonderingError` catch what a checkpoint's own code raises that was loaded before this package.

    Each such code has an error class of its own. It becomes a child of this one.
    """
    from .modeling import PonderingError

    for name, module in [*sys.modules.items()]:
        if name.startswith("transformers_modules.") and name.endswith(".pondering_errors"):
            theirs: Any = getattr(module, "PonderingError", None)
            with contextlib.suppress(TypeError, AttributeError):  # code from before 0.2.0: ValueError catches it
                theirs.__bases__ = (PonderingError,)
