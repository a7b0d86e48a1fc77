"""TRL's SFTTrainer, which takes the loss from `base_model` and the head's weight: it must train on all passes."""

import pytest
import tiny
import torch
from checkpoints import add_tokenizer
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer


def sft_trainer(folder, model, **arguments):
    add_tokenizer(folder)
    rows = [{"prompt": "once upon a time", "completion": f" there was {word}"} for word in ("one cat", "two dogs")]
    settings = SFTConfig(
        output_dir=str(folder / "out"),
        max_steps=3,
        learning_rate=1e-2,
        bf16=False,
        use_cpu=True,
        disable_tqdm=True,
        report_to=[],
        gradient_checkpointing=None,
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return SFTTrainer(model, settings, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, **arguments)


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "gemma2", "granite"])
def test_the_loss_is_that_of_the_last_pass(tmp_path, model_type):
    model = tiny.pondering_model(model_type, pondering_steps=2)
    trainer = sft_trainer(tmp_path, model)
    batch = next(iter(trainer.get_train_dataloader()))
    expected = model(**batch).loss
    plain = model(**batch, pondering_steps=0).loss
    assert abs(expected - plain) > 1e-3
    torch.testing.assert_close(trainer.compute_loss(model, dict(batch)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("adapted", [False, True], ids=["whole", "LoRA"])
def test_it_trains_through_all_passes(tmp_path, adapted):
    model = tiny.pondering_model("gpt2", pondering_steps=2, pondering_gate="zero_init")
    arguments = {}
    if adapted:
        targets = {"target_modules": ["c_attn"], "fan_in_fan_out": True, "modules_to_save": ["pondering_gate"]}
        arguments["peft_config"] = LoraConfig(task_type="CAUSAL_LM", **targets)
    trainer = sft_trainer(tmp_path, model, **arguments)
    before = trainer.evaluate(trainer.train_dataset)["eval_loss"]
    trainer.train()
    assert trainer.evaluate(trainer.train_dataset)["eval_loss"] < before
    assert model.pondering_gate.weight.abs().min() > 0  # only pondering can have moved it
