"""The fast embeddings and the fast loss against the plain ones: values, gradients, and what they keep in memory."""

import math
from contextlib import nullcontext

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from ponder_hf.modeling import pondering_vocabulary, pondering_vocabulary_embedding
from ponder_hf.modeling import pondering_vocabulary_cpu as cpu
from ponder_hf.modeling.pondering_backbone import decoder_context, head_context
from ponder_hf.modeling.pondering_vocabulary import Readout
from ponder_hf.modeling.pondering_vocabulary_cpu import _largest_in_tiles
from ponder_hf.modeling.pondering_vocabulary_embedding import (
    makes_use_of_logits,
    plain_embedding,
    probabilities,
    top_k_embedding,
    vocabulary_embedding,
    weighted_sum,
)
from ponder_hf.modeling.pondering_vocabulary_loss import causal_lm_loss, linear_causal_lm_loss


VOCAB_SIZE, WIDTH = 131, 24
# Relative to the largest element of what is compared.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 3e-2}
TOP_K = [None, 1, 100, VOCAB_SIZE]
HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "cap": {"cap": 1.5},
    "factor": {"factor": 0.5},
    "bias, cap and factor": {"bias": True, "cap": 1.5, "factor": 2.0},
}


@pytest.fixture(params=[2**24, 16 * VOCAB_SIZE], ids=["one chunk", "chunks of 16"])
def _chunked(request, monkeypatch):
    monkeypatch.setitem(pondering_vocabulary.CHUNK_ELEMENTS, "cpu", request.param)


@pytest.fixture(params=["the flash kernel", "no flash kernel"])
def _kernel(request, monkeypatch):
    """As on a CPU, and as on other devices and with a PyTorch that has no such kernel."""
    # Whether torch has it is asked on import, and no torch can be made to lack it afterwards.
    if request.param == "no flash kernel":
        monkeypatch.setattr(cpu, "_FORWARD", None)


def leaves(tokens, dtype, tied=False, bias=False):
    """hidden states, head weight, head bias, embedding table; each row of scores has distinct entries."""
    hidden = torch.randn(tokens, WIDTH).to(dtype).requires_grad_()
    weight = (torch.randn(VOCAB_SIZE, WIDTH) / 3).to(dtype).requires_grad_()
    table = weight if tied else torch.randn(VOCAB_SIZE, WIDTH).to(dtype).requires_grad_()
    return hidden, weight, torch.randn(VOCAB_SIZE).to(dtype).requires_grad_() if bias else None, table


def fast(hidden, readout, table, temperature, top_k):
    if top_k is None:
        return vocabulary_embedding(hidden, readout, table, temperature)
    return top_k_embedding(hidden, readout, table, temperature, top_k)


def plain(hidden, readout, table, temperature, top_k):
    return plain_embedding(readout.finish(readout.scores(hidden)), table, temperature, top_k)


def check_against(tensors, function, reference, tolerance):
    """Values and gradients of two functions of the same leaves, against the reference computed in float64."""
    wide = [None if tensor is None else tensor.detach().double().requires_grad_() for tensor in tensors]
    if tensors[3] is tensors[1]:
        wide[3] = wide[1]
    result, expected = function(*tensors), reference(*wide)
    direction = torch.randn(expected.shape)
    (result * direction.to(result.dtype)).sum().backward()
    (expected * direction.double()).sum().backward()
    pairs = [(result, expected), *((t.grad, w.grad) for t, w in zip(tensors, wide, strict=True) if t is not None)]
    for actual, wanted in pairs:
        assert actual.shape == wanted.shape
        difference = (actual.double() - wanted).abs().max()
        assert difference <= tolerance * wanted.abs().max(), f"{difference:.1e} of {wanted.abs().max():.1e}"


@pytest.mark.usefixtures("_chunked", "_kernel")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("tokens", [1, 63, 257], ids="T={}".format)
@pytest.mark.parametrize("top_k", TOP_K, ids="K={}".format)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_embedding_equals_plain(dtype, tokens, top_k, tied):
    check_against(
        leaves(tokens, dtype, tied),
        lambda h, w, b, e: fast(h, Readout(w), e, 0.7, top_k),
        lambda h, w, b, e: plain(h, Readout(w), e, 0.7, top_k),
        TOLERANCE[dtype],
    )


