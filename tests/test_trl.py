"""TRL's SFTTrainer, which takes the loss from `base_model` and the head's weight: it must train on all passes."""

import json
import math
import sys

import prepared
import pytest
import tiny
import torch
from checkpoints import add_tokenizer
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, LoraConfig
from test_experts import plain_model
from transformers import AutoModelForCausalLM, AutoTokenizer
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


# TRL's own command


TEXT = "once upon a time there was one cat"
PAIR = {"prompt": "once upon a time", "chosen": " there was one cat", "rejected": " two dogs sat by the sea"}
LORA = ["--use_peft", "--lora_r", "4", "--lora_target_modules", "q_proj", "v_proj", "--lora_modules_to_save"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A pondering checkpoint whose gate is open, and beside it texts and pairs."""
    folder = tmp_path_factory.mktemp("trl")
    torch.manual_seed(0)
    model = tiny.pondering_model("llama", pondering_steps=2, pondering_gate="zero_init")
    torch.nn.init.constant_(model.pondering_gate.weight, 0.5)
    model.save_pretrained(folder / "model")
    add_tokenizer(folder / "model")
    for name, row in (("sft", {"text": TEXT}), ("dpo", PAIR)):
        (folder / name).mkdir()
        (folder / name / "train.jsonl").write_text(f"{json.dumps(row)}\n" * 2)
    return folder


def trl(command, folder, output, *words):
    """`trl COMMAND` in a process of its own, which has the checkpoint's code only. Returns each step's loss."""
    line = [sys.executable, "-W", "ignore", "-m", "trl.cli.main", command]
    line += ["--model_name_or_path", str(folder / "model"), "--trust_remote_code"]
    line += ["--dataset_name", str(folder / command), "--output_dir", str(output)]
    line += [
        "--per_device_train_batch_size",
        "2",
        "--max_steps",
        "2",
        "--logging_steps",
        "1",
        "--learning_rate",
        "1e-2",
    ]
    line += ["--use_cpu", "--bf16", "False", "--report_to", "none", *words]
    done = prepared.run(line, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    (state,) = output.glob("checkpoint-2/trainer_state.json")
    return [entry["loss"] for entry in json.loads(state.read_text())["log_history"] if "loss" in entry]


def first_loss(command, folder):
    """The loss of the first step, by the model itself."""
    if command == "dpo":
        return math.log(2)  # equal to its reference
    model = PonderingForCausalLM.from_pretrained(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    ids = torch.tensor([tokenizer(TEXT)["input_ids"] + [tokenizer.eos_token_id]])
    loss, plain = (model(ids, labels=ids, pondering_steps=steps).loss.item() for steps in (2, 0))
    assert abs(loss - plain) > 0.01
    return loss


@pytest.mark.slow
@pytest.mark.parametrize(("command", "adapted"), [("sft", False), ("sft", True), ("dpo", False)])
def test_its_own_command_trains_a_pondering_checkpoint(checkpoint, tmp_path, command, adapted):
    output = tmp_path / "trained"
    losses = trl(command, checkpoint, output, *([*LORA, "pondering_gate"] if adapted else []))
    assert losses[0] == pytest.approx(first_loss(command, checkpoint), abs=1e-3)
    assert losses[1] < losses[0]
    before = PonderingForCausalLM.from_pretrained(checkpoint / "model")
    if adapted:
        trained = AutoPeftModelForCausalLM.from_pretrained(output).merge_and_unload()
    else:
        assert json.loads((output / "config.json").read_text())["auto_map"] == before.config.auto_map
        trained = AutoModelForCausalLM.from_pretrained(output)
    assert type(trained) is PonderingForCausalLM
    assert trained.config.pondering_steps == 2
    for part in (
        lambda model: model.pondering_gate.weight,
        lambda model: model.backbone.model.layers[0].self_attn.q_proj.weight,
    ):
        assert (part(trained) - part(before)).abs().max() > 1e-3
    tokenizer = AutoTokenizer.from_pretrained(output)
    prompt = tokenizer("once upon", return_tensors="pt")
    out = trained.generate(**prompt, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    assert (out.pondering_steps_used == 2).all()
