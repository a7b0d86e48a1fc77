"""Train draft heads: small networks on the earlier passes that guess what the last pass will predict.

The model is frozen; only its `draft_heads` (modeling/pondering_drafts.py) learn, by the cross-entropy between the last
pass's distribution and theirs. What the model generates stays the same, with `num_draft_tokens` it comes sooner.
"""

import torch
from torch import nn
from torch.nn import functional

from ponder_hf.modeling import PonderingError
from ponder_hf.modeling.pondering_backbone import backbone_logits


class DraftHeadTrainer(nn.Module):
    """The heads' loss as a module, which anything that trains modules can train: Trainer, or `train_draft_heads`.

    Only the heads are parameters of this module that learn. The model, in `model`, stays in evaluation mode.
    """

    def __init__(self, model):
        super().__init__()
        if not model.config.draft_heads:
            model.add_draft_heads()
        if not model.config.draft_heads:
            raise PonderingError("a model with 0 pondering steps has no pass to put draft heads on")
        self.model = model.requires_grad_(False)
        self.config = model.config
        model.draft_heads.requires_grad_(True)

    def train(self, mode=True):
        """Dropout in a frozen model would only blur what the heads are to learn."""
        super().train(mode)
        self.model.eval()
        return self

    def forward(self, input_ids, attention_mask=None, **kwargs):
        """The mean loss of the heads in nats per token, and how often each head's best token is the last pass's.

        Args:
            input_ids: (B, T).
            attention_mask: (B, T), 1 for tokens and 0 for padding.
            kwargs: labels and the like; not used, the last pass is what is to be learned.

        Returns:
            {"loss": a scalar, "agreement": (number of heads,)}.
        """
        model, states = self.model, []
        num_heads = model.config.draft_heads
        with torch.no_grad():
            embeddings = model.get_input_embeddings()(input_ids)
            output = model.ponder(
                embeddings, model.config.pondering_steps, attention_mask=attention_mask, on_hidden_states=states.append
            )
            targets = backbone_logits(model.backbone, output.last_hidden_state).float()
        states = torch.stack([state.flatten(0, 1) for state in states[:num_heads]])
        logits = backbone_logits(model.backbone, model.draft_heads(states)).float()
        targets, is_token = targets.flatten(0, 1), torch.ones_like(input_ids, dtype=torch.bool)
        if attention_mask is not None:
            is_token = attention_mask.bool()
        weight = is_token.flatten().to(targets.dtype)
        loss = -(targets.softmax(-1) * functional.log_softmax(logits, dim=-1)).sum(-1)
        agrees = (logits.argmax(-1) == targets.argmax(-1)).float()
        return {
            "loss": (loss.mean(0) * weight).sum() / weight.sum(),
            "agreement": ((agrees * weight).sum(-1) / weight.sum()).detach(),
        }


def train_draft_heads(model, blocks, steps=300, learning_rate=2e-3, rows=8, log=None):
    """Give `model` draft heads, if it has none, and train them. It is in its former mode afterwards, and unfrozen.

    Args:
        model: a PonderingForCausalLM.
        blocks: token ids (N, T), N >= 1.
        steps: of the optimiser, AdamW with a cosine to zero.
        rows: of `blocks` in a step.
        log: called with (step, loss, agreement of each head) after each step.

    Returns:
        The agreement of each head with the last pass, as a list, a mean over the last tenth of the steps.
    """
    was_training = model.training
    learns = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    trainer = DraftHeadTrainer(model).train()
    parameters = list(model.draft_heads.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    agreements = []
    try:
        for step in range(steps):
            chosen = (torch.arange(rows) + step * rows) % len(blocks)
            result = trainer(blocks[chosen].long().to(model.device))
            optimizer.zero_grad()
            result["loss"].backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            agreements.append(result["agreement"])
            if log is not None:
                log(step, result["loss"].item(), result["agreement"].tolist())
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(learns.get(name, False))
        model.train(was_training)
    return torch.stack(agreements[-max(1, steps // 10) :]).mean(0).tolist()
