"""A training step of a small model as one CUDA graph: thousands of tiny kernels started by one call.

Such models compute for microseconds and wait for Python in between. A graph replays the kernels of the plain step.
"""

from collections.abc import Callable

import torch
from torch import nn


class CapturedUpdate:
    """`update` with its input's shape, recorded once and replayed. It changes model and optimiser in place.

    It must be made and called on one stream, and not on the default one.

    Args:
        update: of token ids (B, T); computes a loss and its gradients, and lets the optimiser take a step.
        model, optimizer: what it changes. The optimiser must be made with `capturable=True`.
        input_ids: (B, T), an example.
    """

    def __init__(
        self,
        update: Callable[[torch.Tensor], torch.Tensor],
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        input_ids: torch.Tensor,
    ):
        self.input_ids = input_ids.clone()
        before = [tensor.clone() for tensor in self._state(model, optimizer)]
        update(self.input_ids)  # makes the moments, and whatever libraries make at their first call
        optimizer.zero_grad()
        self.graph = torch.cuda.CUDAGraph()
        # On the stream that replays it: libraries keep a workspace for each stream, and other runs have other streams.
        with torch.cuda.graph(self.graph, stream=torch.cuda.current_stream()):
            self.loss = update(self.input_ids)
        # Recording computes nothing, but the warm-up did. What it made anew, moments and their count, began at 0.
        after = self._state(model, optimizer)
        before += [torch.zeros_like(tensor) for tensor in after[len(before) :]]
        for tensor, value in zip(after, before, strict=True):
            tensor.copy_(value)

    @staticmethod
    def _state(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
        """All tensors that a step changes, those of the optimiser last, in the order in which it made them."""
        moments = [
            tensor for state in optimizer.state.values() for tensor in state.values() if torch.is_tensor(tensor)
        ]
        return [*(parameter.data for parameter in model.parameters()), *moments]

    def __call__(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Take a step on token ids (B, T). The loss is a tensor that the next call overwrites."""
        self.input_ids.copy_(input_ids)
        self.graph.replay()
        return self.loss
