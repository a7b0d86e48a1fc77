"""Read as a whole the text that a command goes on from or looks at: on standard input, or in a file."""

import sys
from pathlib import Path

from .parser import UsageError


LONGEST = 1 << 24  # characters, or bytes of a file; a tokenizer needs hundreds of bytes of memory for each of them


def read_prompt(file: str | None, empty: str) -> str:
    """The text in `file`; None: on standard input. No more of it than LONGEST is ever read.

    Raises:
        UsageError: there is nothing but white space in it; `empty` says so.
        PonderingError: it cannot be read, is longer than LONGEST, or is not UTF-8.
    """
    from ponder_hf import PonderingError
    from ponder_hf.errors import reading

    place = "standard input" if file is None else file
    with reading(place):
        try:
            content = sys.stdin.read(LONGEST + 1) if file is None else _read_bytes(Path(file).expanduser())
            if len(content) > LONGEST:
                raise PonderingError(f"{place} has more than {LONGEST >> 20} MiB, too much for one text: shorten it")
            text = content if isinstance(content, str) else content.decode()
            text.encode()  # what is not UTF-8 comes as surrogates, where the system has no locale
        except UnicodeError as error:
            raise PonderingError(f"{place} is not UTF-8 text: convert it") from error
    if not text.strip():
        raise UsageError(empty)
    return text


def _read_bytes(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(LONGEST + 1)
