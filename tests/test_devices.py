"""Devices: which one a command runs on, and examples that work wherever Trainer has moved the model."""

import json
import re
import sys
from pathlib import Path

import checkpoints
import prepared
import pytest
import torch

from ponder_hf import PonderingError, devices
from ponder_hf.cli import main


REPOSITORY = Path(__file__).resolve().parents[1]


class Accelerator:
    """torch.accelerator of a machine that has this device, or none."""

    def __init__(self, name):
        self.name = name

    def is_available(self):
        return self.name is not None

    def current_accelerator(self):
        return None if self.name is None else torch.device(self.name)


@pytest.mark.parametrize("name", ["cuda", "mps", "xpu"])
def test_the_default_is_the_accelerator_that_torch_finds(name, monkeypatch):
    monkeypatch.setattr(torch, "accelerator", Accelerator(name))
    assert devices.default_device() == torch.device(name)
    monkeypatch.setattr(torch, "accelerator", Accelerator(None))
    assert devices.default_device() == torch.device("cpu")


@pytest.mark.parametrize("name", ["cuda", "mps", "xpu"])
def test_before_torch_accelerator_each_kind_is_asked(name, monkeypatch):
    monkeypatch.delattr(torch, "accelerator", raising=False)
    for kind in ("cuda", "xpu", "mps"):
        monkeypatch.setattr(getattr(torch, kind), "is_available", lambda kind=kind: kind == name)
    assert devices.default_device() == torch.device(name)


def test_a_device_that_is_named_is_tried():
    assert devices.read_device("cpu") == torch.device("cpu")
    for name in ("nonsense", "meta", "hpu:7"):
        with pytest.raises(PonderingError, match=rf"the device '{name}' cannot be used \(.+\): this machine has cpu"):
            devices.read_device(name)


def test_trainer_trains_on_the_first_accelerator_only(monkeypatch):
    monkeypatch.setattr(devices, "read_device", torch.device)
    monkeypatch.setattr(devices, "default_device", lambda: torch.device("cuda"))
    assert devices.training_device("cuda") == torch.device("cuda")
    assert devices.training_device("cuda:0") == torch.device("cuda:0")
    assert devices.training_device("cpu") == torch.device("cpu")
    with pytest.raises(PonderingError, match="set CUDA_VISIBLE_DEVICES=1"):
        devices.training_device("cuda:1")
    with pytest.raises(PonderingError, match="leave out `device`"):
        devices.training_device("mps")


COMMANDS = {
    "generate": ["SOURCE", "--prompt", "once"],
    "eval": ["SOURCE", "--data", "TEXT"],
    "train": ["SOURCE", "--data", "TEXT", "--output", "OUT"],
    "demo": ["--output", "OUT"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_wrong_device_is_one_line_and_nothing_is_written(command, tmp_path, capsys):
    named = {"SOURCE": tmp_path / "source", "TEXT": tmp_path / "text.txt", "OUT": tmp_path / "out"}
    named["TEXT"].write_text("once upon a time " * 50, encoding="utf-8")
    checkpoints.save_base(named["SOURCE"], tokenizer=True)
    capsys.readouterr()
    words = [str(named.get(word, word)) for word in COMMANDS[command]]
    assert main([command, *words, "--device", "nonsense"]) == 2
    error = capsys.readouterr().err
    assert "ponder-hf: error: the device 'nonsense' cannot be used" in error
    assert error.count("\n") == 1
    assert not named["OUT"].exists()


def test_the_device_of_a_command_line_reaches_trainer(tmp_path, monkeypatch):
    from ponder_hf.cli import train as command
    from ponder_hf.training import run as training

    asked = []
    monkeypatch.setattr(training, "train", lambda options: asked.append(options) or {})
    monkeypatch.setattr(command, "_tell", lambda *_: None)
    for flags in (["--device", "cpu"], []):
        assert main(["train", "somewhere", "--data", "x", "--output", str(tmp_path / "out"), *flags]) == 0
    assert [options.arguments.get("use_cpu") for options in asked] == [True, None]


def test_every_example_moves_its_prompt_to_the_model():
    """A model that Trainer has trained lies on the accelerator."""
    files = [REPOSITORY / "README.md", *(REPOSITORY / "docs").glob("*.md"), *(REPOSITORY / "examples").glob("*.py")]
    files += [path for path in (REPOSITORY / "ponder_hf").rglob("*") if path.suffix in (".py", ".md")]
    seen = 0
    for path in files:
        if path.name == "log.md":
            continue
        text = path.read_text(encoding="utf-8")
        for found in re.finditer(r'return_tensors="pt"', text):
            seen += 1
            assert re.search(r"\.to\(\w+\.device\)", text[found.end() : found.end() + 900]), path
    assert seen >= 4


@pytest.fixture(scope="module")
def pretended():
    """What happened on two GPUs that are not there: see pretended_runs.py."""
    pytest.importorskip("accelerate", reason="needs ponder-hf[train]")
    if not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("devices that are written in Python need torch 2.9 or newer")
    tests = Path(__file__).resolve().parent
    done = prepared.run([sys.executable, tests / "pretended_runs.py"])
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_layers_head_and_gate_on_several_devices(pretended):
    """As a device_map spreads them: converting, generating and training mix no devices, and give the same."""
    found = pretended["two devices"]
    assert len(found) == 20
    assert {name: outcome for name, outcome in found.items() if outcome != "ok"} == {}


@pytest.mark.slow
def test_a_tick_waits_for_the_device_once_more_than_a_plain_token_at_most(pretended):
    """What moves a number to the host waits for the device; exits ask once a pass who goes on."""
    waits = pretended["waits"]
    passes_that_may_exit = 2
    assert waits["plain"] == waits["cached"] == 1
    for name in ("drafts", "drafts by heads", "drafts by prompt lookup"):
        assert waits[name] <= waits["plain"] + 1, waits
    for name in ("exits", "exits by argmax"):
        assert waits[name] <= waits["plain"] + passes_that_may_exit, waits
    # transformers looks once a pass whether the positions are those of packed texts, as it does for the plain model.
    assert waits["training step"] <= passes_that_may_exit + 1
