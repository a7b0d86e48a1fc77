"""The demo from its options to the folder that it writes."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ponder_hf.conversion.whole_folder import whole_folder
from ponder_hf.devices import training_device
from ponder_hf.lenses import Lens, lens

from .experiment import Outcome, make_schedule, on_device, run_experiment, torch_threads
from .figure import draw_png
from .load_and_run import continuations
from .prepare import Options, Setup, prepare
from .report import write_report
from .results import gather, write_json
from .separate_process import check_checkpoint


CHECKPOINT, CURVES, LENS, REPORT, RESULTS = "checkpoint", "curves.png", "lens.html", "report.html", "results.json"
_SMALL_THREADS = 2  # more do not make the demo's own small model faster
_CHECKED_ROWS = 4
_NEW_TOKENS = 100
_SAMPLING = {"do_sample": True, "temperature": 0.8, "top_k": 50}


class Clock:
    """Announces each phase on standard error and keeps its seconds."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str, announcement: str) -> Iterator[None]:
        print(announcement, file=sys.stderr, flush=True)
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 1)


def run_demo(options: Options) -> dict[str, Any]:
    """Run the demo and write its folder, whole or not at all.

    Returns:
        The results as a dict that JSON can hold.

    Raises:
        PonderingError: an option, a text, the base or the destination cannot be used; nothing was written.
    """
    clock = Clock()
    most_threads = torch.get_num_threads() if options.base else min(_SMALL_THREADS, torch.get_num_threads())
    with on_device(training_device(options.device)), torch_threads(most_threads):
        with clock.phase("prepare", "Reading the text and making tokens of it."):
            setup = prepare(options)
        with whole_folder(options.output, options.overwrite) as folder:
            return _run(setup, folder, clock)


def _run(setup, folder, clock):
    with clock.phase("plan", "Measuring a few steps to plan the rest."):
        schedule = make_schedule(setup)
    print(_describe(setup, schedule), file=sys.stderr, flush=True)
    with torch_threads(schedule.threads):
        with clock.phase("train", "Training."):
            outcome = run_experiment(setup, schedule)
        with clock.phase("save", "Saving the checkpoint and loading it in another process, from its own code."):
            outcome.pondering.save_pretrained(folder / CHECKPOINT)
            setup.tokenizer.save_pretrained(folder / CHECKPOINT)
            writing = {"seed": setup.options.seed, "max_new_tokens": _new_tokens(setup), **_SAMPLING}
            prompts = () if outcome.diverged else setup.prompts  # there is nothing to sample from then
            control_texts = continuations(outcome.control, setup.tokenizer, prompts, **writing)
            checked = check_checkpoint(
                folder / CHECKPOINT,
                outcome.pondering,
                setup.watched.rows[:_CHECKED_ROWS].long(),
                prompts=prompts,
                threads=schedule.threads,
                writing=writing,
            )
    samples = [
        {"prompt": prompt, "control": control, "pondering": pondering}
        for prompt, control, pondering in zip(prompts, control_texts, checked.pop("texts"), strict=True)
    ]
    looks = [] if outcome.diverged else _look(setup, outcome)
    results = gather(setup, schedule, outcome, checked, samples, looks[0] if looks else None, clock.seconds)
    print("Writing the report.", file=sys.stderr, flush=True)
    if looks:
        (folder / LENS).write_text(looks[0].to_html(*looks[1:]), encoding="utf-8")
    (folder / CURVES).write_bytes(draw_png(results))
    (folder / REPORT).write_text(write_report(results), encoding="utf-8")
    write_json(results, folder / RESULTS)
    return results


def _look(setup: Setup, outcome: Outcome) -> list[Lens]:
    """What the pondering model and the control make of the same piece of held-out text."""
    text = setup.tokenizer.decode(setup.watched.rows[0].tolist())
    models = {"pondering": outcome.pondering, "control": outcome.control}
    length = setup.size.block_size
    return [lens(model, setup.tokenizer, text, max_tokens=length, name=name) for name, model in models.items()]


def _describe(setup, schedule):
    """One line about what comes, before it comes."""
    size = setup.size
    parts = [f"{size.tokens(schedule.base_steps):,} tokens for the base, then " if schedule.base_steps else ""]
    parts.append(f"{size.tokens(schedule.steps):,} for each model on the same tokens")
    if schedule.share < 1:
        parts.append(f"; {schedule.share:.0%} of the full schedule, because this machine is slow or busy")
    return f"Training on {''.join(parts)}: about {schedule.seconds / 60:.1f} minutes on {schedule.threads} threads."


def _new_tokens(setup):
    """As many as fit behind the longest prompt."""
    positions = getattr(setup.base.config, "max_position_embeddings", None)
    if positions is None:
        return _NEW_TOKENS
    longest = max(len(setup.tokenizer(prompt)["input_ids"]) for prompt in setup.prompts)
    return max(1, min(_NEW_TOKENS, positions - longest))
