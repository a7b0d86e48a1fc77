"""`ponder-hf train` as people use it: from a base, a checkpoint or from scratch, with adapters, and evaluated."""

import json
import sys
from pathlib import Path

import prepared
import pytest
import tiny
import torch
from checkpoints import run
from elsewhere import WITHOUT_PONDER_HF
from training_runs import SMALL, assert_same_model, train, train_json, weights
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from ponder_hf import PonderingForCausalLM
from ponder_hf.cli import build_parser
from ponder_hf.evaluation import evaluate_passes
from ponder_hf.training.options import TrainOptions
from ponder_hf.training.plan import load_training_data


pytest_plugins = ["training_material"]

# Loads folders by AutoModelForCausalLM and prints the loss of each; arguments: the folders.
LOAD = """
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ids = torch.arange(4, 14)[None]
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="auto")
    AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    print(model(ids, labels=ids).loss.item())
"""


def losses_elsewhere(*folders):
    """The losses of saved models in a process that cannot import ponder_hf."""
    program = [sys.executable, "-c", WITHOUT_PONDER_HF + LOAD, *map(str, folders)]
    done = prepared.run(program)
    assert done.returncode == 0, done.stderr
    return [float(line) for line in done.stdout.split()]


def loss_here(model):
    ids = torch.arange(4, 14)[None]
    return model.eval()(ids, labels=ids).loss.item()


def test_from_a_plain_base_as_a_user_does(folder):
    """The whole program, with nothing but the flags that everyone needs; what it leaves loads anywhere."""
    words = ["base", "--data", "text.txt", "--output", "out", *SMALL, "--max-steps", "6", "--save-steps", "4"]
    program = [sys.executable, "-c", "from ponder_hf.cli import main; raise SystemExit(main())", "train", *words]
    done = prepared.run([*program, "--held-out", "8"])
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    *bars, first, second = done.stderr.splitlines()
    bar = next(line for line in reversed(bars) if line.startswith("training:"))
    assert [word for word in ("training: 100%", "6/6", "loss=", "tokens/s=") if word not in bar] == []
    assert first.startswith("out: the model after 6 steps and 192 tokens, loss ")
    assert second.startswith("held-out loss of each pass: ")
    places = ["out", "out/checkpoint-4", "out/checkpoint-6"]
    assert losses_elsewhere(*places)[0] == pytest.approx(loss_here(PonderingForCausalLM.from_pretrained("out")))
    for place in places:
        kept = {path.name for path in (folder / place).iterdir()}
        assert {"modeling_pondering.py", "generation_config.json", "tokenizer.json", "config.json"} <= kept
        assert json.loads((folder / place / "config.json").read_text()).get("use_cache") is not False
    assert [path.name for path in folder.glob("out/_*")] == []


def test_a_base_learns_and_json_says_what_was_done(folder, capsys):
    result = train_json(capsys, "out", "--max-steps", "30", "--learning-rate", "1e-2", "--held-out", "0.1")
    assert result["started_from"] == "plain"
    assert result["steps"] == 30
    assert result["tokens"] == 30 * 2 * 16
    assert result["pondering"]["pondering_steps"] == 2
    assert result["checkpoints"] == ["checkpoint-30"]
    rows = json.loads((folder / "out/checkpoint-30/trainer_state.json").read_text())["log_history"]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] == result["loss"] < losses[0] - 0.5


def test_evaluation_gives_the_loss_of_each_pass(folder, capsys):
    settings = [
        "--max-steps",
        "4",
        "--eval-steps",
        "2",
        "--validation",
        "other.txt",
        "--per-device-eval-batch-size",
        "3",
    ]
    result = train_json(capsys, "out", *settings, "--intermediate-loss-weight", "0.5")
    evaluation = result["evaluation"]
    passes = [evaluation[f"eval_pass_{index}_loss"] for index in range(3)]
    model = PonderingForCausalLM.from_pretrained("out")
    options = TrainOptions(data=["text.txt"], validation=["other.txt"], block_size=16)
    material = load_training_data(options, AutoTokenizer.from_pretrained("out"), model.config, 0)
    assert passes == pytest.approx(evaluate_passes(model, material.held_out), abs=1e-4)
    # `eval_loss` is the last pass's, so that runs with other weights of the others can be compared.
    assert evaluation["eval_loss"] == pytest.approx(passes[2], abs=1e-4)
    rows = json.loads((folder / "out/checkpoint-4/trainer_state.json").read_text())["log_history"]
    assert [row["step"] for row in rows if "eval_pass_0_loss" in row] == [2, 4]
    assert [row["step"] for row in rows if "pass_0_entropy" in row] == [2, 4]  # PonderingCallback


def test_a_pondering_checkpoint_goes_on(folder, capsys):
    assert run("convert", "base", "pondering", "--pondering-steps", "1", "--pondering-gate", "zero_init") == 0
    small = SMALL[:4]
    result = train_json(capsys, "out", "--max-steps", "3", source="pondering", small=small)
    assert result["started_from"] == "pondering"
    assert result["pondering"]["pondering_steps"] == 1
    before, after = weights(folder / "pondering"), weights(folder / "out")
    assert before.keys() == after.keys()
    assert not torch.equal(before["pondering_gate.weight"], after["pondering_gate.weight"])
    changed = train_json(capsys, "more", "--max-steps", "1", "--pondering-steps", "3", source="out", small=small)
    assert changed["pondering"]["pondering_steps"] == 3


