"""Load a pondering checkpoint from its own code, where ponder_hf cannot be imported, and use it.

A program of its own: separate_process.py starts it with a job as JSON on standard input, and it prints its answer as
one line of JSON. So nothing here imports ponder_hf.
"""

import contextlib
import hashlib
import importlib.abc
import json
import sys
from collections.abc import Sequence
from typing import Any


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
    from transformers import set_seed

    texts = []
    for prompt in prompts:
        set_seed(seed)
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
        ids = model.generate(**inputs, **generation)[0, inputs["input_ids"].shape[1] :]
        texts.append(tokenizer.decode(ids, skip_special_tokens=True))
    return texts


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
    }


def main() -> None:
    job = json.loads(sys.stdin.read())
    sys.meta_path.insert(0, NoPonderHf())
    with contextlib.redirect_stdout(sys.stderr):  # whatever libraries print
        answer = do(job)
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
