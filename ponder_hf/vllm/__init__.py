"""The plug-in for vLLM: every pondering checkpoint in an engine that serves many users at once.

Nobody imports this. vLLM finds `register` through the entry point `vllm.general_plugins` and calls it in each of its
processes; `vllm serve CHECKPOINT` and `vllm.LLM(CHECKPOINT)` then know the architecture PonderingForCausalLM. The
backbone is vLLM's own class for it; this package holds the passes over it:

- `model.py`: the loop over the passes;
- `attention.py`: a key/value cache of each pass in every attention layer;
- `vocabulary.py`: the pondering embedding over a vocabulary that tensor parallelism has sharded;
- `checks.py`: what is refused at start-up, by name.
"""

import logging


ARCHITECTURES = ("PonderingForCausalLM", "PonderingModel")
_MODEL = f"{__name__}.model:PonderingForCausalLM"
# Held against `model.generate` by tests/test_vllm_backbones.py. Model cards of these tell how they are served.
TESTED_BACKBONES = frozenset(
    "gemma2 gemma3_text gpt2 gpt_neox granite llama mistral mixtral olmo2 olmoe opt phi qwen2 qwen2_moe qwen3".split()
)


def register() -> None:
    """Tell vLLM of pondering models. May be called any number of times.

    It never raises: vLLM would not start then, whatever model it was to serve.
    """
    try:
        from vllm import ModelRegistry

        import ponder_hf.modeling  # noqa: F401 - transformers' AutoConfig knows pondering configurations from now on

        from .checks import register_checks

        # By name, so that the model's code is imported only in a process that builds one.
        for architecture in ARCHITECTURES:
            if architecture not in ModelRegistry.get_supported_archs():
                ModelRegistry.register_model(architecture, _MODEL)
        register_checks(ARCHITECTURES)
    except Exception as error:
        logging.getLogger(__name__).warning(
            "ponder_hf could not register itself with this vLLM, which will not know pondering models "
            f"({type(error).__name__}: {error})"
        )
