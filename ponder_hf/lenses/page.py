"""One self-contained page of one or two looks: `page.html` with the style, `page.js`, and the numbers between them."""

import html
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ponder_hf.modeling import PonderingError

from .measures import MEASURES


if TYPE_CHECKING:
    from .lens import Lens

_HERE = Path(__file__).parent
_DIGITS = 4  # significant ones


def page(looks: Sequence["Lens"], title: str | None = None) -> str:
    """The page as HTML.

    Args:
        looks: one, or two to be put side by side.
        title: of the page; None: what it shows.

    Raises:
        PonderingError: there are more than two.
    """
    if len(looks) > 2:
        raise PonderingError(f"a page shows one or two looks side by side, got {len(looks)}")
    names = " and ".join(dict.fromkeys(look.name for look in looks))
    data = json.dumps({"looks": [_content(look) for look in looks]}, ensure_ascii=False, separators=(",", ":"))
    parts = {
        # No text of a token can end the element that it stands in.
        "@DATA@": data.replace("<", "\\u003c"),
        "@SCRIPT@": (_HERE / "page.js").read_text(encoding="utf-8"),
        "@TITLE@": html.escape(title or f"A lens on {names}"),
    }
    found = (_HERE / "page.html").read_text(encoding="utf-8")
    for place, text in parts.items():
        before, *rest = found.split(place)
        found = text.join([before, *rest])
    return found


def frame(page: str) -> str:
    """A page as a notebook shows it: in a frame of its own, so that the styles of both do not meet."""
    return (
        f'<iframe srcdoc="{html.escape(page, quote=True)}" title="ponder_hf lens" '
        'style="width:100%;height:46rem;border:0"></iframe>'
    )


def _content(look: "Lens") -> dict[str, Any]:
    """What the page's script reads of one look; tokens are indices of `strings`."""
    readings = look.readings
    ids = list(look.strings)
    index = {token_id: place for place, token_id in enumerate(ids)}
    tops = zip(readings.top_ids.tolist(), readings.top_probabilities.tolist(), strict=True)
    return {
        "name": look.name,
        "prompt": look.prompt_tokens,
        "trained": look.trained_steps,
        "intervention": look.intervention,
        "from": look.draft_source,
        "strings": [look.strings[token_id] for token_id in ids],
        "tokens": [index[token_id] for token_id in look.token_ids],
        **{name: _rounded(look.measure(name)) for name in MEASURES},
        "distances": {name: _rounded(values) for name, values in readings.distances.items()},
        "thresholds": look.exit_thresholds,
        "drafts": [[index[token_id] for token_id in row] for row in readings.drafts.tolist()],
        # For each pass and token one list: a token, its probability, the next token, its probability, ...
        "top": [
            [
                [each for pair in zip(map(index.get, row), map(_short, shares), strict=True) for each in pair]
                for row, shares in zip(rows, all_shares, strict=True)
            ]
            for rows, all_shares in tops
        ],
    }


def _rounded(matrix: torch.Tensor) -> list[list[float | int | None]]:
    return [[_short(value) for value in row] for row in matrix.tolist()]


def _short(value: float) -> float | int | None:
    if not math.isfinite(value):
        return None
    short = float(f"{value:.{_DIGITS}g}")
    return int(value) if value == int(value) else short
