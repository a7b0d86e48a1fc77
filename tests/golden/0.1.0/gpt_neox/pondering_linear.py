"""Linear layers over few rows on a CPU, as decoding has them.

BLAS libraries pack the weight for a product x W^T of a few rows, which takes longer than the product. W x^T, the same
numbers turned on their side, is computed without. For a single row they use one thread; cut into a part a thread, the
weight is read by all of them.
"""

from contextlib import nullcontext

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode


_MOST_ROWS = 32
# Narrower layers are so quick that looking at each call of a decoder costs more than it saves.
_LEAST_WIDTH, _LEAST_WIDTH_OF_ONE_ROW = 512, 1024


def is_few(states):
    """Whether (..., d) has so few rows that few_rows_linear may be faster than functional.linear."""
    return (
        states.device.type == "cpu"
        and states.dtype == torch.float32
        and 0 < states.numel() <= _MOST_ROWS * states.shape[-1]
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


def few_rows_linear(states, weight, bias=None):
    """functional.linear of few rows: (..., d), (V, d), (V,) to (..., V)."""
    columns = states.reshape(-1, states.shape[-1]).t()
    if columns.shape[1] == 1:
        if torch.get_num_threads() == 1 or len(weight) < 2 or not weight.is_contiguous():
            return functional.linear(states, weight, bias)
        product = _one_column(weight, columns, min(torch.get_num_threads(), len(weight)))
        product = product if bias is None else product + bias.unsqueeze(1)
    else:
        product = weight @ columns if bias is None else torch.addmm(bias.unsqueeze(1), weight, columns)
    return product.t().contiguous().view(*states.shape[:-1], -1)


def _one_column(weight, column, num_parts):
    even = len(weight) - len(weight) % num_parts
    parts = weight[:even].view(num_parts, -1, weight.shape[1])
    product = torch.bmm(parts, column.expand(num_parts, -1, -1)).view(-1, 1)
    return product if even == len(weight) else torch.cat([product, weight[even:] @ column])


def few_rows_sum(weights, table):
    """weights @ table of few rows: (n, V), (V, d) to (n, d).

    A part of the table for each thread, since BLAS libraries give a product of so few rows to one; and rows by fours,
    as three cost more than four.
    """
    num_rows, num_parts = len(weights), min(torch.get_num_threads(), len(table))
    if num_rows > 1 and num_rows % 4:
        weights = functional.pad(weights, (0, 0, 0, -num_rows % 4))
    even = len(table) - len(table) % num_parts
    parts = weights[:, :even].view(len(weights), num_parts, -1).transpose(0, 1)
    total = torch.bmm(parts, table[:even].view(num_parts, -1, table.shape[1])).sum(0)
    if even < len(table):
        total += weights[:, even:] @ table[even:]
    return total[:num_rows]


class _OnTheirSide(TorchFunctionMode):
    """Within it, every linear layer that a backbone runs over few rows is computed by few_rows_linear."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is functional.linear and not kwargs:
            states, weight = args[:2]
            if type(weight) in (torch.Tensor, nn.Parameter) and weight.ndim == 2 and is_few(states):
                return few_rows_linear(*args)
        return function(*args, **(kwargs or {}))


def fast_layers(states):
    """A context to run a backbone's decoder in, on states (B, T, d).

    It changes nothing for more than one token a row, so that whole texts have the bits of the backbone's own forward.
    """
    num_rows, length, width = states.shape
    pays = length == 1 and width >= (_LEAST_WIDTH_OF_ONE_ROW if num_rows == 1 else _LEAST_WIDTH)
    return _OnTheirSide() if pays and is_few(states) else nullcontext()


def fast_head(states):
    """A context to run a backbone's head in, on states (B, T, d) or (n, d), n tokens; as fast_layers, of any width."""
    is_decoding = states.ndim == 2 or states.shape[1] == 1
    return _OnTheirSide() if is_decoding and is_few(states) else nullcontext()
