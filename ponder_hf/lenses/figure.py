"""Heat maps of a look, for papers.

The lightness of their colours only rises: they can be read in grey, and by those who do not see red and green apart.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from ponder_hf.modeling import PonderingError

from .measures import MEASURES
from .strings import visible


if TYPE_CHECKING:
    from .lens import Lens

_COLOURS = "cividis"
_CELL = 0.27  # inches
_TOKENS_IN_A_LINE = 40
_MOST_TOKENS = 400  # more would be a picture that nobody can look at
_LONGEST_LABEL = 14


def heat_maps(look: "Lens", measures: Sequence[str]) -> Figure:
    """One heat map a measure, passes by tokens; a long text goes on in the next line.

    Args:
        look: what to draw.
        measures: which of `MEASURES`.

    Raises:
        PonderingError: there is no such measure, or there are more tokens than a picture can show.
    """
    if len(look.token_ids) > _MOST_TOKENS:
        raise PonderingError(
            f"heat maps show at most {_MOST_TOKENS} tokens, and here are {len(look.token_ids):,}: give `max_tokens`"
        )
    values = [(name, look.measure(name)) for name in measures]
    passes, count = values[0][1].shape
    lines = math.ceil(count / _TOKENS_IN_A_LINE)
    width = max(12, min(count, _TOKENS_IN_A_LINE)) * _CELL
    labels = [_label(token) for token in look.tokens]
    height = passes * _CELL + 0.07 * max(len(label) for label in labels) + 0.3
    figure = Figure(figsize=(width + 1.7, (height * lines + 0.25) * len(values) + 0.3), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(values) * lines, 1, squeeze=False)[:, 0]
    for index, (name, matrix) in enumerate(values):
        own = axes[index * lines : (index + 1) * lines]
        norm, colours = _scale(name, matrix)
        for line, axis in enumerate(own):
            part = slice(line * _TOKENS_IN_A_LINE, (line + 1) * _TOKENS_IN_A_LINE)
            image = axis.imshow(matrix[:, part].numpy(), cmap=colours, norm=norm, aspect="equal")
            axis.set_xlim(-0.5, width / _CELL - 0.5)
            _label_axis(axis, labels[part], passes)
        own[0].set_title(f"{MEASURES[name].title} {MEASURES[name].about}", fontsize=9, loc="left")
        bar = figure.colorbar(image, ax=list(own), fraction=0.03, pad=0.01, aspect=12)
        bar.ax.tick_params(labelsize=7)
        if name == "rank":
            bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
            bar.ax.invert_yaxis()
    figure.suptitle(f"{look.name}{f', {look.intervention}' if look.intervention else ''}", fontsize=10)
    return figure


def _scale(name: str, matrix: torch.Tensor):
    """(norm, map of colours). Bright is much of it; of ranks, the best."""
    known = matrix[matrix.isfinite()]
    most = known.max().item() if known.numel() else 1.0
    if name == "rank":
        return LogNorm(1, max(most, 10.0)), colormaps[_COLOURS].reversed()
    return Normalize(0, 1.0 if name == "probability" else max(most, 1e-9)), colormaps[_COLOURS]


def _label_axis(axis, labels, passes):
    axis.set_xticks(range(len(labels)), labels, rotation=90, fontsize=7, family="monospace")
    for text in axis.get_xticklabels():
        text.set_parse_math(False)  # a dollar is a dollar
    axis.yaxis.set_major_locator(MaxNLocator(min(passes, 8), integer=True))
    axis.set_ylabel("pass", fontsize=8)
    axis.tick_params(length=0, labelsize=7)
    for spine in axis.spines.values():
        spine.set_visible(False)


def _label(token):
    text = visible(token)
    return text if len(text) <= _LONGEST_LABEL else f"{text[: _LONGEST_LABEL - 1]}…"
