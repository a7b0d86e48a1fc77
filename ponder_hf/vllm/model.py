"""A pondering language model in vLLM: the loop over the passes, around vLLM's own model of the backbone.

See modeling/modeling_pondering.py for the equations. Everything that selects a pass is in one traced graph: vLLM drops
the guards of torch.compile, so a backbone that was compiled alone would run pass 0 for ever.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from vllm.compilation.decorators import support_torch_compile
from vllm.compilation.wrapper import TorchCompileWithNoGuardsWrapper
from vllm.config import VllmConfig
from vllm.model_executor.models.utils import AutoWeightsLoader, init_vllm_registered_model, maybe_prefix
from vllm.sequence import IntermediateTensors

from ponder_hf.modeling.pondering_vocabulary import scaled
from ponder_hf.modeling.pondering_vocabulary_embedding import make_gate

from .attention import CurrentPass, give_caches_to_passes
from .checks import check_engine
from .vocabulary import VocabularyEmbedding


def _compiles_its_backbone(vllm_config):
    """Whether vLLM would compile the backbone alone: not where its class or its kind of rotations cannot be."""
    layers = vllm_config.compilation_config.static_forward_context.values()
    backbone = next(layer.backbone for layer in layers if isinstance(layer, VocabularyEmbedding))
    return any(
        isinstance(module, TorchCompileWithNoGuardsWrapper) and not module.do_not_compile
        for module in backbone.modules()
    )


@support_torch_compile(enable_if=_compiles_its_backbone)
class PonderingForCausalLM(nn.Module):
    """A backbone of vLLM's that runs S + 1 times, each pass with a cache of its own, and perhaps a gate.

    Weights have the names of the checkpoint.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config, architecture = check_engine(vllm_config)
        self.config = config
        self._is_verified = False
        if hasattr(vllm_config.compilation_config, "fast_moe_cold_start"):
            # It counts on every layer of experts running once.
            vllm_config.compilation_config.fast_moe_cold_start = False
        self.backbone: Any = init_vllm_registered_model(
            vllm_config,
            prefix=maybe_prefix(prefix, "backbone"),
            hf_config=config.base_config,
            architectures=[architecture],
        )
        layers_by_name = vllm_config.compilation_config.static_forward_context
        self.current_pass = CurrentPass()
        give_caches_to_passes(self.backbone, config.pondering_steps + 1, self.current_pass, layers_by_name)
        self.embedding = VocabularyEmbedding(
            self.backbone,
            config.vocab_size,
            config.pondering_temperature,
            config.pondering_top_k,
            maybe_prefix(prefix, "pondering_embedding"),
            layers_by_name,
        )
        self.pondering_gate = make_gate(config.pondering_gate, self.embedding.table.embedding_dim)
        if self.pondering_gate is not None:
            self.pondering_gate.requires_grad_(False)

    def embed_input_ids(self, input_ids: torch.Tensor | None) -> torch.Tensor:
        """Token ids (T,) to embeddings (T, d) as the backbone feeds them in."""
        return self.backbone.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run passes 0 .. S over the tokens of a step.

        Args:
            input_ids: (T,), the tokens of all requests one after another; or inputs_embeds: (T, d).
            positions: (T,).
            intermediate_tensors: of pipeline parallelism, which is refused: always None.

        Returns:
            The last hidden states of the last pass, (T, d_h).
        """
        config = self.config
        if inputs_embeds is None:
            inputs_embeds = self.embed_input_ids(input_ids)
        hidden_inputs = scaled(inputs_embeds, config.input_scale * config.embedding_scale)
        for step in range(config.pondering_steps):
            # A copy, since many backbones of vLLM compute in the memory that they are given.
            hidden_states = self._run_pass(step, positions, hidden_inputs.clone())
            embedding = scaled(self.embedding(hidden_states), config.embedding_scale)
            if self.pondering_gate is not None:
                embedding = self.pondering_gate(embedding)
            hidden_inputs = hidden_inputs + embedding
        return self._run_pass(config.pondering_steps, positions, hidden_inputs)

    def _run_pass(self, index, positions, inputs_embeds):
        self.current_pass.index = index
        return self.backbone(input_ids=None, positions=positions, inputs_embeds=inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """(n, d_h) to logits (n, V), by the backbone."""
        return self.backbone.compute_logits(hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load a checkpoint's weights, all but its draft heads, which only `generate` of transformers uses."""
        needed = ((name, weight) for name, weight in weights if not name.startswith("draft_heads."))
        loaded = AutoWeightsLoader(self).load_weights(needed)
        if not self._is_verified:  # weights may be loaded again, one by one
            self.embedding.verify()
            self._is_verified = True
        return loaded
