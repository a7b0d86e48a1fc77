"""TRL's SFTTrainer, which takes the loss from `base_model` and the head's weight: it must train on all passes."""

import math

import pytest
import tiny
import torch
from checkpoints import add_tokenizer
from datasets import Dataset
from peft import LoraConfig
from test_experts import plain_model
from transformers import AutoTokenizer
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from ponder_hf import PonderingForCausalLM


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


def dpo_trainer(folder, model, **arguments):
    add_tokenizer(folder)
    rows = [{"prompt": "once upon a time", "chosen": " there was one cat", "rejected": " two dogs sat by the sea"}] * 2
    settings = DPOConfig(
        output_dir=str(folder / "out"),
        max_steps=1,
        logging_steps=1,
        bf16=False,
        use_cpu=True,
        disable_tqdm=True,
        report_to=[],
        gradient_checkpointing=None,
        **arguments,
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return DPOTrainer(model, args=settings, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)


def test_the_reference_is_the_checkpoint_with_its_own_steps(tmp_path):
    """TRL loads it by the name of the model: steps that a call of from_pretrained changed must be said to TRL, too."""
    tiny.pondering_model("llama", pondering_steps=2).save_pretrained(tmp_path)
    model = PonderingForCausalLM.from_pretrained(tmp_path, pondering_steps=1)
    assert dpo_trainer(tmp_path, model).ref_model.config.pondering_steps == 2
    trainer = dpo_trainer(tmp_path, model, model_init_kwargs={"pondering_steps": 1})
    assert trainer.ref_model.config.pondering_steps == 1
    trainer.train()
    assert abs(trainer.state.log_history[0]["loss"] - math.log(2)) < 1e-6  # equal to its reference before it learns


def test_a_model_that_was_never_saved_has_no_reference(tmp_path):
    model = tiny.pondering_model("llama", pondering_steps=1)
    assert model.config._name_or_path == model.name_or_path == f"{model.config.name_or_path}" == ""
    with pytest.raises(OSError, match=r"made in memory.*save_pretrained"):
        dpo_trainer(tmp_path, model)
    model.save_pretrained(tmp_path)
    assert "memory" not in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe"])
def test_the_load_balancing_loss_counts(tmp_path, model_type):
    """TRL has one of its own over the router logits of all passes."""
    trainer = sft_trainer(tmp_path, PonderingForCausalLM.from_base(plain_model(model_type), pondering_steps=1))
    batch = next(iter(trainer.get_train_dataloader()))
    output = trainer.model(**batch)
    balance = load_balancing_loss_func(output.router_logits, 4, 2, batch.get("attention_mask"))
    expected = output.loss - 5.0 * output.aux_loss + 5.0 * balance
    torch.testing.assert_close(trainer.compute_loss(trainer.model, dict(batch)), expected, rtol=1e-4, atol=1e-5)
    trainer.train()
