"""What the callback logs, against its definition."""

import math

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import ProgressCallback

from ponder_hf import PonderingError
from ponder_hf.callbacks import PonderingCallback, TrainingProgress, pondering_statistics
from ponder_hf.training.trainer import PonderingTrainer


def test_statistics_are_what_they_are_called():
    model = tiny.pondering_model(
        "llama", torch.float64, pondering_steps=2, embedding_scale=2.0, input_scale=3.0, pondering_gate="zero_init"
    )
    torch.nn.init.constant_(model.pondering_gate.weight, 0.5)
    input_ids = tiny.token_ids(2, 9)
    statistics = pondering_statistics(model.train(), input_ids)
    assert model.training
    output = model.eval()(input_ids, labels=input_ids, output_pondering=True)
    for index, logits in enumerate((*output.pondering_logits, output.logits)):
        probabilities = logits.softmax(-1)
        entropy = -(probabilities * probabilities.log()).sum(-1).mean()
        assert statistics[f"pass_{index}_entropy"] == pytest.approx(entropy.item(), rel=1e-5)
        assert statistics[f"pass_{index}_loss"] == pytest.approx(output.pondering_losses[index].item(), rel=1e-6)
    table = model.get_input_embeddings().weight
    added = 0.5 * 2.0 * (output.pondering_logits[0].softmax(-1) @ table)
    token_norm = (2.0 * 3.0 * table[input_ids]).norm(dim=-1).mean()
    assert statistics["step_0_norm_ratio"] == pytest.approx((added.norm(dim=-1).mean() / token_norm).item(), rel=1e-5)
    assert statistics["gate_mean"] == statistics["gate_abs_mean"] == 0.5
    assert len(statistics) == 3 + 3 + 2 + 2


def test_padding_does_not_count():
    model = tiny.pondering_model("llama", torch.float64, pondering_steps=1)
    row = tiny.token_ids(6)
    ids, mask = tiny.left_padded([tiny.token_ids(9), row])
    alone = pondering_statistics(model, row[None])
    padded = pondering_statistics(model, ids[1:], mask[1:], labels=ids[1:].where(mask[1:].bool(), torch.tensor(-100)))
    # The label of the first real token is predicted from padding, which a row alone does not have.
    assert {key: value for key, value in padded.items() if "loss" not in key} == pytest.approx(
        {key: value for key, value in alone.items() if "loss" not in key}, rel=1e-4
    )


def test_it_takes_one_forward_pass_and_changes_no_mode():
    model = tiny.pondering_model("llama", pondering_steps=2).train()
    model.backbone.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    rows_of_logits, calls = [], []
    model.get_output_embeddings().register_forward_hook(lambda _, arguments, output: rows_of_logits.append(output))
    model.backbone.model.register_forward_hook(lambda *_: calls.append(1))
    pondering_statistics(model, tiny.token_ids(3, 9))
    assert len(calls) == 3
    assert [module.training for module in model.modules()] == modes
    assert not any(parameter.grad is not None for parameter in model.parameters())
    assert len(model.backbone.model._forward_hooks) == len(model.get_output_embeddings()._forward_hooks) == 1
    assert not model.backbone.model._forward_pre_hooks


def test_nothing_labelled_is_no_division_by_zero():
    model = tiny.pondering_model("gpt2", pondering_steps=1)
    ids = tiny.token_ids(1, 5)
    assert pondering_statistics(model, ids, labels=torch.full_like(ids, -100))["pass_0_loss"] == 0


def small_trainer(folder, model, trainer_class=Trainer, **settings):
    rows = [{"input_ids": row, "labels": row} for row in tiny.token_ids(8, 12)]
    arguments = TrainingArguments(
        output_dir=str(folder),
        **{
            "max_steps": 4,
            "learning_rate": 1e-2,
            "report_to": [],
            "use_cpu": True,
            "disable_tqdm": True,
            "label_names": ["labels"],
            **settings,
        },
    )
    return trainer_class(model, arguments, train_dataset=rows, eval_dataset=rows)


def test_trainer_logs_them(tmp_path):
    model = tiny.pondering_model("gpt2", pondering_steps=2, pondering_gate="zero_init")
    trainer = small_trainer(tmp_path, model)
    PonderingCallback({"input_ids": tiny.token_ids(2, 12)}, every=2).attach(trainer)
    trainer.train()
    trainer.evaluate()
    logged = [entry for entry in trainer.state.log_history if "pass_0_loss" in entry]
    assert [entry["step"] for entry in logged] == [2, 4, 4]
    assert logged[0]["gate_abs_mean"] > 0
    assert all(math.isfinite(value) for value in logged[-1].values())
    assert {f"pass_{i}_entropy" for i in range(3)} <= set(logged[0])


