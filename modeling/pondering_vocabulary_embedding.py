"""The pondering embedding: a predicted distribution as a weighted sum of token embeddings.

`plain_embedding` says what it is. Where head and embedding are plain matrices, nothing of the size of tokens times
vocabulary is kept.

Over the whole vocabulary, chunks of tokens meet all of it one after another, and once more in the backward pass.
There, with g the gradient of t:

    dp = g E^T      dlogits = p * (dp - <g, t>) / temperature      dhidden = dscores W      dW = dscores^T hidden
    dE = p^T g

Over the K most probable tokens only K of V logits of a token carry a gradient. So the one product over the vocabulary,
which finds them, needs none, and everything after it is sparse: a bag of K rows of the embedding table forward, bags
of K rows of the head backward.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers import PreTrainedModel

from .configuration_pondering import PonderingConfig, check_vocabulary
from .pondering_backbone import backbone_logits, backbone_readout, bare_table, embedding_table, finish_logits
from .pondering_vocabulary import (
    Readout,
    add_product,
    chunks,
    compute_dtype,
    needs_plain_operations,
    often_differentiable,
    replaceable,
    scaled,
    wide,
    zero_gradients,
)


def plain_embedding(
    logits: torch.Tensor, table: torch.Tensor, temperature: float = 1.0, top_k: int | None = None
) -> torch.Tensor:
    """t = softmax(logits / temperature) @ table, or the same over the K largest logits only (renormalised).

    The softmax of half-precision logits is computed in float32. This is the plain reference, with autograd through
    everything.

    Args:
        logits: (..., V), what the backbone predicts.
        table: (V, d), every token's embedding as the backbone feeds it in.
        temperature: of the softmax, > 0.
        top_k: K, 1 <= K <= V, or None for the whole vocabulary.

    Returns:
        (..., d), in the dtype of `table`.
    """
    if top_k is None:
        return probabilities(logits, temperature).to(table.dtype) @ table
    scores, token_ids = wide(logits).topk(top_k, dim=-1)
    weights = probabilities(scores, temperature).to(table.dtype)
    return (weights.unsqueeze(-2) @ table[token_ids]).squeeze(-2)


def probabilities(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """The softmax of logits / temperature, in float32 or wider."""
    logits = wide(logits)
    return torch.softmax(logits if temperature == 1 else logits / temperature, dim=-1)


@replaceable
def weighted_sum(weights: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """weights @ table: (n, V), (V, d) to (n, d), in the dtype of `table`."""
    return weights.to(table.dtype) @ table


@replaceable
def makes_use_of_logits(
    hidden_states: torch.Tensor, readout: Readout, table: torch.Tensor, to_the_bit: bool = False
) -> bool:
    """Whether the embedding of hidden states (n, d_h) is computed faster from its logits, where these are there.

    to_the_bit: whether it must then be what vocabulary_embedding gives, and not only up to rounding.
    """
    return True


@replaceable
def vocabulary_sum(
    hidden_states: torch.Tensor, readout: Readout, table: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """vocabulary_embedding without gradients, where all arguments have one dtype.

    Returns:
        (embedding, normaliser): (n, d), and what vocabulary_gradients may need beside it, or None.
    """
    embedding = hidden_states.new_empty(len(hidden_states), table.shape[1])
    for part in chunks(hidden_states, len(table)):
        weights = probabilities(readout.finish(readout.scores(hidden_states[part])), temperature)
        embedding[part] = weighted_sum(weights, table)
    return embedding, None


@replaceable
def vocabulary_gradients(
    gradient: torch.Tensor,
    hidden_states: torch.Tensor,
    readout: Readout,
    table: torch.Tensor,
    temperature: float,
    embedding: torch.Tensor,
    normaliser: torch.Tensor | None,
    needs: Sequence[bool],
) -> tuple[torch.Tensor | None, ...]:
    """The gradients of hidden states, head, bias and table, from that of the embedding (n, d).

    Args:
        hidden_states, readout, table, temperature: what vocabulary_sum was given.
        embedding, normaliser: what it returned.
        needs: which of the four are needed; for the others there may be None.
    """
    dtype = hidden_states.dtype
    hidden_gradient: Any = torch.empty_like(hidden_states) if needs[0] else None
    buffers: Any = zero_gradients((readout.weight, readout.bias, table), needs[1:])
    weight_gradient, bias_gradient, table_gradient = buffers
    mean = (wide(gradient) * wide(embedding)).sum(-1, keepdim=True)
    for part in chunks(hidden_states, len(table)):
        scores: Any = readout.scores(hidden_states[part])
        weights = probabilities(readout.finish(scores), temperature)
        if readout.cap is None:  # nothing below reads them: two tensors of a chunk's size are alive, not three
            scores = None
        if needs[3]:
            add_product(table_gradient, weights.to(dtype), gradient[part])
        if not any(needs[:3]):
            continue
        score_gradient = wide(gradient[part] @ table.t()).sub_(mean[part]).mul_(weights).div_(temperature)
        del weights
        score_gradient = readout.finish_backward(score_gradient, scores)
        if needs[2]:
            bias_gradient += score_gradient.sum(0)
        score_gradient = score_gradient.to(dtype)
        if needs[0]:
            torch.mm(score_gradient, readout.weight, out=hidden_gradient[part])
        if needs[1]:
            add_product(weight_gradient, score_gradient, hidden_states[part])
    return hidden_gradient, *buffers


class _VocabularyEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_states, weight, bias, table, cap, factor, temperature):
        ctx.set_materialize_grads(False)
        ctx.settings = (cap, factor, temperature, compute_dtype(hidden_states))
        with torch.autocast(hidden_states.device.type, enabled=False):
            inputs = _VocabularyEmbedding.inputs(hidden_states, weight, bias, table, *ctx.settings)
            embedding, normaliser = vocabulary_sum(*inputs)
        ctx.save_for_backward(hidden_states, weight, bias, table, embedding, normaliser)
        return embedding

    @staticmethod
    def inputs(hidden_states, weight, bias, table, cap, factor, temperature, dtype):
        """What vocabulary_sum takes."""
        return hidden_states.to(dtype), Readout(weight, bias, cap, factor).to(dtype), table.to(dtype), temperature

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        if gradient is None:
            return (None,) * 7
        *tensors, embedding, normaliser = ctx.saved_tensors
        inputs = _VocabularyEmbedding.inputs(*tensors, *ctx.settings)
        gradients = vocabulary_gradients(
            gradient.to(embedding.dtype), *inputs, embedding, normaliser, ctx.needs_input_grad[:4]
        )
        found = (g if g is None else g.to(t.dtype) for g, t in zip(gradients, tensors, strict=True))
        return *found, None, None, None


def _plain_vocabulary_embedding(hidden_states, weight, bias, table, cap, factor, temperature, dtype):
    """The same with all probabilities at once, by operations that torch differentiates; the plain reference."""
    with torch.autocast(hidden_states.device.type, enabled=False):
        readout = Readout(weight, bias, cap, factor).to(dtype)
        logits = readout.finish(readout.scores(hidden_states.to(dtype)))
        return plain_embedding(logits, table.to(dtype), temperature)


def vocabulary_embedding(
    hidden_states: torch.Tensor, readout: Readout, table: torch.Tensor, temperature: float
) -> torch.Tensor:
    """softmax over the whole vocabulary, and the weighted sum of all embeddings.

    Args:
        hidden_states: (n, d_h), the last hidden states of a pass.
        readout: the head as a Readout.
        table: (V, d), a plain embedding matrix.
        temperature: > 0.

    Returns:
        (n, d), in the dtype that the product of `hidden_states` with the head has.
    """
    inputs = (hidden_states, readout.weight, readout.bias, table)
    settings = {"cap": readout.cap, "factor": readout.factor, "temperature": temperature}
    plain: Any = partial(_plain_vocabulary_embedding, **settings, dtype=compute_dtype(hidden_states))
    if needs_plain_operations(*inputs):
        return plain(*inputs)
    embedding = _VocabularyEmbedding.apply(*inputs, *settings.values())
    return often_differentiable(plain, embedding, *inputs)


@replaceable
def largest_of_head(hidden_states: torch.Tensor, readout: Readout, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The K largest scores of each token and their token ids, both (n, K); all scores are never there at once."""
    parts = [hidden_states[part] for part in chunks(hidden_states, len(readout.weight))] or [hidden_states]
    found = [readout.scores(part).topk(top_k, dim=-1, sorted=False) for part in parts]
    values, token_ids = (torch.cat(tensors) for tensors in zip(*found, strict=True))
    return values, token_ids


