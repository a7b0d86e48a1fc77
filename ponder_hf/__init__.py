"""ponder_hf: language models that ponder in continuous space before each token (arXiv 2505.20674).

Importing it registers the pondering classes with transformers' Auto classes.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .modeling import PonderingConfig, PonderingError, PonderingForCausalLM, PonderingModel


__version__ = "0.1.0"
__all__ = ["PonderingConfig", "PonderingError", "PonderingForCausalLM", "PonderingModel"]

AutoConfig.register(PonderingConfig.model_type, PonderingConfig)
AutoModel.register(PonderingConfig, PonderingModel)
AutoModelForCausalLM.register(PonderingConfig, PonderingForCausalLM)
