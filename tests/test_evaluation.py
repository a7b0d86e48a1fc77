"""What each pass predicts, against the plain way: all logits at once."""

import math

import pytest
import tiny
import torch
from torch.nn import functional
from transformers import GPT2LMHeadModel

from ponder_hf import measure_passes
from ponder_hf.data.blocks import Blocks
from ponder_hf.evaluation import PassSums, evaluate_passes, measure_blocks, passes, text_table
from ponder_hf.modeling.pondering_backbone import TESTED


def all_logits(model, ids, **settings):
    with torch.no_grad():
        output = model(ids, output_pondering=True, use_cache=False, **settings)
    return torch.stack([*output.pondering_logits, output.logits])


@pytest.mark.parametrize("model_type", ["gpt_neox", "gemma2", "granite", "cohere"])
@pytest.mark.parametrize("chunk", [1, 500, 1 << 24], ids=["one token", "some tokens", "all tokens"])
def test_against_all_logits(monkeypatch, model_type, chunk):
    # The real chunk has millions of numbers. How many there are changes no result, so nothing else could choose it.
    monkeypatch.setattr(passes, "_LARGEST_CHUNK", chunk)
    model = tiny.pondering_model(model_type, torch.float64, pondering_steps=2)
    ids = tiny.token_ids(3, 9)
    logits = all_logits(model, ids)
    found = measure_passes(model.train(), ids, entropies=True)
    assert model.training
    targets = ids[:, 1:]
    for index in range(3):
        losses = functional.cross_entropy(logits[index, :, :-1].transpose(1, 2), targets, reduction="none")
        torch.testing.assert_close(found.losses[index, :, :-1], losses)
        entropies = torch.distributions.Categorical(logits=logits[index]).entropy()
        torch.testing.assert_close(found.entropies[index], entropies)
    assert torch.equal(found.predictions[:, :, :-1], logits[:, :, :-1].argmax(-1))
    assert not found.losses[:, :, -1].any()
    right = logits[:, :, :-1].argmax(-1) == targets
    torch.testing.assert_close(found.sums().hits, right.sum(-1).double())
    same = logits[:, :, :-1].argmax(-1) == logits[-1, :, :-1].argmax(-1)
    torch.testing.assert_close(found.sums().agreements, same.sum(-1).double())


def test_other_steps_and_labels():
    model = tiny.pondering_model("llama", torch.float64, pondering_steps=1)
    ids, mask = tiny.left_padded([tiny.token_ids(9), tiny.token_ids(6)])
    whole = measure_passes(model, ids, mask, pondering_steps=3)
    assert whole.losses.shape == (4, 2, 9)
    assert whole.is_predicted.sum(-1).tolist() == [8, 6]  # the first token is predicted from padding
    labels = ids.clone()
    labels[:, :5] = -100
    found = measure_passes(model, ids, mask, labels, pondering_steps=3)
    torch.testing.assert_close(found.losses[:, :, 4:], whole.losses[:, :, 4:])
    assert not found.losses[:, :, :4].any()


def test_no_more_logits_than_of_a_chunk_are_made(monkeypatch):
    monkeypatch.setattr(passes, "_LARGEST_CHUNK", 3 * tiny.VOCAB_SIZE)
    model = tiny.pondering_model("gpt2", pondering_steps=2)
    model(tiny.token_ids(1, 4))  # it checks itself
    sizes, calls, whole = [], [], passes.backbone_logits
    monkeypatch.setattr(
        passes, "backbone_logits", lambda backbone, states: sizes.append(states.shape[:2]) or whole(backbone, states)
    )
    model.backbone.base_model.register_forward_hook(lambda *_: calls.append(1))
    measure_passes(model, tiny.token_ids(2, 9))
    assert len(calls) == 3
    assert set(sizes) == {(1, 3), (1, 1)}


