"""Load a pondering checkpoint from its own code, where ponder_hf cannot be imported, and use it.

A program of its own: separate_process.py starts it with a job as JSON on standard input, and it prints its answer as
one line of JSON. So nothing here imports ponder_hf.
"""

import contextlib
import hashlib
import importlib.abc
import json
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any


_ROUNDS, _TIMED_TOKENS = 3, 40  # few enough for a large base, too


class NoPonderHf(importlib.abc.MetaPathFinder):
    """Makes `import ponder_hf` fail, as on a machine where it is not installed."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> None:
        if fullname.partition(".")[0] == "ponder_hf":
            raise ModuleNotFoundError("ponder_hf is hidden from this process", name=fullname)


def fingerprint(model: Any, ids: Any) -> tuple[float, str]:
    """What must be equal for two copies of a model: (loss in nats per token, checksum of the logits). ids: (B, T)."""
    import torch

    with torch.no_grad():
        output = model(input_ids=ids, labels=ids, use_cache=False)
    return output.loss.item(), hashlib.sha256(output.logits.contiguous().numpy().tobytes()).hexdigest()


def continuations(model: Any, tokenizer: Any, prompts: Sequence[str], seed: int, **generation: Any) -> list[str]:
    """How the model continues each prompt; the same every time for the same seed."""
    texts = []
    for prompt in prompts:
        ids, new = _generate(model, tokenizer, prompt, seed, **generation)
        texts.append(tokenizer.decode(ids[new:], skip_special_tokens=True))
    return texts


def _generate(model, tokenizer, prompt, seed, **generation):
    """(token ids of prompt and continuation, where the continuation begins)."""
    from transformers import set_seed

    set_seed(seed)
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
    return model.generate(**inputs, **generation)[0].tolist(), inputs["input_ids"].shape[1]


def compare_drafts(
    model: Any, tokenizer: Any, prompts: Sequence[str], seed: int, **generation: Any
) -> dict[str, Any] | None:
    """Generate from the same prompts plainly and with drafts, turn by turn.

    Returns:
        `plain_seconds` and `drafted_seconds` for a token, the median of the rounds' ratio as `speed`, the number of
        `num_draft_tokens`, and whether greedy generation gave the `same_text`. None without prompts or with S = 0.
    """
    steps = model.config.pondering_steps
    if not prompts or not steps:
        return None
    drafts = {"num_draft_tokens": steps}
    generation["max_new_tokens"] = min(_TIMED_TOKENS, generation["max_new_tokens"])
    greedy = {**generation, "do_sample": False, "temperature": None, "top_k": None}
    same = [
        _generate(model, tokenizer, prompt, seed, **greedy)[0]
        == _generate(model, tokenizer, prompt, seed, **greedy, **drafts)[0]
        for prompt in prompts
    ]
    rounds = [
        [_seconds_per_token(model, tokenizer, prompts, seed + turn, **generation, **way) for way in ({}, drafts)]
        for turn in range(_ROUNDS)
    ]
    plain, drafted = zip(*rounds, strict=True)
    return {
        "plain_seconds": statistics.median(plain),
        "drafted_seconds": statistics.median(drafted),
        "speed": statistics.median(slow / fast for slow, fast in rounds),
        "same_text": all(same),
        **drafts,
    }


def _seconds_per_token(model, tokenizer, prompts, seed, **generation):
    tokens, start = 0, time.perf_counter()
    for prompt in prompts:
        ids, new = _generate(model, tokenizer, prompt, seed, **generation)
        tokens += len(ids) - new
    return (time.perf_counter() - start) / max(1, tokens)


def load(folder: str) -> tuple[Any, Any]:
    """The checkpoint's model and tokenizer. The tokenizer asks for trust as well: it reads the configuration."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    return model.eval(), AutoTokenizer.from_pretrained(folder, trust_remote_code=True)


def do(job: dict[str, Any]) -> dict[str, Any]:
    """Load the checkpoint, compute on `ids` (B, T) and continue the prompts."""
    import torch

    torch.set_num_threads(job["threads"])
    model, tokenizer = load(job["folder"])
    loss, checksum = fingerprint(model, torch.tensor(job["ids"]))
    return {
        "class": f"{type(model).__module__}.{type(model).__name__}",
        "saw_ponder_hf": "ponder_hf" in sys.modules,
        "loss": loss,
        "checksum": checksum,
        "texts": continuations(model, tokenizer, job["prompts"], **job["writing"]),
        "drafts": compare_drafts(model, tokenizer, job["prompts"], **job["writing"]),
    }


def main() -> None:
    job = json.loads(sys.stdin.read())
    sys.meta_path.insert(0, NoPonderHf())
    with contextlib.redirect_stdout(sys.stderr):  # whatever libraries print
        answer = do(job)
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
