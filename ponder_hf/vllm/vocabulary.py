"""The pondering embedding over a vocabulary of which each process of tensor parallelism holds a part.

With logits z of all tokens v, t = sum_v softmax(z / temperature)_v E_v. Each of R processes has the logits of its own
part of the vocabulary, by the backbone's own head, and the same part of the embedding table:

    whole vocabulary   gathered: the largest logit and the sum of exponentials, 2 R numbers a token
    top K              gathered: the K largest logits, K R numbers a token
    both               summed over the processes: the part's share of t, d numbers a token

so no tensor of tokens times vocabulary leaves a process, and none larger than a chunk of tokens is made in one.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_gather,
    tensor_model_parallel_all_reduce,
)
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)

from ponder_hf.modeling import PonderingError
from ponder_hf.modeling.pondering_vocabulary import chunks, wide

from .checks import INSTEAD


class LogitsOfParts(LogitsProcessor):
    """vLLM's last step from hidden states to logits, which within `of_part` gives those of this process's part.

    Instances become it, so that the backbone's `compute_logits` does all that it does.
    """

    is_of_part = False

    def forward(self, lm_head: Any, hidden_states: torch.Tensor, embedding_bias: Any = None, **kwargs: Any) -> Any:
        """As vLLM's."""
        if self.is_of_part:
            kwargs["skip_gather"] = True
        return super().forward(lm_head, hidden_states, embedding_bias, **kwargs)

    @contextmanager
    def of_part(self) -> Iterator[None]:
        """Within it, logits are (n, the part of the vocabulary, padded), in every process."""
        self.is_of_part = True
        try:
            yield
        finally:
            self.is_of_part = False


class TableOfRows(VocabParallelEmbedding):
    """vLLM's embedding table, which hands rows that it is given on instead of looking tokens up.

    Instances become it. The backbone's `embed_input_ids` then does to a mixture of rows what it does to the rows of
    tokens after they were looked up (Gemma scales them).
    """

    def forward(self, input_: torch.Tensor) -> torch.Tensor:
        """input_: token ids of any shape, or rows (n, d)."""
        return input_ if input_.is_floating_point() else super().forward(input_)


