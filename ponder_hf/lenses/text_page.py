"""What pondering does over a whole text as one self-contained page: tables, plots, and intervals of every figure."""

import html
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .strings import visible
from .whole_text import GROUPS, OVER_ALL, Z


_WIDTH, _HEIGHT = 150, 14  # of the drawing beside a row
_SIDE = 300  # of the plot of calibration
_DASHES = ("1.5 3", "6 3", "9 3 2 3", "none")  # curves told apart without colours; the last pass has the solid one


def text_page(content: dict[str, Any], title: str | None = None) -> str:
    """The page as HTML.

    Args:
        content: as `ponder_hf.lenses.lens_text` gives it.
        title: of the page; None: what it is about.
    """
    found = Path(__file__).with_name("text.html").read_text(encoding="utf-8")
    heading = html.escape(title or f"A lens on {content['source']} over a text")
    body = [
        f"<h1>{heading}</h1>",
        _lead(content),
        "<h2>Each pass</h2>",
        _passes(content["passes"]),
        "<h2>Which tokens gain and lose</h2>",
        "<p>Gain is the loss of pass 0 less that of the last pass, in nats per token. The drawing shows it with its "
        "interval; right of the line is a gain, and all drawings on this page share one scale.</p>",
        *_groups(content["groups"]),
        "<h2>Single tokens</h2>",
        _single(content["most_changed"]),
        "<h2>Right thought wrong, and back</h2>",
        *_changes(content["changes"]),
        "<h2>Agreement of the passes</h2>",
        "<p>The share of tokens for which two passes predict the same.</p>",
        _agreement(content["agreement"]),
        "<h2>Calibration</h2>",
        *_calibration(content["calibration"]),
    ]
    return found.replace("@TITLE@", heading).replace("@BODY@", "\n".join(body))


def with_interval(figures: dict[str, Any], name: str, digits: int = 3, scale: float = 1.0, sign: bool = False) -> str:
    """A figure with half the width of its interval of 95 %, where that is known: 0.123 ± 0.004."""
    value, error = figures[name] * scale, figures.get(f"{name}_stderr")
    shown = f"{value:{'+' if sign else ''}.{digits}f}"
    return shown if error is None else f"{shown} ± {Z * error * scale:.{digits}f}"


def _lead(content):
    data = ", ".join(map(str, content["data"]))
    loss = [each["loss"] for each in content["passes"]]
    note = ""
    if content["pondering_steps"] > content["trained_steps"]:
        note = f" The model was trained with {content['trained_steps']} steps: later passes were never trained."
    return (
        f"<p>{content['tokens']:,} tokens in {content['blocks']:,} blocks of {content['block_size']:,}, of "
        f"{html.escape(data)}. Pass 0 predicts them with a loss of {loss[0]:.3f} nats per token, pass {len(loss) - 1} "
        f"with {loss[-1]:.3f}: a gain of {with_interval(content, 'gain', sign=True)}.{note}</p>"
        '<p class="soft">Behind ± stands half an interval of 95 %, by 1.96 standard errors over blocks. Tokens of a '
        "block share a context, so a few blocks say little, however long they are.</p>"
    )


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], name: str) -> str:
    """Cells are HTML; the first one of a row is its heading. A wide table scrolls by itself."""
    head = "".join(f'<th scope="col">{cell}</th>' for cell in header)
    body = ""
    for first, *others in rows:
        cells = "".join(each if each.startswith("<td") else f"<td>{each}</td>" for each in others)
        body += f'<tr><th scope="row">{first}</th>{cells}</tr>'
    return (
        f'<div class="scroll" tabindex="0" role="group" aria-label="{html.escape(name)}"><table><thead><tr>{head}</tr>'
        f"</thead><tbody>{body}</tbody></table></div>"
    )


def _passes(passes):
    header = ["pass", "loss, nats", "right, %", "agrees with the last, %", "confidence, %", "calibration error, %"]
    rows = [
        [
            str(index),
            with_interval(each, "loss"),
            with_interval(each, "accuracy", 2, 100),
            with_interval(each, "agreement", 2, 100),
            with_interval(each, "confidence", 2, 100),
            with_interval(each, "calibration_error", 2, 100),
        ]
        for index, each in enumerate(passes)
    ]
    return _table(header, rows, "Each pass")


def _groups(groups):
    ends = [abs(row["gain"]) + Z * (row["gain_stderr"] or 0) for rows in groups.values() for row in rows]
    reach = max([*ends, 1e-9])
    for name, rows in groups.items():
        yield f"<h3>{GROUPS[name]}</h3>"
        header = ["", "gain", "", "tokens", "loss of pass 0", "of the last", "right in pass 0, %", "in the last, %"]
        cells = [
            [
                html.escape(row["label"]),
                with_interval(row, "gain", sign=True),
                _drawn(row["gain"], Z * (row["gain_stderr"] or 0), reach),
                f"{100 * row['share']:.1f} %",
                with_interval(row, "loss_before"),
                with_interval(row, "loss_after"),
                with_interval(row, "accuracy_before", 1, 100),
                with_interval(row, "accuracy_after", 1, 100),
            ]
            for row in rows
        ]
        yield _table(header, cells, GROUPS[name])


