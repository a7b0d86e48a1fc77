"""The training curves as a picture."""

import io
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator


# Colours that readers who do not see red and green apart can tell apart, on both backgrounds.
_BASE, _CONTROL, _PONDERING = "#8a8a8a", "#0f8bce", "#e07b00"
_LIGHT = {"background": "#ffffff", "ink": "#24292f", "grid": "#d8dee4"}
_DARK = {"background": "#161b22", "ink": "#e6edf3", "grid": "#30363d"}


def draw_curves(results: dict[str, Any], dark: bool = False) -> bytes:
    """The PNG of the curves in `results`, as bytes.

    Left: training losses from the first token on. Right: held-out losses after the base was continued. A base that
    was given has no left part.
    """
    theme = _DARK if dark else _LIGHT
    curves = results["curves"]
    panels = 1 if curves["base"] is None else 2
    figure = Figure(figsize=(5.4 * panels, 3.9), dpi=150, facecolor=theme["background"], layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, panels, squeeze=False)[0]
    if curves["base"] is not None:
        _draw_training(axes[0], curves, results)
    _draw_held_out(axes[-1], curves, results)
    for axis in axes:
        _style(axis, theme)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor=theme["background"])
    return buffer.getvalue()


def _draw_training(axis, curves, results):
    tokens_per_step = results["settings"]["batch_size"] * results["settings"]["block_size"] / 1000
    first = results["settings"]["base_steps"]
    for name, label, colour, start in (
        ("base", "base", _BASE, 0),
        ("control", "control: plain", _CONTROL, first),
        ("pondering", "pondering", _PONDERING, first),
    ):
        points = [(step, loss) for step, loss in curves[name]["training"] if loss is not None]
        axis.plot(
            [(start + step) * tokens_per_step for step, _ in points],
            [loss for _, loss in points],
            color=colour,
            label=label,
            linewidth=1.4,
        )
    axis.set_title("Training loss")
    axis.set_xlabel("thousand tokens of training")
    axis.set_ylabel("nats per token")


def _draw_held_out(axis, curves, results):
    tokens_per_step = results["settings"]["batch_size"] * results["settings"]["block_size"] / 1000
    losses = results["held_out_loss"]
    lowest, highest = _limits(curves, losses)
    if losses["base"] is not None:
        axis.axhline(losses["base"], color=_BASE, linestyle="--", linewidth=1.2, label="base, before")
    for name, label, colour in (("control", "control: plain", _CONTROL), ("pondering", "pondering", _PONDERING)):
        points = [(step, passes[-1]) for step, passes in curves[name]["held_out"] if passes[-1] is not None]
        if points and points[0][1] > highest:
            label += f" (starts at {points[0][1]:.2f})"
        axis.plot(
            [step * tokens_per_step for step, _ in points],
            [loss for _, loss in points],
            color=colour,
            label=label,
            marker="o",
            markersize=4,
            linewidth=1.8,
        )
    axis.set_ylim(lowest, highest)
    axis.set_title("Held-out loss of the continued models")
    axis.set_xlabel("thousand tokens after the base")
    axis.set_ylabel("nats per token")


def _limits(curves, losses):
    """The lowest and highest loss to show, with room for the legend above.

    Just after the conversion the loss can be so high that all others would be one line: it may lie outside.
    """
    later = [passes[-1] for name in ("control", "pondering") for step, passes in curves[name]["held_out"] if step > 0]
    shown = [loss for loss in (*later, losses["base"]) if loss is not None] or [0.0]
    bottom, top = min(shown), max(shown)
    span = (top - bottom) or 0.1
    if losses["converted"] is not None and losses["converted"] < bottom + 2 * span:
        top = max(top, losses["converted"])
    return bottom - 0.08 * span, top + 0.35 * (top - bottom or span)


def _style(axis, theme):
    axis.set_facecolor(theme["background"])
    axis.grid(color=theme["grid"], linewidth=0.7)
    axis.set_axisbelow(True)
    axis.xaxis.set_major_locator(MaxNLocator(6))
    axis.tick_params(colors=theme["ink"], labelsize=9, length=0)
    for text in (axis.title, axis.xaxis.label, axis.yaxis.label):
        text.set_color(theme["ink"])
        text.set_fontsize(10.5)
    for name, spine in axis.spines.items():
        spine.set_visible(name in ("left", "bottom"))
        spine.set_color(theme["grid"])
    axis.legend(frameon=False, labelcolor=theme["ink"], fontsize=9, loc="upper right")
