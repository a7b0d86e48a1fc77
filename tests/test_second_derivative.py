"""Derivatives of derivatives, torch.func and forward mode: exact through the fast embeddings and the fast loss."""

import pytest
import tiny
import torch
from test_kernels import TOLERANCE, VOCAB_SIZE, fast, leaves, plain
from torch.autograd import forward_ad
from torch.func import functional_call

from ponder_hf.modeling import pondering_vocabulary_cpu
from ponder_hf.modeling.pondering_vocabulary import Readout
from ponder_hf.modeling.pondering_vocabulary_loss import causal_lm_loss, linear_causal_lm_loss


KERNELS = {"whole vocabulary": None, "top-17": 17}
SETTINGS = {"cap": 1.5, "factor": 0.5}
IN_FLOAT32 = {"rtol": 1e-5, "atol": 1e-6}  # LLaMA's norms are computed in float32, whatever the model's dtype


def curvature(function, tensors, constant):
    """Gradient and Hessian-vector product of a scalar; `constant`: nothing that comes in from above has a gradient."""
    value = function(*tensors)
    value = value if constant else value.square() + value
    gradients = torch.autograd.grad(value, tensors, create_graph=True)
    generator = torch.Generator().manual_seed(3)
    directions = [torch.randn(g.shape, generator=generator).to(g.dtype) for g in gradients]
    product = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True))
    return [*gradients, *torch.autograd.grad(product, tensors)]


def check_curvature(function, reference, tensors, constant, tolerance):
    wide = [tensor.detach().double().requires_grad_() for tensor in tensors]
    found, expected = curvature(function, tensors, constant), curvature(reference, wide, constant)
    for actual, wanted in zip(found, expected, strict=True):
        difference = (actual.double() - wanted).abs().max()
        assert difference <= tolerance * wanted.abs().max(), f"{difference:.1e} of {wanted.abs().max():.1e}"


@pytest.fixture(params=["the flash kernel", "no flash kernel"])
def _kernel(request, monkeypatch):
    # Whether torch has it is asked on import, and no torch can be made to lack it afterwards.
    if request.param == "no flash kernel":
        monkeypatch.setattr(pondering_vocabulary_cpu, "_FORWARD", None)


