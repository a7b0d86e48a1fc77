"""Trainer's label smoothing shifts the labels of a pondering model as of any causal language model."""

import elsewhere
import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional
from transformers import Trainer, TrainingArguments

from ponder_hf import PonderingError, PonderingForCausalLM
from ponder_hf.training.trainer import PonderingTrainer


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


def trainer(folder, model, rows, trainer_class=Trainer):
    arguments = TrainingArguments(
        str(folder), report_to=[], use_cpu=True, label_smoothing_factor=FACTOR, disable_tqdm=True, max_steps=1
    )
    rows = [{"input_ids": row, "labels": row} for row in rows]
    return trainer_class(model=model, args=arguments, train_dataset=rows, eval_dataset=rows)


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


def test_the_losses_of_the_passes_stand_beside_it(tmp_path):
    rows = tiny.token_ids(4, 11)
    model = tiny.pondering_model("llama", pondering_steps=2)
    passes = model(rows, labels=rows, output_pondering=True).pondering_losses
    found = trainer(tmp_path, model, rows, PonderingTrainer).evaluate()
    assert abs(found["eval_loss"] - smoothed(model(rows).logits, rows).item()) < 1e-4
    for index, loss in enumerate(passes):
        assert abs(found[f"eval_pass_{index}_loss"] - loss.item()) < 1e-4
    model.config.intermediate_loss_weight = 0.5
    with pytest.raises(PonderingError, match="label_smoothing_factor goes with the logits of the last pass alone"):
        trainer(tmp_path, model, rows, PonderingTrainer)


def test_where_ponder_hf_is_not(tmp_path):
    model = tiny.pondering_model("llama", pondering_steps=1)
    model.save_pretrained(tmp_path / "checkpoint")
    row = torch.arange(3, 14)[None]
    expected = smoothed(model(row).logits, row).item()
    elsewhere.run(ELSEWHERE, tmp_path / "home", tmp_path / "checkpoint", tmp_path / "out", expected)
