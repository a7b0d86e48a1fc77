"""Trainer's label smoothing shifts the labels of a pondering model as of any causal language model."""

import elsewhere
import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional
from transformers import Trainer, TrainingArguments

from ponder_hf import PonderingForCausalLM


FACTOR = 0.1

ELSEWHERE = """
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

folder, output, expected = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
row = torch.arange(3, 14)
arguments = TrainingArguments(output, report_to=[], use_cpu=True, label_smoothing_factor=0.1, disable_tqdm=True)
found = Trainer(model, arguments, eval_dataset=[{"input_ids": row, "labels": row}] * 2).evaluate()["eval_loss"]
assert abs(found - float(expected)) < 1e-4, (found, expected)
"""


def smoothed(logits, labels):
    """Next-token cross-entropy against labels that are mixed with the uniform distribution."""
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), label_smoothing=FACTOR)


def trainer(folder, model, rows):
    arguments = TrainingArguments(
        str(folder), report_to=[], use_cpu=True, label_smoothing_factor=FACTOR, disable_tqdm=True, max_steps=1
    )
    rows = [{"input_ids": row, "labels": row} for row in rows]
    return Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)


class FSDPPonderingForCausalLM(PonderingForCausalLM):
    """What FSDP2 makes of the class."""


@pytest.mark.parametrize("change", ["plain", "adapter", "FSDP2"])
def test_the_loss_is_that_of_the_next_tokens(tmp_path, change):
    rows = tiny.token_ids(4, 11)
    model = tiny.pondering_model("llama", pondering_steps=2)
    expected = smoothed(model(rows).logits, rows)
    if change == "adapter":
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
    if change == "FSDP2":
        model.__class__ = FSDPPonderingForCausalLM
    made = trainer(tmp_path, model, rows)
    assert abs(made.evaluate()["eval_loss"] - expected.item()) < 1e-4
    model.train()
    loss = made.compute_loss(model, {"input_ids": rows, "labels": rows})
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert loss.requires_grad


def test_where_ponder_hf_is_not(tmp_path):
    model = tiny.pondering_model("llama", pondering_steps=1)
    model.save_pretrained(tmp_path / "checkpoint")
    row = torch.arange(3, 14)[None]
    expected = smoothed(model(row).logits, row).item()
    elsewhere.run(ELSEWHERE, tmp_path / "home", tmp_path / "checkpoint", tmp_path / "out", expected)
