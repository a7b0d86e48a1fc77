"""What `ponder-hf demo` runs: a base, a control and a pondering model on the same text, and a report on them."""

from .prepare import Options
from .report import summary
from .run import run_demo


__all__ = ["Options", "run_demo", "summary"]