@pytest.mark.usefixtures("_chunked", "_kernel")
@pytest.mark.parametrize("tokens", [1, 63, 257], ids="T={}".format)
@pytest.mark.parametrize("top_k", [None, VOCAB_SIZE], ids="K={}".format)
def test_embedding_in_bfloat16(tokens, top_k):
    check_against(
        leaves(tokens, torch.bfloat16),
        lambda h, w, b, e: fast(h, Readout(w), e, 1.0, top_k),
        lambda h, w, b, e: plain(h, Readout(w), e, 1.0, top_k),
        TOLERANCE[torch.bfloat16],
    )


def test_a_torch_without_the_flash_kernel_is_said_once(monkeypatch):
    said = []
    monkeypatch.setattr(cpu.logger, "warning_once", said.append)
    hidden, weight, _, table = leaves(3, torch.float32)
    vocabulary_embedding(hidden, Readout(weight), table, 1.0)
    assert not said
    # see `_kernel`
    monkeypatch.setattr(cpu, "_FORWARD", None)
    vocabulary_embedding(hidden, Readout(weight), table, 1.0)
    assert "no flash attention kernel for CPUs" in said[0]


@pytest.mark.parametrize("threads", [1, 2, 3, 7, 200])
@pytest.mark.parametrize("tokens", [1, 5, 300])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "frozen bias"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_the_flash_kernel_on_so_many_threads(threads, tokens, bias, dtype, monkeypatch):
    """It cuts the vocabulary into a part a thread, and what is left over; 131 is divided by none of these."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    hidden, weight, frozen, table = leaves(tokens, dtype, bias=bias)
    frozen = None if frozen is None else frozen.detach()
    wide = None if frozen is None else frozen.double()

    def readout(weight):
        return Readout(weight, frozen if weight.dtype == dtype else wide, factor=0.6)

    with Operations() as operations:
        check_against(
            (hidden, weight, None, table),
            lambda h, w, b, e: vocabulary_embedding(h, readout(w), e, 0.7),
            lambda h, w, b, e: plain(h, readout(w), e, 0.7, None),
            TOLERANCE[dtype],
        )
    assert any("flash_attention" in name for name in operations.names), "the kernel was not used"


@pytest.mark.parametrize("top_k", [1, 17])
def test_top_k_in_bfloat16_equals_plain_in_bfloat16(top_k):
    """Rounded scores may choose other tokens than exact ones, so both sides must round."""
    hidden, weight, _, table = leaves(63, torch.bfloat16)
    scores = Readout(weight).scores(hidden)
    largest = scores.topk(top_k + 1).values
    distinct = largest[:, -1] != largest[:, -2]  # otherwise which token is the K-th is anyone's choice
    results = []
    for function in (fast, plain):
        tensors = [tensor.detach().requires_grad_() for tensor in (hidden[distinct], weight, table)]
        result = function(tensors[0], Readout(tensors[1]), tensors[2], 1.0, top_k)
        result.float().square().sum().backward()
        results.append([result, *(tensor.grad for tensor in tensors)])
    assert distinct.sum() > 20
    for actual, expected in zip(*results, strict=True):
        assert (actual.float() - expected.float()).abs().max() <= 3e-2 * expected.float().abs().max()


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("top_k", TOP_K, ids="K={}".format)
def test_heads(head, top_k):
    settings = {key: value for key, value in head.items() if key != "bias"}
    check_against(
        leaves(33, torch.float64, bias=head.get("bias", False)),
        lambda h, w, b, e: fast(h, Readout(w, b, **settings), e, 1.3, top_k),
        lambda h, w, b, e: plain(h, Readout(w, b, **settings), e, 1.3, top_k),
        TOLERANCE[torch.float64],
    )


@pytest.mark.parametrize("top_k", [None, 3, 11], ids="K={}".format)
def test_gradcheck(top_k):
    hidden, weight, bias, table = (
        torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in [(4, 5), (11, 5), (11,), (11, 6)]
    )

    def function(hidden, weight, bias, table):
        return fast(hidden, Readout(weight, bias, 2.0, 0.5), table, 0.7, top_k)

    assert torch.autograd.gradcheck(function, (hidden, weight, bias, table))


@pytest.mark.parametrize("wanted", range(4))
@pytest.mark.parametrize("top_k", [None, 17], ids="K={}".format)
def test_only_the_wanted_gradient_is_made(top_k, wanted):
    tensors = [
        tensor.detach().requires_grad_(i == wanted) for i, tensor in enumerate(leaves(9, torch.float64, bias=True))
    ]
    hidden, weight, bias, table = tensors
    fast(hidden, Readout(weight, bias), table, 1.0, top_k).sum().backward()
    assert [tensor.grad is not None for tensor in tensors] == [i == wanted for i in range(4)]


@pytest.mark.parametrize("top_k", [None, 17], ids="K={}".format)
def test_autocast(top_k):
    """Under autocast both multiply in bfloat16; weights and their gradients stay float32."""
    tensors = leaves(63, torch.float32)

    def under_autocast(hidden, weight, bias, table):
        with torch.autocast("cpu", torch.bfloat16):
            return fast(hidden, Readout(weight), table, 1.0, top_k)

    if top_k is None:
        check_against(tensors, under_autocast, lambda h, w, b, e: plain(h, Readout(w), e, 1.0, None), 3e-2)
    else:  # bfloat16 chooses other tokens here and there: most rows agree with the exact choice
        result = under_autocast(*tensors)
        result.sum().backward()
        close = (result - plain(tensors[0], Readout(tensors[1]), tensors[3], 1.0, top_k)).abs().amax(-1) < 0.1
        assert close.float().mean() > 0.9
    assert {tensor.grad.dtype for tensor in tensors if tensor is not None} == {torch.float32}


@pytest.mark.parametrize("top_k", [1, 5])
def test_equal_scores_choose_k_tokens(top_k):
    hidden, weight, table = torch.zeros(4, WIDTH), torch.randn(VOCAB_SIZE, WIDTH), torch.eye(VOCAB_SIZE)
    embedding = top_k_embedding(hidden, Readout(weight), table, 1.0, top_k)
    torch.testing.assert_close(embedding.sum(-1), torch.ones(4))
    assert (embedding > 0).sum(-1).tolist() == [top_k] * 4


@pytest.mark.parametrize("padding", ["zeros", "shut out"])
@pytest.mark.parametrize("top_k", [None, 17, VOCAB_SIZE], ids="K={}".format)
def test_rows_that_pad_the_vocabulary_are_predictions_too(top_k, padding):
    """As in Pythia, whose 50304 rows hold 50277 tokens. A bias of minus infinity shuts them out without a NaN."""
    tensors = leaves(20, torch.float64, bias=True)
    with torch.no_grad():
        tensors[1][-5:] = 0
        tensors[2][-5:] = 0 if padding == "zeros" else -torch.inf
    check_against(
        tensors,
        lambda h, w, b, e: fast(h, Readout(w, b), e, 1.0, top_k),
        lambda h, w, b, e: plain(h, Readout(w, b), e, 1.0, top_k),
        TOLERANCE[torch.float64],
    )
    if top_k != 17:
        counted = tensors[3].grad[-5:].abs().max() > 0
        assert counted == (padding == "zeros")


def test_all_of_the_vocabulary_is_the_whole_vocabulary():
    hidden, weight, _, table = leaves(40, torch.float64)
    torch.testing.assert_close(
        top_k_embedding(hidden, Readout(weight), table, 1.0, VOCAB_SIZE),
        vocabulary_embedding(hidden, Readout(weight), table, 1.0),
    )


@pytest.mark.parametrize("top_k", [None, 17], ids="K={}".format)
def test_twice_gives_the_same_bits(top_k):
    tensors = leaves(63, torch.float32)
    results = []
    for _ in range(2):
        for tensor in tensors:
            if tensor is not None:
                tensor.grad = None
        result = fast(tensors[0], Readout(tensors[1]), tensors[3], 1.0, top_k)
        result.square().sum().backward()
        results.append([result, *(tensor.grad for tensor in tensors if tensor is not None)])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("top_k", [None, 17], ids="K={}".format)
def test_recomputed_under_gradient_checkpointing(top_k):
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(0)
        hidden, weight, _, table = leaves(33, torch.float64)

        def twice(hidden, weight, table):
            once = fast(hidden, Readout(weight), table, 1.0, top_k)
            return fast(once, Readout(weight), table, 1.0, top_k)

        if recompute:
            result = checkpoint(twice, hidden, weight, table, use_reentrant=False)
        else:
            result = twice(hidden, weight, table)
        result.square().sum().backward()
        gradients.append([hidden.grad, weight.grad, table.grad])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


class Operations(TorchDispatchMode):
    """The names of all operations of torch that run within."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(str(function))
        return function(*args, **(kwargs or {}))


