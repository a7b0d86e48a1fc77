"""A Trainer callback that logs how a model ponders."""

from contextlib import ExitStack

import torch
from transformers import TrainerCallback

from .evaluation import FOR_LOSS_OF_EACH_PASS
from .modeling import PonderingError
from .modeling.pondering_backbone import backbone_decoder, backbone_logits, evaluating


@torch.no_grad()
def pondering_statistics(model, input_ids, attention_mask=None, labels=None):
    """How `model` ponders over one batch, as a dict of numbers that every logger takes. One forward pass.

    Logits are made one row at a time. Nothing of the model is changed, not even the mode of one of its modules.

    Args:
        model: a PonderingForCausalLM, also wrapped by PEFT or sharded.
        input_ids, attention_mask, labels: (B, T) each. Without labels the tokens themselves are predicted.

    Returns:
        For each pass i of 0 .. S: `pass_{i}_loss` (nats per token), `pass_{i}_entropy` (nats, mean over tokens). For
        each step i of 0 .. S-1: `step_{i}_norm_ratio`, the mean norm of what it adds to its input over the mean norm
        of the token embeddings. With a gate: `gate_mean` and `gate_abs_mean`.
    """
    pondering_model = model.get_base_model() if hasattr(model, "get_base_model") else model
    backbone, gate = pondering_model.backbone, pondering_model.pondering_gate
    real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    if labels is None:
        labels = input_ids.masked_fill(~real, -100)
    inputs, entropies, statistics = [], [], {}

    def before_pass(decoder, arguments, keywords):
        inputs.append(keywords["inputs_embeds"])

    def after_pass(decoder, arguments, output):
        # Within the forward pass, where sharded weights of the head are gathered.
        entropies.append(_entropy(backbone, output.last_hidden_state, real))

    def before_gate(module, arguments):
        weight = module.weight.float()
        statistics.update(gate_mean=weight.mean().item(), gate_abs_mean=weight.abs().mean().item())

    with ExitStack() as stack:
        decoder = backbone_decoder(backbone)
        for hook in (
            decoder.register_forward_pre_hook(before_pass, with_kwargs=True),
            decoder.register_forward_hook(after_pass),
            *([] if gate is None else [gate.register_forward_pre_hook(before_gate)]),
        ):
            stack.callback(hook.remove)
        stack.enter_context(evaluating(model))
        output = model(input_ids=input_ids, attention_mask=attention_mask, labels=labels, **FOR_LOSS_OF_EACH_PASS)

    token_norm = _mean_norm(inputs[0], real)
    is_labelled = (labels[:, 1:] != -100).any()
    for index, (loss, entropy) in enumerate(zip(output.pondering_losses, entropies, strict=True)):
        statistics |= {f"pass_{index}_loss": loss.item() if is_labelled else 0.0, f"pass_{index}_entropy": entropy}
    for index in range(len(entropies) - 1):
        statistics[f"step_{index}_norm_ratio"] = _mean_norm(inputs[index + 1] - inputs[index], real) / token_norm
    return statistics


def _mean_norm(vectors, real):
    return vectors.float().norm(dim=-1)[real].mean().item()


def _entropy(backbone, hidden_states, real):
    """The mean over the real tokens. hidden_states: (B, T, d), real: (B, T)."""
    entropy = 0.0
    for states, counts in zip(hidden_states, real, strict=True):
        logits = backbone_logits(backbone, states)
        if logits.dtype in (torch.float16, torch.bfloat16):
            logits = logits.float()
        log_probabilities = logits.log_softmax(-1)
        entropy -= (log_probabilities.exp() * log_probabilities).sum(-1)[counts].sum().item()
    return entropy / real.sum().item()


class PonderingCallback(TrainerCallback):
    """Adds `pondering_statistics` of one fixed batch to what Trainer logs whenever it evaluates or every n steps.

    It needs the Trainer that logs: `PonderingCallback(batch).attach(trainer)`, not `callbacks=[...]`.

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

    def on_init_end(self, args, state, control, **kwargs):
        raise PonderingError("give PonderingCallback its Trainer: PonderingCallback(batch).attach(trainer)")

    def on_evaluate(self, args, state, control, model=None, **kwargs):
        self._log(model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if self.every and state.global_step % self.every == 0 and not control.should_evaluate:
            self._log(model)  # not twice: the evaluation that follows this step will

    def _log(self, model):
        accelerator = self.trainer.accelerator
        model = accelerator.unwrap_model(model)
        batch = {name: tensor.to(accelerator.device) for name, tensor in self.batch.items()}
        with accelerator.autocast():
            statistics = pondering_statistics(model, **batch)
        self.trainer.log(statistics)
