"""The demo's experiment: a plain base is made to ponder and trained on, beside plain models on the same text."""

import contextvars
import copy
import math
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedModel, set_seed

from ponder_hf import PonderingForCausalLM
from ponder_hf.data.blocks import Blocks
from ponder_hf.devices import default_device

from .simple_training import Run, train


if TYPE_CHECKING:
    from .prepare import Setup


_FEWEST_STEPS, _FEWEST_EVALUATIONS = 8, 3
# What of the schedule is left where a machine is too slow for all of it: the first of these that fits.
_SHARES = (1.0, 0.75, 0.5, 0.375, 0.25, 0.1875, 0.125, 0.0625)
_TRAINER = 1.15  # what a step costs beside the model's own time
_LATE = 1.2  # times the budget: what would end later is not begun
# The base is a model in the middle of its training: the rate falls only while the models after it train.
_CONSTANT_RATE = {"lr_scheduler_type": "constant_with_warmup", "lr_scheduler_kwargs": {}}


@dataclass(frozen=True)
class Size:
    """How large everything is. Steps are optimiser steps; those of the base are only for a base made here.

    Args:
        text_blocks: that the models are trained on, again and again.
        characters: of text to read, at most. What is more than these blocks is for the model that gets fresh text.
        evaluations: how often the models are evaluated on the way.
        learning_rate: of a base that is made here.
        given_learning_rate: of a base that the user gave.
        budget_seconds: for all training.
    """

    hidden_size: int
    num_layers: int
    num_heads: int
    positions: int
    block_size: int
    batch_size: int
    base_steps: int
    steps: int
    text_blocks: int
    characters: int
    held_out_blocks: int
    evaluations: int
    learning_rate: float = 4e-3
    given_learning_rate: float = 3e-4
    budget_seconds: float = 150.0

    def tokens(self, steps: int) -> int:
        return steps * self.batch_size * self.block_size


FULL = Size(
    hidden_size=64,
    num_layers=1,
    num_heads=2,
    positions=512,
    block_size=128,
    batch_size=8,
    base_steps=150,
    steps=300,
    text_blocks=320,
    characters=500_000,
    held_out_blocks=128,
    evaluations=8,
)
QUICK = replace(
    FULL,
    hidden_size=32,
    positions=256,
    block_size=64,
    base_steps=40,
    steps=24,
    text_blocks=80,
    characters=200_000,
    held_out_blocks=16,
    evaluations=3,
)


@dataclass(frozen=True)
class Schedule:
    """How long it is trained.

    Args:
        base_steps: of the base; 0 where it was given.
        steps: of every model on the same tokens.
        longer_steps: of plain models that are trained for the pondering model's arithmetic.
        text_blocks: that all but one see again and again.
        evaluations: of each model on the way.
        threads: for torch.
        share: of the size's steps; below 1 where this machine would take too long.
        seconds: that all of it takes, by the steps that were measured.
    """

    base_steps: int
    steps: int
    longer_steps: int
    text_blocks: int
    evaluations: int
    threads: int
    share: float
    seconds: float


def make_base(size: Size, vocab_size: int, seed: int, times_layers: int = 1) -> GPTNeoXForCausalLM:
    """A small GPT-NeoX with random weights, for a tokenizer without special tokens."""
    set_seed(seed)
    config = GPTNeoXConfig(
        vocab_size=vocab_size,
        hidden_size=size.hidden_size,
        num_hidden_layers=size.num_layers * times_layers,
        num_attention_heads=size.num_heads,
        intermediate_size=4 * size.hidden_size,
        max_position_embeddings=size.positions,
        # The authors' choice for training from scratch; 0.02 is for models that are far wider.
        initializer_range=(2 / (5 * size.hidden_size)) ** 0.5,
        bos_token_id=None,
        eos_token_id=None,
    )
    return GPTNeoXForCausalLM(config).eval()


def operations_per_token(model: PreTrainedModel) -> int:
    """Floating-point operations of training a model on one token, by the weights that it multiplies with.

    Six for each weight of the layers and of the head in each pass, two forward and four backward. The weighted sum of
    embeddings after each pass but the last costs as much as the head. Attention's products of tokens with tokens are
    left out.
    """
    ponders = isinstance(model, PonderingForCausalLM)
    steps = model.config.pondering_steps if ponders else 0
    backbone = model.backbone if ponders else model
    tables = [backbone.get_input_embeddings().weight, backbone.get_output_embeddings().weight]
    in_tables = sum({id(table): table.numel() for table in tables}.values())
    layers = sum(parameter.numel() for parameter in backbone.parameters()) - in_tables
    head = tables[1].numel()
    return 6 * ((steps + 1) * (layers + head) + steps * head)