def _drawn(value, half, reach):
    """A dot with its interval beside a line at 0. The numbers stand in the table."""
    middle, y = _WIDTH / 2, _HEIGHT / 2
    low, dot, high = (middle + each / reach * (middle - 5) for each in (value - half, value, value + half))
    return (
        f'<td><svg width="{_WIDTH}" height="{_HEIGHT}" aria-hidden="true">'
        f'<path class="zero" d="M{middle} -5V{_HEIGHT + 5}"/><path class="bar" d="M{low:.1f} {y}H{high:.1f}"/>'
        f'<circle class="dot" cx="{dot:.1f}" cy="{y}" r="3.5"/></svg></td>'
    )


def _single(most_changed):
    parts = []
    for name, title in (("gain", "that gain most, in sum"), ("lose", "that lose most, in sum")):
        rows = [
            [
                f'<span class="token">{html.escape(visible(row["token"]))}</span>',
                f"{row['times']:,}",
                f"{row['sum']:+.1f}",
                with_interval(row, "gain", sign=True),
            ]
            for row in most_changed[name]
        ]
        found = (
            _table(["token", "times", "nats in sum", "nats each"], rows, f"Tokens {title}") if rows else "<p>None.</p>"
        )
        parts.append(f"<div><h3>Tokens {title}</h3>{found}</div>")
    return f'<div class="columns">{"".join(parts)}</div>'


def _changes(changes):
    rows = [
        [
            f"pass {each['step']} to {each['step'] + 1}",
            with_interval(each, "won", 2, 100),
            with_interval(each, "lost", 2, 100),
        ]
        for each in changes["steps"]
    ]
    if rows:
        yield _table(["", "wrong became right, % of all", "right became wrong, % of all"], rows, "From pass to pass")
    rows = [[title, with_interval(changes["over_all"], name, 2, 100)] for name, title in OVER_ALL.items()]
    yield _table(["over all passes", "% of all tokens"], rows, "Over all passes")


def _agreement(matrix):
    rows = [
        [f"pass {index}", *(f'<td class="level" style="--level:{each:.3f}">{100 * each:.1f}</td>' for each in row)]
        for index, row in enumerate(matrix)
    ]
    return _table(["%", *(f"pass {index}" for index in range(len(matrix)))], rows, "Agreement of the passes")


def _calibration(calibration):
    yield (
        "<p>Tokens by the probability of the most probable one, and how many of those were right: on the diagonal "
        "where a model is as often right as it says.</p>"
    )
    yield _reliability(calibration)
    last = len(calibration) - 1
    for index, bins in ((0, calibration[0]), (last, calibration[last]))[: 1 + bool(last)]:
        yield f"<h3>Pass {index}</h3>"
        rows = [
            [
                f"{100 * each['low']:.0f} to {100 * each['high']:.0f} %",
                f"{each['tokens']:,}",
                f"{100 * each['confidence']:.1f}",
                with_interval(each, "accuracy", 1, 100),
            ]
            for each in bins
        ]
        yield _table(
            ["probability", "tokens", "mean probability, %", "right, %"], rows, f"Calibration of pass {index}"
        )


def _reliability(calibration):
    parts = [
        f'<path class="zero" d="M0 {_SIDE}L{_SIDE} 0M0 0V{_SIDE}H{_SIDE}" fill="none"/>',
        *(f'<text x="{each * _SIDE}" y="{_SIDE + 16}" text-anchor="middle">{each:.0%}</text>' for each in (0, 0.5, 1)),
        *(f'<text x="-6" y="{_SIDE * (1 - each) + 4}" text-anchor="end">{each:.0%}</text>' for each in (0.5, 1)),
        f'<text x="{_SIDE / 2}" y="{_SIDE + 32}" text-anchor="middle">probability of the most probable token</text>',
        f'<text x="{_SIDE / 2}" y="-8" text-anchor="middle">how often it was right</text>',
    ]
    for index, bins in enumerate(calibration):
        points = [(each["confidence"] * _SIDE, (1 - each["accuracy"]) * _SIDE) for each in bins]
        dash = _DASHES[-1] if index == len(calibration) - 1 else _DASHES[index % (len(_DASHES) - 1)]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        y = 14 + 18 * index
        parts += [
            f'<polyline class="curve" stroke-dasharray="{dash}" points="{line}"/>',
            f'<path class="curve" stroke-dasharray="{dash}" d="M{_SIDE + 16} {y}h30"/>',
            f'<text x="{_SIDE + 52}" y="{y + 4}">pass {index}</text>',
        ]
    size = f'viewBox="-40 -22 {_SIDE + 150} {_SIDE + 62}" width="{_SIDE + 150}" style="max-width:100%"'
    return (
        f'<svg {size} role="img" aria-label="How often each pass is right, by how sure it is">{"".join(parts)}</svg>'
    )
