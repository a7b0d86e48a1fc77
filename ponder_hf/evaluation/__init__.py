"""What each pass predicts: of one batch, of blocks of tokens, of any text that a user names."""

from .harness import PAPER_TASKS, evaluate_tasks
from .passes import PassStatistics, PassSums, measure_passes
from .tables import tasks_table, text_table
from .text import evaluate_passes, evaluate_text, measure_blocks, measure_texts


__all__ = [
    "PAPER_TASKS",
    "PassStatistics",
    "PassSums",
    "evaluate_passes",
    "evaluate_tasks",
    "evaluate_text",
    "measure_blocks",
    "measure_passes",
    "measure_texts",
    "tasks_table",
    "text_table",
]
