"""S drawn for each training step: by which rules, in every kind of training, and what cannot be honoured."""

import json
import shutil
from collections import Counter

import pytest
import tiny
import torch
from checkpoints import run
from torch import nn
from training_runs import assert_same_model, history, train, train_json, weights
from transformers import Trainer, TrainingArguments

from ponder_hf import PonderingError, PonderingTrainer
from ponder_hf.training.sampled_steps import check_rule_of_model, steps_at


pytest_plugins = ["training_material"]

WEIGHTS = [0.0, 1.0, 2.0]


# Rules


@pytest.mark.parametrize(
    ("most", "num_steps", "expected"),
    [(3, 6, [1, 1, 2, 2, 3, 3]), (2, 5, [1, 1, 1, 2, 2]), (1, 3, [1, 1, 1]), (3, 2, [1, 2]), (3, 0, [])],
)
def test_growing_takes_each_for_an_equal_part(most, num_steps, expected):
    assert [steps_at("growing", most, 7, step, num_steps) for step in range(num_steps)] == expected
    assert steps_at("growing", most, 7, num_steps + 5, num_steps) == most


def test_weights_are_shares():
    drawn = Counter(steps_at([0.0, 1.0, 0.0, 3.0], 3, 5, step, 4000) for step in range(4000))
    assert set(drawn) == {1, 3}
    assert drawn[3] / 4000 == pytest.approx(0.75, abs=0.03)


def test_draws_follow_from_seed_and_step_alone():
    one, again, other = ([steps_at([1, 1, 1], 2, seed, step, 50) for step in range(50)] for seed in (3, 3, 4))
    torch.rand(3)
    assert one == again
    assert one != other
    assert steps_at([1, 1, 1], 2, 3, 20, 50) == steps_at([1, 1, 1], 2, 3, 20, 999) == one[20]


@pytest.mark.parametrize(
    ("rule", "fields", "message"),
    [
        ("shrinking", {}, "must be \"growing\" or the weights of S = 0, 1, ..., got 'shrinking'"),
        ([1, "a"], {}, 'must be "growing" or the weights'),
        ([True, False, True], {}, 'must be "growing" or the weights'),
        ([1, -1, 1], {}, "finite and >= 0, one of them > 0, got 1 -1 1"),
        ([0, 0, 0], {}, "one of them > 0"),
        ([0, float("nan"), 1], {}, "finite"),
        ([], {}, "one of them > 0"),
        ([1, 1], {}, r"weights of S = 0 \.\. 1, and the model has S = 2: give 3 weights"),
        ([0, 0, 0, 1], {}, r"weights of S = 0 \.\. 3, and the model has S = 2"),
        ([1, 1, 1], {"pondering_gate": "zero_init"}, "draws S = 0, where the gate learns nothing"),
        ("growing", {"pondering_steps": 0}, "this one has S = 0"),
    ],
)
def test_what_a_model_cannot_follow_is_refused(tmp_path, rule, fields, message):
    model = tiny.pondering_model("llama", **{"pondering_steps": 2, **fields})
    with pytest.raises(PonderingError, match=message):
        check_rule_of_model(rule, model.config)
    with pytest.raises(PonderingError, match=message):
        trainer_of(model, tmp_path, sampled_steps=rule)


# Trainer


def settings(folder, **changes):
    values = {
        "output_dir": str(folder),
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "report_to": "none",
        "train_sampling_strategy": "sequential",
    }
    return TrainingArguments(**{**values, **changes})


def trainer_of(model, folder, changes=(), **more):
    rows = [{"input_ids": row, "labels": row} for row in tiny.token_ids(24, 12)]
    return PonderingTrainer(model=model, args=settings(folder, **dict(changes)), train_dataset=rows, **more)


def model_of(**fields):
    torch.manual_seed(0)
    return tiny.pondering_model("llama", **{"pondering_steps": 2, **fields}).train()


def watch(monkeypatch):
    """A list that gets S of every training pass through the model."""
    seen = []
    plain = Trainer.compute_loss

    def watched(self, model, inputs, *args, **kwargs):
        if model.training:
            seen.append(inputs.get("pondering_steps"))
        return plain(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(Trainer, "compute_loss", watched)
    return seen


@pytest.mark.parametrize("rule", ["growing", WEIGHTS])
def test_each_step_is_trained_with_its_own_steps(tmp_path, rule):
    """Held against a loop of ten lines."""
    model, plain = model_of(), model_of()
    trainer_of(model, tmp_path, {"optim": "sgd", "lr_scheduler_type": "constant"}, sampled_steps=rule).train()
    ids = tiny.token_ids(24, 12)
    for step in range(6):
        num_steps = steps_at(rule, 2, 42, step, 6)
        batch = ids[2 * step : 2 * step + 2]
        plain(input_ids=batch, labels=batch, pondering_steps=num_steps).loss.backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        with torch.no_grad():
            for parameter in plain.parameters():
                parameter -= 1e-2 * parameter.grad
        plain.zero_grad()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, plain.get_parameter(name), rtol=1e-4, atol=1e-6)