def make_schedule(setup: "Setup") -> Schedule:
    """Measure a few steps and decide on threads and, where the user did not say, on the numbers of steps.

    Where the size's own steps would take longer than its budget, a share of them is taken. Shares are few, so that a
    second run on the same machine comes to the same numbers.
    """
    size, options = setup.size, setup.options
    is_fixed = (options.steps, options.base_steps) != (None, None)
    threads, plain_seconds = _fastest_threads(setup.base, size, repeats=1 if is_fixed else 5)
    pondering = PonderingForCausalLM.from_base(copy.deepcopy(setup.base), **options.pondering_fields)
    ratio = operations_per_token(pondering) / operations_per_token(setup.base)
    pondering_seconds = ratio * plain_seconds  # good enough to announce how long it will take
    if not is_fixed:
        with torch_threads(threads):
            pondering_seconds = _step_seconds(pondering, size, repeats=3)
    full_base_steps = 0 if setup.base_is_given else options.base_steps or size.base_steps
    full_steps = options.steps or size.steps

    def schedule(share: float) -> Schedule:
        base_steps, steps = int(full_base_steps * share), max(1, int(full_steps * share))
        longer_steps = round(steps * ratio)
        plain_steps = base_steps + longer_steps + steps * (1 if setup.more_text is None else 2)
        if not setup.base_is_given:
            plain_steps += 2 * (base_steps + steps)  # the model with twice the layers
        # An evaluation costs a forward pass, a third of a step.
        evaluations = max(_FEWEST_EVALUATIONS, round(share * size.evaluations))
        evaluated = (evaluations + 1) * len(setup.watched) / size.batch_size / 3
        seconds = _TRAINER * (plain_steps * plain_seconds + steps * pondering_seconds)
        seconds += evaluated * (8 * plain_seconds + pondering_seconds)
        return Schedule(base_steps, steps, longer_steps, setup.text_blocks, evaluations, threads, share, seconds)

    if is_fixed:
        return schedule(1.0)
    fitting = [share for share in _SHARES if full_steps * share >= _FEWEST_STEPS]
    return next(
        (each for each in map(schedule, fitting) if each.seconds <= size.budget_seconds), schedule(min(fitting))
    )


def _fastest_threads(model, size, repeats):
    """(threads, seconds of a step): one thread or torch's own number, for which a busy machine can be far too slow."""
    most = torch.get_num_threads()
    timings = {}
    for threads in {1, most}:
        with torch_threads(threads):
            timings[threads] = _step_seconds(model, size, repeats)
    best = min(timings, key=timings.get)
    return best, timings[best]


def _step_seconds(model, size, repeats):
    """The time of a training step on a copy of the model, where nothing else is in its way.

    A machine that is busy just now may not be in a minute; what would end too late then is left out.
    """
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
    return min(timings[1:])


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


@dataclass
class Trained:
    """What one model was trained on, and what it came to.

    Args:
        parameters: their number.
        operations_per_token: of training.
        base: what it was trained on before, as the plain model that it was made from.
        runs: what was recorded: of its own training as a base, where it has no other, and of its training on.
    """

    parameters: int
    operations_per_token: int
    base: "Trained | None" = None
    runs: list[Run] = field(default_factory=list)

    @property
    def losses(self) -> list[float]:
        """The held-out loss of each pass at the end, in nats per token."""
        return self.runs[-1].passes[-1][1]

    @property
    def lowest_loss(self) -> float:
        """Of the last pass, of all evaluations on the way."""
        return min((passes[-1] for _, passes in self.runs[-1].passes), key=lambda loss: (math.isnan(loss), loss))

    @property
    def tokens(self) -> int:
        """That it has seen, those of its base included."""
        return self.points()[-1][0]

    @property
    def operations(self) -> int:
        """Of all its training, that of its base included."""
        return self.points()[-1][1]

    @property
    def last_operations(self) -> int:
        """Of its last run."""
        return self.runs[-1].passes[-1][0] * self.runs[-1].tokens_per_step * self.operations_per_token

    def points(self) -> list[tuple[int, int, float]]:
        """(tokens, operations, held-out loss) of each evaluation; both with those of the base."""
        points: list[tuple[int, int, float]] = []
        tokens, operations = (self.base.tokens, self.base.operations) if self.base else (0, 0)
        for run in self.runs:
            for step, passes in run.passes:
                seen = step * run.tokens_per_step
                points.append((tokens + seen, operations + seen * self.operations_per_token, passes[-1]))
            tokens, operations, _ = points[-1]
        return points


