"""Looks as tables for the terminal, as wide as it is: tokens by passes in colours, and what a whole text shows."""

from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.style import Style
from rich.table import Table
from rich.text import Text

from .measures import MEASURES, Measure
from .strings import visible
from .text_page import with_interval
from .whole_text import GROUPS, OVER_ALL


if TYPE_CHECKING:
    from .lens import Lens

_EMPTY, _FULL = (24, 40, 62), (155, 209, 255)
_NARROWEST, _WORDS = 10, 10  # columns of a pass at least, of tokens at most


def print_table(look: "Lens", measure: str = "probability", console: Console | None = None) -> None:
    """Print a look. Passes that do not fit beside each other follow below.

    Args:
        look: what to print.
        measure: one of `MEASURES`, whose values stand in the cells and colour them.
        console: where; None: standard output.

    Raises:
        PonderingError: there is no such measure.
    """
    values = look.measure(measure)
    console = console or Console()
    is_unicode = console.encoding.lower().startswith("utf")
    beside = max(1, (console.width - 2 * (_WORDS + 2) - 2) // (_NARROWEST + 2))
    passes = range(len(values))
    known = values[values.isfinite()]
    most = max(known.max().item() if known.numel() else 1.0, 1e-9)
    shown = MEASURES[measure]
    for line in (look.name, f"{shown.title.lower()} {shown.about}"):
        console.print(_written(line, console), markup=False, highlight=False)
    for first in range(0, len(passes), beside):
        table = Table(box=SIMPLE_HEAD, padding=(0, 1))
        table.add_column("token", no_wrap=True, overflow="ellipsis", max_width=_WORDS)
        for index in passes[first : first + beside]:
            note = " (untrained)" if index > look.trained_steps else ""
            table.add_column(f"pass {index}{note}", no_wrap=True, overflow="ellipsis", ratio=1, min_width=_NARROWEST)
        table.add_column("came", no_wrap=True, overflow="ellipsis", max_width=_WORDS)
        for place, token in enumerate(look.tokens):
            cells = [
                _cell(look, index, place, values[index, place].item(), shown, most, is_unicode, console)
                for index in passes[first : first + beside]
            ]
            style = "italic" if place >= look.prompt_tokens else ""
            came = look.tokens[place + 1] if place + 1 < len(look.tokens) else ""
            words = [Text(_written(visible(each) if is_unicode else each.strip(), console)) for each in (token, came)]
            words[0].stylize(style)
            table.add_row(words[0], *cells, words[1])
        console.print(table)


def print_text_tables(content: dict[str, Any], console: Console | None = None) -> None:
    """Print what pondering does over a whole text.

    Args:
        content: as `ponder_hf.lenses.lens_text` gives it.
        console: where; None: standard output.
    """
    console = console or Console()
    plus = "±" if console.encoding.lower().startswith("utf") else "+-"

    def show(title: str, header: list[str], rows: list[list[str]]) -> None:
        table = Table(*header, box=SIMPLE_HEAD, padding=(0, 1), title=title, title_justify="left", title_style="bold")
        for column in table.columns[1:]:
            column.justify = "right"
        for row in rows:
            table.add_row(*(Text(_written(cell.replace("±", plus), console)) for cell in row))
        console.print(table)

    intro = (
        f"{content['source']}: {content['tokens']:,} tokens in {content['blocks']:,} blocks; behind {plus} half an "
    )
    console.print(_written(intro + "interval of 95 %", console), markup=False, highlight=False)
    passes = [
        [
            str(index),
            with_interval(each, "loss"),
            with_interval(each, "accuracy", 1, 100),
            with_interval(each, "agreement", 1, 100),
            with_interval(each, "calibration_error", 1, 100),
        ]
        for index, each in enumerate(content["passes"])
    ]
    show("Each pass", ["pass", "loss, nats", "right, %", "agrees, %", "calibration error, %"], passes)
    for name, rows in content["groups"].items():
        cells = [
            [
                row["label"],
                f"{100 * row['share']:.1f}",
                with_interval(row, "gain", sign=True),
                with_interval(row, "accuracy_before", 1, 100),
                with_interval(row, "accuracy_after", 1, 100),
            ]
            for row in rows
        ]
        show(GROUPS[name], ["", "tokens, %", "gain, nats", "right in pass 0, %", "in the last, %"], cells)
    over_all = content["changes"]["over_all"]
    cells = [[title, with_interval(over_all, name, 2, 100)] for name, title in OVER_ALL.items()]
    show("Right thought wrong, and back", ["", "tokens, %"], cells)


def _cell(
    look: "Lens", index: int, place: int, value: float, shown: Measure, most: float, is_unicode: bool, console: Console
) -> Any:
    predicted = int(look.readings.top_ids[index, place, 0])
    came = look.token_ids[place + 1] if place + 1 < len(look.token_ids) else None
    word = look.strings[predicted]
    text = _written(visible(word) if is_unicode else word.strip(), console)
    if value != value:
        return Text(text)
    number = shown.write(value)
    mark = ("✓" if is_unicode else "*") if predicted == came else " "
    # The number first: it is never cut off.
    return Text(f"{mark}{number:>5} {text}", style=_colour(shown.level(value, most)))


def _colour(level: float) -> Style:
    level = min(1.0, max(0.0, level))
    paper = [round(empty + level * (full - empty)) for empty, full in zip(_EMPTY, _FULL, strict=True)]
    ink = "#000000" if level > 0.48 else "#ffffff"
    return Style(color=ink, bgcolor="#" + "".join(f"{each:02x}" for each in paper))


def _written(text: str, console: Console) -> str:
    """The text as far as the terminal's encoding has its characters."""
    return text.encode(console.encoding, "replace").decode(console.encoding)
