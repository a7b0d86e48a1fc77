"""One run: a model made, trained and measured, with a result that JSON holds. It goes on where it was killed.

Everything random follows from the seed and the number of the step, so a checkpoint holds no random state, and a run
that was killed comes to the same numbers as one that was not.
"""

import dataclasses
import datetime
import functools
import json
import math
import os
import platform
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import transformers
from captured import CapturedUpdate
from runs import Run
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, LlamaConfig, PreTrainedModel

import ponder_hf
from ponder_hf import PonderingForCausalLM


HELD_OUT_ROWS = 256
CHECKPOINT_SECONDS = 60
_HEAD_SIZE = 32


class HiddenStateFedBack(nn.Module):
    """The ablation: the last hidden states themselves are added to the inputs, not what they say of the vocabulary."""

    def __init__(self, backbone: PreTrainedModel):
        super().__init__()
        self.backbone = backbone

    def losses(self, input_ids: torch.Tensor, num_steps: int) -> list[torch.Tensor]:
        """The losses of passes 0 .. S on token ids (B, T)."""
        inputs, losses = self.backbone.get_input_embeddings()(input_ids), []
        for _ in range(num_steps + 1):
            hidden_states = self.backbone.base_model(inputs_embeds=inputs).last_hidden_state
            logits = self.backbone.get_output_embeddings()(hidden_states)
            losses.append(nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten()))
            inputs = inputs + hidden_states
        return losses


def make_plain(run: Run) -> PreTrainedModel:
    """A plain model of transformers' for bytes, with random weights."""
    shape = {
        "vocab_size": run.vocabulary,
        "hidden_size": run.width,
        "num_hidden_layers": run.layers,
        "num_attention_heads": run.width // _HEAD_SIZE,
        "max_position_embeddings": run.block,
        # The authors' choice for training from scratch; 0.02 is for models that are far wider.
        "initializer_range": (2 / (5 * run.width)) ** 0.5,
        "bos_token_id": None,
        "eos_token_id": None,
        "use_cache": False,
    }
    if run.family == "gpt_neox":
        dropouts = dict.fromkeys(("hidden_dropout", "attention_dropout"), run.dropout)
        config = GPTNeoXConfig(**shape, intermediate_size=4 * run.width, **dropouts)
    elif run.family == "llama":
        config = LlamaConfig(**shape, intermediate_size=8 * run.width // 3 // 8 * 8, attention_dropout=run.dropout)
    else:
        dropouts = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), run.dropout)
        config = GPT2Config(**shape, **dropouts)
    torch.manual_seed(run.seed)
    return AutoModelForCausalLM.from_config(config)


def make_model(run: Run, base_weights: dict | None = None) -> nn.Module:
    """The model that a run trains, around the weights of its base where it has one."""
    model = make_plain(run)
    if base_weights is not None:
        model.load_state_dict(base_weights)
    if run.feeds_back_hidden_state:
        return HiddenStateFedBack(model)
    if not run.ponders:
        return model
    model = PonderingForCausalLM.from_base(model, pondering_steps=run.pondering_steps, **dict(run.fields))
    if run.gate_matrix:
        model.pondering_gate = nn.Linear(run.width, run.width, bias=False)
        nn.init.zeros_(model.pondering_gate.weight)
    elif model.pondering_gate is not None:
        nn.init.constant_(model.pondering_gate.weight, run.gate_start)
        if run.gate_signs:
            signs = torch.randint(2, (run.width,), generator=torch.Generator().manual_seed(run.seed))
            model.pondering_gate.weight.data *= 2.0 * signs - 1
    return model


def make_optimizer(run: Run, model: nn.Module) -> torch.optim.Optimizer:
    """AdamW. Norms and biases do not decay, nor does the gate, which has a learning rate of its own."""
    parameters = {"gate": [], "vectors": [], "matrices": []}
    for name, parameter in model.named_parameters():
        kind = "gate" if "pondering_gate" in name else "matrices" if parameter.ndim > 1 else "vectors"
        parameters[kind].append(parameter)
    rates = {"gate": run.learning_rate * run.gate_rate}
    decays = {"matrices": run.weight_decay}
    groups = [
        {"params": params, "rate": rates.get(kind, run.learning_rate), "weight_decay": decays.get(kind, 0.0)}
        for kind, params in parameters.items()
        if params
    ]
    if next(model.parameters()).is_cuda:  # a learning rate that a captured step reads anew each time
        for group in groups:
            group["lr"] = torch.tensor(0.0, device=group["params"][0].device)
        return torch.optim.AdamW(groups, betas=(0.9, 0.95), capturable=True, fused=True)
    return torch.optim.AdamW(groups, lr=run.learning_rate, betas=(0.9, 0.95))


