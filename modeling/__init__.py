"""The files that ship with every checkpoint. Installed as `ponder_hf.modeling`.

Each imports only torch, transformers, the standard library and its siblings (as `from .sibling import name`, so that
transformers finds what to copy).
"""

from .configuration_pondering import PonderingConfig
from .pondering_errors import PonderingError, check_transformers


try:
    from .modeling_pondering import PonderingForCausalLM, PonderingModel
    from .pondering_generate_drafts import PromptLookup
    from .pondering_generate_exits import PonderingExit
    from .pondering_vocabulary_loss import PonderingCausalLMOutput
except ImportError as error:
    check_transformers(error)  # a version that lacks what they import is outside the range, which says more
    raise


__all__ = [
    "PonderingCausalLMOutput",
    "PonderingConfig",
    "PonderingError",
    "PonderingExit",
    "PonderingForCausalLM",
    "PonderingModel",
    "PromptLookup",
]
