"""`ponder-hf eval`: the loss of each pass on a text, of pondering and of plain models."""

import json
import math
import shutil

import checkpoints
import pytest
import torch
import training_runs
from checkpoints import run
from huggingface_hub import ModelCard
from torch.nn import functional
from transformers import AutoTokenizer

from ponder_hf import PonderingError, PonderingForCausalLM
from ponder_hf.data import load_blocks
from ponder_hf.evaluation import evaluate_text


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = checkpoints.save_base_and_model(tmp_path_factory.mktemp("made"))
    training_runs.write_text(folder / "text.txt", 30)
    return folder


@pytest.fixture
def evaluated(made, capsys, monkeypatch):
    monkeypatch.chdir(made)

    def evaluate(source, *words):
        capsys.readouterr()
        assert run("eval", source, "--data", "text.txt", "--block-size", 16, *words, "--json") == 0
        return json.loads(capsys.readouterr().out)

    return evaluate


def losses(result):
    return [each["loss"] for each in result["passes"]]


def expected_losses(made, **settings):
    """The same numbers the plain way: one block at a time, all logits."""
    tokenizer = AutoTokenizer.from_pretrained(made / "model")
    model = PonderingForCausalLM.from_pretrained(made / "model")
    rows = load_blocks(str(made / "text.txt"), tokenizer, 16, progress=False, **settings).rows.long()
    with torch.no_grad():
        output = model(rows, output_pondering=True)
    every_pass = [*output.pondering_logits, output.logits]
    return [functional.cross_entropy(each[:, :-1].flatten(0, 1), rows[:, 1:].flatten()).item() for each in every_pass]


def test_the_loss_of_each_pass(made, evaluated):
    result = evaluated("model")
    assert losses(result) == pytest.approx(expected_losses(made), abs=1e-5)
    assert result["loss"] == losses(result)[-1]
    assert result["perplexity"] == pytest.approx(math.exp(result["loss"]))
    assert (result["pondering_steps"], result["block_size"], result["dtype"]) == (2, 16, "float32")
    assert result["tokens"] == result["blocks"] * 15
    assert result["tokens_per_second"] > 0


def test_fewer_blocks_and_other_steps(made, evaluated):
    whole, short = evaluated("model"), evaluated("model", "--max-blocks", 3)
    assert short["blocks"] == 3 < whole["blocks"]
    assert losses(short) == pytest.approx(expected_losses(made, max_blocks=3), abs=1e-5)
    assert losses(evaluated("model", "--pondering-steps", 1)) == pytest.approx(losses(whole)[:2], abs=1e-6)
    assert len(losses(evaluated("model", "--pondering-steps", 4))) == 5


def test_a_plain_model_has_one_pass(evaluated):
    assert losses(evaluated("base")) == pytest.approx(losses(evaluated("model"))[:1], abs=1e-6)
    assert losses(evaluated("base", "--pondering-steps", 2)) == pytest.approx(losses(evaluated("model")), abs=1e-6)


def test_half_precision(evaluated):
    result = evaluated("model", "--dtype", "bfloat16")
    assert result["dtype"] == "bfloat16"
    assert result["loss"] != evaluated("model")["loss"]
    assert result["loss"] == pytest.approx(evaluated("model")["loss"], rel=0.02)


def test_from_python(made, evaluated):
    """The same of a checkpoint and of a model that is loaded already; errors name arguments, not flags."""
    timed = ("seconds", "tokens_per_second")
    expected = {key: value for key, value in evaluated("model").items() if key not in timed}
    found = evaluate_text("model", "text.txt", block_size=16)
    assert {key: value for key, value in found.items() if key not in timed} == expected
    model, tokenizer = PonderingForCausalLM.from_pretrained("model"), AutoTokenizer.from_pretrained("model")
    for each in (tokenizer, "model"):
        loaded = evaluate_text(model, ["text.txt"], tokenizer=each, block_size=16, device="cpu")
        assert losses(loaded) == losses(found)
    with pytest.raises(PonderingError, match="needs a `tokenizer`"):
        evaluate_text(model, "text.txt")
    with pytest.raises(PonderingError, match=r"^`block_size` is 65, but the model has only 64 positions"):
        evaluate_text("model", "text.txt", block_size=65)


