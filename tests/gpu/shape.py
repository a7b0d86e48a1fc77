"""The model that is measured: Pythia-410m's shape with random weights."""

from dataclasses import dataclass

import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from ponder_hf import PonderingForCausalLM


@dataclass(frozen=True)
class Shape:
    """Sizes of the model and of what it is given."""

    layers: int = 24
    hidden_size: int = 1024
    heads: int = 16
    vocab_size: int = 50304
    steps: int = 3
    top_k: int = 100
    rows: int = 4  # of a training step
    length: int = 1024  # of a training step, and of a prefill
    prompt: int = 64
    new_tokens: int = 24
    batches: tuple = (1, 8)
    rounds: int = 2

    @property
    def passes(self):
        """S + 1."""
        return self.steps + 1

    def described(self):
        return f"gpt_neox, {self.layers} layers, d {self.hidden_size}, V {self.vocab_size}, S = {self.steps}"

    def plain(self, device, dtype):
        """The plain backbone, the same one at each call."""
        config = GPTNeoXConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            intermediate_size=4 * self.hidden_size,
            max_position_embeddings=2048,
        )
        torch.manual_seed(0)
        with torch.device(device):
            model = GPTNeoXForCausalLM(config)
        return model.to(device, dtype).eval()

    def model(self, device, dtype, variant):
        """`variant`: "plain", "top-K" (K of this shape), "whole vocabulary"."""
        plain = self.plain(device, dtype)
        if variant == "plain":
            return plain
        top_k = self.top_k if variant.startswith("top") else None
        return PonderingForCausalLM.from_base(plain, pondering_steps=self.steps, pondering_top_k=top_k).eval()

    def tokens(self, device, *size):
        """The same for the same size, so that what is counted and what is timed are of one prompt."""
        return torch.randint(0, self.vocab_size, size, generator=torch.Generator().manual_seed(0)).to(device)


PYTHIA_410M = Shape()
QUICK = Shape(rounds=1, new_tokens=16, batches=(1,))
# Only to see that the measurements run.
TINY = Shape(
    layers=2, hidden_size=32, heads=4, vocab_size=131, top_k=20, rows=2, length=16, prompt=6, new_tokens=6, rounds=1
)


def always_right(model):
    """The model with draft heads, and a final norm by which it predicts one token, whatever comes."""
    model.add_draft_heads()
    with torch.no_grad():
        token = model.get_output_embeddings().weight[7]
        norm = model.backbone.base_model.final_layer_norm
        norm.bias.copy_(200 * token / token.norm())
    return model
