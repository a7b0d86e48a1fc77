"""A language-modelling head taken apart, and the numerics that all products with the vocabulary share.

Logits are `finish(hidden_states @ weight.T + bias)`. `chunks` cuts the tokens so that one chunk's scores stay small,
as no (tokens, vocabulary) tensor may be kept whole.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.nn.functional import linear


# Elements of the largest (tokens, vocabulary) tensor that lives at a time: in float32 24 MiB on a CPU, 256 on any
# other device. Smaller chunks read and write the (V, d) sums of gradients more often; larger ones cost memory and
# gain little time (docs/log.md).
CHUNK_ELEMENTS = {"cpu": 6 * 2**20, "other": 2**26}


def chunk_elements(device: torch.device) -> int:
    """The entry of CHUNK_ELEMENTS for a device."""
    return CHUNK_ELEMENTS.get(device.type, CHUNK_ELEMENTS["other"])


class replaceable:
    """A function that is computed in a faster way where `faster` is set and knows one, and otherwise as it stands.

    pondering_vocabulary_cpu.py sets `faster`, which takes the same arguments and gives None where it is no faster.
    """

    def __init__(self, function: Callable) -> None:
        functools.update_wrapper(self, function)
        self.function = function
        self.faster: Callable | None = None

    def __call__(self, *arguments: Any) -> Any:
        result = None if self.faster is None else self.faster(*arguments)
        return self.function(*arguments) if result is None else result


@replaceable
def product_with_head(hidden_states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """hidden_states @ weight.T + bias: (..., d), (V, d), (V,) or None to (..., V)."""
    return linear(hidden_states, weight, bias)


@dataclass(frozen=True)
class Readout:
    """What lies between hidden states and logits.

    weight: (V, d). bias: (V,) or None. cap: logits are cap * tanh(scores / cap) (Gemma), or None. factor: on the
    logits after that (Cohere, Granite); positive.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    cap: float | None = None
    factor: float = 1.0

    def to(self, dtype: torch.dtype) -> "Readout":
        """The same in another dtype."""
        return Readout(
            self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype), self.cap, self.factor
        )

    def scores(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(n, d) to (n, V), before cap and factor."""
        return product_with_head(hidden_states, self.weight, self.bias)

    def finish(self, scores: torch.Tensor) -> torch.Tensor:
        """Scores to logits, any shape; raised to float32 where they are half precision."""
        scores = wide(scores)
        if self.cap is not None:
            scores = torch.tanh(scores / self.cap) * self.cap
        return scores if self.factor == 1 else scores * self.factor

    def finish_backward(self, gradient: torch.Tensor, scores: torch.Tensor | None) -> torch.Tensor:
        """The gradient of the scores from that of the logits; overwrites `gradient`. No cap: reads no scores."""
        if self.cap is not None and scores is not None:
            gradient.mul_(1 - torch.tanh(scores.to(gradient.dtype) / self.cap).square_())
        return gradient if self.factor == 1 else gradient.mul_(self.factor)


def chunks(hidden_states: torch.Tensor, vocab_size: int) -> Iterator[slice]:
    """Slices over the tokens of (n, d) whose scores have at most CHUNK_ELEMENTS elements."""
    size = max(1, chunk_elements(hidden_states.device) // vocab_size)
    for first in range(0, len(hidden_states), size):
        yield slice(first, first + size)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums over many chunks are kept in: half precision would lose the small terms."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """Half precision raised to float32; any other as it is."""
    return tensor.to(wide_dtype(tensor.dtype))


def zero_gradients(tensors: Sequence[torch.Tensor | None], needed: Sequence[bool]) -> list[torch.Tensor | None]:
    """A buffer of zeros, in `wide_dtype`, for each tensor whose gradient is needed, None for the others."""
    return [
        torch.zeros_like(tensor, dtype=wide_dtype(tensor.dtype)) if is_needed and tensor is not None else None
        for tensor, is_needed in zip(tensors, needed, strict=True)
    ]


def compute_dtype(tensor: torch.Tensor) -> torch.dtype:
    """The dtype that autocast would multiply this tensor's matrices in, or its own where autocast is off."""
    device_type = tensor.device.type
    if torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return tensor.dtype


def add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """total += left^T right, in the dtype of `total`. total: (V, d), left: (n, V), right: (n, d)."""
    if total.dtype == left.dtype:
        total.addmm_(left.t(), right)
    else:
        total += left.t() @ right


def needs_plain_operations(*tensors: torch.Tensor | None) -> bool:
    """Whether someone differentiates these in a way that only torch's own operations know: torch.func, forward mode.

    Where torch has no such question, torch.func ends in torch's own words about `setup_context`.
    """
    if torch.compiler.is_compiling():
        return False
    is_transforming = getattr(torch._C, "_are_functorch_transforms_active", None)
    if is_transforming is not None and is_transforming():
        return True
    return any(tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)


def scaled(tensor: torch.Tensor, factor: float | torch.Tensor) -> torch.Tensor:
    """tensor * factor. A factor of 1 leaves every bit as it is, and costs nothing."""
    return tensor if not torch.is_tensor(factor) and factor == 1 else tensor * factor


class _OftenDifferentiable(torch.autograd.Function):
    """Gives `value` on. Backward, the gradient goes to `value`; or, where a graph of it is made, to the inputs."""

    @staticmethod
    def forward(ctx, plain, value, *inputs):
        ctx.plain = plain
        ctx.save_for_backward(*inputs)
        ctx.set_materialize_grads(False)
        return value

    @staticmethod
    def backward(ctx, gradient):
        needed = ctx.needs_input_grad[2:]
        if gradient is None or not torch.is_grad_enabled():
            return None, gradient, *[None] * len(needed)
        # Views, since head and embedding table may be one tensor.
        inputs = [tensor if tensor is None else tensor.view_as(tensor) for tensor in ctx.saved_tensors]
        wanted = [tensor for tensor, is_needed in zip(inputs, needed, strict=True) if is_needed]
        found = iter(torch.autograd.grad(ctx.plain(*inputs), wanted, gradient, create_graph=True))
        return None, None, *[next(found) if is_needed else None for is_needed in needed]


def often_differentiable(plain: Callable, value: torch.Tensor, *inputs: torch.Tensor | None) -> torch.Tensor:
    """`value`, which a function with a backward pass of its own gave for `inputs`, differentiable any number of times.

    That function's backward pass has no derivative: torch would take what it gives for constants, without a word where
    the gradient that comes in is one. With `create_graph` the gradients are therefore those of `plain(*inputs)`.

    Args:
        plain: computes the same by torch's own operations.
        value: must pass None on where its gradient is None.
        inputs: tensors or None.
    """
    if torch.compiler.is_compiling() or not value.requires_grad:  # a compiled graph refuses second derivatives itself
        return value
    return _OftenDifferentiable.apply(plain, value, *inputs)