def rate_at(run: Run, step: int) -> float:
    """The factor of the learning rate in step 0 .. steps - 1: a linear warm-up, then constant or a cosine to 10 %."""
    warmup = math.ceil(run.warmup * run.steps)
    if step < warmup:
        return (step + 1) / warmup
    if run.constant_rate:
        return 1.0
    progress = (step - warmup) / max(1, run.steps - warmup)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))


def steps_at(run: Run, step: int) -> int:
    """S of this training step: drawn from the seed and the number of the step, so all processes draw alike."""
    if not run.sampled:
        return run.pondering_steps
    probabilities = next(p for end, p in run.sampled if step < end * run.steps)
    return random.Random(f"{run.seed} {step}").choices(range(len(probabilities)), probabilities)[0]


def batch_at(run: Run, text: torch.Tensor, step: int) -> torch.Tensor:
    """Token ids (B, T) of a training step, from places in the text that the seed and the number of the step choose."""
    if run.text_bytes:
        text = text[: run.text_bytes]
    step += run.base.steps if run.base else 0  # a base trained on sees other places
    generator = torch.Generator().manual_seed(1_000_003 * run.seed + step)
    starts = torch.randint(len(text) - run.block, (run.batch, 1), generator=generator).to(
        text.device, non_blocking=True
    )
    return text[starts + torch.arange(run.block, device=text.device)].long()


def loss_of(model: nn.Module, input_ids: torch.Tensor, num_steps: int) -> torch.Tensor:
    """The loss that is trained."""
    if isinstance(model, HiddenStateFedBack):
        return model.losses(input_ids, num_steps)[-1]
    steps = {"pondering_steps": num_steps} if isinstance(model, PonderingForCausalLM) else {}
    return model(input_ids=input_ids, labels=input_ids, **steps).loss


def computing(run: Run, device: torch.device) -> torch.autocast:
    """The precision that a run's model computes in."""
    return torch.autocast(device.type, torch.bfloat16, enabled=run.half)


@torch.no_grad()
@torch.compiler.set_stance("force_eager")
def held_out_losses(model: nn.Module, rows: torch.Tensor, num_steps: int) -> list[float]:
    """Held-out loss, in nats per token, of passes 0 .. S: pass s is the last one of a call with S = s.

    Args:
        rows: (N, T) token ids.
    """
    model.eval()
    total = torch.zeros(num_steps + 1, dtype=torch.float64)
    for input_ids in rows.split(32 if rows.device.type == "cpu" else len(rows)):
        if isinstance(model, HiddenStateFedBack):
            losses = model.losses(input_ids, num_steps)
        elif isinstance(model, PonderingForCausalLM):
            output = model(
                input_ids=input_ids,
                labels=input_ids,
                pondering_steps=num_steps,
                output_pondering=True,
                logits_to_keep=1,
                use_cache=False,
            )
            losses = output.pondering_losses
        else:
            losses = [model(input_ids=input_ids, labels=input_ids).loss]
        total += torch.stack(list(losses)).double().cpu() * len(input_ids) / len(rows)
    model.train()
    return total.tolist()


def forward_flops(run: Run, layer_parameters: int, num_steps: int) -> int:
    """Floating-point operations of S + 1 passes over one token, two for each multiplication with its addition.

    A backward pass is counted as twice that, whatever is computed a second time in it.
    """
    table = run.vocabulary * run.width
    one_pass = 2 * layer_parameters + 4 * run.block * run.width * run.layers
    head = 2 * table
    bottleneck = 0 if run.feeds_back_hidden_state else num_steps * 2 * 2 * table  # head and sum in each but the last
    return (num_steps + 1) * one_pass + head + bottleneck


