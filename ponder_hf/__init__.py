"""ponder_hf: language models that ponder in continuous space before each token (arXiv 2505.20674).

Importing it registers the pondering classes with transformers' Auto classes.
"""

import contextlib
import sys

# First, as it says in words where transformers is too old for what is imported from it.
from .modeling import PonderingConfig, PonderingError, PonderingForCausalLM, PonderingModel


# isort: split
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM


__version__ = "0.1.0"
__all__ = ["PonderingConfig", "PonderingError", "PonderingForCausalLM", "PonderingModel"]

AutoConfig.register(PonderingConfig.model_type, PonderingConfig)
AutoModel.register(PonderingConfig, PonderingModel)
AutoModelForCausalLM.register(PonderingConfig, PonderingForCausalLM)


def _adopt_errors():
    """Let `except PonderingError` catch what a checkpoint's own code raises that was loaded before this package.

    Each such code has an error class of its own. It becomes a child of this one.
    """
    for name, module in [*sys.modules.items()]:
        if name.startswith("transformers_modules.") and name.endswith(".pondering_errors"):
            theirs = getattr(module, "PonderingError", None)
            with contextlib.suppress(TypeError, AttributeError):  # the code of release 0.1.0: ValueError catches it
                theirs.__bases__ = (PonderingError,)


_adopt_errors()


def _push_to_hub(self, repo_id, **arguments):
    from .hub import push_model

    return push_model(self, repo_id, **arguments)


# The code that ships with a checkpoint pushes as transformers does; here it also gets a card and a tokenizer.
for _model_class in (PonderingModel, PonderingForCausalLM):
    _push_to_hub.__doc__ = "Push the model with its code, card and tokenizer; see ponder_hf.hub.push_model."
    _model_class.push_to_hub = _push_to_hub