def test_for_people(made, evaluated, capsys):
    result = evaluated("model")
    assert run("eval", "model", "--data", "text.txt", "--block-size", 16) == 0
    out, err = capsys.readouterr()
    rows = [line.split() for line in out.splitlines()]
    assert rows[0] == ["pass", "loss", "perplexity", "bits/byte", "accuracy", "agreement"]
    assert [row[1] for row in rows[1:]] == [f"{loss:.4f}" for loss in losses(result)]
    assert "evaluating: 100%" in err
    assert f"{result['tokens']:,} tokens in {result['blocks']} blocks of 16" in err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["nowhere", "--data", "text.txt"], "no folder nowhere"),
        (["model"], "--data"),
        (["model", "--data", "nothing.txt"], "nothing.txt"),
        (["model", "--data", "text.txt", "--block-size", "65"], "64 positions"),
        (["model", "--data", "text.txt", "--block-size", "1"], "--block-size"),
        (["model", "--data", "text.txt", "--max-blocks", "0"], "--max-blocks"),
        (["model", "--data", "text.txt", "--pondering-steps", "-1"], "--pondering-steps"),
        (["model", "--data", "text.txt", "--dtype", "int8"], "--dtype"),
        (["model", "--data", "short.txt"], "fewer tokens than one block"),
        (["bare", "--data", "text.txt"], "has no tokenizer"),
        (["broken", "--data", "text.txt", "--block-size", "16"], "NaN or infinity"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input(made, monkeypatch, capsys, words, says):
    monkeypatch.chdir(made)
    (made / "short.txt").write_text("once upon a time")
    model = PonderingForCausalLM.from_pretrained("model")
    model.save_pretrained("bare")
    model.save_pretrained("broken")
    AutoTokenizer.from_pretrained("model").save_pretrained("broken")
    checkpoints.change_tensors(made / "broken", lambda tensors: tensors["backbone.embed_out.weight"].fill_(math.nan))
    capsys.readouterr()
    assert run("eval", *words) == 2
    out, err = capsys.readouterr()
    last = err.replace("\r", "\n").splitlines()[-1]
    assert (out, last.startswith("ponder-hf: error: ")) == ("", True)
    assert says in last


def test_bits_per_byte_and_what_else_is_known_of_each_pass(made, evaluated):
    result = evaluated("model")
    tokenizer = AutoTokenizer.from_pretrained("model")
    rows = load_blocks("text.txt", tokenizer, 16, progress=False).rows
    text = tokenizer.decode(rows.flatten().tolist(), skip_special_tokens=True)
    assert result["bytes"] == len(text.encode())
    bits = result["loss"] / math.log(2) * rows.numel() / result["bytes"]
    assert result["bits_per_byte"] == pytest.approx(bits)
    model = PonderingForCausalLM.from_pretrained("model")
    with torch.no_grad():
        output = model(rows.long(), output_pondering=True)
    predictions = torch.stack([*output.pondering_logits, output.logits])[:, :, :-1].argmax(-1)
    for index, figures in enumerate(result["passes"]):
        right = (predictions[index] == rows[:, 1:]).float().mean().item()
        assert figures["accuracy"] == pytest.approx(right, abs=1e-3)
        assert figures["agreement"] == pytest.approx(
            (predictions[index] == predictions[-1]).float().mean().item(), abs=1e-3
        )
        assert figures["loss_stderr"] > 0
    assert result["passes"][-1]["agreement"] == 1


def test_several_checkpoints(made, evaluated, capsys):
    both = evaluated("model", "--pondering-steps", "0,1")
    assert len(both["passes"]) == 2
    assert run("eval", "model", "base", "--data", "text.txt", "--block-size", 16, "--json") == 0
    found = json.loads(capsys.readouterr().out)["checkpoints"]
    assert [each["source"] for each in found] == ["model", "base"]
    assert losses(found[1]) == pytest.approx(losses(found[0])[:1], abs=1e-6)
    assert run("eval", "model", "base", "--data", "text.txt", "--block-size", 16) == 0
    assert capsys.readouterr().out.splitlines()[0].split()[:2] == ["checkpoint", "pass"]


def test_the_card_has_the_figures_of_each_pass(made, evaluated, tmp_path):
    folder = shutil.copytree(made / "model", tmp_path / "model")
    for _ in range(2):  # the second time replaces them
        result = evaluated(folder, "--stride", 8, "--card")
    found = ModelCard.load(folder / "README.md").data.eval_results
    assert len(found) == 3 * 5
    values = {(each.metric_type, each.metric_args["pass"]): each.metric_value for each in found}
    for index, figures in enumerate(result["passes"]):
        for name in ("loss", "perplexity", "bits_per_byte", "accuracy", "agreement"):
            assert values[name, index] == round(figures[name], 4)
    assert {each.dataset_name for each in found} == {"text.txt"}
    assert found[0].dataset_args == {"block_size": 16, "stride": 8, "tokens": result["tokens"]}


def test_a_window_and_steps_that_were_never_trained(evaluated, capsys):
    result = evaluated("model", "--stride", 8)
    assert result["stride"] == 8
    assert result["tokens"] == 16 * result["blocks"] - 1
    assert run("eval", "model", "--data", "text.txt", "--block-size", 16, "--pondering-steps", 4) == 0
    assert "warning: --pondering-steps is 4, and model was trained with 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--data", "text.txt", "--block-size", 16, "--stride", 16], "--stride must be from 1"),
        (["--data", "text.txt", "--stride", 0, "--block-size", 16], "--stride must be from 1"),
        (["--data", "text.txt", "--limit", 3], "--limit goes with --tasks"),
        (["--tasks", "piqa", "--stride", 3], "--stride goes with --data"),
        (["--data", "text.txt", "--pondering-steps", "1,x"], "--pondering-steps"),
        ([], "give --data with a text, or --tasks"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_flags_that_do_not_go_together(made, monkeypatch, capsys, words, says):
    monkeypatch.chdir(made)
    assert run("eval", "model", *words) == 2
    assert says in capsys.readouterr().err.replace("\r", "\n").splitlines()[-1]
