"""A Trainer callback that logs how a model ponders."""

import torch
from transformers import TrainerCallback

from .modeling.pondering_backbone import backbone_logits
from .modeling.pondering_embedding import PonderingEmbedding


@torch.no_grad()
def pondering_statistics(model, input_ids, attention_mask=None, labels=None):
    """How `model` ponders over one batch, as a dict of numbers that every logger takes.

    Args:
        model: a PonderingForCausalLM; it is in its former mode afterwards.
        input_ids, attention_mask, labels: (B, T) each. Without labels the tokens themselves are predicted.

    Returns:
        For each pass i of 0 .. S: `pass_{i}_loss` (nats per token), `pass_{i}_entropy` (nats, mean over tokens). For
        each step i of 0 .. S-1: `step_{i}_norm_ratio`, the mean norm of what it adds to its input over the mean norm
        of the token embeddings. With a gate: `gate_mean` and `gate_abs_mean`.
    """
    was_training = model.training
    model.eval()
    try:
        labels = input_ids if labels is None else labels
        arguments = {"attention_mask": attention_mask, "use_cache": False}
        output = model(input_ids, labels=labels, output_pondering=True, **arguments)
        real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        statistics = {f"pass_{i}_loss": loss.item() for i, loss in enumerate(output.pondering_losses)}
        steps = []
        embeddings = model.get_input_embeddings()(input_ids)
        model.ponder(embeddings, model.config.pondering_steps, on_hidden_states=steps.append, **arguments)
        scale = model.config.embedding_scale
        token_norm = _mean_norm(scale * model.config.input_scale * embeddings, real)
        pondering_embedding = PonderingEmbedding(model.backbone, model.config)
        for index, hidden_states in enumerate(steps):
            statistics[f"pass_{index}_entropy"] = _entropy(backbone_logits(model.backbone, hidden_states), real)
            added = scale * pondering_embedding(hidden_states)
            if model.pondering_gate is not None:
                added = model.pondering_gate(added)
            statistics[f"step_{index}_norm_ratio"] = _mean_norm(added, real) / token_norm
        statistics[f"pass_{len(steps)}_entropy"] = _entropy(output.logits, real)
        if model.pondering_gate is not None:
            gate = model.pondering_gate.weight.float()
            statistics |= {"gate_mean": gate.mean().item(), "gate_abs_mean": gate.abs().mean().item()}
        return statistics
    finally:
        model.train(was_training)


def _mean_norm(vectors, real):
    return vectors.float().norm(dim=-1)[real].mean().item()


def _entropy(logits, real):
    log_probabilities = logits[real].float().log_softmax(-1)
    return -(log_probabilities.exp() * log_probabilities).sum(-1).mean().item()


class PonderingCallback(TrainerCallback):
    """Adds `pondering_statistics` of one fixed batch to what Trainer logs whenever it evaluates or every n steps.

    Args:
        batch: a dict with `input_ids` and perhaps `attention_mask` and `labels`, (B, T) each; a few rows are enough.
        every: in steps, on top of every evaluation; 0: only then.
    """

    def __init__(self, batch, every=0):
        self.batch, self.every, self.trainer = dict(batch), every, None

    def attach(self, trainer):
        """Register with a Trainer, whose loggers then get the numbers. Returns the callback."""
        self.trainer = trainer
        trainer.add_callback(self)
        return self

    def on_evaluate(self, args, state, control, model=None, **kwargs):
        self._log(model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if self.every and state.global_step % self.every == 0:
            self._log(model)

    def _log(self, model):
        model = self.trainer.accelerator.unwrap_model(model)
        model = model.get_base_model() if hasattr(model, "get_base_model") else model
        batch = {name: tensor.to(model.device) for name, tensor in self.batch.items()}
        self.trainer.log(pondering_statistics(model, **batch))
