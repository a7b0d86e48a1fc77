"""Linear layers over few rows on a CPU, as decoding a batch or a wave of passes has them.

BLAS libraries pack the weight for a product x W^T of a few rows, which takes longer than the product. W x^T, the same
numbers turned on their side, is computed without.
"""

from contextlib import nullcontext

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode


_MOST_ROWS = 64
_LEAST_WIDTH = 256  # narrower layers are so quick that looking at each call costs more


def is_few(states):
    """Whether (..., d) has so few rows that linear layers of them are faster on their side."""
    return (
        states.device.type == "cpu"
        and states.dtype == torch.float32
        and states.shape[-1] >= _LEAST_WIDTH
        and 1 < states.numel() // states.shape[-1] <= _MOST_ROWS
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


def few_rows_linear(states, weight, bias=None):
    """functional.linear of few rows: (..., d), (V, d), (V,) to (..., V)."""
    columns = states.reshape(-1, states.shape[-1]).t()
    product = weight @ columns if bias is None else torch.addmm(bias.unsqueeze(1), weight, columns)
    return product.t().reshape(*states.shape[:-1], -1)


class _OnTheirSide(TorchFunctionMode):
    """Within it, every linear layer that a backbone runs over few rows is computed by few_rows_linear."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is functional.linear and not kwargs:
            states, weight = args[:2]
            if type(weight) in (torch.Tensor, nn.Parameter) and is_few(states):
                return few_rows_linear(*args)
        return function(*args, **(kwargs or {}))


def fast_linear(states):
    """A context to run a backbone or its head in, given the states that it will run on: (B, T, d) or (n, d).

    It changes nothing for more than one token a row, so that whole texts have the bits of the backbone's own forward.
    """
    is_decoding = states.ndim == 2 or states.shape[1] == 1
    return _OnTheirSide() if is_decoding and is_few(states) else nullcontext()