@dataclass(frozen=True)
class Outcome:
    """Everything that the experiment measured.

    Args:
        models: what was trained, by name: "base" where it was made here, "control": the base trained on plainly,
            "pondering", "longer": plain, for the pondering model's arithmetic, "deeper": plain, with twice the layers,
            "more_text": plain, on text that it has not seen.
        left_out: names of those for which there was no time left.
        control, pondering: the models themselves.
    """

    models: dict[str, Trained]
    left_out: list[str]
    control: PreTrainedModel
    pondering: PonderingForCausalLM

    @property
    def diverged(self) -> bool:
        return not all(math.isfinite(self.models[name].losses[-1]) for name in ("control", "pondering"))


def run_experiment(setup: "Setup", schedule: Schedule) -> Outcome:
    """Train the base if it is new, and then all models. Those on the same text see the same blocks in one order."""
    session, base = _Session(setup, schedule), setup.base
    if schedule.base_steps:
        session.make("base", base)
    control = session.train_on("control", copy.deepcopy(base)).cpu()
    pondering = PonderingForCausalLM.from_base(copy.deepcopy(base), **setup.options.pondering_fields)
    session.train_on("pondering", pondering).cpu()
    # The price: what else would have been had for as much, or for less. What costs most comes last.
    if setup.more_text is not None and session.has_time_for("more_text", schedule.steps):
        session.train_on("more_text", copy.deepcopy(base), setup.more_text)
    if schedule.base_steps and session.has_time_for("deeper", 2 * (schedule.base_steps + schedule.steps)):
        deeper = make_base(setup.size, base.config.vocab_size, setup.options.seed, times_layers=2)
        session.make("deeper", deeper)
        session.train_on("deeper", deeper)
    if session.has_time_for("longer", schedule.longer_steps):
        session.train_on("longer", copy.deepcopy(base), steps=schedule.longer_steps)
    return Outcome(session.models, session.left_out, control, pondering)


class _Session:
    """The models so far, and the time that is left."""

    def __init__(self, setup, schedule):
        self.setup, self.schedule = setup, schedule
        self.text = setup.text(schedule.text_blocks)
        self.models: dict[str, Trained] = {}
        self.left_out: list[str] = []
        chosen = (setup.options.steps, setup.options.base_steps) != (None, None)
        self.end = math.inf if chosen else time.perf_counter() + _LATE * setup.size.budget_seconds

    def make(self, name, model):
        """Train a new model as a base: at a constant rate, in the middle of a longer training, as it were."""
        self.models[name] = Trained(model.num_parameters(), operations_per_token(model))
        self._train(name, model, self.text, 0, self.schedule.base_steps, **_CONSTANT_RATE)

    def train_on(self, name, model, blocks=None, steps=None):
        """Train a base on, behind the blocks that it has seen."""
        if name not in self.models:
            base = self.models.get("base")
            self.models[name] = Trained(model.num_parameters(), operations_per_token(model), base)
        blocks = self.text if blocks is None else blocks
        return self._train(name, model, blocks, self.schedule.base_steps, steps or self.schedule.steps)

    def _train(self, name, model, blocks, first, steps, **changes):
        size = self.setup.size
        rate = size.learning_rate if changes else self.setup.learning_rate
        arguments = trainer_arguments(size, steps, rate, self.setup.options.seed) | changes
        rows = take(blocks, first * size.batch_size, steps * size.batch_size)
        every = max(1, steps // self.schedule.evaluations)
        label = f"{name.replace('_', ' '):<9}"
        self.models[name].runs.append(train(model, rows, label, self.setup.watched, every, **arguments))
        return model

    def has_time_for(self, name, plain_steps):
        """Whether so many plain steps end in time, by those of the control; notes the name where they do not."""
        seconds = plain_steps * statistics.mean(self.models["control"].runs[-1].step_seconds)
        has_time = time.perf_counter() + seconds < self.end
        if not has_time:
            self.left_out.append(name)
        return has_time


def trainer_arguments(size: Size, steps: int, learning_rate: float, seed: int) -> dict[str, Any]:
    """TrainingArguments' fields that all models share."""
    return {
        "max_steps": steps,
        "per_device_train_batch_size": size.batch_size,
        "learning_rate": learning_rate,
        "warmup_steps": max(1, steps // 20),
        "logging_steps": max(1, steps // 40),
        "seed": seed,
        "use_cpu": device().type == "cpu",
    }
