"""What the callback logs, against its definition."""

import math

import pytest
import tiny
import torch
from transformers import Trainer, TrainingArguments

from ponder_hf.callbacks import PonderingCallback, pondering_statistics


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


def test_trainer_logs_them(tmp_path):
    rows = [{"input_ids": row, "labels": row} for row in tiny.token_ids(8, 12)]
    model = tiny.pondering_model("gpt2", pondering_steps=2, pondering_gate="zero_init")
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=4, learning_rate=1e-2, report_to=[], use_cpu=True, disable_tqdm=True
    )
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
    PonderingCallback({"input_ids": tiny.token_ids(2, 12)}, every=2).attach(trainer)
    trainer.train()
    trainer.evaluate()
    logged = [entry for entry in trainer.state.log_history if "pass_0_loss" in entry]
    assert [entry["step"] for entry in logged] == [2, 4, 4]
    assert logged[0]["gate_abs_mean"] > 0
    assert all(math.isfinite(value) for value in logged[-1].values())
    assert {f"pass_{i}_entropy" for i in range(3)} <= set(logged[0])
