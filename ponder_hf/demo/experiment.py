"""The demo's experiment: a base, the base trained on plainly (the control), and the base trained on pondering."""

import contextvars
import copy
import math
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedModel, set_seed

from ponder_hf import PonderingForCausalLM
from ponder_hf.data.blocks import Blocks
from ponder_hf.devices import default_device

from .simple_training import Run, train


if TYPE_CHECKING:
    from .prepare import Setup


_FEWEST_STEPS = 8
# The base is a model in the middle of its training: the rate falls only while the models after it train.
_CONSTANT_RATE = {"lr_scheduler_type": "constant_with_warmup", "lr_scheduler_kwargs": {}}


@dataclass(frozen=True)
class Size:
    """How large everything is. Steps are optimiser steps; those of the base are only for a base trained here.

    Args:
        characters: of text to read, at most.
        evaluations: how often the continued models are evaluated on the way.
        learning_rate: of a base that is made here.
        given_learning_rate: of a base that the user gave.
        budget_seconds: for all training.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    positions: int
    block_size: int
    batch_size: int
    base_steps: int
    steps: int
    characters: int
    held_out_blocks: int
    evaluations: int
    learning_rate: float = 4e-3
    given_learning_rate: float = 3e-4
    budget_seconds: float = 200.0

    def tokens(self, steps: int) -> int:
        return steps * self.batch_size * self.block_size


FULL = Size(
    vocab_size=2048,
    hidden_size=128,
    num_layers=4,
    num_heads=4,
    positions=512,
    block_size=128,
    batch_size=8,
    base_steps=800,
    steps=240,
    characters=5_000_000,
    held_out_blocks=128,
    evaluations=6,
)
QUICK = Size(
    vocab_size=512,
    hidden_size=64,
    num_layers=2,
    num_heads=2,
    positions=256,
    block_size=64,
    batch_size=8,
    base_steps=60,
    steps=24,
    characters=300_000,
    held_out_blocks=16,
    evaluations=3,
)


@dataclass(frozen=True)
class Schedule:
    """How long it is trained: steps, and threads for torch.

    Args:
        base_steps: of the base; 0 where it was given.
        steps: of the control and of the pondering model.
        threads: for torch.
        share: of the size's steps; below 1 where this machine would take too long.
        step_seconds: of a plain and of a pondering step.
    """

    base_steps: int
    steps: int
    threads: int
    share: float
    step_seconds: tuple[float, float]


def make_base(size: Size, vocab_size: int, seed: int) -> GPTNeoXForCausalLM:
    """A small GPT-NeoX with random weights; id 0 ends a text, as in the tokenizer that is trained for it."""
    set_seed(seed)
    config = GPTNeoXConfig(
        vocab_size=vocab_size,
        hidden_size=size.hidden_size,
        num_hidden_layers=size.num_layers,
        num_attention_heads=size.num_heads,
        intermediate_size=4 * size.hidden_size,
        max_position_embeddings=size.positions,
        # The authors' choice for training from scratch; 0.02 is for models that are far wider.
        initializer_range=(2 / (5 * size.hidden_size)) ** 0.5,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return GPTNeoXForCausalLM(config).eval()


def make_schedule(setup: "Setup") -> Schedule:
    """Measure a few steps and decide on threads and, where the user did not say, on the numbers of steps.

    Where the size's own steps would take longer than its budget they are halved until they fit, so that a second run
    on the same machine comes to the same numbers.
    """
    size, options = setup.size, setup.options
    threads, plain_seconds = _fastest_threads(setup.base, size)
    with torch_threads(threads):
        pondering = PonderingForCausalLM.from_base(copy.deepcopy(setup.base), **options.pondering_fields)
        pondering_seconds = _step_seconds(pondering, size, repeats=2)
    base_steps = 0 if setup.base_is_given else size.base_steps if options.base_steps is None else options.base_steps
    steps = size.steps if options.steps is None else options.steps
    share = 1.0
    if options.steps is None and options.base_steps is None:
        expected = base_steps * plain_seconds + steps * (plain_seconds + pondering_seconds)
        while expected * share > size.budget_seconds and steps * share >= 2 * _FEWEST_STEPS:
            share /= 2
    return Schedule(int(base_steps * share), int(steps * share), threads, share, (plain_seconds, pondering_seconds))


def _fastest_threads(model, size):
    """(threads, seconds of a step): one thread or torch's own number, for which a busy machine can be far too slow."""
    most = torch.get_num_threads()
    timings = {}
    for threads in {1, most}:
        with torch_threads(threads):
            timings[threads] = _step_seconds(model, size, repeats=3)
    best = min(timings, key=timings.get)
    return best, timings[best]


