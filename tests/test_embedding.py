"""The pondering embedding against its equation, written out with loops."""

import pytest
import tiny
import torch

from ponder_hf.modeling.pondering_vocabulary_embedding import PonderingEmbedding, PonderingGate, plain_embedding


TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}


def written_out(logits, table, temperature, top_k):
    """The equation for one position after another, in float64."""
    rows = []
    for scores in logits.double().reshape(-1, logits.shape[-1]):
        kept = scores.argsort(descending=True)[: top_k or len(scores)]
        weights = [torch.exp((scores[token] - scores.max()) / temperature) for token in kept]
        row = sum(weight * table[token].double() for weight, token in zip(weights, kept, strict=True))
        rows.append(row / sum(weights))
    return torch.stack(rows).view(*logits.shape[:-1], -1)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("top_k", [None, 1, 7, 131], ids="K={}".format)
@pytest.mark.parametrize("tokens", [1, 13], ids="T={}".format)
@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_value(dtype, top_k, tokens, temperature):
    # Distinct in bfloat16 too: among equal logits, which ones are the K largest is anyone's choice.
    logits = (torch.rand(2, tokens, 131).argsort(-1) / 16).to(dtype)
    table = torch.randn(131, 24).to(dtype)
    result = plain_embedding(logits, table, temperature, top_k)
    assert result.dtype == dtype
    assert result.shape == (2, tokens, 24)
    expected = written_out(logits, table, temperature, top_k)
    assert (result.double() - expected).abs().max() <= TOLERANCE[dtype] * expected.abs().max()


@pytest.mark.parametrize("top_k", [None, 1, 5], ids="K={}".format)
def test_gradient(top_k):
    logits = torch.randn(3, 11, dtype=torch.float64, requires_grad=True)
    table = torch.randn(11, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *inputs: plain_embedding(*inputs, 0.7, top_k), (logits, table))


def test_the_whole_vocabulary_as_top_k_changes_nothing():
    logits, table = torch.randn(5, 131, dtype=torch.float64), torch.randn(131, 8, dtype=torch.float64)
    torch.testing.assert_close(plain_embedding(logits, table, 1.0, 131), plain_embedding(logits, table))


def test_one_best_token_gives_its_own_embedding():
    logits, table = torch.randn(5, 131), torch.randn(131, 8)
    assert torch.equal(plain_embedding(logits, table, 1.0, 1), table[logits.argmax(-1)])


def test_the_gate_starts_at_nothing_and_can_learn():
    gate = PonderingGate("zero_init", 8)
    embedding = torch.randn(2, 3, 8)
    assert torch.equal(gate(embedding), torch.zeros(2, 3, 8))
    gate(embedding).sum().backward()
    torch.testing.assert_close(gate.weight.grad, embedding.sum((0, 1)))


def test_a_gate_that_is_a_matrix_starts_at_nothing_and_multiplies():
    gate = PonderingGate("zero_init_matrix", 8)
    embedding = torch.randn(2, 3, 8)
    assert torch.equal(gate(embedding), torch.zeros(2, 3, 8))
    torch.nn.init.normal_(gate.weight)
    torch.testing.assert_close(gate(embedding), torch.einsum("ij,btj->bti", gate.weight, embedding))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_embedding_of_half_precision_logits_is_computed_in_float32(dtype):
    model = tiny.pondering_model("llama", dtype, pondering_temperature=0.7)
    logits = torch.randn(5, tiny.VOCAB_SIZE).mul(4).to(dtype)
    table = model.get_input_embeddings().weight
    with torch.no_grad():
        embedding = PonderingEmbedding(model.backbone, model.config).of_logits(logits)
        expected = plain_embedding(logits, table, 0.7)
    assert torch.equal(embedding, expected)


@pytest.mark.parametrize("model_type", ["llama", "gemma"])  # gemma's rows are scaled when they are fed in
@pytest.mark.parametrize("top_k", [None, 5])
def test_from_logits_it_is_what_it_is_from_hidden_states(model_type, top_k):
    model = tiny.pondering_model(model_type, torch.float64, pondering_temperature=0.7, pondering_top_k=top_k)
    embedding = PonderingEmbedding(model.backbone, model.config)
    assert embedding.kernel == ("vocabulary" if top_k is None else "top_k")
    states = torch.randn(1, 6, 32, dtype=torch.float64)
    with torch.no_grad():
        expected = embedding(states)
        found = embedding.of_logits(embedding.logits(states[0]))
    torch.testing.assert_close(found, expected[0])