class _ChosenScores(torch.autograd.Function):
    """scores[n, k] = hidden_states[n] . weight[token_ids[n, k]] + bias[token_ids[n, k]], computed before."""

    @staticmethod
    def forward(ctx, hidden_states, weight, bias, token_ids, scores):
        ctx.save_for_backward(hidden_states, weight, bias, token_ids)
        ctx.set_materialize_grads(False)
        return scores

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        if gradient is None:
            return (None,) * 5
        hidden_states, weight, bias, token_ids = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        hidden_gradient = weight_gradient = bias_gradient = None
        with torch.enable_grad():
            # A bag of head rows, weighted by the scores' gradients, is the gradient of the hidden states; and the
            # gradient of that bag's rows, with the hidden states coming in from above, is the gradient of the head.
            rows = weight.detach().requires_grad_(needs_weight)
            bags = functional.embedding_bag(token_ids, rows, per_sample_weights=gradient.to(rows.dtype), mode="sum")
        if needs_hidden:
            hidden_gradient = bags.detach().to(hidden_states.dtype)
        if needs_weight:
            (weight_gradient,) = torch.autograd.grad(bags, rows, hidden_states.to(bags.dtype))
        if needs_bias:
            bias_gradient = torch.zeros_like(bias).index_add_(
                0, token_ids.flatten(), gradient.flatten().to(bias.dtype)
            )
        return hidden_gradient, weight_gradient, bias_gradient, None, None