class LargestTensor(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation puts out."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if torch.is_tensor(tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


FUNCTIONS = {
    "whole vocabulary": lambda h, w, e: vocabulary_embedding(h, Readout(w), e, 1.0).sum(),
    "top-17": lambda h, w, e: top_k_embedding(h, Readout(w), e, 1.0, 17).sum(),
    "loss": lambda h, w, e: linear_causal_lm_loss(h[None], Readout(w), torch.arange(len(h))[None] % VOCAB_SIZE),
}


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_no_tensor_of_tokens_by_vocabulary(function, monkeypatch):
    monkeypatch.setitem(pondering_vocabulary.CHUNK_ELEMENTS, "cpu", 16 * VOCAB_SIZE)
    hidden, weight, _, table = leaves(257, torch.float32)
    with LargestTensor() as largest:
        function(hidden, weight, table).backward()
    assert largest.elements <= 257 * WIDTH  # hidden states; a chunk of scores and the weights are smaller
    with LargestTensor() as largest:
        plain(hidden, Readout(weight), table, 1.0, None).sum().backward()
    assert largest.elements == 257 * VOCAB_SIZE, "the measure does not see what the plain embedding keeps"


class Shapes(TorchDispatchMode):
    """The shapes of all tensors that operations make, views left out."""

    def __init__(self):
        super().__init__()
        self.made, self.products = set(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.products += function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
        if torch.is_tensor(result) and not function.is_view:
            self.made.add(tuple(result.shape))
        return result


WITHOUT_GRADIENTS = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode, "frozen": nullcontext}


@pytest.mark.parametrize("without", WITHOUT_GRADIENTS)
def test_a_loss_that_nobody_differentiates_makes_no_gradients(without):
    hidden, weight, bias, _ = leaves(257, torch.float32, bias=True)
    if without == "frozen":
        hidden, weight, bias = (tensor.detach() for tensor in (hidden, weight, bias))
    labels = torch.arange(257)[None] % VOCAB_SIZE
    with WITHOUT_GRADIENTS[without](), Shapes() as shapes:
        loss = linear_causal_lm_loss(hidden[None], Readout(weight, bias), labels)
    assert not shapes.made & {tuple(tensor.shape) for tensor in (hidden, weight, bias)}
    assert shapes.products <= 1  # inference mode shows none
    assert not loss.requires_grad
    expected = linear_causal_lm_loss(hidden.clone()[None], Readout(weight, bias), labels)
    torch.testing.assert_close(loss.clone(), expected)


def test_a_loss_makes_only_the_gradients_that_are_needed():
    hidden, weight, bias, _ = leaves(257, torch.float32, bias=True)
    labels = torch.arange(257)[None] % VOCAB_SIZE
    with Shapes() as shapes:
        loss = linear_causal_lm_loss(hidden[None], Readout(weight.detach(), bias.detach()), labels)
        loss.backward()
    assert tuple(hidden.shape) in shapes.made
    assert not shapes.made & {tuple(weight.shape), tuple(bias.shape)}
    assert shapes.products == 2


LOSS_ARGUMENTS = {
    "mean": {},
    "of several batches": {"num_items_in_batch": 57},
    "of several batches, a tensor": {"num_items_in_batch": torch.tensor(57)},
    "another ignored label": {"ignore_index": 7},
}


@pytest.mark.usefixtures("_chunked")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("arguments", LOSS_ARGUMENTS.values(), ids=LOSS_ARGUMENTS)
def test_loss_equals_plain(dtype, head, arguments):
    settings = {key: value for key, value in head.items() if key != "bias"}
    labels = torch.randint(0, VOCAB_SIZE, (3, 21))
    labels[0, :9] = arguments.get("ignore_index", -100)
    hidden, weight, bias, _ = leaves(63, dtype, bias=head.get("bias", False))

    def linear(hidden, weight, bias, table):
        readout = Readout(weight, bias, **settings)
        return linear_causal_lm_loss(hidden.view(3, 21, -1), readout, labels, **arguments)

    def whole(hidden, weight, bias, table):
        readout = Readout(weight, bias, **settings)
        return causal_lm_loss(readout.finish(readout.scores(hidden.view(3, 21, -1))), labels, **arguments)

    check_against((hidden, weight, bias, None), linear, whole, TOLERANCE[dtype])


def test_loss_gradcheck():
    hidden, weight, bias = (
        torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in [(2, 4, 5), (11, 5), (11,)]
    )
    labels = torch.tensor([[1, 2, -100, 4], [9, 10, 0, 3]])
    assert torch.autograd.gradcheck(
        lambda h, w, b: linear_causal_lm_loss(h, Readout(w, b, 2.0, 0.5), labels), (hidden, weight, bias)
    )


def test_loss_backward_twice_through_one_graph():
    hidden, weight, _, _ = leaves(20, torch.float64)
    loss = linear_causal_lm_loss(hidden[None], Readout(weight), torch.randint(0, VOCAB_SIZE, (1, 20)))
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(loss, (hidden, weight)), first)


