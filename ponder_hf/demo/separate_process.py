"""Hold a saved checkpoint against the model that was saved: in another process, from the checkpoint's own code."""

import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from .load_and_run import fingerprint


TOLERANCE = 1e-5  # nats per token; the same machine and threads normally give the same bits
_PROGRAM = Path(__file__).with_name("load_and_run.py")


def check_checkpoint(
    folder: str | os.PathLike, model: PreTrainedModel, ids: torch.Tensor, **job: Any
) -> dict[str, Any]:
    """Load the checkpoint `folder` elsewhere and compare it with `model`, which is on the CPU.

    Args:
        ids: (B, T), for the comparison.
        job: what else load_and_run.py needs: prompts, threads, and `writing`, the arguments of `continuations`.

    Returns:
        A dict: `loss` there and `expected_loss` here, whether the logits have the `same_bits`, the `class` that was
        loaded, the `texts` that it wrote, and what `compare_drafts` found, as `drafts`.

    Raises:
        RuntimeError: the checkpoint does not load or is another model than the one saved.
    """
    expected_loss, checksum = fingerprint(model, ids)
    answer = _run({"folder": str(Path(folder).resolve()), "ids": ids.tolist(), **job})
    if answer["saw_ponder_hf"]:
        raise RuntimeError("the process that loads the checkpoint on its own imported ponder_hf")
    both_diverged = math.isnan(answer["loss"]) and math.isnan(expected_loss)
    if not both_diverged and not abs(answer["loss"] - expected_loss) <= TOLERANCE:
        raise RuntimeError(
            f"the saved checkpoint has the loss {answer['loss']:.6f}, the model that was saved {expected_loss:.6f}"
        )
    return {
        "loss": answer["loss"],
        "expected_loss": expected_loss,
        "same_bits": answer["checksum"] == checksum,
        "class": answer["class"],
        "texts": answer["texts"],
        "drafts": answer["drafts"],
    }


def _run(job):
    with tempfile.TemporaryDirectory(prefix="ponder-hf-") as empty_folder:
        environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            # transformers copies a checkpoint's code here before it runs it: no earlier copy may be found instead.
            "HF_MODULES_CACHE": str(Path(empty_folder, "modules")),
        }
        done = subprocess.run(
            [sys.executable, "-c", _PROGRAM.read_text(encoding="utf-8")],
            input=json.dumps(job),
            capture_output=True,
            text=True,
            encoding="utf-8",
            cwd=empty_folder,
            env=environment,
        )
    if done.returncode:
        raise RuntimeError(f"the saved checkpoint does not load in another process: {done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])