@pytest.mark.parametrize("model_type", ["gpt_neox", "gpt2", "llama"])
def test_from_scratch(folder, capsys, model_type):
    path = folder / "config.json"
    path.write_text(tiny.base_config(model_type).to_json_string())
    settings = ["--config", path, "--tokenizer", "base", "--max-steps", "2", "--pondering-gate", "zero_init"]
    result = train_json(capsys, "out", *settings, source=None)
    assert result["started_from"] == "scratch"
    model = AutoModelForCausalLM.from_pretrained("out")
    assert model.config.base_config.model_type == model_type
    assert model.config.pondering_steps == 2
    # A pondering configuration serves as well, and the same seed gives the same model.
    again = train_json(capsys, "again", "--config", "out", "--max-steps", "2", source=None, small=SMALL[:4])
    assert again["loss"] == result["loss"]


def test_training_from_a_script_of_arguments(folder, capsys):
    (folder / "run.yaml").write_text(
        "data: [text.txt, other.txt]\noutput: out\nblock-size: 16\nlearning_rate: 1e-3\nmax_steps: 5\n"
        "lr_scheduler_kwargs: {min_lr_rate: 0.5}\nbf16: false\nreport_to: none\npondering_steps: 1\nsource: base\n"
        "pondering-top-k: null\nper-device-train-batch-size: 2\nlora: false\noverwrite: true\n"
    )
    assert run("train", "--arguments", "run.yaml", "--max-steps", "3", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["steps"] == 3  # flags win
    assert result["pondering"]["pondering_steps"] == 1
    stored = json.loads((folder / "out/checkpoint-3/ponder_training.json").read_text())
    assert stored["arguments"]["learning_rate"] == 1e-3
    assert stored["options"]["data"] == ["text.txt", "other.txt"]


def test_every_training_argument_is_a_flag_in_both_spellings(capsys):
    assert run("train", "--help-all") == 0
    shown = capsys.readouterr().out
    for name in ("learning_rate", "torch_compile_mode", "eval_steps", "deepspeed", "bf16", "hub_model_id"):
        assert name in TrainingArguments.__dataclass_fields__
        assert f"--{name.replace('_', '-')}" in shown
        for flag in (f"--{name}", f"--{name.replace('_', '-')}"):
            assert name in build_parser().parse_args(["train", "base", flag, "1"])


@pytest.mark.parametrize("merge", [False, True])
def test_an_adapter(folder, capsys, merge):
    settings = [
        "--lora",
        "--lora-r",
        "2",
        "--max-steps",
        "4",
        "--learning-rate",
        "1e-2",
        "--pondering-gate",
        "zero_init",
    ]
    result = train_json(capsys, "out", *settings, *(["--merge"] if merge else []))
    assert result["adapter"] is not merge
    assert (folder / "out/adapter_config.json").exists() is not merge
    assert (folder / "out/config.json").exists() is merge
    adapted, checkpoint = losses_elsewhere("out", "out/checkpoint-4")
    base = loss_here(PonderingForCausalLM.from_pretrained("out/base"))
    assert adapted == pytest.approx(checkpoint, abs=1e-4)
    assert abs(adapted - base) > 1e-3


def test_an_adapter_names_the_pondering_checkpoint_it_belongs_to(folder, capsys):
    assert run("convert", "base", "pondering", "--pondering-steps", "1") == 0
    modules = ["--lora-target-modules", "dense_h_to_4h"]
    train_json(capsys, "out", "--lora", *modules, "--max-steps", "1", source="pondering", small=SMALL[:4])
    settings = json.loads((folder / "out/adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(folder / "pondering")
    assert settings["target_modules"] == ["dense_h_to_4h"]
    assert not (folder / "out/base").exists()


@pytest.mark.parametrize("flags", [["--bf16", "--use-cpu"], ["--gradient-checkpointing"]], ids=lambda flags: flags[0])
def test_bf16_and_gradient_checkpointing(folder, capsys, flags):
    plain = train_json(capsys, "plain", "--max-steps", "4", "--learning-rate", "1e-2")
    other = train_json(capsys, "other", "--max-steps", "4", "--learning-rate", "1e-2", *flags)
    is_exact = flags == ["--gradient-checkpointing"]
    assert other["loss"] == pytest.approx(plain["loss"], abs=1e-5 if is_exact else 5e-2)
    assert is_exact or other["loss"] != plain["loss"]
    assert weights(folder / "other")["backbone.embed_out.weight"].dtype == torch.float32


def test_accumulated_batches_train_as_one_large_batch_does(folder, capsys):
    small = SMALL[:2]
    whole = train_json(capsys, "a", "--max-steps", "3", "--per-device-train-batch-size", "4", small=small)
    parts = ["--per-device-train-batch-size", "2", "--gradient-accumulation-steps", "2"]
    accumulated = train_json(capsys, "b", "--max-steps", "3", *parts, small=small)
    assert accumulated["loss"] == pytest.approx(whole["loss"], abs=1e-5)
    for name, tensor in weights(folder / "a").items():
        torch.testing.assert_close(weights(folder / "b")[name], tensor, rtol=1e-3, atol=1e-4)


def test_streamed_data(folder, capsys):
    """As many steps as asked for, beyond one pass over the text, in the same blocks."""
    settings = ["--streaming", "--max-steps", "12", "--held-out", "3"]
    result = train_json(capsys, "out", *settings, data="other.txt")
    assert result["steps"] == 12
    assert "eval_pass_2_loss" in result["evaluation"]
    assert train("x", "--streaming", data="other.txt") == 2
    assert "--max-steps" in capsys.readouterr().err


def test_the_learning_rate_falls_to_a_tenth_after_a_short_warm_up(folder, capsys):
    train_json(capsys, "out", "--max-steps", "100", "--logging-steps", "1", "--pondering-steps", "0")
    rows = json.loads((folder / "out/checkpoint-100/trainer_state.json").read_text())["log_history"]
    rates = [row["learning_rate"] for row in rows if "learning_rate" in row]
    assert max(rates) == pytest.approx(1e-3 / 3)
    assert rates[0] == 0
    assert rates[-1] == pytest.approx(1e-4 / 3, rel=0.01)


def test_a_half_precision_base_is_trained_in_float32(folder, capsys):
    (folder / "half").mkdir()
    tiny.base_model(dtype=torch.bfloat16).save_pretrained("half")
    AutoTokenizer.from_pretrained("base").save_pretrained("half")
    train_json(capsys, "out", "--max-steps", "1", source="half")
    assert all(tensor.dtype == torch.float32 for tensor in weights(folder / "out").values())
    train_json(capsys, "kept", "--max-steps", "1", "--dtype", "auto", source="half")
    assert all(tensor.dtype == torch.bfloat16 for tensor in weights(folder / "kept").values())


def test_only_the_newest_checkpoints_stay(folder, capsys):
    result = train_json(capsys, "out", "--max-steps", "5", "--save-steps", "1", "--save-total-limit", "2")
    assert result["checkpoints"] == ["checkpoint-4", "checkpoint-5"]


def test_the_best_checkpoint_stays_and_is_loaded(folder, capsys):
    settings = ["--max-steps", "4", "--save-steps", "1", "--eval-steps", "1", "--save-total-limit", "1"]
    settings += ["--load-best-model-at-end", "--held-out", "4", "--learning-rate", "5"]
    result = train_json(capsys, "out", *settings)
    name = min(result["checkpoints"], key=lambda name: int(name.rpartition("-")[2]))
    state = json.loads((folder / "out" / name / "trainer_state.json").read_text())
    best = min((row for row in state["log_history"] if "eval_loss" in row), key=lambda row: row["eval_loss"])
    assert best["step"] < 4, "at this learning rate the last step must not be the best"
    assert name == f"checkpoint-{best['step']}"
    assert state["best_model_checkpoint"] == str(folder / "out" / name)
    assert_same_model(folder / "out", folder / "out" / name)


@pytest.mark.parametrize("logger", ["tensorboard", "trackio"])
def test_losses_go_to_a_logger(folder, capsys, monkeypatch, logger):
    package = pytest.importorskip(logger, reason="needs ponder-hf[train,viz]")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(folder / "tensorboard"))
    train_json(capsys, "out", "--max-steps", "2", "--report-to", logger, "--held-out", "5", "--project", "ours")
    place = folder / logger if logger == "tensorboard" else Path(package.utils.TRACKIO_DIR)
    written = [path for path in place.rglob("*") if path.is_file()]
    assert any(b"pass_1_loss" in path.read_bytes() for path in written)


@pytest.mark.slow
def test_a_real_model_on_real_text(shared, tmp_path, capsys, monkeypatch):
    """LLaMA with a llama2.c tokenizer, on novels: what a base that never pondered loses is soon made up for."""
    monkeypatch.chdir(tmp_path)
    data = shared / "data"
    arguments = [data / "models/stories260K-llama", "--data", data / "text/novels-valid.txt.gz", "--output", "out"]
    settings = "--max-steps 30 --block-size 64 --held-out 32 --eval-on-start true --learning-rate 2e-3".split()
    settings += ["--per-device-train-batch-size", "4", "--pondering-top-k", "50", "--max-grad-norm", "1"]
    assert run("train", *arguments, *settings, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    rows = json.loads((tmp_path / "out/checkpoint-30/trainer_state.json").read_text())["log_history"]
    evaluated = [row["eval_loss"] for row in rows if "eval_loss" in row]
    assert result["evaluation"]["eval_pass_3_loss"] == pytest.approx(evaluated[-1], abs=1e-4)
    assert evaluated[-1] < evaluated[0] - 0.5
    assert run("generate", "out", "--prompt", "The", "--max-new-tokens", "5") == 0