def test_all_batches_of_a_step_draw_alike_and_it_is_logged(tmp_path, monkeypatch):
    seen = watch(monkeypatch)
    trainer = trainer_of(model_of(), tmp_path, {"gradient_accumulation_steps": 2}, sampled_steps=[1.0, 1.0, 1.0])
    trainer.train()
    drawn = [steps_at([1, 1, 1], 2, 42, step, 6) for step in range(6)]
    assert len(set(drawn)) > 1
    assert seen == [steps for steps in drawn for _ in range(2)]
    assert [row["training_pondering_steps"] for row in trainer.state.log_history if "loss" in row] == drawn


def test_evaluation_has_the_steps_of_the_model(tmp_path):
    trainer = trainer_of(model_of(), tmp_path, sampled_steps="growing")
    metrics = trainer.evaluate(trainer.train_dataset)
    assert [name for name in metrics if name.endswith("_loss") and "pass" in name] == [
        f"eval_pass_{index}_loss" for index in range(3)
    ]


def test_without_a_rule_nothing_changes(tmp_path, monkeypatch):
    seen = watch(monkeypatch)
    trainer = trainer_of(model_of(), tmp_path)
    trainer.train()
    assert set(seen) == {None}
    assert not any("training_pondering_steps" in row for row in trainer.state.log_history)


# The command line


def test_a_resumed_run_draws_what_an_unbroken_one_does(folder, tmp_path, capsys):
    words = "--max-steps 6 --save-steps 3 --logging-steps 1 --sampled-steps 0 1 2".split()
    result = train_json(capsys, tmp_path / "whole", *words)
    assert result["sampled_steps"] == [0.0, 1.0, 2.0]
    shutil.copytree(tmp_path / "whole", tmp_path / "broken")
    for path in (tmp_path / "broken").iterdir():
        if path.name != "checkpoint-3":
            path.unlink() if path.is_file() else shutil.rmtree(path)
    assert run("train", "--output", tmp_path / "broken", "--resume") == 0, capsys.readouterr().err
    assert_same_model(tmp_path / "whole", tmp_path / "broken")
    assert history(tmp_path / "whole/checkpoint-6") == history(tmp_path / "broken/checkpoint-6")
    logged = [
        row.get("training_pondering_steps") for row in history(tmp_path / "broken/checkpoint-6") if "loss" in row
    ]
    assert logged == [steps_at(WEIGHTS, 2, 42, step, 6) for step in range(6)]
    for path in ("broken/README.md", "broken/checkpoint-6/README.md"):
        card = (tmp_path / path).read_text(encoding="utf-8")
        assert "| pondering steps in training | drawn from 0, 1, ... with the weights 0, 1, 2 |" in card
    record = json.loads((tmp_path / "broken/checkpoint-6/ponder_training.json").read_text())
    assert record["options"]["sampled_steps"] == [0.0, 1.0, 2.0]
    capsys.readouterr()
    assert run("train", "--output", tmp_path / "broken", "--resume", "--sampled-steps", "growing") == 2
    assert "--sampled-steps is growing, but" in capsys.readouterr().err


def test_growing_from_a_file_of_arguments_with_a_gate(folder, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text("sampled_steps: growing\npondering_gate: zero_init\n")
    words = ["--max-steps", "4", "--logging-steps", "1", "--arguments", tmp_path / "run.yaml"]
    assert train_json(capsys, tmp_path / "out", *words)["sampled_steps"] == "growing"
    assert "| pondering steps in training | growing |" in (tmp_path / "out/README.md").read_text(encoding="utf-8")
    assert weights(tmp_path / "out")["pondering_gate.weight"].any()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sampled-steps", "often"], "--sampled-steps must be"),
        (["--sampled-steps", "1", "1"], "the model has S = 2: give 3 weights"),
        (["--sampled-steps", "1", "1", "1", "--pondering-gate", "zero_init"], "give S = 0 the weight 0"),
        (["--sampled-steps", "growing", "--draft-heads"], "leave out --sampled-steps"),
    ],
)
def test_bad_rules_are_one_line_and_write_nothing(folder, tmp_path, capsys, words, message):
    assert train(tmp_path / "out", "--max-steps", "1", *words) == 2
    errors = capsys.readouterr().err
    assert errors.splitlines()[-1].startswith("ponder-hf: error: ")
    assert message in errors
    assert not (tmp_path / "out").exists()
