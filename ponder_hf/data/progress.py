"""Read sources one after another, with a progress bar on standard error."""

import atexit
import contextlib
import functools
import sys
import weakref

from tqdm.auto import tqdm


_OPEN: weakref.WeakSet = weakref.WeakSet()


@atexit.register
def _close_all():
    for generator in [*_OPEN]:
        with contextlib.suppress(ValueError):  # a thread still runs it
            generator.close()


def closed_at_exit(function):
    """Make a generator function whose generators are closed when Python ends, where nobody reads them to their end.

    Otherwise Python closes them, and the files in them, after the modules that this needs are gone.
    """

    @functools.wraps(function)
    def make(*args, **kwargs):
        generator = function(*args, **kwargs)
        _OPEN.add(generator)
        return generator

    return make


@closed_at_exit
def read_pieces(sources, text_field, progress=False):
    """Yield the pieces of all these sources in order.

    Args:
        sources: of `ponder_hf.data.sources`.
        text_field: the field or column that holds the text.
        progress: whether a bar shows how far it is: in bytes where all are files, else in documents.
    """
    sizes = [source.num_bytes for source in sources]
    in_bytes = None not in sizes
    rows = [source.num_rows for source in sources]
    total = sum(sizes) if in_bytes else None if None in rows else sum(rows)
    unit = {"unit": "B", "unit_divisor": 1024} if in_bytes else {"unit": " documents"}
    with tqdm(
        total=total,
        desc="tokenising",
        unit_scale=True,
        disable=not progress,
        file=sys.stderr,
        dynamic_ncols=True,
        **unit,
    ) as bar:
        for source in sources:
            for piece in source.pieces(text_field, bar.update if in_bytes else None):
                yield piece
                if not in_bytes:
                    bar.update(piece.starts_document)
