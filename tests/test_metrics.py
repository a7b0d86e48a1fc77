"""Metrics that `evaluate` loads by path, without network, in an empty Hugging Face home."""

import json
import math
import os
import shutil
import sys

import checkpoints
import prepared
import pytest
import tiny
import torch
from transformers import AutoTokenizer, Trainer, TrainingArguments

from ponder_hf import PonderingError, PonderingForCausalLM, metrics
from ponder_hf.evaluation import measure_passes, measure_texts
from ponder_hf.training.trainer import PonderingTrainer


TEXTS = ["once upon a time there was one cat", "two dogs who sat by the sea", "cat"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = checkpoints.save_base_and_model(tmp_path_factory.mktemp("made"))
    return folder / "model"


def of_each_pass(folder):
    """Perplexity and accuracy of each pass the plain way, one text at a time."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), PonderingForCausalLM.from_pretrained(folder)
    losses, hits, count = torch.zeros(3), torch.zeros(3), 0
    for text in TEXTS[:2]:
        ids = tokenizer(text, return_tensors="pt").input_ids
        with torch.no_grad():
            output = model(ids, labels=ids, output_pondering=True)
        logits = torch.stack([*output.pondering_logits, output.logits])[:, 0, :-1]
        count += ids.shape[1] - 1
        losses += torch.stack(output.pondering_losses) * (ids.shape[1] - 1)
        hits += (logits.argmax(-1) == ids[0, 1:]).sum(-1)
    return (losses / count).exp().tolist(), (hits / count).tolist()


PROGRAM = """
import json, sys
import evaluate
import ponder_hf.metrics

found = {}
for name in ponder_hf.metrics.NAMES:
    metric = evaluate.load(ponder_hf.metrics.path(name))
    found[name] = metric.compute(predictions=json.loads(sys.argv[2]), model_id=sys.argv[1])
print(json.dumps(found))
"""


def test_evaluate_loads_them_by_path_without_network(model, tmp_path):
    pytest.importorskip("evaluate", reason="needs ponder-hf[eval]")
    variables = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    variables |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM, str(model), json.dumps(TEXTS)]
    result = prepared.run(command, cwd=tmp_path, env=variables)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    perplexities, accuracies = of_each_pass(model)
    assert found["pondering_perplexity"]["perplexities"] == pytest.approx(perplexities, rel=1e-5)
    assert found["pondering_perplexity"]["perplexity"] == pytest.approx(perplexities[-1], rel=1e-5)
    assert found["next_token_accuracy"]["accuracies"] == pytest.approx(accuracies)
    assert len(found["pass_agreement"]["agreements"]) == 3
    assert found["pass_agreement"]["agreement"] == 1
    sums = measure_texts(PonderingForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model), TEXTS)
    for metric, figure in zip(found.values(), ("accuracy", "agreement", "perplexity"), strict=True):
        assert metric["stderrs"] == pytest.approx([each[f"{figure}_stderr"] for each in sums.figures()], rel=1e-4)


def test_a_text_longer_than_the_model():
    model = tiny.pondering_model("llama", pondering_steps=1)  # 64 positions
    tokenizer = checkpoints.word_tokenizer()
    text = " ".join(["once", "upon", "a", "time", "there"] * 30)
    sums = measure_texts(model, tokenizer, [text])
    assert sums.tokens.tolist() == [149]
    assert math.isfinite(sums.losses.sum().item())


def test_nothing_to_predict_and_no_such_metric():
    with pytest.raises(PonderingError, match="nothing to predict"):
        measure_texts(tiny.pondering_model(), checkpoints.word_tokenizer(), ["cat", ""])
    with pytest.raises(PonderingError, match="the metrics are next_token_accuracy, pass_agreement"):
        metrics.path("perplexity")


def test_a_model_of_nan_has_no_figures(model, tmp_path):
    shutil.copytree(model, tmp_path / "spoiled")
    checkpoints.change_tensors(tmp_path / "spoiled", lambda tensors: next(iter(tensors.values())).fill_(math.nan))
    with pytest.raises(PonderingError, match="spoiled predicts NaN or infinity"):
        metrics.figures(TEXTS[:2], str(tmp_path / "spoiled"))


@pytest.fixture
def trainer(tmp_path):
    """A function that makes a Trainer of a class with `compute_metrics`; a model; five rows of its tokens."""
    model, ids = tiny.pondering_model("gpt2", pondering_steps=1), tiny.token_ids(5, 9)

    def make(trainer_class, **settings):
        arguments = TrainingArguments(
            output_dir=str(tmp_path), report_to=[], use_cpu=True, disable_tqdm=True, label_names=["labels"]
        )
        return trainer_class(
            model,
            arguments,
            eval_dataset=[{"input_ids": row, "labels": row} for row in ids],
            compute_metrics=metrics.compute_metrics,
            **{"preprocess_logits_for_metrics": metrics.predicted_tokens, **settings},
        )

    return make, model, ids


@pytest.mark.parametrize("trainer_class", [Trainer, PonderingTrainer])
def test_in_trainer(trainer, trainer_class):
    """The same accuracy as by hand; PonderingTrainer gives the figures of each pass besides."""
    make, model, ids = trainer
    found = make(trainer_class).evaluate()
    with torch.no_grad():
        output = model(ids, output_pondering=True)
    predictions = torch.stack([*output.pondering_logits, output.logits])[:, :, :-1].argmax(-1)
    right = (predictions == ids[:, 1:]).float().mean((1, 2)).tolist()
    assert found["eval_accuracy"] == pytest.approx(right[-1])
    of_rows = (predictions[-1] == ids[:, 1:]).float().mean(-1)
    assert found["eval_accuracy_stderr"] == pytest.approx(of_rows.std().item() / math.sqrt(5))
    if trainer_class is PonderingTrainer:
        expected = measure_passes(model, ids).sums().figures()
        for index, figures in enumerate(expected):
            for name in ("loss", "accuracy", "agreement"):
                assert found[f"eval_pass_{index}_{name}"] == pytest.approx(figures[name], rel=1e-5)
        assert found["eval_pass_0_accuracy"] == pytest.approx(right[0])


def test_logits_instead_of_tokens_are_refused_by_name(trainer):
    with pytest.raises(PonderingError, match=r"preprocess_logits_for_metrics=ponder_hf\.metrics\.predicted_tokens"):
        trainer[0](Trainer, preprocess_logits_for_metrics=None).evaluate()