def test_loss_with_labels_already_shifted():
    hidden, weight, _, _ = leaves(20, torch.float64)
    labels = torch.randint(0, VOCAB_SIZE, (2, 10))
    shifted = torch.cat([labels[:, 1:], torch.full((2, 1), -100)], dim=1)
    one = linear_causal_lm_loss(hidden.view(2, 10, -1), Readout(weight), labels)
    assert torch.equal(one, linear_causal_lm_loss(hidden.view(2, 10, -1), Readout(weight), None, shift_labels=shifted))


def test_a_scaled_loss_scales_its_gradients():
    """As under gradient accumulation or a gradient scaler."""
    hidden, weight, _, _ = leaves(20, torch.float64)
    labels = torch.randint(0, VOCAB_SIZE, (1, 20))
    gradients = []
    for factor in (1.0, 3.0):
        hidden.grad = weight.grad = None
        (factor * linear_causal_lm_loss(hidden[None], Readout(weight), labels)).backward()
        gradients.append((hidden.grad, weight.grad))
    torch.testing.assert_close(tuple(3 * gradient for gradient in gradients[0]), gradients[1])


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("num_rows", "vocab_size", "width", "top_k"), [(40, 1000, 192, 3), (33, 997, 96, 5), (3, 997, 96, 5)]
)
def test_tile_by_tile_finds_what_topk_finds(num_rows, vocab_size, width, top_k, dtype, bias):
    hidden = torch.randn(num_rows, WIDTH).to(dtype)
    weight = (torch.randn(vocab_size, WIDTH) / 3).to(dtype)
    weight[700:706] = weight[3]  # equal scores in different tiles
    readout = Readout(weight, torch.randn(vocab_size).to(dtype) if bias else None)
    scores = readout.scores(hidden)
    # The width of a tile is this function's only: outside it follows from the machine's caches.
    values, token_ids = _largest_in_tiles(hidden, readout, top_k, width)
    torch.testing.assert_close(values.sort().values, scores.topk(top_k).values.sort().values)
    torch.testing.assert_close(scores.gather(1, token_ids), values)
    assert all(len(set(row)) == top_k for row in token_ids.tolist())


