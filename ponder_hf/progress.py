"""The one look of all progress bars: on standard error, which is for people."""

import sys
from typing import Any

from tqdm.auto import tqdm


def progress_bar(description: str, unit: str, total: int | None, *, shown: bool = True, **settings: Any) -> tqdm:
    """Make a progress bar on standard error.

    Args:
        description: what is done.
        unit: what is counted, as it follows a number.
        total: how much there is to do, None where that is not known.
        shown: whether there is anything to see.
        settings: further arguments of `tqdm`.

    Returns:
        The bar; `update(n)` moves it on, and it is closed by `close()` or as a context.
    """
    return tqdm(
        total=total,
        desc=description,
        unit=unit,
        disable=not shown,
        file=sys.stderr,
        dynamic_ncols=True,
        **settings,
    )