def described_machine(device: torch.device) -> dict:
    """What a result was measured with."""
    processor = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        processor = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), processor)
    gpu = {"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}
    return {
        **gpu,
        "processor": processor,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "ponder_hf": ponder_hf.__version__,
    }


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` write a file that appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    write(partial)
    os.replace(partial, path)


class Training:
    """A run and its state; `checkpoint` and `weights` lie in the folder `work`.

    Args:
        text: token ids to train on (N,) and held-out ones (M,).
        device: where it computes. On a GPU a training step is captured as a graph.
    """

    def __init__(
        self, run: Run, text: tuple[torch.Tensor, torch.Tensor], work: Path, device: str | torch.device = "cpu"
    ):
        self.run, self.device = run, torch.device(device)
        self.text = text[0].to(self.device)
        rows = text[1][: len(text[1]) // run.block * run.block].view(-1, run.block)
        chosen = torch.linspace(0, len(rows) - 1, min(HELD_OUT_ROWS, len(rows))).round().long()
        self.held_out = rows[chosen].long().to(self.device)
        self.checkpoint, self.weights = work / f"{run.name}.checkpoint", work / f"{run.name}.weights"
        base_weights = torch.load(work / f"{run.base.name}.weights", map_location="cpu") if run.base else None
        self.model = make_model(run, base_weights).to(self.device)
        if run.compiled:
            self.model.compile(dynamic=False)
        self.optimizer = make_optimizer(run, self.model)
        self.step, self.flops, self.curve = 0, 0, []
        self.captured = {}
        self.parameters = sum(parameter.numel() for parameter in self.model.parameters())
        tables = ("embed", "wte", "wpe", "lm_head")
        self.layer_parameters = sum(
            parameter.numel()
            for name, parameter in self.model.named_parameters()
            if not any(table in name for table in tables)
        )

    def resume(self) -> None:
        """Go on from the checkpoint, if there is one of this very run."""
        if not self.checkpoint.is_file():
            return
        state = torch.load(self.checkpoint, map_location=self.device)
        if state["run"] == repr(self.run):
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.flops, self.curve = state["step"], state["flops"], state["curve"]

    def save(self) -> None:
        state = {"run": repr(self.run), "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        state.update(step=self.step, flops=self.flops, curve=self.curve)
        write_whole(self.checkpoint, lambda path: torch.save(state, path))

    def update(self, input_ids: torch.Tensor, num_steps: int) -> torch.Tensor:
        """Loss, gradients and the optimiser's step on token ids (B, T). Returns the loss."""
        with computing(self.run, self.device):
            loss = loss_of(self.model, input_ids, num_steps)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return loss.detach()

    def take_step(self) -> torch.Tensor:
        """One optimiser step. Returns its loss, a scalar tensor that the next step may overwrite."""
        run, step = self.run, self.step
        torch.manual_seed(1_000_003 * run.seed + step)  # of dropout
        for group in self.optimizer.param_groups:
            rate = group["rate"] * rate_at(run, step)
            if torch.is_tensor(group["lr"]):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        num_steps, input_ids = steps_at(run, step), batch_at(run, self.text, step)
        if self.device.type == "cuda":
            if num_steps not in self.captured:
                update = functools.partial(self.update, num_steps=num_steps)
                self.captured[num_steps] = CapturedUpdate(update, self.model, self.optimizer, input_ids)
            loss = self.captured[num_steps](input_ids)
        else:
            self.optimizer.zero_grad()
            loss = self.update(input_ids, num_steps)
        self.step += 1
        self.flops += 3 * run.batch * run.block * forward_flops(run, self.layer_parameters, num_steps)
        return loss

    def evaluate(self) -> None:
        with computing(self.run, self.device):
            losses = held_out_losses(self.model, self.held_out, self.run.pondering_steps)
        self.curve.append({"step": self.step, "flops": self.flops, "losses": losses})

    def train(self, say: Callable[[str], None] = print) -> Iterator[None]:
        """Train to the end, pausing after each step. The last checkpoint is left to whoever writes the result."""
        run = self.run
        self.resume()
        if self.step:
            say(f"{run.name}: goes on from step {self.step}")
        finite, saved = True, time.monotonic()
        if not self.curve:
            self.evaluate()
        while finite and self.step < run.steps:
            loss = self.take_step()
            is_due = self.step % run.evaluate_every == 0 or self.step == run.steps
            # On a GPU, reading a loss means waiting for it.
            finite = bool(loss.isfinite()) if is_due or self.device.type == "cpu" else True
            if finite and is_due:
                self.evaluate()
                say(f"{run.name}: step {self.step} of {run.steps}: {self.curve[-1]['losses'][-1]:.4f}")
            if time.monotonic() - saved >= CHECKPOINT_SECONDS:
                self.save()
                saved = time.monotonic()
            yield
        self.finite = finite
        self.save()
        write_whole(self.weights, lambda path: torch.save(self.model.state_dict(), path))

    def result(self) -> dict:
        """What was measured, once `train` has come to its end."""
        run, finite, result = self.run, self.finite, {}
        if finite and run.pondering_steps:
            with computing(run, self.device):
                result["losses_by_steps"] = held_out_losses(self.model, self.held_out, 2 * run.pondering_steps)
        gate = getattr(self.model, "pondering_gate", None)
        if gate is not None:
            result["gate"] = {"mean": gate.weight.mean().item(), "mean_absolute": gate.weight.abs().mean().item()}
        return {
            "name": run.name,
            "run": dataclasses.asdict(run),
            "parameters": self.parameters,
            "tokens": self.step * run.batch * run.block,
            "training_flops": self.flops,
            "held_out_tokens": self.held_out[:, 1:].numel(),
            "diverged": not finite,
            "curve": self.curve,
            **result,
            "machine": described_machine(self.device),
            "date": datetime.date.today().isoformat(),
        }


def write_result(path: Path, result: dict) -> None:
    """Write a result as JSON, whole or not at all."""
    text = json.dumps(result, indent=1) + "\n"
    write_whole(path, lambda partial: partial.write_text(text, encoding="utf-8"))
