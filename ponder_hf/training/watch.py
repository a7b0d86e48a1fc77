"""What a training run shows while it runs, on standard error."""

import sys
import time

from tqdm.auto import tqdm
from transformers import TrainerCallback


_SHOWN = ("loss", "eval_loss")


class Progress(TrainerCallback):
    """A bar over the steps with the loss, tokens per second and the time left.

    tokens_per_step: in all rows of all processes. The time of evaluations and checkpoints does not count.
    """

    def __init__(self, tokens_per_step):
        self.tokens_per_step = tokens_per_step
        self.bar = self.start = None
        self.shown, self.seconds, self.steps = {}, 0.0, 0

    @property
    def tokens_per_second(self):
        return self.steps * self.tokens_per_step / self.seconds if self.seconds else 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        self.start = time.perf_counter()
        if state.is_world_process_zero and not args.disable_tqdm:
            self.bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                desc="training",
                unit="step",
                file=sys.stderr,
                dynamic_ncols=True,
            )

    def on_step_end(self, args, state, control, **kwargs):
        now = time.perf_counter()
        self.seconds += now - self.start
        self.start = now
        self.steps += 1
        if self.bar is not None:
            self.bar.set_postfix({**self.shown, "tokens/s": f"{self.tokens_per_second:,.0f}"}, refresh=False)
            self.bar.update()

    def on_evaluate(self, args, state, control, **kwargs):
        self.start = time.perf_counter()

    def on_save(self, args, state, control, **kwargs):
        self.start = time.perf_counter()

    def on_log(self, args, state, control, logs=None, **kwargs):
        for name in _SHOWN:
            if name in logs:
                self.shown[name] = f"{logs[name]:.3f}"

    def close(self):
        """End the bar; what is printed next begins on a line of its own."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None


class ResumeProgress(TrainerCallback):
    """Restores what PonderingTrainer stores in a checkpoint and Trainer does not, as soon as training begins."""

    def __init__(self, trainer, checkpoint):
        self.trainer, self.checkpoint = trainer, checkpoint

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.resume_progress(self.checkpoint)
