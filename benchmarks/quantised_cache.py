"""What a quantised cache does to the text of a plain and of a pondering model.

    python -m benchmarks quantised_cache --model FOLDER --text TEXT

FOLDER is a trained pondering model with its tokenizer, as examples/train_small.py writes it; its greedy texts are held
against those with an unquantised cache, with S = 0 (the plain model) and with its own S. Needs optimum-quanto (which
compiles with ninja and a C++ compiler) and hqq (which needs termcolor); `make setup` puts them beside the environment,
in .venv/overlays/caches: put that on PYTHONPATH.
"""

import argparse
from pathlib import Path

from transformers import AutoTokenizer

from ponder_hf import PonderingForCausalLM

from .machine import described
from .wave import prompts_of, read_ids


CACHES = {
    "hqq, 8 bits": {"backend": "hqq", "nbits": 8, "axis_key": 1, "axis_value": 1},
    "hqq, 4 bits": {"backend": "hqq", "nbits": 4, "axis_key": 1, "axis_value": 1},
    "quanto, 4 bits": {"backend": "quanto", "nbits": 4},
}


def compare(model, prompts, new_tokens, cache_config, **steps):
    """The largest difference of logits in parts of the largest logit, up to where texts part, and where they part."""
    settings = {
        "max_new_tokens": new_tokens,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    error, lengths = 0.0, []
    for prompt in prompts:
        exact = model.generate(prompt, **settings, **steps)
        cache = {"cache_implementation": "quantized", "cache_config": {**cache_config, "q_group_size": 32}}
        quantised = model.generate(prompt, **settings, **steps, **cache)
        same = (exact.sequences == quantised.sequences)[0, prompt.shape[1] :]
        lengths.append(int(same.long().cumprod(0).sum()))
        for one, other in list(zip(exact.logits, quantised.logits, strict=True))[: lengths[-1] + 1]:
            error = max(error, float((one - other).abs().max() / one.abs().max()))
    return error, sorted(lengths)


def main(argv=None):
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="the folder of a trained model")
    parser.add_argument("--text", type=Path, help="a text to take prompts from")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=20)
    parser.add_argument("--new-tokens", type=int, default=40)
    arguments = parser.parse_args(argv)
    if arguments.model is None or arguments.text is None:
        print("quantised_cache: nothing to measure without --model and --text")
        return
    model = PonderingForCausalLM.from_pretrained(arguments.model).eval()
    ids = read_ids(arguments.text, AutoTokenizer.from_pretrained(arguments.model), 8192)
    prompts = prompts_of(ids, arguments.prompts, arguments.prompt_tokens)
    print(described())
    print(f"\n| cache | model | largest error of logits | of {arguments.new_tokens} tokens the same, each prompt |")
    print("| --- | --- | --- | --- |")
    for name, cache_config in CACHES.items():
        for steps in (0, model.config.pondering_steps):
            error, lengths = compare(model, prompts, arguments.new_tokens, cache_config, pondering_steps=steps)
            shown = "plain (S = 0)" if steps == 0 else f"S = {steps}"
            print(f"| {name} | {shown} | {error:.1%} | {', '.join(map(str, lengths))} |", flush=True)
