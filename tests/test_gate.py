"""The gate's own group of parameters: a learning rate of its own, no weight decay, in every kind of training."""

import copy
import json
import re
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from checkpoints import run
from peft import LoraConfig, get_peft_model
from torch import nn
from training_runs import SMALL, assert_same_model, history, train, train_json, weights
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from ponder_hf import PonderingError, PonderingTrainer, separate_gate, train_draft_heads
from ponder_hf.data import Blocks
from ponder_hf.demo import simple_training
from ponder_hf.training.draft_heads import DraftHeadTrainer, freeze_all_but_heads
from ponder_hf.training.gate import GATE_LEARNING_RATE_FACTOR, trained_gate


pytest_plugins = ["training_material"]

RATE = 0.5
NAME = "pondering_gate.weight"


def gated(start=0.5, model_type="llama", **fields):
    """A tiny pondering model whose gate is not at 0, so that decay would act on it."""
    torch.manual_seed(0)
    model = tiny.pondering_model(model_type, pondering_steps=2, pondering_gate="zero_init", **fields).train()
    nn.init.constant_(model.pondering_gate.weight, start)
    return model


def settings(folder, **changes):
    return TrainingArguments(
        **{
            "output_dir": str(folder),
            "max_steps": 1,
            "per_device_train_batch_size": 4,
            "optim": "sgd",
            "learning_rate": RATE,
            "lr_scheduler_type": "constant",
            "weight_decay": 0.1,
            "max_grad_norm": 0.0,
            "logging_steps": 1,
            "save_strategy": "no",
            "disable_tqdm": True,
            "use_cpu": True,
            "report_to": "none",
            "train_sampling_strategy": "sequential",
            **changes,
        }
    )


def rows(number=4):
    return [{"input_ids": row, "labels": row} for row in tiny.token_ids(number, 12)]


def trainer_of(model, folder, trainer_class=PonderingTrainer, number=4, changes=(), **more):
    return trainer_class(model=model, args=settings(folder, **dict(changes)), train_dataset=rows(number), **more)


def gradients_of(model):
    """What the first batch of `rows` gives."""
    ids = tiny.token_ids(4, 12)
    model(input_ids=ids, labels=ids).loss.backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    return found


def test_a_gate_that_is_a_matrix_learns_as_the_rest_unless_a_factor_is_asked_for(tmp_path):
    torch.manual_seed(0)
    model = tiny.pondering_model("llama", pondering_steps=2, pondering_gate="zero_init_matrix").train()
    expected = gradients_of(model)[NAME] * -RATE
    for factor, times in ((None, 1), (3.0, 3)):
        again = copy.deepcopy(model)
        trainer = trainer_of(again, tmp_path / str(factor), gate_learning_rate_factor=factor)
        trainer.train()
        assert len(trainer.optimizer.param_groups) == (2 if factor is None else 3)
        torch.testing.assert_close(again.pondering_gate.weight.detach(), times * expected, rtol=1e-5, atol=1e-8)


def test_signs_learn_as_the_rest_but_do_not_decay(tmp_path):
    torch.manual_seed(0)
    model = tiny.pondering_model("llama", pondering_steps=2, pondering_gate="random_signs").train()
    before = model.pondering_gate.weight.detach().clone()
    expected = before - RATE * gradients_of(model)[NAME]
    trainer_of(model, tmp_path).train()
    torch.testing.assert_close(model.pondering_gate.weight.detach(), expected)
    assert not torch.equal(expected, before)


@pytest.mark.parametrize("factor", [None, 0.25, 7.0])
def test_one_step_moves_the_gate_so_many_times_as_far_and_it_does_not_decay(tmp_path, factor):
    model = gated()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    gradients = gradients_of(model)
    trainer_of(model, tmp_path, gate_learning_rate_factor=factor).train()
    after = dict(model.named_parameters())
    times = GATE_LEARNING_RATE_FACTOR if factor is None else factor
    torch.testing.assert_close(after[NAME], before[NAME] - times * RATE * gradients[NAME])
    matrix = "backbone.model.layers.0.mlp.up_proj.weight"
    torch.testing.assert_close(after[matrix], before[matrix] - RATE * (gradients[matrix] + 0.1 * before[matrix]))


