"""The loss against transformers' own, and where it goes further."""

import pytest
import torch
from transformers.loss.loss_utils import ForCausalLMLoss

from ponder_hf.modeling.pondering_vocabulary_loss import causal_lm_loss


def example(dtype=torch.float32):
    labels = torch.randint(0, 31, (3, 9))
    labels[0, :4] = -100
    labels[2, -1] = -100
    return torch.randn(3, 9, 31).to(dtype), labels


ARGUMENTS = {
    "mean": {},
    "of several batches": {"num_items_in_batch": 57},
    "of several batches, a tensor": {"num_items_in_batch": torch.tensor(57)},
    "another ignored label": {"ignore_index": 7},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("arguments", ARGUMENTS.values(), ids=ARGUMENTS)
def test_equals_transformers_own(arguments, dtype):
    logits, labels = example(dtype)
    labels = labels.where(labels != -100, arguments.get("ignore_index", -100))
    expected = ForCausalLMLoss(logits, labels, vocab_size=31, **arguments)
    torch.testing.assert_close(causal_lm_loss(logits, labels, **arguments), expected)


def test_labels_already_shifted():
    logits, labels = example()
    shifted = torch.cat([labels[:, 1:], torch.full((3, 1), -100)], dim=1)
    assert torch.equal(causal_lm_loss(logits, None, shift_labels=shifted), causal_lm_loss(logits, labels))


def test_float64_stays_float64():
    logits, labels = example(torch.float64)
    loss = causal_lm_loss(logits, labels)
    assert loss.dtype == torch.float64
    log_probabilities = logits.log_softmax(-1)
    expected = [
        -log_probabilities[row, position - 1, labels[row, position]]
        for row in range(3)
        for position in range(1, 9)
        if labels[row, position] != -100
    ]
    torch.testing.assert_close(loss, torch.stack(expected).mean(), rtol=1e-12, atol=0)