def test_tensorboard_holds_them(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    model = tiny.pondering_model("gpt2", pondering_steps=1, pondering_gate="zero_init")
    trainer = small_trainer(tmp_path, model, report_to=["tensorboard"], eval_strategy="steps", eval_steps=2)
    PonderingCallback({"input_ids": tiny.token_ids(2, 12)}).attach(trainer)
    trainer.train()
    events = EventAccumulator(str(tmp_path / "events")).Reload()
    logged = [entry for entry in trainer.state.log_history if "pass_0_loss" in entry]
    names = ["gate_abs_mean", "gate_mean", "step_0_norm_ratio"]
    for name in [*names, *(f"pass_{i}_{what}" for i in range(2) for what in ("loss", "entropy"))]:
        scalars = events.Scalars(f"train/{name}")
        assert [scalar.step for scalar in scalars] == [2, 4]
        assert [scalar.value for scalar in scalars] == pytest.approx([entry[name] for entry in logged])


def with_lora(model, **settings):
    targets = {"target_modules": ["c_attn"], "fan_in_fan_out": True, "modules_to_save": ["pondering_gate"]}
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **targets, **settings))


WAYS = {
    "plain": {},
    "bf16": {"bf16": True},
    "gradient checkpointing": {"activation_checkpointing": True},
    "PEFT": {"lora": True},
    "PEFT, bf16 and gradient checkpointing": {"lora": True, "bf16": True, "activation_checkpointing": True},
}


@pytest.mark.parametrize("settings", WAYS.values(), ids=WAYS)
def test_a_run_with_it_ends_bit_for_bit_like_one_without(tmp_path, settings):
    settings = dict(settings)
    lora = settings.pop("lora", False)

    def weights_after(with_callback):
        torch.manual_seed(0)
        changes = {"resid_pdrop": 0.2, "embd_pdrop": 0.2}
        model = tiny.pondering_model("gpt2", base_changes=changes, pondering_steps=2, pondering_gate="zero_init")
        if lora:
            model = with_lora(model, lora_dropout=0.2)
        trainer = small_trainer(tmp_path, model, eval_strategy="steps", eval_steps=3, **settings)
        if with_callback:
            PonderingCallback({"input_ids": tiny.token_ids(2, 12)}, every=1).attach(trainer)
        trainer.train()
        logged = [entry for entry in trainer.state.log_history if "pass_0_loss" in entry]
        assert [entry["step"] for entry in logged] == ([1, 2, 3, 4] if with_callback else [])
        assert all(entry["gate_abs_mean"] > 0 for entry in logged)
        return model.state_dict()

    with_it, without_it = weights_after(True), weights_after(False)
    assert with_it.keys() == without_it.keys()
    assert all(torch.equal(with_it[name], without_it[name]) for name in with_it)


def test_a_wrapped_model_gives_the_numbers_of_the_model():
    model = tiny.pondering_model("gpt2", pondering_steps=2, pondering_gate="zero_init")
    torch.nn.init.constant_(model.pondering_gate.weight, 0.5)
    ids, mask = tiny.left_padded([tiny.token_ids(9), tiny.token_ids(6)])
    expected = pondering_statistics(model, ids, mask)
    adapted = with_lora(model)  # which adds nothing until it is trained
    assert pondering_statistics(adapted, ids, mask) == pytest.approx(expected, rel=1e-5)


def test_without_its_trainer_it_says_so(tmp_path):
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    with pytest.raises(PonderingError, match="attach"):
        Trainer(tiny.pondering_model("gpt2"), arguments, callbacks=[PonderingCallback({})])


@pytest.mark.parametrize("trainer_class", [Trainer, PonderingTrainer])
def test_an_evaluation_has_a_bar_of_its_own(tmp_path, capsys, trainer_class):
    model = tiny.pondering_model("gpt2", pondering_steps=1)
    settings = {"eval_strategy": "steps", "eval_steps": 2, "disable_tqdm": False, "per_device_eval_batch_size": 2}
    trainer = small_trainer(tmp_path, model, trainer_class, **settings)
    trainer.remove_callback(ProgressCallback)
    progress = TrainingProgress(8)
    trainer.add_callback(progress)
    trainer.train()
    progress.close()
    shown = capsys.readouterr().err.replace("\r", "\n").splitlines()
    assert len([line for line in shown if "evaluating:   0%" in line and "0/4" in line]) == 2
    assert progress.evaluation_bar is None
    if trainer_class is PonderingTrainer:  # it is there while the first batch is computed
        seen = []
        model.register_forward_hook(lambda *_: seen.append(progress.evaluation_bar.n))
        trainer.evaluate()
        assert seen == [0, 1, 2, 3]
        trainer.predict(trainer.eval_dataset)
        assert progress.evaluation_bar is None
