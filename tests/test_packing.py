"""Several texts in one row, told apart by positions that begin anew: each must be computed as if it stood alone.

transformers keeps them apart only where there is no cache, and Trainer says so by `model.config.use_cache = False`.
"""

import pytest
import tiny
import torch
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

from ponder_hf.modeling import pondering_cache
from ponder_hf.modeling.pondering_generate_exits import PonderingExit


LENGTHS = (5, 9, 2, 7)


def texts():
    return [tiny.token_ids(length, seed=length) for length in LENGTHS]


def packed():
    """(input_ids, position_ids) of all texts in one row, (1, T) each."""
    positions = [torch.arange(length) for length in LENGTHS]
    return torch.cat(texts())[None], torch.cat(positions)[None]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mistral", "gemma3_text", "gpt_neox"])
def test_packed_texts_do_not_see_each_other(model_type, steps, training, attention):
    model = tiny.pondering_model(model_type, pondering_steps=steps, base_changes={"attn_implementation": attention})
    model.train(training)
    input_ids, position_ids = packed()
    with torch.no_grad():
        output = model(input_ids, position_ids=position_ids)
        alone = [model(text[None], use_cache=False).logits for text in texts()]
        whole = model(input_ids, position_ids=position_ids, attention_mask=torch.ones_like(input_ids)).logits
    assert output.past_key_values is None
    torch.testing.assert_close(output.logits, torch.cat(alone, dim=1), rtol=1e-4, atol=1e-4)
    assert (whole - output.logits).abs().max() > 1e-2  # what it would be if they did


def test_positions_that_go_on_keep_the_cache():
    model = tiny.pondering_model("llama", pondering_steps=1)
    input_ids = tiny.token_ids(2, 6)
    positions = torch.arange(6).expand(2, -1)
    cache = model(input_ids[:, :4], position_ids=positions[:, :4]).past_key_values
    rest = model(input_ids[:, 4:], position_ids=positions[:, 4:], past_key_values=cache).logits
    torch.testing.assert_close(rest, model(input_ids).logits[:, 4:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("collator", ["packed", "one by one"])
def test_trainer_evaluates_packed_texts(tmp_path, monkeypatch, steps, collator):
    model = tiny.pondering_model("llama", pondering_steps=steps)
    rows = [{"input_ids": text.tolist(), "labels": text.tolist()} for text in texts()]
    with torch.no_grad():
        losses = [model(text[None], labels=text[None]).loss.item() for text in texts()]
    arguments = TrainingArguments(
        str(tmp_path),
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        per_device_eval_batch_size=len(rows) if collator == "packed" else 1,
    )
    together = DataCollatorWithFlattening() if collator == "packed" else None
    trainer = Trainer(model, arguments, eval_dataset=rows, data_collator=together)
    assert model.config.use_cache is model.backbone.config.use_cache is False

    def no_slots(*arguments, **keywords):
        raise AssertionError("evaluation reads no cache, so it needs none")

    monkeypatch.setattr(pondering_cache, "DynamicCache", no_slots)
    found = trainer.evaluate()["eval_loss"]
    counts = [length - 1 for length in LENGTHS] if collator == "packed" else [1] * len(rows)
    expected = sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)
    assert found == pytest.approx(expected, rel=1e-4)


def test_trainer_s_loss_of_a_trained_model_is_the_plain_one(tmp_path, shared):
    """The numbers of the packed rows that the plain model gives; seeing each other the texts have 3.4616."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ponder_hf import PonderingForCausalLM

    source = shared / "data" / "models" / "stories260K-llama"
    tokenizer = AutoTokenizer.from_pretrained(source)
    sentences = ("Once upon a time", "The cat sat on a mat", "Lily was happy", "A big dog ran away")
    rows = [tokenizer(sentence)["input_ids"] for sentence in sentences]
    rows = [{"input_ids": row, "labels": row} for row in rows]
    arguments = TrainingArguments(
        str(tmp_path), report_to=[], use_cpu=True, disable_tqdm=True, per_device_eval_batch_size=len(rows)
    )
    for model in (
        AutoModelForCausalLM.from_pretrained(source),
        PonderingForCausalLM.from_base(source, pondering_steps=0),
    ):
        trainer = Trainer(model, arguments, eval_dataset=rows, data_collator=DataCollatorWithFlattening())
        assert trainer.evaluate()["eval_loss"] == pytest.approx(2.9920, abs=1e-4)


@pytest.mark.parametrize("threshold", [0.0, 0.5, 1e9])
@pytest.mark.parametrize("model_type", ["llama", "mistral", "gemma3_text"])
def test_early_exits_keep_packed_texts_apart(model_type, threshold):
    model = tiny.pondering_model(model_type, pondering_steps=2)
    input_ids, position_ids = packed()

    def run(ids, **inputs):
        taken = []
        exit = PonderingExit.read("kl", threshold)
        exit.record = taken.append
        with torch.no_grad():
            return model(ids, pondering_exit=exit, use_cache=False, **inputs).logits, taken[0]

    alone = [run(text[None]) for text in texts()]
    logits, taken = run(input_ids, position_ids=position_ids)
    torch.testing.assert_close(logits, torch.cat([one for one, _ in alone], dim=1), rtol=1e-4, atol=1e-4)
    assert taken.tolist() == torch.cat([steps for _, steps in alone], dim=1).tolist()
