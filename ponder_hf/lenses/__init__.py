"""A lens: see what a model ponders, of one text token by token, over a whole text, and what changing it does.

The package cannot be called `lens`, or importing it would hide the function `ponder_hf.lens`.
"""

from .lens import EXIT_THRESHOLDS, Lens, lens
from .measures import MEASURES
from .readings import Readings, read_passes
from .whole_text import TextLens, lens_text


__all__ = ["EXIT_THRESHOLDS", "MEASURES", "Lens", "Readings", "TextLens", "lens", "lens_text", "read_passes"]
