"""One process of a distributed training run: `python -m torch.distributed.run ... distributed_worker.py CASES.json`.

The file lists cases. Each trains one tiny model by transformers' Trainer and writes what it saw into its own folder.
Called by the tests' own process, `run_case` is the single process that the others are held against.
"""

import json
import sys
import traceback
from pathlib import Path

import tiny
import torch
from accelerate.state import AcceleratorState, DistributedType, PartialState
from transformers import Trainer, TrainerCallback, TrainingArguments

from ponder_hf import PonderingForCausalLM, PonderingTrainer


ROWS, TOKENS = 24, 12
STEPS = 3


def training_rows():
    """Rows of equal length whose labels leave out a different number of tokens each: means of means would be wrong."""
    rows = []
    for index, row in enumerate(tiny.token_ids(ROWS, TOKENS)):
        labels = row.clone()
        labels[: (index * 5) % 9] = -100
        rows.append({"input_ids": row, "labels": labels})
    return rows


class Watch(TrainerCallback):
    """Notes the loss and gradient norm of each step."""

    def __init__(self):
        self.losses, self.norms = [], []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.losses.append(logs["loss"])
            self.norms.append(logs["grad_norm"])


def allow_fsdp_on_cpu():
    """accelerate shards on accelerators only, and trains with DDP on a CPU without a word: take that one check out."""
    initialise = AcceleratorState.__init__

    def with_fsdp(self, *args, fsdp_plugin=None, **kwargs):
        initialise(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = fsdp_plugin
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = with_fsdp


def build_model(case):
    """The case's model, the same in every process and every launch."""
    torch.manual_seed(0)
    base = tiny.base_model(case["model_type"], getattr(torch, case.get("dtype", "float64")))
    model = PonderingForCausalLM.from_base(base, **case["fields"])
    if model.pondering_gate is not None:  # at 0 nothing of pondering would reach the loss
        torch.nn.init.constant_(model.pondering_gate.weight, 0.5)
    if case.get("plain"):  # a hook before the head: its weight may not be there, so nothing reads it
        model.get_output_embeddings().register_forward_pre_hook(lambda module, arguments: None)
    return model


def run_case(case, processes):
    """Train one case and save it; process 0 returns what it saw."""
    folder = Path(case["folder"])
    model = build_model(case)
    arguments = TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        per_device_train_batch_size=4 // processes,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        disable_tqdm=True,
        report_to="none",
        train_sampling_strategy="sequential",
        **{"max_steps": STEPS, "save_strategy": "no", **case.get("arguments", {})},
    )
    watch = Watch()
    given = {"train_dataset": training_rows(), "callbacks": [watch]}
    if case.get("gate_rate") or case.get("sampled_steps"):
        trainer = PonderingTrainer(model, arguments, sampled_steps=case.get("sampled_steps"), **given)
    else:
        trainer = Trainer(model, arguments, **given)
    kernels, ponder = set(), PonderingForCausalLM.ponder

    # Asked within the passes, where sharded weights are gathered if ever.
    def watched(self, *args, **kwargs):
        kernels.add(self.pondering_kernel)
        return ponder(self, *args, **kwargs)

    PonderingForCausalLM.ponder = watched
    try:
        trainer.train(resume_from_checkpoint=case.get("resume"))
    finally:
        PonderingForCausalLM.ponder = ponder
    trainer.save_model(str(folder / "final"))
    return {
        "losses": watch.losses,
        "norms": watch.norms,
        "kernels": sorted(kernels),
        "rates": [group["lr"] for group in trainer.optimizer.param_groups],
        "wrapped": type(trainer.model_wrapped).__name__,
    }


def main(path):
    torch.set_num_threads(1)
    allow_fsdp_on_cpu()
    for case in json.loads(Path(path).read_text()):
        try:
            result = run_case(case, 2)
        except Exception:  # the other cases still run, and the test shows this one's traceback
            result = {"error": traceback.format_exc()}
        if PartialState().is_main_process or "error" in result:
            Path(case["folder"]).mkdir(parents=True, exist_ok=True)
            (Path(case["folder"]) / "result.json").write_text(json.dumps(result))
    torch.distributed.destroy_process_group()  # or one end in three is an abort, on a busy machine


if __name__ == "__main__":
    main(sys.argv[1])
