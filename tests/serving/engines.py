"""vLLM's engines in the process of a test, one after another."""

import gc
import os
from contextlib import contextmanager


# Read by vLLM when it is imported. In one process an engine starts in seconds; that the plug-in reaches vLLM's other
# processes is tested apart (test_vllm_processes.py).
for name, value in {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}.items():
    os.environ.setdefault(name, value)

import torch  # noqa: E402
from transformers import PreTrainedModel  # noqa: E402
from vllm import LLM, SamplingParams  # noqa: E402
from vllm.distributed import cleanup_dist_env_and_memory  # noqa: E402


def _with_subclasses(kind):
    yield kind
    for subclass in kind.__subclasses__():
        yield from _with_subclasses(subclass)


@contextmanager
def classes_of_transformers():
    """Within it they may be changed: afterwards all that were there before are as they were.

    vLLM's backend for models of transformers makes their classes such that it compiles, and then nobody else in this
    process can make a model of them.
    """
    before = {kind: (kind.__bases__, dict(vars(kind))) for kind in _with_subclasses(PreTrainedModel)}
    try:
        yield
    finally:
        for kind, (bases, attributes) in before.items():
            if kind.__bases__ != bases:
                kind.__bases__ = bases
            for name in {*vars(kind)} - {*attributes}:
                delattr(kind, name)
            for name, value in attributes.items():
                if vars(kind).get(name) is not value:
                    setattr(kind, name, value)


@contextmanager
def hooks_on_compilation():
    """What is hooked into torch's compilation within it is unhooked afterwards.

    vLLM leaves hooks there, which look at the code of an engine's model whatever is compiled later in this process.
    """
    convert_frame, handles = torch._dynamo.convert_frame, []
    register = convert_frame.register_bytecode_hook

    def register_for_a_while(hook):
        handles.append(register(hook))
        return handles[-1]

    convert_frame.register_bytecode_hook = register_for_a_while
    try:
        yield
    finally:
        convert_frame.register_bytecode_hook = register
        for handle in handles:
            handle.remove()


@contextmanager
def engine(folder, **options):
    """An engine for a checkpoint: in float32, without compilation and without a tokenizer, if not said otherwise."""
    options = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 256,
        "seed": 0,
        "skip_tokenizer_init": True,
        **options,
    }
    with hooks_on_compilation(), classes_of_transformers():
        llm = LLM(str(folder), **options)
        try:
            yield llm
        finally:
            llm.llm_engine.engine_core.shutdown()
            del llm
            cleanup_dist_env_and_memory()
            gc.collect()


def continued(llm, prompts, num_new_tokens, **arguments):
    """What an engine continues prompts with: tokens, a list for each, and their log-probabilities, likewise."""
    parameters = SamplingParams(
        **{"temperature": 0, "max_tokens": num_new_tokens, "logprobs": 0, "detokenize": False, **arguments}
    )
    requests = [{"prompt_token_ids": prompt} for prompt in prompts]
    outputs = [request.outputs[0] for request in llm.generate(requests, parameters, use_tqdm=False)]
    tokens = [list(output.token_ids) for output in outputs]
    return tokens, [
        [found[token].logprob for token, found in zip(output.token_ids, output.logprobs, strict=True)]
        for output in outputs
    ]
