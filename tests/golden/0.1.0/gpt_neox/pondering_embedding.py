"""The pondering embedding: a predicted distribution as a weighted sum of token embeddings."""

import torch
from torch import nn

from .configuration_pondering import check_vocabulary
from .pondering_attention import can_attend
from .pondering_backbone import backbone_logits, backbone_readout, bare_table, embedding_table, finish_logits
from .pondering_topk import top_k_embedding, top_k_of_scores
from .pondering_vocabulary import makes_use_of_logits, probabilities, vocabulary_embedding, weighted_sum


def plain_embedding(logits, table, temperature=1.0, top_k=None):
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
    scores = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    if top_k is None:
        weights = torch.softmax(scores / temperature, dim=-1).to(table.dtype)
        return weights @ table
    scores, token_ids = scores.topk(top_k, dim=-1)
    weights = torch.softmax(scores / temperature, dim=-1).to(table.dtype)
    return (weights.unsqueeze(-2) @ table[token_ids]).squeeze(-2)


class PonderingEmbedding:
    """From the last hidden states of a pass to its pondering embedding, in the cheapest way that the backbone allows.

    Made anew for each forward pass, since modules may have been wrapped or replaced since.

    kernel: "top_k" or "vocabulary" (pondering_topk.py, pondering_vocabulary.py) where head and embedding are plain
        matrices, "plain" where they must be asked through their modules.
    """

    def __init__(self, backbone, config):
        self.backbone, self.config = backbone, config
        check_vocabulary(config)  # which anyone may have changed
        self.readout, self.table = backbone_readout(backbone), bare_table(backbone)
        self.kernel = "plain"
        if self.readout is not None and self.table is not None:
            whole = config.pondering_top_k in (None, len(self.table[0]))
            self.kernel = "vocabulary" if whole else "top_k"
        self._all_rows = None

    def makes_use_of_logits(self, hidden_states):
        """Whether `of_logits` is the faster way for hidden states (n, d_h) where their logits cost little."""
        return self.kernel != "vocabulary" or makes_use_of_logits(hidden_states, self.readout, self.table[0])

    def logits(self, hidden_states):
        """(n, V) of hidden states (n, d_h), as the backbone computes them."""
        if self.readout is None:
            return backbone_logits(self.backbone, hidden_states)
        return finish_logits(self.readout.scores(hidden_states), self.backbone.config)

    def wide_logits(self, hidden_states):
        """(n, V) of hidden states (n, d_h), in float32 or wider; raised before caps and factors."""
        if self.readout is None:
            return _wide(backbone_logits(self.backbone, hidden_states))
        return self.readout.finish(self.readout.scores(hidden_states))

    def __call__(self, hidden_states):
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
        return _scaled(embedding.view(*hidden_states.shape[:-1], -1), scale)

    def of_logits(self, logits):
        """The same from logits (..., V); with gradients only where `kernel` is "plain"."""
        temperature, top_k = self.config.pondering_temperature, self.config.pondering_top_k
        if self.kernel == "plain":
            if self._all_rows is None:
                self._all_rows = embedding_table(self.backbone, logits.device)
            # With a device_map, head and embedding may lie on different devices.
            table = self._all_rows.to(logits.device)
            return plain_embedding(logits, table, temperature, top_k).to(self._all_rows.device)
        table, scale = self.table
        if self.kernel == "top_k":
            return _scaled(plain_embedding(logits, table, temperature, top_k), scale)
        weights = probabilities(logits.reshape(-1, logits.shape[-1]), temperature)
        return _scaled(weighted_sum(weights, table).view(*logits.shape[:-1], -1), scale)

    def with_logits(self, hidden_states):
        """The same without gradients, for one chunk of tokens (pondering_readout.py), and the logits of the pass.

        Args:
            hidden_states: (n, d_h).

        Returns:
            t (n, d) as above, and the logits (n, V) in float32 or wider.
        """
        temperature, top_k = self.config.pondering_temperature, self.config.pondering_top_k
        if self.kernel == "plain":
            if self.readout is None:
                logits = backbone_logits(self.backbone, hidden_states)
                return self.of_logits(logits), _wide(logits)
            scores = self.readout.scores(hidden_states)
            return self.of_logits(finish_logits(scores, self.backbone.config)), self.readout.finish(scores)
        table, scale = self.table
        scores = self.readout.scores(hidden_states)
        logits = self.readout.finish(scores)
        if self.kernel == "top_k":
            embedding = _scaled(top_k_of_scores(scores, self.readout, table, temperature, top_k), scale)
        elif can_attend(hidden_states, self.readout, table):  # computes them once more, and is faster for all that
            embedding = _scaled(vocabulary_embedding(hidden_states, self.readout, table, temperature), scale)
        else:
            embedding = _scaled(probabilities(logits, temperature).to(table.dtype) @ table, scale)
        return embedding, logits


def _wide(logits):
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def _scaled(embedding, scale):
    return embedding if isinstance(scale, float) and scale == 1 else embedding * scale


class PonderingGate(nn.Module):
    """g * t, with a learned factor g that starts at 0: before training, pondering changes nothing."""

    def __init__(self, hidden_size):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(hidden_size))

    def forward(self, embedding):
        """embedding: (..., d). Returns the same shape."""
        return embedding * self.weight
