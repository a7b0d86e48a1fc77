"""Read sources one after another, with a progress bar on standard error."""

import sys

from tqdm.auto import tqdm


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