class _Bags(torch.autograd.Function):
    """functional.embedding_bag with weights that need gradients; for half precision torch has no kernel on GPUs.

    token_ids, weights: (n, K). table: (V, d). Gives (n, d).
    """

    @staticmethod
    def forward(ctx, token_ids, table, weights):
        ctx.save_for_backward(token_ids, table, weights)
        return functional.embedding_bag(token_ids, table, per_sample_weights=weights, mode="sum")

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        token_ids, table, weights = ctx.saved_tensors
        table_gradient = weight_gradient = None
        if ctx.needs_input_grad[1]:
            with torch.enable_grad():
                rows = table.detach().requires_grad_()
                bags = functional.embedding_bag(token_ids, rows, per_sample_weights=weights.detach(), mode="sum")
            (table_gradient,) = torch.autograd.grad(bags, rows, gradient)
        if ctx.needs_input_grad[2]:
            weight_gradient = torch.empty_like(weights)
            for part in chunks(gradient, weights.shape[1] * table.shape[1]):
                weight_gradient[part] = (table[token_ids[part]] @ gradient[part].unsqueeze(-1)).squeeze(-1)
        return None, table_gradient, weight_gradient


def _weighted_bags(token_ids, table, weights):
    """(n, d), the weighted sums of rows of `table` (V, d). token_ids, weights: (n, K)."""
    if weights.requires_grad and weights.device.type != "cpu" and weights.dtype in (torch.float16, torch.bfloat16):
        return _Bags.apply(token_ids, table, weights)
    return functional.embedding_bag(token_ids, table, per_sample_weights=weights, mode="sum")


def _plain_top_k_embedding(hidden_states, weight, bias, table, token_ids, cap, factor, temperature, dtype):
    """The embedding of chosen tokens (n, K) by operations that torch differentiates: (n, K, d) tensors are kept."""
    with torch.autocast(hidden_states.device.type, enabled=False):
        rows, states = weight.to(dtype)[token_ids], hidden_states.to(dtype).unsqueeze(-1)
        scores = (rows @ states).squeeze(-1)
        if bias is not None:
            scores = scores + bias.to(dtype)[token_ids]
        weights = torch.softmax(Readout(weight, bias, cap, factor).finish(scores) / temperature, dim=-1)
        return (weights.to(table.dtype).unsqueeze(-2) @ table[token_ids]).squeeze(-2)


def top_k_embedding(
    hidden_states: torch.Tensor, readout: Readout, table: torch.Tensor, temperature: float, top_k: int
) -> torch.Tensor:
    """softmax over the K largest logits, and the weighted sum of their embeddings.

    Args:
        hidden_states, readout, table, temperature: as in vocabulary_embedding.
        top_k: 1 <= K <= V. Among equal logits any may be chosen.

    Returns:
        (n, d), in the dtype of `table`.
    """
    inputs = (hidden_states, readout.weight, readout.bias, table)
    settings = {"cap": readout.cap, "factor": readout.factor, "temperature": temperature}
    plain: Any = partial(_plain_top_k_embedding, **settings, dtype=compute_dtype(hidden_states))
    if needs_plain_operations(*inputs):
        return plain(*inputs, readout.scores(hidden_states).topk(top_k, dim=-1, sorted=False).indices)
    with torch.no_grad():
        scores, token_ids = largest_of_head(hidden_states, readout, top_k)
    scores = _ChosenScores.apply(*inputs[:3], token_ids, scores)
    weights = probabilities(readout.finish(scores), temperature).to(table.dtype)
    embedding = _weighted_bags(token_ids, table, weights)
    return often_differentiable(partial(plain, token_ids=token_ids), embedding, *inputs)


