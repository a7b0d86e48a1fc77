"""What pondering does over a whole text as a figure of matplotlib, for papers."""

from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .whole_text import GROUPS, Z


_DARK, _SOFT = "#08306b", "#8c959f"
_STYLES = (":", "--", "-.")


def text_plots(content: dict[str, Any]) -> Figure:
    """Losses of the passes, gains of each group of tokens, calibration; bars are intervals of 95 %.

    Args:
        content: as `ponder_hf.lenses.lens_text` gives it.
    """
    figure = Figure(figsize=(11, 7.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 3).flatten()
    _draw_losses(axes[0], content["passes"])
    for axis, (name, rows) in zip(axes[1:5], content["groups"].items(), strict=True):
        _draw_gains(axis, GROUPS[name], rows)
    _draw_calibration(axes[5], content["calibration"])
    for axis in axes:
        axis.tick_params(labelsize=8, length=0)
        axis.title.set_fontsize(9.5)
        axis.xaxis.label.set_fontsize(8.5)
        axis.yaxis.label.set_fontsize(8.5)
        for name, spine in axis.spines.items():
            spine.set_visible(name in ("left", "bottom"))
            spine.set_color("#d0d7de")
    figure.suptitle(f"{content['source']}: {content['tokens']:,} tokens", fontsize=10)
    return figure


def _draw_losses(axis, passes):
    errors = [Z * (each["loss_stderr"] or 0) for each in passes]
    places = range(len(passes))
    axis.errorbar(places, [each["loss"] for each in passes], errors, color=_DARK, marker="o", markersize=4, capsize=3)
    axis.set_xticks(places)
    axis.set_title("Loss of each pass")
    axis.set_xlabel("pass")
    axis.set_ylabel("nats per token")


def _draw_gains(axis, title, rows):
    places = range(len(rows))[::-1]
    gains, errors = [row["gain"] for row in rows], [Z * (row["gain_stderr"] or 0) for row in rows]
    axis.axvline(0, color=_SOFT, linewidth=1)
    axis.errorbar(gains, places, xerr=errors, color=_DARK, marker="o", markersize=4, linestyle="none", capsize=2)
    axis.set_yticks(places, [row["label"] for row in rows])
    axis.set_title(title)
    axis.set_xlabel("gain by pondering, nats per token")


def _draw_calibration(axis, calibration):
    axis.plot([0, 1], [0, 1], color=_SOFT, linewidth=1)
    for index, bins in enumerate(calibration):
        is_last = index == len(calibration) - 1
        axis.plot(
            [each["confidence"] for each in bins],
            [each["accuracy"] for each in bins],
            color=_DARK,
            linestyle="-" if is_last else _STYLES[index % len(_STYLES)],
            linewidth=1.4,
            label=f"pass {index}",
        )
    axis.set_title("Calibration")
    axis.set_xlabel("probability of the most probable token")
    axis.set_ylabel("how often it was right")
    axis.legend(frameon=False, fontsize=8)