class VocabularyEmbedding:
    """From hidden states of a pass to its pondering embedding, by the head and the table of a vLLM model.

    Args:
        backbone: the model, of vLLM's. Its table and its last step to logits become subclasses of theirs.
        vocab_size: V.
        temperature: of the softmax.
        top_k: K, or None for the whole vocabulary.
        name: under which the compiled graph finds this.
        layers_by_name: where it is found, `compilation_config.static_forward_context`.

    Raises:
        PonderingError: the backbone's head and table cannot be taken apart, or are cut in different places.
    """

    def __init__(
        self,
        backbone: Any,
        vocab_size: int,
        temperature: float,
        top_k: int | None,
        name: str,
        layers_by_name: dict[str, Any],
    ) -> None:
        self.backbone, self.temperature, self.name = backbone, temperature, name
        self.top_k = None if top_k == vocab_size else top_k
        self.processor = _only_one(backbone, LogitsProcessor, "step from hidden states to logits")
        self.table = _only_one(backbone, VocabParallelEmbedding, "embedding table", but=ParallelLMHead)
        heads = [module for module in backbone.modules() if isinstance(module, ParallelLMHead)]
        if not isinstance(self.table.quant_method, UnquantizedEmbeddingMethod):
            raise PonderingError("a quantised embedding table cannot ponder in vLLM: quantise all but the embedding")
        for part in (self.table, *heads):
            if (part.org_vocab_size, part.num_embeddings) != (vocab_size, vocab_size):
                raise PonderingError(
                    f"{type(backbone).__name__} of this vLLM has a vocabulary of {part.num_embeddings} entries, the "
                    f"model {vocab_size}"
                )
            if part.shard_indices != self.table.shard_indices:
                raise PonderingError("head and embedding table are cut in different places by this vLLM")
        self.num_rows = self.table.shard_indices.num_org_elements
        self.processor.__class__ = LogitsOfParts
        table_class = type(self.table)
        # Before VocabParallelEmbedding in the order of methods, and after what a subclass of it does to the rows.
        self.table.__class__ = (
            TableOfRows
            if table_class is VocabParallelEmbedding
            else type(table_class.__name__, (table_class, TableOfRows), {})
        )
        layers_by_name[name] = self

    def __call__(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """hidden_states: (T, d_h). Returns t (T, d), as the backbone feeds embeddings in."""
        rows = torch.ops.ponder_hf.mixture_of_rows(hidden_states, self.table.embedding_dim, self.name)
        return self.backbone.embed_input_ids(rows)

    def verify(self) -> None:
        """Hold the backbone's way to embed tokens against its table, whose weights must be there.

        Raises:
            PonderingError: rows of the table are not what the backbone makes embeddings from.
        """
        ids = torch.arange(min(8, self.table.num_embeddings), device=self.table.weight.device)
        with torch.no_grad():
            rows = VocabParallelEmbedding.forward(self.table, ids)
            expected, found = self.backbone.embed_input_ids(ids), self.backbone.embed_input_ids(rows)
        if found.shape != expected.shape or not torch.equal(found, expected):
            raise PonderingError(
                f"{type(self.backbone).__name__} of this vLLM embeds something else than rows of its table: {INSTEAD}"
            )

    def mixture_of_rows(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The weighted sum of rows of the table: (T, d_h) to (T, d)."""
        mixture = hidden_states.new_empty(len(hidden_states), self.table.embedding_dim, dtype=self.table.weight.dtype)
        of_chunk = self._whole if self.top_k is None else self._largest
        for part in chunks(hidden_states, self.table.num_embeddings_per_partition):
            mixture[part] = of_chunk(hidden_states[part])
        return mixture

    def _logits(self, hidden_states):
        # (n, rows of this part), in float32.
        with self.processor.of_part():
            logits = self.backbone.compute_logits(hidden_states)
        logits = wide(logits[:, : self.num_rows])
        return logits if self.temperature == 1 else logits / self.temperature

    def _whole(self, hidden_states):
        logits, table = self._logits(hidden_states), self.table.weight[: self.num_rows]
        if get_tensor_model_parallel_world_size() == 1:
            return torch.softmax(logits, dim=-1).to(table.dtype) @ table
        if self.num_rows:
            # Finite where every token of this part is forbidden (-inf), as differences of infinities are not a number.
            largest = logits.amax(-1, keepdim=True).clamp_min_(torch.finfo(logits.dtype).min)
            total = (logits - largest).exp_().sum(-1, keepdim=True)
        else:  # of a vocabulary so small that padding is all that is left
            largest, total = logits.new_full((len(logits), 1), -torch.inf), logits.new_zeros(len(logits), 1)
        gathered = tensor_model_parallel_all_gather(torch.cat([largest, total], dim=-1), dim=-1)
        maxima, totals = gathered[:, 0::2], gathered[:, 1::2]
        largest = maxima.amax(-1, keepdim=True)
        total = (totals * (maxima - largest).exp()).sum(-1, keepdim=True)
        weights = logits.sub_(largest).exp_().div_(total)
        return tensor_model_parallel_all_reduce(weights.to(table.dtype) @ table)

    def _largest(self, hidden_states):
        logits, table = self._logits(hidden_states), self.table.weight
        scores, rows = logits.topk(min(self.top_k, self.num_rows), dim=-1, sorted=False)
        if get_tensor_model_parallel_world_size() == 1:
            return _weighted_rows(table, rows, torch.softmax(scores, dim=-1))
        missing = (0, self.top_k - scores.shape[1])
        scores, rows = functional.pad(scores, missing, value=-torch.inf), functional.pad(rows, missing)
        scores, places = tensor_model_parallel_all_gather(scores, dim=-1).topk(self.top_k, dim=-1)
        places -= get_tensor_model_parallel_rank() * self.top_k
        is_own = (places >= 0) & (places < self.top_k)
        weights = torch.softmax(scores, dim=-1).mul_(is_own)
        rows = rows.gather(-1, places.clamp_(0, self.top_k - 1))
        return tensor_model_parallel_all_reduce(_weighted_rows(table, rows, weights))


def _weighted_rows(table, rows, weights):
    return functional.embedding_bag(rows, table, per_sample_weights=weights.to(table.dtype), mode="sum")


def _only_one(backbone: nn.Module, kind: type, meaning: str, but: tuple | type = ()) -> Any:
    found = [module for module in backbone.modules() if isinstance(module, kind) and not isinstance(module, but)]
    if len(found) != 1:
        raise PonderingError(
            f"{type(backbone).__name__} of this vLLM has {len(found)} modules that may be its {meaning}, where "
            f"pondering needs exactly one: {INSTEAD}"
        )
    return found[0]


# One node in the compiled graph, since the number of chunks depends on the number of tokens.
@torch.library.custom_op("ponder_hf::mixture_of_rows", mutates_args=())
def _mixture_of_rows(hidden_states: torch.Tensor, width: int, name: str) -> torch.Tensor:
    return get_forward_context().no_compile_layers[name].mixture_of_rows(hidden_states)


@_mixture_of_rows.register_fake
def _(hidden_states: torch.Tensor, width: int, name: str) -> torch.Tensor:
    return hidden_states.new_empty(hidden_states.shape[0], width)