class PonderingEmbedding:
    """From the last hidden states of a pass to its pondering embedding, in the cheapest way that the backbone allows.

    Made anew for each forward pass, since modules may have been wrapped or replaced since.

    kernel: "top_k" or "vocabulary" where head and embedding are plain matrices, "plain" where they must be asked
        through their modules.
    """

    def __init__(self, backbone: PreTrainedModel, config: PonderingConfig) -> None:
        self.backbone = backbone
        self.config: Any = config
        check_vocabulary(config)  # which anyone may have changed
        self.readout: Any = backbone_readout(backbone)
        self.table: Any = bare_table(backbone)
        self.kernel = "plain"
        if self.readout is not None and self.table is not None:
            whole = config.pondering_top_k in (None, len(self.table[0]))
            self.kernel = "vocabulary" if whole else "top_k"
        self._all_rows: Any = None

    def makes_use_of_logits(self, hidden_states: torch.Tensor) -> bool:
        """Whether `of_logits` is the faster way for hidden states (n, d_h) where their logits cost little."""
        return self.kernel != "vocabulary" or makes_use_of_logits(hidden_states, self.readout, self.table[0])

    def logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(n, V) of hidden states (n, d_h), as the backbone computes them."""
        if self.readout is None:
            return backbone_logits(self.backbone, hidden_states)
        return finish_logits(self.readout.scores(hidden_states), self.backbone.config)

    def wide_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(n, V) of hidden states (n, d_h), in float32 or wider; raised before caps and factors."""
        if self.readout is None:
            return wide(backbone_logits(self.backbone, hidden_states))
        return self.readout.finish(self.readout.scores(hidden_states))

    def __call__(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """hidden_states: (B, T, d_h). Returns t of shape (B, T, d), before gate and `embedding_scale`."""
        temperature, top_k = self.config.pondering_temperature, self.config.pondering_top_k
        if self.kernel == "plain":
            return self.of_logits(backbone_logits(self.backbone, hidden_states))
        table, scale = self.table
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        if self.kernel == "top_k":
            embedding = top_k_embedding(flat, self.readout, table, temperature, top_k)
        else:
            embedding = vocabulary_embedding(flat, self.readout, table, temperature)
        return scaled(embedding.view(*hidden_states.shape[:-1], -1), scale)

    def of_logits(self, logits: torch.Tensor) -> torch.Tensor:
        """The same from logits (..., V); with gradients only where `kernel` is "plain"."""
        temperature, top_k = self.config.pondering_temperature, self.config.pondering_top_k
        if self.kernel == "plain":
            if self._all_rows is None:
                self._all_rows = embedding_table(self.backbone, logits.device)
            # With a device_map, head and embedding may lie on different devices.
            table = self._all_rows.to(logits.device)
            return plain_embedding(logits, table, temperature, top_k).to(self._all_rows.device)
        table, scale = self.table
        flat = logits.reshape(-1, logits.shape[-1])
        if self.kernel == "top_k":
            scores, token_ids = flat.topk(top_k, dim=-1, sorted=False)
            embedding = _weighted_bags(token_ids, table, probabilities(scores, temperature).to(table.dtype))
        else:
            embedding = weighted_sum(probabilities(flat, temperature), table)
        return scaled(embedding.view(*logits.shape[:-1], -1), scale)

    def with_logits(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The same without gradients, for one chunk of tokens, and the logits of the pass.

        Args:
            hidden_states: (n, d_h).

        Returns:
            t (n, d) as above, and the logits (n, V) in float32 or wider.
        """
        if self.readout is None:
            logits = backbone_logits(self.backbone, hidden_states)
            return self.of_logits(logits), wide(logits)
        scores = self.readout.scores(hidden_states)
        logits = self.readout.finish(scores)
        if self.kernel == "plain":
            return self.of_logits(finish_logits(scores, self.backbone.config)), logits
        if self.kernel == "top_k" or makes_use_of_logits(hidden_states, self.readout, self.table[0], True):
            return self.of_logits(logits), logits
        return self(hidden_states.unsqueeze(0))[0], logits


class PonderingGate(nn.Module):
    """g * t or G t, with a learned factor for each dimension or a learned matrix.

    From 0 on pondering changes nothing before training. The matrix learns at the model's own learning rate; factors
    from 0 on need a far higher one. Factors of 1 and -1 tell what is expected from what came: with no gate both are
    added in the same coordinates.
    """

    def __init__(self, kind: str, hidden_size: int) -> None:
        super().__init__()
        self.has_signs = kind == "random_signs"
        self.weight = nn.Parameter(torch.empty((hidden_size,) * (2 if kind == "zero_init_matrix" else 1)))
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """As before training. Signs are drawn from torch's random state."""
        if self.has_signs:
            self.weight.copy_(2 * torch.randint(2, self.weight.shape, device=self.weight.device) - 1)
        else:
            nn.init.zeros_(self.weight)

    def forward(self, embedding: torch.Tensor) -> torch.Tensor:
        """embedding: (..., d). Returns the same shape."""
        if self.weight.ndim == 1:
            return embedding * self.weight
        return functional.linear(embedding, self.weight)


def make_gate(kind: str, hidden_size: int) -> PonderingGate | None:
    """The gate that `pondering_gate` of a configuration names; None for "none"."""
    return None if kind == "none" else PonderingGate(kind, hidden_size)
