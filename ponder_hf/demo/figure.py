"""The training curves as pictures: held-out loss against tokens and against arithmetic."""

import io
import re
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .words import NAMES


# Colours that readers who do not see red and green apart can tell apart, on both backgrounds; dashes tell them apart
# on paper.
_STYLES = {
    "base": ("#8a8a8a", "-"),
    "control": ("#0f8bce", "-"),
    "pondering": ("#e07b00", "-"),
    "longer": ("#0f8bce", "--"),
    "deeper": ("#8e5bbf", "-"),
    "more_text": ("#0f8bce", ":"),
}
_INK, _GRID = "#24292f", "#d8dee4"
# What an SVG within the report takes from its page, so that one picture is right for light, dark and paper.
_FROM_PAGE = {_INK: "var(--ink)", _GRID: "var(--line)"}
_AXES = {
    "tokens": (0, 1e3, "Against tokens", "thousand tokens of training, the base's included"),
    "operations": (1, 1e12, "Against arithmetic", "10¹² operations of training, the base's included"),
}


def draw_png(results: dict[str, Any]) -> bytes:
    """Both pictures beside each other, as a PNG."""
    figure = Figure(figsize=(11, 4.4), dpi=130, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    for axis, against in zip(figure.subplots(1, 2), _AXES, strict=True):
        _draw(axis, results, against)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def draw_svg(results: dict[str, Any], against: str) -> str:
    """One picture as an SVG element for the report, in the colours of its page.

    Args:
        against: "tokens" or "operations".
    """
    figure = Figure(figsize=(5.2, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    _draw(figure.subplots(), results, against)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    drawing = buffer.getvalue()
    drawing = drawing[drawing.index("<svg") :]
    for colour, variable in _FROM_PAGE.items():
        drawing = drawing.replace(colour, variable)
    # An id must occur once in a page, and the page decides on the size.
    drawing = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{against}-", drawing)
    drawing = re.sub(r'<svg ([^>]*?)width="[^"]*"', r"<svg \1", drawing, count=1)
    return re.sub(r'<svg ([^>]*?)height="[^"]*"', r"<svg \1", drawing, count=1)


def _draw(axis, results, against):
    index, unit, title, label = _AXES[against]
    curves = {name: [p for p in points if p[2] is not None] for name, points in results["curves"].items()}
    for name in (name for name in _STYLES if curves.get(name)):
        colour, dashes = _STYLES[name]
        axis.plot(
            [point[index] / unit for point in curves[name]],
            [point[2] for point in curves[name]],
            color=colour,
            linestyle=dashes,
            label=NAMES.get(name, "base"),
            linewidth=2.2 if name == "pondering" else 1.6,
            marker="o",
            markersize=3,
            zorder=3 if name == "pondering" else 2,
        )
    axis.set_ylim(*_limits(results))
    axis.set_title(title, color=_INK, fontsize=11, loc="left")
    axis.set_xlabel(label, color=_INK, fontsize=9.5)
    axis.set_ylabel(f"held-out loss, {results['unit']}", color=_INK, fontsize=9.5)
    axis.set_facecolor("none")
    axis.grid(color=_GRID, linewidth=0.7)
    axis.set_axisbelow(True)
    axis.xaxis.set_major_locator(MaxNLocator(6))
    axis.tick_params(colors=_INK, labelsize=9, length=0)
    for name, spine in axis.spines.items():
        spine.set_visible(name in ("left", "bottom"))
        spine.set_color(_GRID)
    axis.legend(
        frameon=False, labelcolor=_INK, fontsize=8.5, loc="upper center", bbox_to_anchor=(0.45, -0.16), ncols=2
    )


def _limits(results):
    """The lowest and highest loss to show: a little above the base's own, whose training began far above that."""
    shown = [loss for loss in (*results["lowest_loss"].values(), results["held_out_loss"]["base"]) if loss is not None]
    bottom, top = min(shown, default=0.0), max(shown, default=1.0)
    span = (top - bottom) or 0.1
    return bottom - 0.06 * span, top + 0.35 * span