def _step_seconds(model, size, repeats):
    """The median time of a training step on a copy of the model."""
    model = copy.deepcopy(model).to(device()).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    ids = torch.zeros(size.batch_size, size.block_size, dtype=torch.long, device=device())
    timings = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()  # waits for an accelerator
        timings.append(time.perf_counter() - start)
    return statistics.median(timings[1:])


_DEVICE: contextvars.ContextVar[torch.device | None] = contextvars.ContextVar("device of the demo", default=None)


def device() -> torch.device:
    """Where the demo trains: what `on_device` says, or else what Trainer would choose."""
    return _DEVICE.get() or default_device()


@contextmanager
def on_device(chosen: torch.device) -> Iterator[None]:
    """A context in which the demo trains on this device."""
    token = _DEVICE.set(chosen)
    try:
        yield
    finally:
        _DEVICE.reset(token)


@contextmanager
def torch_threads(number: int) -> Iterator[None]:
    """A context in which torch computes on so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def take(blocks: Blocks, first: int, number: int) -> Blocks:
    """`number` rows from row `first` on, beginning anew at the end."""
    return Blocks(blocks.rows[torch.arange(first, first + number) % len(blocks)])


def spread(blocks: Blocks, number: int) -> Blocks:
    """At most `number` rows, evenly spread over the blocks."""
    chosen = torch.linspace(0, len(blocks) - 1, min(number, len(blocks))).round().long()
    return Blocks(blocks.rows[chosen])


def trainer_arguments(size: Size, steps: int, learning_rate: float, seed: int) -> dict[str, Any]:
    """TrainingArguments' fields that the control and the pondering model share, and the base's own training too."""
    return {
        "max_steps": steps,
        "per_device_train_batch_size": size.batch_size,
        "learning_rate": learning_rate,
        "warmup_steps": max(1, steps // 20),
        "logging_steps": max(1, steps // 40),
        "seed": seed,
        "use_cpu": device().type == "cpu",
    }


@dataclass(frozen=True)
class Outcome:
    """Everything that the experiment measured; losses in nats per token on the held-out blocks.

    Args:
        control: the base, trained on.
        pondering: the base made to ponder, trained on.
        base_run: None where the base was given.
        control_run, pondering_run: what was recorded.
    """

    control: PreTrainedModel
    pondering: PonderingForCausalLM
    base_run: Run | None
    control_run: Run
    pondering_run: Run

    @property
    def base_loss(self) -> float:
        return self.control_run.passes[0][1][0]

    @property
    def control_loss(self) -> float:
        return self.control_run.passes[-1][1][0]

    @property
    def diverged(self) -> bool:
        return not all(math.isfinite(loss) for loss in (self.control_loss, self.pondering_losses[-1]))

    @property
    def converted_losses(self) -> list[float]:
        """Of each pass, before pondering was trained."""
        return self.pondering_run.passes[0][1]

    @property
    def pondering_losses(self) -> list[float]:
        return self.pondering_run.passes[-1][1]


def run_experiment(setup: "Setup", schedule: Schedule) -> Outcome:
    """Train the base if it is new, then the control and the pondering model on the same blocks in the same order.

    The setup's base is trained itself: it becomes the control.
    """
    size, base, seed = setup.size, setup.base, setup.options.seed
    base_run = None
    if schedule.base_steps:
        rows = take(setup.training, 0, schedule.base_steps * size.batch_size)
        arguments = trainer_arguments(size, schedule.base_steps, size.learning_rate, seed) | _CONSTANT_RATE
        base_run = train(base, rows, "base     ", **arguments)
    pondering = PonderingForCausalLM.from_base(copy.deepcopy(base), **setup.options.pondering_fields)
    rows = take(setup.training, schedule.base_steps * size.batch_size, schedule.steps * size.batch_size)
    arguments = trainer_arguments(size, schedule.steps, setup.learning_rate, seed)
    watching: dict[str, Any] = {
        "held_out": setup.watched,
        "evaluate_every": max(1, schedule.steps // size.evaluations),
    }
    control_run = train(base, rows, "control  ", **watching, **arguments)
    pondering_run = train(pondering, rows, "pondering", **watching, **arguments)
    return Outcome(base.cpu(), pondering.cpu(), base_run, control_run, pondering_run)
