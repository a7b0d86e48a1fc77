"""Train draft heads: small networks on the earlier passes that guess what the last pass will predict.

The model is frozen; only its `draft_heads` (modeling/pondering_generate_drafts.py) learn, by the Kullback-Leibler
divergence of their distributions from the last pass's. What the model generates stays the same; with
`num_draft_tokens` it comes sooner.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from ponder_hf.modeling import PonderingError, PonderingForCausalLM
from ponder_hf.modeling.pondering_backbone import backbone_logits, evaluating

from .trainer import PonderingTrainer


def freeze_all_but_heads(model: PonderingForCausalLM) -> PonderingForCausalLM:
    """The model, with draft heads on all passes but the last if it had none, which alone learn from now on."""
    if model.draft_heads is None:
        model.add_draft_heads()
    if model.draft_heads is None:
        raise PonderingError("a model with 0 pondering steps has no passes to put draft heads on")
    model.requires_grad_(False)
    model.draft_heads.requires_grad_(True)
    return model


def draft_head_loss(
    model: PonderingForCausalLM, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """How far the heads are from the last pass.

    Args:
        model: a PonderingForCausalLM with draft heads.
        input_ids: (B, T).
        attention_mask: (B, T), 1 for tokens and 0 for padding.

    Returns:
        (loss, agreement): the mean divergence of the heads in nats per token, and for each head how often its best
        token is the last pass's.
    """
    collected: list[torch.Tensor] = []
    with torch.no_grad():
        output = model.ponder(
            model.get_input_embeddings()(input_ids),
            model.config.pondering_steps,
            attention_mask=attention_mask,
            on_hidden_states=collected.append,
        )
        targets = backbone_logits(model.backbone, output.last_hidden_state).flatten(0, 1).float()
    states = torch.stack([state.flatten(0, 1) for state in collected[: model.config.draft_heads]])
    heads: Any = model.draft_heads
    logits = backbone_logits(model.backbone, heads(states)).float()
    weight = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    weight = (weight / weight.sum()).flatten()
    # Tokens that may not come have logits of minus infinity, from the last pass and from a head alike.
    wanted, drafted = (
        functional.log_softmax(each, dim=-1).clamp(min=torch.finfo(each.dtype).min) for each in (targets, logits)
    )
    loss = (wanted.exp() * (wanted - drafted)).sum(-1)
    agrees = (logits.argmax(-1) == targets.argmax(-1)).to(loss.dtype)
    return (loss.mean(0) * weight).sum(), (agrees * weight).sum(-1)


class DraftHeadTrainer(PonderingTrainer):
    """A Trainer for the draft heads of a frozen model. It logs `draft_{i}_agreement` of each head beside the loss."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False  # losses are means over a batch, not over all that are accumulated
        self._agreements: list[torch.Tensor] = []

    def compute_loss(
        self, model: PreTrainedModel, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        if return_outputs:  # the evaluation of the model itself
            return super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        self.pondering_model.eval()  # dropout in a frozen model would only blur what the heads are to learn
        loss, agreement = draft_head_loss(self.pondering_model, inputs["input_ids"], inputs.get("attention_mask"))
        self._agreements.append(agreement.detach())
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self._agreements:
            rates = torch.stack(self._agreements).mean(0).tolist()
            logs = {**logs, **{f"draft_{index}_agreement": rate for index, rate in enumerate(rates)}}
            self._agreements.clear()
        super().log(logs, *args, **kwargs)


def train_draft_heads(
    model: PonderingForCausalLM, blocks: torch.Tensor, steps: int = 600, learning_rate: float = 2e-3, rows: int = 8
) -> list[float]:
    """Give `model` draft heads, if it has none, and train them in a plain loop; `ponder-hf train` uses Trainer.

    Each part of the model is in its former mode afterwards, and what learned before learns again.

    Args:
        model: a PonderingForCausalLM.
        blocks: token ids (N, T), N >= 1.
        steps: of the optimiser, AdamW with a cosine to zero.
        rows: of `blocks` in a step.

    Returns:
        The agreement of each head with the last pass, as a list, a mean over the last tenth of the steps.

    Raises:
        PonderingError: the model has no pondering steps, or a loss is no finite number. Heads that are new are gone
            then, others are as the step before left them.
    """
    had_heads = model.draft_heads is not None
    learned = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    heads: Any = freeze_all_but_heads(model).draft_heads
    parameters = list(heads.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    agreements = []
    try:
        with evaluating(model):
            for step in range(steps):
                chosen = (torch.arange(rows) + step * rows) % len(blocks)
                loss, agreement = draft_head_loss(model, blocks[chosen].long().to(model.device))
                if not torch.isfinite(loss):
                    if not had_heads:
                        model.add_draft_heads(0)
                    raise PonderingError(
                        f"the loss of draft heads in step {step + 1} is {loss.item()}: the model predicts NaN or "
                        "infinity, or `learning_rate` is too high"
                    )
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                schedule.step()
                agreements.append(agreement.detach())
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in learned)
    return torch.stack(agreements[-max(1, steps // 10) :]).mean(0).tolist()