def test_the_groups(tmp_path):
    """Trainer's two, then the gate's with what its group had else."""
    plain = trainer_of(gated(), tmp_path, Trainer, changes={"optim": "adamw_torch"}).create_optimizer()
    model = gated()
    trainer = trainer_of(model, tmp_path, changes={"optim": "adamw_torch"})
    optimizer = trainer.create_optimizer()
    assert len(plain.param_groups) == 2
    decaying, others, gate = optimizer.param_groups
    assert [id(each) for each in gate["params"]] == [id(model.pondering_gate.weight)]
    assert gate["lr"] == GATE_LEARNING_RATE_FACTOR * RATE
    assert gate["weight_decay"] == 0
    for group, before in zip((decaying, others), plain.param_groups, strict=True):
        assert {**group, "params": 0} == {**before, "params": 0}
    assert {key: gate[key] for key in ("betas", "eps", "amsgrad")} == {
        key: decaying[key] for key in ("betas", "eps", "amsgrad")
    }
    all_of_them = [id(each) for group in optimizer.param_groups for each in group["params"]]
    assert sorted(all_of_them) == sorted(map(id, model.parameters()))
    assert trainer.create_optimizer() is optimizer, "a second training goes on with it"
    assert len(optimizer.param_groups) == 3


def test_the_schedule_scales_it_and_both_rates_are_logged(tmp_path):
    changes = {"max_steps": 4, "lr_scheduler_type": "linear", "learning_rate": 0.1}
    trainer = trainer_of(gated(), tmp_path, number=16, changes=changes)
    trainer.train()
    logs = [row for row in trainer.state.log_history if "learning_rate" in row]
    assert [row["learning_rate"] for row in logs] == pytest.approx([0.1, 0.075, 0.05, 0.025])
    assert [row["gate_learning_rate"] for row in logs] == pytest.approx([3.0, 2.25, 1.5, 0.75])
    assert trainer.lr_scheduler.get_last_lr() == [0, 0, 0]
    assert trainer.lr_scheduler.base_lrs == pytest.approx([0.1, 0.1, 3.0])


def test_any_trainer_with_the_function_trains_as_ours_does(tmp_path):
    ours, theirs = gated(), gated()
    changes = {"optim": "adamw_torch", "learning_rate": 1e-2, "max_steps": 3}
    trainer_of(ours, tmp_path, number=12, changes=changes).train()
    trainer = trainer_of(theirs, tmp_path, Trainer, number=12, changes=changes)
    assert separate_gate(trainer.create_optimizer(), theirs) is trainer.optimizer
    trainer.train()
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, theirs.get_parameter(name)), name


def test_the_demos_training(monkeypatch):
    made = []
    create = Trainer.create_scheduler
    monkeypatch.setattr(
        Trainer, "create_scheduler", lambda self, *a, **k: (made.append(self), create(self, *a, **k))[1]
    )
    arguments = {"max_steps": 1, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "use_cpu": True}
    blocks = Blocks(tiny.token_ids(4, 12).int())
    matrix = tiny.pondering_model("llama", pondering_steps=2, pondering_gate="zero_init_matrix")
    for model in (gated(), tiny.base_model(), matrix):
        simple_training.train(model, blocks, **arguments)
    rates = [trainer.lr_scheduler.base_lrs for trainer in made]
    assert rates == [[1e-3, 1e-3, pytest.approx(1e-3 * GATE_LEARNING_RATE_FACTOR)], [1e-3, 1e-3], [1e-3, 1e-3]]


def test_without_a_gate_nothing_changes(tmp_path):
    changes = {"optim": "adamw_torch", "learning_rate": 1e-2, "max_steps": 3}
    trained, logs = [], []
    for trainer_class in (Trainer, PonderingTrainer):
        torch.manual_seed(0)
        model = tiny.pondering_model("llama", pondering_steps=2).train()
        trainer = trainer_of(model, tmp_path, trainer_class, number=12, changes=changes)
        trainer.train()
        assert len(trainer.optimizer.param_groups) == 2
        trained.append(model)
        logs.append(
            [
                {k: v for k, v in row.items() if "runtime" not in k and "per_second" not in k}
                for row in trainer.state.log_history
            ]
        )
    for name, parameter in trained[0].named_parameters():
        assert torch.equal(parameter, trained[1].get_parameter(name)), name
    assert logs[0] == logs[1]


@pytest.mark.parametrize("wrap", ["lora", "compiled", "own code"])
def test_a_gate_within_wrappers_and_in_a_checkpoints_own_code_is_found(tmp_path, wrap):
    model = gated()
    if wrap == "lora":
        lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], modules_to_save=["pondering_gate"])
        model = get_peft_model(model, lora)
        expected = model.get_base_model().pondering_gate.modules_to_save["default"].weight
    elif wrap == "compiled":
        expected = model.pondering_gate.weight
        model = torch.compile(model)
    else:
        model.save_pretrained(tmp_path / "saved")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", trust_remote_code=True)
        expected = model.pondering_gate.weight
    (parameter,) = trained_gate(model).values()
    assert parameter is expected
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = separate_gate(torch.optim.AdamW(learned, lr=0.1), model, 3)
    first, last = optimizer.param_groups
    assert len(first["params"]) == len(learned) - 1
    assert [last["params"][0] is expected, last["lr"], last["weight_decay"]] == [True, pytest.approx(0.3), 0]