TOKEN, ROW = torch.arange(1000), torch.arange(40).unsqueeze(1)
# What becomes of random scores (40, 1000), of which five tiles take every fifth token each, and in how many rows the
# floor guessed from the first tile for K = 60 must be too high.
UNFAIR_TILES = {
    "ascending": (lambda scores: scores.sort().values, 0),
    "descending": (lambda scores: scores.sort(descending=True).values, 0),
    "large ones at the end": (lambda scores: scores + 9 * (TOKEN > 980), 0),
    "large ones in the first tile": (lambda scores: scores + 9 * (TOKEN % 5 == 0), 40),
    "large ones in the last tile": (lambda scores: scores + 9 * (TOKEN % 5 == 4), 0),
    "larger from tile to tile": (lambda scores: scores + 9 * (TOKEN % 5), 0),
    "one row's large ones in the last tile": (lambda scores: scores + 9 * (TOKEN % 5 == 4) * (ROW == 7), 0),
    "one row's large ones in the first tile": (lambda scores: scores + 9 * (TOKEN % 5 == 0) * (ROW == 7), 1),
    "constant": (lambda scores: scores * 0, 40),
    "one row is constant": (lambda scores: scores * (ROW != 7), 1),
    "equal ones": (lambda scores: scores.mul(8).round(), None),
    "not a number in one row": (lambda scores: scores.where(ROW != 7, math.nan), 1),
}