@pytest.mark.parametrize("model_type", sorted(TESTED))
def test_a_plain_model_has_one_pass(model_type, monkeypatch):
    """Of which no more logits are made than of a chunk, either."""
    model = tiny.pondering_model(model_type, pondering_steps=2)
    ids = tiny.token_ids(2, 9)
    pondering = measure_passes(model, ids)
    seen = []
    head = model.backbone.get_output_embeddings()
    head.register_forward_hook(lambda module, given, output: seen.append(output.shape[:2]))
    monkeypatch.setattr(passes, "_LARGEST_CHUNK", 3 * tiny.VOCAB_SIZE)
    plain = measure_passes(model.backbone, ids)
    torch.testing.assert_close(plain.losses, pondering.losses[:1], rtol=1e-5, atol=1e-6)
    assert torch.equal(plain.predictions, pondering.predictions[:1])
    assert seen == [(1, 3)] * 5 + [(1, 1)]


def test_a_plain_model_of_another_class_is_asked_for_its_logits():
    class Other(GPT2LMHeadModel):
        pass

    model = tiny.pondering_model("gpt2", pondering_steps=0)
    other = Other(model.config.base_config)
    other.load_state_dict(model.backbone.state_dict())
    ids = tiny.token_ids(2, 9)
    torch.testing.assert_close(measure_passes(other.eval(), ids).losses, measure_passes(model, ids).losses)


def test_standard_errors_are_over_rows():
    losses = torch.tensor([[10.0, 14.0, 9.0, 11.0]])
    sums = PassSums(losses, losses / 5, losses / 4, torch.full((4,), 5.0))
    (figures,) = sums.figures(tokens_per_byte=0.25)
    means = losses[0] / 5
    assert figures["loss"] == pytest.approx(means.mean().item())
    assert figures["loss_stderr"] == pytest.approx((means.std() / 2).item())
    assert figures["perplexity_stderr"] == pytest.approx(figures["perplexity"] * figures["loss_stderr"])
    assert figures["bits_per_byte"] == pytest.approx(figures["loss"] / math.log(2) / 4)
    # Rows of other lengths count by their tokens; one row alone has no error.
    uneven = PassSums(torch.tensor([[2.0, 9.0]]), torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor([1.0, 3.0]))
    (figures,) = uneven.figures()
    assert figures["loss"] == 11 / 4
    assert figures["loss_stderr"] == pytest.approx(math.sqrt(2 * (0.75**2 + 0.75**2)) / 4)
    assert figures["bits_per_byte"] is None
    (alone,) = PassSums(losses[:, :1], losses[:, :1], losses[:, :1], torch.tensor([5.0])).figures()
    assert alone["loss_stderr"] is None


@pytest.mark.parametrize("stride", [1, 3, 7])
def test_a_sliding_window_predicts_every_token_once(stride):
    model = tiny.pondering_model("llama", torch.float64, pondering_steps=1)
    blocks = Blocks(tiny.token_ids(3, 8).int())
    sums = measure_blocks(model, blocks, stride=stride)
    assert sums.tokens.sum() == 23
    text, total, predicted = blocks.rows.long().flatten(), 0.0, 1
    for start in [*range(0, 16, stride), 16]:
        window = text[start : start + 8]
        losses = functional.cross_entropy(all_logits(model, window[None])[-1, 0, :-1], window[1:], reduction="none")
        total += losses[max(0, predicted - start - 1) :].sum().item()
        predicted = start + 8
    assert sums.losses[-1].sum().item() == pytest.approx(total)


def test_a_longer_context_is_what_a_window_is_for():
    """With blocks every token right behind a cut has no context; a window gives it one, so other losses come out."""
    model = tiny.pondering_model("llama", pondering_steps=1)
    blocks = Blocks(tiny.token_ids(4, 8).int())
    whole = measure_blocks(model, blocks)
    assert whole.tokens.sum() == 28
    assert evaluate_passes(model, blocks)[-1] != measure_blocks(model, blocks, stride=4).losses[-1].sum() / 31


def test_checkpoints_side_by_side():
    figures = {"loss": 1.5, "loss_stderr": 0.25, "perplexity": 4.0, "bits_per_byte": None, "accuracy": 0.5}
    passes_of_one = [{**figures, "agreement": 0.75}, {**figures, "agreement": 1.0}]
    table = text_table([{"source": "one", "passes": passes_of_one}, {"source": "two", "passes": passes_of_one[1:]}])
    rows = [line.split() for line in table.splitlines()]
    assert [row[0] for row in rows] == ["checkpoint", "one", "1", "two"]
    assert rows[1][1:] == ["0", "1.5000", "±", "0.2500", "4.00", "-", "0.5000", "0.7500"]