def test_an_optimizer_that_was_given_names_keeps_them():
    model = gated()
    optimizer = separate_gate(torch.optim.AdamW(list(model.named_parameters()), lr=0.1), model)
    first, last = optimizer.param_groups
    assert last["param_names"] == [NAME]
    assert all(model.get_parameter(name) is p for name, p in zip(first["param_names"], first["params"], strict=True))


def test_draft_heads_and_a_frozen_gate_have_no_group(tmp_path):
    model = freeze_all_but_heads(gated())
    trainer = trainer_of(model, tmp_path, DraftHeadTrainer)
    assert len(trainer.create_optimizer().param_groups) == 2
    assert trained_gate(model) == {}
    train_draft_heads(gated(), tiny.token_ids(4, 12), steps=1)
    model = gated()
    trainer = trainer_of(model, tmp_path)
    model.pondering_gate.requires_grad_(False)
    assert len(trainer.create_optimizer().param_groups) == 2


class Lomo(torch.optim.SGD):
    """Has groups, as LOMO does, which steps without them."""


class LayerWise(torch.optim.SGD):
    """Holds a parameter of nobody's, as Trainer's optimiser for layer-wise ones does."""

    def __init__(self, parameters, **settings):
        super().__init__([torch.zeros(1)], **settings)


class DummyOptim:
    """What accelerate makes where DeepSpeed's configuration has an optimiser."""

    def __init__(self, parameters, **settings):
        self.params = parameters


@pytest.mark.parametrize("kind", [Lomo, LayerWise, DummyOptim])
def test_an_optimizer_without_a_group_for_it_is_refused_by_name(tmp_path, kind):
    model = gated()
    with pytest.raises(PonderingError, match=f"optimizer {kind.__name__} has no group"):
        separate_gate(kind(model.parameters(), lr=0.1), model)
    trainer = trainer_of(model, tmp_path)
    trainer.optimizer = kind(model.parameters(), lr=0.1)  # where Trainer has it before the groups are made
    with pytest.raises(PonderingError, match=f"optimizer {kind.__name__} has no group"):
        trainer.create_optimizer()


def test_what_separate_gate_refuses(tmp_path):
    model = gated()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for factor in (0, -1, float("inf"), float("nan")):
        with pytest.raises(PonderingError, match="gate_learning_rate_factor"):
            separate_gate(optimizer, model, factor)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    with pytest.raises(PonderingError, match="schedule"):
        separate_gate(optimizer, model)
    optimizer = separate_gate(torch.optim.SGD(model.parameters(), lr=0.1), model)
    with pytest.raises(PonderingError, match="already"):
        separate_gate(optimizer, model)
    ungated = tiny.pondering_model("llama")
    with pytest.raises(PonderingError, match="no gate that learns"):
        separate_gate(torch.optim.SGD(ungated.parameters(), lr=0.1), ungated)
    with pytest.raises(PonderingError, match="leave it out"):
        trainer_of(ungated, tmp_path, gate_learning_rate_factor=3.0)


def test_an_optimizer_that_is_passed_stays_as_it_is(tmp_path):
    model = gated()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    trainer = trainer_of(model, tmp_path, optimizers=(optimizer, None))
    trainer.train()
    assert len(optimizer.param_groups) == 1


# The command line

GATE = ["--pondering-gate", "zero_init"]


def record(checkpoint):
    return json.loads((Path(checkpoint) / "ponder_training.json").read_text())["options"]["gate_learning_rate_factor"]


def test_the_flag_and_the_record_and_resume_is_bit_identical(folder, capsys):
    settings = [*GATE, "--gate-learning-rate-factor", "4", "--save-steps", "3", "--learning-rate", "1e-2"]
    settings += ["--logging-steps", "1", "--lr-scheduler-type", "constant", "--max-steps"]
    train_json(capsys, "whole", *settings, "6")
    train_json(capsys, "part", *settings, "3")
    assert run("train", "--output", "part", "--resume", "--max-steps", "6") == 0
    assert_same_model(folder / "whole", folder / "part")
    assert history(folder / "whole/checkpoint-6") == history(folder / "part/checkpoint-6")
    assert record("whole/checkpoint-3") == record("part/checkpoint-6") == 4
    states = [torch.load(folder / name / "checkpoint-6/optimizer.pt", weights_only=True) for name in ("whole", "part")]
    for state in states:
        assert [group["lr"] for group in state["param_groups"]] == pytest.approx([1e-2, 1e-2, 4e-2])
    assert all(row["gate_learning_rate"] == pytest.approx(4e-2) for row in history(folder / "part/checkpoint-6")[:6])
    train_json(capsys, "usual", *GATE, "--max-steps", "3")
    assert record("usual/checkpoint-3") == GATE_LEARNING_RATE_FACTOR
    assert not torch.equal(weights(folder / "usual")[NAME], weights(folder / "whole/checkpoint-3")[NAME])
    train_json(capsys, "none", "--max-steps", "1")
    assert record("none/checkpoint-1") is None


