"""Killed, interrupted and resumed training: what stays is whole, and goes on as if nothing had happened."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
import torch
from checkpoints import run
from patience import PATIENCE
from training_runs import assert_same_model, history, train

from ponder_hf.training.checkpoints import checkpoints, clean_up, last_checkpoint, remove_oldest


pytest_plugins = ["training_material"]

# Runs command lines in children of its own and kills each with SIGKILL, as [arguments, moment] says.
KILL = """
import json, os, signal, sys, time
from pathlib import Path
import ponder_hf.training.checkpoints as checkpoints, ponder_hf.training.trainer as trainer
from ponder_hf.cli import main

def kill(*arguments, **settings):
    os.kill(os.getpid(), signal.SIGKILL)

def at_second(function):
    calls = []
    def wrapped(*arguments, **settings):
        calls.append(1)
        return kill() if len(calls) == 2 else function(*arguments, **settings)
    return wrapped

def after(function):
    def wrapped(*arguments, **settings):
        function(*arguments, **settings)
        kill()
    return wrapped

def slowed(function):
    calls = []
    def wrapped(*arguments, **settings):
        calls.append(1)
        time.sleep(0.1)
        if len(calls) == 18:
            signal.pause()
        return function(*arguments, **settings)
    return wrapped

for arguments, moment in json.loads(sys.argv[1]):
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        Trainer = trainer.Trainer
        if moment == "weights written":
            Trainer._save_optimizer_and_scheduler = at_second(Trainer._save_optimizer_and_scheduler)
        elif moment == "before the rename":
            trainer.publish = at_second(trainer.publish)
        elif moment == "while deleting":
            checkpoints.remove = lambda path: (path.rename(path.with_name("_removed-" + path.name)), kill())
        elif moment == "while saving the model":
            checkpoints.os.replace = after(os.replace)
        else:  # so that on no machine, fast or busy, the run is over by then
            Trainer.training_step = slowed(Trainer.training_step)
        main(arguments)
        os._exit(9)
    output = Path(arguments[arguments.index("--output") + 1])
    if isinstance(moment, float):
        while not any(output.glob("checkpoint-*")):
            time.sleep(0.01)
        time.sleep(moment)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (moment, status)
"""
MOMENTS = ["weights written", "before the rename", "while deleting", "while saving the model", 0.15, 0.7]

MAPPED = "--gradient-accumulation-steps 2 --held-out 5".split()
STREAMED = "--streaming --shuffle-buffer 7 --validation other.txt".split()
COMMON = "--max-steps 20 --save-steps 4 --logging-steps 3 --save-total-limit 2 --learning-rate 1e-2".split()


def words(output, *more):
    start = ["train", "dropout", "--data", "text.txt", "--output", output, "--pondering-steps", "1"]
    return [*start, "--block-size", "16", "--per-device-train-batch-size", "2", *COMMON, *more]


def same_state(one, other):
    """Whether two nested structures of tensors are equal in every bit."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same_state(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same_state, one, other))
    return torch.equal(one, other) if torch.is_tensor(one) else one == other


def assert_same_run(one, other):
    assert_same_model(one, other)
    last, other_last = last_checkpoint(one), last_checkpoint(other)
    assert last.name == other_last.name
    assert_same_model(last, other_last)
    assert history(last) == history(other_last)
    for name in ("optimizer.pt", "scheduler.pt"):
        states = [torch.load(folder / name, weights_only=True) for folder in (last, other_last)]
        assert same_state(*states), name


@pytest.mark.slow
@pytest.mark.parametrize("data", [MAPPED, STREAMED], ids=["in memory and accumulated", "streamed"])
def test_killed_at_any_moment_and_resumed_is_bit_identical(folder, data):
    assert run(*words("whole", *data)) == 0
    lines = [(words(f"killed {number}", *data), moment) for number, moment in enumerate(MOMENTS)]
    killer = subprocess.run([sys.executable, "-c", KILL, json.dumps(lines)], capture_output=True, text=True)
    assert killer.returncode == 0, killer.stderr
    for number, moment in enumerate(MOMENTS):
        output = folder / f"killed {number}"
        assert checkpoints(output), moment
        if moment in ("weights written", "before the rename"):
            assert (output / "_partial-checkpoint-8").is_dir()
            assert last_checkpoint(output).name == "checkpoint-4"
        if moment == "while saving the model":
            assert (output / "_partial-model").is_dir()
            assert not (output / "config.json").exists()
        if moment == "while deleting":
            assert (output / "_removed-checkpoint-4").is_dir()
        assert run("train", "--output", output, "--resume", "--disable-tqdm", "true") == 0, moment
        assert not list(output.glob("_*"))
        assert_same_run(folder / "whole", output)


