"""The model: exactly the files that ship with every checkpoint. Installed as `ponder_hf.modeling`.

Each imports only torch, transformers, the standard library and its siblings (as `from .sibling import name`, so that
transformers finds what to copy). In the order in which one builds on the other:

pondering_errors                PonderingError, and the versions of transformers that this runs on
configuration_pondering         PonderingConfig: how a model ponders, and every field of its backbone
pondering_cache                 one cache for the keys and values of all passes, paged or not
pondering_vocabulary            the head taken apart, and the numerics that all products with the vocabulary share
pondering_vocabulary_loss       the next-token loss, logits on demand, and what the model returns
pondering_backbone              a model of transformers taken apart; whether it can ponder; what is wrapped around it
pondering_vocabulary_embedding  from predictions to the pondering embedding, over the whole vocabulary or the K largest
pondering_vocabulary_cpu        what only makes CPUs faster; without it everything is computed the same
pondering_backbone_checkpoint   what `from_base(id)` reads: plain checkpoints, and those of the method's authors
pondering_generate              what `generate` takes about pondering: settings, checks of the prompt, self-checks
pondering_generate_exits        early exits: the criteria, and passes over the tokens that go on
pondering_generate_tokens       choosing tokens while drafting: noise, processors, stopping
pondering_generate_drafts       where drafts come from, and which of them are kept
pondering_generate_wave         the passes of successive tokens in one batched forward pass
pondering_generate_speculation  self-speculative generation: drafts, the wave and the choice of tokens together
modeling_pondering              PonderingModel and PonderingForCausalLM: the loop over the passes. Begin here.
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