@pytest.mark.usefixtures("_kernel")
@pytest.mark.parametrize("constant", [True, False], ids=["constant from above", "more above"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("top_k", KERNELS.values(), ids=KERNELS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_of_an_embedding(dtype, top_k, tied, constant):
    hidden, weight, bias, table = leaves(7, dtype, tied, bias=True)
    if top_k is not None and dtype == torch.bfloat16:  # rounded scores may choose other tokens: none that are close
        weight.data[:top_k] /= 4
        weight.data[top_k:] /= 64
        bias.data = torch.zeros_like(bias).index_fill(0, torch.arange(top_k, VOCAB_SIZE), -4)
    tensors = (hidden, weight, bias) if tied else (hidden, weight, bias, table)

    def summed(embedding_of):
        def function(hidden, weight, bias, table=None):
            readout = Readout(weight, bias, **SETTINGS)
            embedding = embedding_of(hidden, readout, weight if table is None else table, 0.7, top_k)
            return (embedding / 10).sum() if constant else (embedding / 10).square().sum()

        return function

    check_curvature(summed(fast), summed(plain), tensors, constant, 2 * TOLERANCE[dtype])


@pytest.mark.parametrize("constant", [True, False], ids=["constant from above", "more above"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_of_the_loss(dtype, constant):
    hidden, weight, bias, _ = leaves(21, dtype, bias=True)
    labels = torch.randint(0, VOCAB_SIZE, (3, 7))
    labels[0, :4] = -100

    def linear(hidden, weight, bias):
        return linear_causal_lm_loss(hidden.view(3, 7, -1), Readout(weight, bias, **SETTINGS), labels)

    def whole(hidden, weight, bias):
        readout = Readout(weight, bias, **SETTINGS)
        return causal_lm_loss(readout.finish(readout.scores(hidden.view(3, 7, -1))), labels)

    check_curvature(linear, whole, (hidden, weight, bias), constant, 2 * TOLERANCE[dtype])


@pytest.mark.parametrize("top_k", KERNELS.values(), ids=KERNELS)
def test_gradgradcheck(top_k):
    hidden, weight, bias, table = (
        torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in [(4, 5), (23, 5), (23,), (23, 6)]
    )
    labels = torch.tensor([[3, -100, 22, 0]])

    def embedding(hidden, weight, bias, table):
        return fast(hidden, Readout(weight, bias, 2.0, 0.5), table, 0.7, top_k)

    def loss(hidden, weight, bias):
        return linear_causal_lm_loss(hidden[None], Readout(weight, bias, 2.0, 0.5), labels)

    assert torch.autograd.gradgradcheck(embedding, (hidden, weight, bias, table))
    assert torch.autograd.gradgradcheck(loss, (hidden, weight, bias))


def model_and_plain(top_k, **fields):
    """The same model, by its fast functions and with a hook that has the head asked through its module."""
    models = []
    for _ in range(2):
        torch.manual_seed(5)
        base_changes = {"attn_implementation": "eager"}  # scaled_dot_product_attention has no second derivative
        fields = {"pondering_steps": 2, "pondering_top_k": top_k, "intermediate_loss_weight": 0.5, **fields}
        models.append(tiny.pondering_model("llama", torch.float64, base_changes, **fields).train())
    models[1].get_output_embeddings().register_forward_hook(lambda *arguments: None)
    assert models[0].pondering_kernel != "plain" == models[1].pondering_kernel
    return models


@pytest.mark.parametrize("top_k", KERNELS.values(), ids=KERNELS)
def test_a_gradient_penalty_trains_the_whole_model(top_k):
    ids, found = tiny.token_ids(2, 9), []
    for model in model_and_plain(top_k):
        parameters = list(model.parameters())
        loss = model(ids, labels=ids, pondering_steps=2).loss
        gradients = torch.autograd.grad(loss, parameters, create_graph=True)
        penalty = sum(gradient.square().sum() for gradient in gradients)
        (loss + penalty).backward()
        found.append([parameter.grad for parameter in parameters])
    torch.testing.assert_close(*found, **IN_FLOAT32)


@pytest.mark.parametrize("top_k", KERNELS.values(), ids=KERNELS)
def test_a_graph_of_the_gradients_changes_no_gradient(top_k):
    ids, found = tiny.token_ids(2, 9), []
    model = model_and_plain(top_k)[0]
    for create_graph in (False, True):
        loss = model(ids, labels=ids).loss
        found.append(torch.autograd.grad(loss, list(model.parameters()), create_graph=create_graph))
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("top_k", KERNELS.values(), ids=KERNELS)
def test_torch_func(top_k):
    ids = tiny.token_ids(2, 9)
    model = model_and_plain(top_k)[0]
    weights = {name: weight.detach() for name, weight in model.named_parameters()}

    def loss(weights, ids):
        return functional_call(model, weights, (), {"input_ids": ids, "labels": ids}).loss

    def written_out(row):
        value = model(row, labels=row).loss
        return dict(zip(weights, torch.autograd.grad(value, list(model.parameters())), strict=True))

    torch.testing.assert_close(torch.func.grad(loss)(weights, ids), written_out(ids), **IN_FLOAT32)
    rows = torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, ids[:, None])
    for index in range(2):
        one = {name: gradients[index] for name, gradients in rows.items()}
        torch.testing.assert_close(one, written_out(ids[index][None]), **IN_FLOAT32)
    tangents = {name: torch.randn_like(weight) for name, weight in weights.items()}
    slope = torch.func.jvp(lambda weights: loss(weights, ids), (weights,), (tangents,))[1]
    expected = sum((gradient * tangents[name]).sum() for name, gradient in written_out(ids).items())
    torch.testing.assert_close(slope, expected, **IN_FLOAT32)


@pytest.mark.parametrize("top_k", KERNELS.values(), ids=KERNELS)
def test_forward_mode(top_k):
    ids = tiny.token_ids(2, 9)
    model = model_and_plain(top_k)[0]
    embedded = model.get_input_embeddings()(ids).detach()
    direction = torch.randn_like(embedded)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(embedded, direction)
        slope = forward_ad.unpack_dual(model(inputs_embeds=dual, labels=ids).loss).tangent
    embedded.requires_grad_()
    (gradient,) = torch.autograd.grad(model(inputs_embeds=embedded, labels=ids).loss, embedded)
    torch.testing.assert_close(slope, (gradient * direction).sum(), **IN_FLOAT32)