def test_resumed_in_the_second_epoch(folder):
    """The order of the data is another in every epoch, and an epoch's end may fall between two checkpoints."""
    line = "dropout --data other.txt --block-size 16 --pondering-steps 1 --save-steps 3 --num-train-epochs 2".split()
    assert run("train", *line, "--output", "whole") == 0
    names = [path.name for path in checkpoints(folder / "whole")]
    middle = names[1]
    shutil.copytree("whole", "part")
    for path in (folder / "part").iterdir():
        if path.name != middle:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert run("train", "--output", "part", "--resume", f"part/{middle}") == 0
    assert_same_run(folder / "whole", folder / "part")


@pytest.mark.parametrize("source", ["base", "dropout"])
def test_an_adapter_and_a_longer_run_are_resumed(folder, source):
    """GPT-NeoX calls its head otherwise on disk than in memory: it must be read back by its name on disk."""
    settings = ["--lora", "--lora-dropout", "0.1"] if source == "dropout" else []
    line = [source, "--data", "text.txt", "--block-size", "16", "--pondering-steps", "1", "--lr-scheduler-type"]
    line += ["constant", *settings]
    assert run("train", *line, "--output", "whole", "--max-steps", "6") == 0
    assert run("train", *line, "--output", "part", "--max-steps", "3") == 0
    assert run("train", "--output", "part", "--resume", "--max-steps", "6", "--data", "text.txt") == 0
    last = [last_checkpoint(folder / name) for name in ("whole", "part")]
    if settings:
        adapters = [(path / "adapter_model.safetensors").read_bytes() for path in last]
        assert adapters[0] == adapters[1]
    else:
        assert_same_model(*last)


def test_interrupted(folder):
    """Ctrl-C: exit code 130, whole checkpoints, and a line that says how to go on."""
    line = words("out", "--held-out", "5")
    line[line.index("--max-steps") + 1] = "100000"
    program = [sys.executable, "-c", "from ponder_hf.cli import main; raise SystemExit(main())", *line]
    # A test run in the background ignores SIGINT, and its children would, too.
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    running = subprocess.Popen(program, stderr=subprocess.PIPE, text=True, preexec_fn=heed)
    until = time.monotonic() + PATIENCE
    while not (folder / "out/checkpoint-4").exists():
        assert running.poll() is None, running.communicate()[1]
        assert time.monotonic() < until
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    _, errors = running.communicate(timeout=PATIENCE)
    assert running.returncode == 130, errors
    last = last_checkpoint(folder / "out")
    said = f"ponder-hf: interrupted; {last} is whole: `ponder-hf train --output out --resume` goes on from it"
    assert errors.splitlines()[-1] == said
    assert not list((folder / "out").glob("_*"))
    step = int(last.name.rpartition("-")[2])
    assert run("train", "--output", "out", "--resume", "--max-steps", step + 1) == 0


def test_what_a_killed_run_left_is_no_checkpoint(tmp_path):
    for name in ("checkpoint-5", "checkpoint-10", "_partial-checkpoint-15", "_removed-checkpoint-1", "checkpoint-x"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-99").write_text("a file")
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-5", "checkpoint-10"]
    clean_up(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-10", "checkpoint-5", "checkpoint-99", "checkpoint-x"]
    remove_oldest(tmp_path, 1, keep=tmp_path / "checkpoint-5")
    assert len(checkpoints(tmp_path)) == 2
    remove_oldest(tmp_path, 1)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-10"]


def test_a_loss_that_is_no_number_ends_it(folder, capsys):
    """One line that names the step; the checkpoints before it stay, and no later one is written."""
    arguments = ["--max-steps", "9", "--save-steps", "1", "--learning-rate", "1e30", "--max-grad-norm", "0"]
    assert train("out", *arguments, "--warmup-steps", "3") == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("ponder-hf: error: ")
    assert "step" in line
    assert "--learning-rate" in line
    last = last_checkpoint(folder / "out")
    assert last is not None
    assert str(last) in line
    assert not (folder / "out/config.json").exists()
    assert not list((folder / "out").glob("_*"))
    kept = torch.load(last / "optimizer.pt", weights_only=True)
    assert all(state["exp_avg"].isfinite().all() for state in kept["state"].values())


def test_damaged_data_met_while_streaming(folder, capsys):
    text = (folder / "text.txt").read_bytes() * 100  # so much is tokenised before the first step
    (folder / "bad.txt").write_bytes(text + b"\nbad \xff byte\n" + text)
    small = "--pondering-steps 0 --block-size 64 --per-device-train-batch-size 200 --max-grad-norm 0".split()
    settings = ["--streaming", "--max-steps", "500", "--save-steps", "1", "--save-total-limit", "1"]
    assert train("out", *settings, data="bad.txt", small=small) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert all(word in line for word in ("bad.txt", "UTF-8", "line ", "--resume")), line
    assert last_checkpoint(folder / "out") is not None
