"""How the measures of a lens are called, written and coloured in a terminal and in a figure; page.js does it alike."""

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Measure:
    """title, about: what it is called, and of what it is. write: a value as people read it. level: from a value and
    the largest of its look to how strongly it is coloured, from 0 to 1."""

    title: str
    about: str
    write: Callable[[float], str]
    level: Callable[[float, float], float]


def number(value: float) -> str:
    """With about three digits."""
    if value == 0 or value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 0.01 else f"{value:.0e}".replace("e-0", "e-")


def percent(value: float) -> str:
    """A share, from 0 to 1."""
    if value == 0 or value >= 0.1:
        return f"{100 * value:.0f}%"
    return f"{100 * value:.1f}%" if value >= 0.001 else "<0.1%"


_OF_NEXT = "of the token that came next"
# In the order in which they are shown.
MEASURES = {
    "probability": Measure("Probability", _OF_NEXT, percent, lambda value, most: math.sqrt(value)),
    "rank": Measure("Rank", _OF_NEXT, lambda value: f"{value:,.0f}", lambda value, most: 1 - math.log10(value) / 4),
    "entropy": Measure("Entropy", "of the prediction, nats", number, lambda value, most: value / most),
    "divergence": Measure(
        "Divergence", "from the last pass, KL in nats", number, lambda value, most: math.sqrt(value / most)
    ),
    "share": Measure("Share", "of pondering in the input", percent, lambda value, most: value / most),
}