def test_an_adapter_trains_its_gate_at_its_own_rate_and_is_resumed(folder, capsys):
    settings = ["--lora", *GATE, "--lr-scheduler-type", "constant", "--max-steps"]
    train_json(capsys, "whole", *settings, "4")
    train_json(capsys, "part", *settings, "2")
    assert run("train", "--output", "part", "--resume", "--max-steps", "4") == 0
    adapters = [(folder / name / "checkpoint-4/adapter_model.safetensors").read_bytes() for name in ("whole", "part")]
    assert adapters[0] == adapters[1]
    *_, last = torch.load(folder / "part/checkpoint-4/optimizer.pt", weights_only=True)["param_groups"]
    assert last["lr"] == pytest.approx(2e-4 * GATE_LEARNING_RATE_FACTOR)
    assert len(last["params"]) == 1


def refused(capsys, *line, words):
    capsys.readouterr()
    assert run("train", *line) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert [word for word in words if word not in message] == [], message


def test_what_the_command_refuses(folder, capsys):
    start = ["base", "--data", "text.txt", "--output", "out", *SMALL]
    flag = "--gate-learning-rate-factor"
    refused(capsys, *start, flag, "3", words=[flag, "base does not have", "--pondering-gate"])
    for value in ("0", "-1", "nan", "inf"):
        refused(capsys, *start, *GATE, f"{flag}={value}", words=[flag, "> 0 and finite", value])
    refused(capsys, *start, *GATE, "--draft-heads", flag, "3", words=["--draft-heads", f"leave out {flag}"])
    for name in ("lomo", "galore_adamw_layerwise"):
        refused(capsys, *start, *GATE, "--optim", name, words=[f"optimizer {name}", "--optim"])
    assert not (folder / "out").exists()
    assert train("out", *GATE, "--max-steps", "1") == 0
    resume = ["--output", "out", "--resume", "--max-steps", "2"]
    refused(capsys, *resume, flag, "3", words=[f"{flag} is 3.0", f"made with {GATE_LEARNING_RATE_FACTOR}"])
    assert run("train", *resume, flag, GATE_LEARNING_RATE_FACTOR) == 0


def test_a_checkpoint_in_which_the_gate_has_no_group_is_refused(folder, capsys, tmp_path):
    """Of a run by an earlier state of this package, and of a plain Trainer."""
    assert train("out", *GATE, "--max-steps", "1", "--gate-learning-rate-factor", "3") == 0
    checkpoint = folder / "out/checkpoint-1"
    state = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    first, second, gate = state["param_groups"]
    state["param_groups"] = [{**first, "params": [*first["params"], *gate["params"]]}, second]
    torch.save(state, checkpoint / "optimizer.pt")
    stored = json.loads((checkpoint / "ponder_training.json").read_text())
    del stored["options"]["gate_learning_rate_factor"]
    (checkpoint / "ponder_training.json").write_text(json.dumps(stored))
    resume = ["--output", "out", "--resume", "--max-steps", "2"]
    refused(capsys, *resume, words=["checkpoint-1 cannot be resumed", "learning rate of its own", "as SOURCE"])
    shutil.rmtree(folder / "out")
    plain = trainer_of(gated(), tmp_path / "plain", Trainer, changes={"save_strategy": "steps", "save_steps": 1})
    plain.train()
    trainer = trainer_of(gated(), tmp_path / "ours", changes={"max_steps": 2})
    with pytest.raises(PonderingError, match="cannot be resumed"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "plain/checkpoint-1"))


def test_the_help_and_the_page_name_the_default(capsys):
    assert run("train", "--help") == 0
    help_text = " ".join(capsys.readouterr().out.split())
    assert f"of the gate to the model. Default: {GATE_LEARNING_RATE_FACTOR:g} for zero_init," in help_text
    page = (Path(__file__).parents[1] / "docs/training.md").read_text(encoding="utf-8")
    assert re.findall(r"gate_learning_rate_factor` \| (\S+);", page) == [f"{GATE_LEARNING_RATE_FACTOR:g}"]