def work_in_tiles(hidden, readout, top_k):
    """What is found in five tiles, and how often each score was computed on average: 1 where no row is done again."""
    with FlopCounterMode(display=False) as counter:
        found = _largest_in_tiles(hidden, readout, top_k, len(readout.weight) // 5)
    return *found, counter.get_total_flops() / (2 * readout.weight.numel() * len(hidden))


@pytest.mark.parametrize("top_k", [1, 10, 60])
@pytest.mark.parametrize(("change", "too_high"), UNFAIR_TILES.values(), ids=UNFAIR_TILES)
def test_tiles_that_are_no_fair_samples(change, too_high, top_k):
    scores = change(torch.randn(40, 1000))
    hidden, readout = torch.eye(40), Readout(scores.nan_to_num(7.0).t().contiguous())
    hidden[scores.isnan().any(-1)] = math.nan
    values, token_ids, work = work_in_tiles(hidden, readout, top_k)
    assert torch.equal(values.sort().values.nan_to_num(), scores.topk(top_k).values.sort().values.nan_to_num())
    assert torch.equal(scores.gather(1, token_ids).nan_to_num(), values.nan_to_num())
    assert all(len(set(row)) == top_k for row in token_ids.tolist())
    if top_k == 60 and too_high is not None:
        assert work == pytest.approx(1 + too_high / 40)


@pytest.mark.parametrize("top_k", [1, 10, 60])
def test_fair_samples_are_not_done_again(top_k):
    assert work_in_tiles(torch.randn(500, WIDTH), Readout(torch.randn(1000, WIDTH)), top_k)[2] == 1


@pytest.mark.parametrize("allowed", [3, 59, 60, 200])
def test_tiles_where_most_tokens_are_forbidden(allowed):
    """By a bias of minus infinity; fewer than K are left, or just enough."""
    bias = torch.full((1000,), -math.inf)
    bias[torch.randperm(1000)[:allowed]] = 0
    hidden, readout = torch.randn(40, WIDTH), Readout(torch.randn(1000, WIDTH), bias)
    scores = readout.scores(hidden)
    values, token_ids = _largest_in_tiles(hidden, readout, 60, 200)
    torch.testing.assert_close(values.sort().values, scores.topk(60).values.sort().values)
    torch.testing.assert_close(scores.gather(1, token_ids), values)
    assert all(len(set(row)) == 60 for row in token_ids.tolist())


def test_tiles_that_get_larger_and_larger_are_given_up(monkeypatch):
    """All of every tile lies above what was seen before: few of them wait at a time, and chunks take over."""
    monkeypatch.setitem(pondering_vocabulary.CHUNK_ELEMENTS, "cpu", 40 * 64)
    scores = torch.randn(40, 63 * 32) + 9 * (torch.arange(63 * 32) % 63)
    hidden, readout = torch.eye(40).repeat(5, 1), Readout(scores.t().contiguous())
    with LargestTensor() as largest, FlopCounterMode(display=False) as counter:
        values, _ = _largest_in_tiles(hidden, readout, 4, 32)
    assert torch.equal(values.sort().values, scores.topk(4).values.sort().values.repeat(5, 1))
    tiles = counter.get_total_flops() / (2 * 200 * 32 * 40)
    assert 63 + 2 < tiles < 63 + 10
    assert largest.elements <= readout.weight.numel() < 31 * 200 * 32  # as many tiles would wait before the last look


@pytest.mark.parametrize("token", range(6))
def test_what_is_not_a_number_is_not_lost_in_a_tile(token):
    """Whichever of five tiles it lies in: as for topk, it is the largest of all."""
    weight = torch.randn(1000, WIDTH)
    weight[token] = math.nan
    hidden, readout = torch.randn(40, WIDTH), Readout(weight)
    values, token_ids = _largest_in_tiles(hidden, readout, 10, 200)
    assert values.isnan().sum(-1).tolist() == [1] * 40
    assert torch.equal(token_ids[values.isnan()], torch.full((40,), token))
    expected = readout.scores(hidden).topk(10).values
    torch.testing.assert_close(values.nan_to_num(99).sort().values, expected.nan_to_num(99).sort().values)


@pytest.mark.parametrize("all_again", [False, True])
def test_tiles_give_values_and_gradients(all_again, monkeypatch):
    monkeypatch.setitem(pondering_vocabulary.CHUNK_ELEMENTS, "cpu", 960 * 40)
    shapes = [(40, WIDTH), (997, WIDTH), (997,), (997, WIDTH)]
    tensors = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    if all_again:  # the first of four tiles holds all large ones
        tensors[2].data[::4] += 99
    check_against(
        tensors,
        lambda h, w, b, e: fast(h, Readout(w, b), e, 5.0, 60),
        lambda h, w, b, e: plain(h, Readout(w, b), e, 5.0, 60),
        TOLERANCE[torch.float64],
    )


def test_tiles_are_taken_where_the_scores_would_be_large(monkeypatch):
    monkeypatch.setitem(pondering_vocabulary.CHUNK_ELEMENTS, "cpu", 64 * 50)
    hidden, weight, _, table = leaves(50, torch.float64)
    with LargestTensor() as largest, FlopCounterMode(display=False) as counter:
        embedding = top_k_embedding(hidden, Readout(weight), table, 1.0, 3)
    assert largest.elements <= 64 * 50 < 50 * VOCAB_SIZE
    assert counter.get_flop_counts()["Global"][torch.ops.aten.mm] == 2 * 50 * weight.numel()  # each score but once
    torch.testing.assert_close(embedding, plain(hidden, Readout(weight), table, 1.0, 3))


@pytest.mark.parametrize("rows", [1, 2, 7, 32, 33])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("threads", [1, 3])
def test_linear_layers_of_few_rows(rows, dtype, threads, monkeypatch):
    """Every linear layer that runs within; many rows and other dtypes stay as they are."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    counted = []
    on_their_side = cpu.few_rows_product
    monkeypatch.setattr(cpu, "few_rows_product", lambda *a: counted.append(1) or on_their_side(*a))
    layers = torch.nn.Sequential(torch.nn.Linear(1024, 320), torch.nn.GELU(), torch.nn.Linear(320, 129, bias=False))
    layers, states = layers.to(dtype), torch.randn(rows, 1, 1024).to(dtype)
    with torch.no_grad():
        expected = layers(states)
        for context in (decoder_context, head_context):
            with context(states):
                torch.testing.assert_close(layers(states), expected)
    assert len(counted) == (4 if rows < 33 and dtype == torch.float32 else 0)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7, 16])
@pytest.mark.parametrize("threads", [1, 3, 200])
def test_sums_of_few_rows(rows, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    weights, table = torch.rand(rows, VOCAB_SIZE), torch.randn(VOCAB_SIZE, WIDTH)
    with torch.no_grad():
        torch.testing.assert_close(cpu.few_rows_sum(weights, table), weights @ table)


@pytest.mark.parametrize("threads", [1, 3, 200])
def test_a_layer_with_fewer_outputs_than_threads(threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    states = torch.randn(1, 1, 1024)
    for outputs in (8, 1, 0):
        layer = torch.nn.Linear(1024, 8)
        layer.weight.data, layer.bias.data = layer.weight[:outputs], layer.bias[:outputs]
        with torch.no_grad(), decoder_context(states):
            torch.testing.assert_close(layer(states), states @ layer.weight.t() + layer.bias)


@pytest.mark.parametrize("tokens", [1, 3, 16, 17])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("is_tied", [False, True], ids=["untied", "tied"])
def test_logits_of_few_tokens_are_made_use_of(tokens, dtype, is_tied):
    """Few tokens meet head and table faster in two products, unless these are one matrix; the value is the same."""
    hidden, weight, _, table = leaves(tokens, dtype)
    readout, table = Readout(weight, factor=0.6), weight if is_tied else table
    with torch.no_grad():
        assert makes_use_of_logits(hidden, readout, table) == (not is_tied and tokens <= 16 and dtype == torch.float32)
        embedding = weighted_sum(probabilities(readout.finish(readout.scores(hidden)), 0.7), table)
    tolerance = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    torch.testing.assert_close(embedding, plain(hidden, readout, table, 0.7, None).detach(), **tolerance)


@pytest.mark.usefixtures("_kernel")
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_gradients_change_no_bit_of_the_value(tokens):
    hidden, weight, _, table = leaves(tokens, torch.float32)
    embedding = vocabulary_embedding(hidden, Readout(weight), table, 0.7)
    with torch.no_grad():
        assert torch.equal(vocabulary_embedding(hidden, Readout(weight), table, 0.7), embedding)


@pytest.mark.usefixtures("_kernel", "_chunked")
@pytest.mark.parametrize("top_k", [None, 1, 17], ids="K={}".format)
def test_no_tokens_at_all(top_k):
    hidden, weight, _, table = leaves(0, torch.float32)
    embedding = fast(hidden, Readout(weight), table, 1.0, top_k)
    embedding.sum().backward()
    assert embedding.shape == (0, WIDTH)
    assert hidden.grad.shape == (0, WIDTH)


@pytest.mark.parametrize("top_k", [None, 17], ids="K={}".format)
def test_matrices_that_lie_transposed(top_k):
    hidden, weight, _, table = leaves(40, torch.float64)
    lying = [tensor.detach().t().contiguous().t().requires_grad_() for tensor in (hidden, weight, table)]
    check_against(
        (lying[0], lying[1], None, lying[2]),
        lambda h, w, b, e: fast(h, Readout(w), e, 0.7, top_k),
        lambda h, w, b, e: plain(h, Readout(w), e, 0.7, top_k),
        TOLERANCE[torch.float64],
    )


def test_a_vector_as_weight_stays_as_it_is():
    states, weight = torch.randn(4, 1, 1024), torch.randn(1024)
    with torch.no_grad(), decoder_context(states):
        assert torch.nn.functional.linear(states, weight).shape == (4, 1)


@pytest.mark.parametrize("context", [decoder_context, head_context])
@pytest.mark.parametrize("case", ["gradients", "autocast", "whole texts", "narrow layers"])
def test_linear_layers_stay_as_they_are(case, context):
    with torch.no_grad():
        assert not isinstance(context(torch.randn(4, 1, 1024)), nullcontext)
    if case == "narrow layers" and context is head_context:
        return
    states = torch.randn(4, 3 if case == "whole texts" else 1, 24 if case == "narrow layers" else 1024)
    with torch.set_grad_enabled(case == "gradients"), torch.autocast("cpu", torch.bfloat16, case == "autocast"):
        assert isinstance(context(states), nullcontext)


@pytest.mark.parametrize("elements", [2**24, 3 * VOCAB_SIZE], ids=["one chunk", "chunks"])
def test_bags_whose_weights_need_gradients_in_half_precision(elements, monkeypatch):
    """What GPUs take there, as torch has no kernel for them, gives what torch gives elsewhere."""
    monkeypatch.setitem(pondering_vocabulary.CHUNK_ELEMENTS, "cpu", elements)
    token_ids = torch.randint(VOCAB_SIZE, (7, 5))
    leaves = [torch.randn(VOCAB_SIZE, WIDTH), torch.rand(7, 5)]
    direction, found = torch.randn(7, WIDTH).double(), []
    for bags in (
        # Of itself it is taken on GPUs only.
        pondering_vocabulary_embedding._Bags.apply,
        lambda ids, table, weights: functional.embedding_bag(ids, table, per_sample_weights=weights, mode="sum"),
    ):
        table, weights = (leaf.double().requires_grad_() for leaf in leaves)
        result = bags(token_ids, table, weights)
        (result * direction).sum().backward()
        found.append((result, table.grad, weights.grad))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_chunks_are_larger_on_every_device_that_is_no_cpu():
    sizes = {}
    for device in ("cpu", "meta"):
        parts = list(pondering_vocabulary.chunks(torch.empty(10_000, 1, device=device), 50_304))
        assert parts[-1].stop >= 10_000
        sizes[device] = parts[0].stop
    assert 1 < sizes["cpu"] < sizes["meta"] < 10_000
