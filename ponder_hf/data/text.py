"""Read text files piece by piece: plain text, .jsonl with one document a line, and both of them as .gz.

No file is ever held as a whole. Errors name the file, and the line or row where there is one. The library `datasets`
reads these formats as well, but not as they are: it makes line breaks of lone carriage returns and dates of texts that
look like dates, passes over lines without the field, and holds long lines whole.
"""

import atexit
import codecs
import contextlib
import functools
import gzip
import json
import os
import weakref
import zlib
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

from ponder_hf.modeling import PonderingError


PIECE_SIZE = 1 << 16  # bytes of a file that are read at once, characters of a document in one piece
MAX_JSON_LINE = 1 << 26  # bytes of a line, characters of a row; it must be held as a whole to be understood
JSON_ENDINGS = (".jsonl", ".ndjson", ".json")

# How files begin that are often taken for text, and what to do with them.
_OTHER_FILES = {
    b"PAR1": "it is a parquet file: name it .parquet",
    b"\x1f\x8b": "it is a gzip file: name it .gz",
    b"PK\x03\x04": "it is a zip archive: unpack it",
    b"\x28\xb5\x2f\xfd": "it is compressed by zstd: unpack it, or compress it with gzip",
    b"\xfd7zXZ\x00": "it is compressed by xz: unpack it, or compress it with gzip",
    b"BZh91AY&SY": "it is compressed by bzip2: unpack it, or compress it with gzip",
    b"%PDF-": "it is a PDF: extract its text",
}


@dataclass(frozen=True)
class Piece:
    """A part of a document, cut at the end of a line where lines are not overlong.

    Args:
        text: never empty.
        path: of the file, as the user gave it; of a data set, what messages call it.
        line: where it begins; in a table, the row.
        starts_document: it is the first of its document.
    """

    text: str
    path: str
    line: int
    starts_document: bool


_OPEN: weakref.WeakSet[Generator] = weakref.WeakSet()
Function = TypeVar("Function", bound=Callable[..., Iterator[Any]])


@atexit.register
def _close_all() -> None:
    for generator in [*_OPEN]:
        with contextlib.suppress(ValueError):  # a thread still runs it
            generator.close()


def closed_at_exit(function: Function) -> Function:
    """Make a generator function whose generators are closed when Python ends, where nobody reads them to their end.

    Otherwise Python closes them, and the files in them, after the modules that this needs are gone.
    """

    @functools.wraps(function)
    def make(*args, **kwargs):
        generator = function(*args, **kwargs)
        _OPEN.add(generator)
        return generator

    return cast(Function, make)


@closed_at_exit
def read_text(
    paths: Sequence[str | os.PathLike], text_field: str = "text", advance: Callable[[int], Any] | None = None
) -> Iterator[Piece]:
    """Yield the pieces of all documents in these files, in order. A plain text file is one document.

    Args:
        paths: files. The name decides: .jsonl (.ndjson, .json) is one JSON object a line, .gz is decompressed, all
            else is plain text. A .json that begins with [ is one array of objects.
        text_field: the field of an object that holds the text. Those where it is empty or null are passed over.
        advance: called with the number of bytes of the file, as it lies on the disk, that were read since its last
            call.

    Raises:
        PonderingError: a file is missing, damaged, not text, or holds no text.
    """
    for path in paths:
        yield from with_text(_read_file(str(path), text_field, advance), str(path))


def with_text(pieces: Iterator[Piece], name: str) -> Iterator[Piece]:
    """Yield these pieces of what messages call `name`.

    Raises:
        PonderingError: after the last one, there was nothing but white space in them.
    """
    has_text = False
    for piece in pieces:
        has_text = has_text or not piece.text.isspace()
        yield piece
    if not has_text:
        raise PonderingError(f"{name} holds no text: give a file that does")


def cut(text: str) -> Iterator[str]:
    """Yield `text` in parts of about PIECE_SIZE characters that end with a line, or within one that is overlong."""
    start = 0
    while start < len(text):
        newline = text.find("\n", start + PIECE_SIZE - 1, start + 2 * PIECE_SIZE)
        end = start + PIECE_SIZE if newline < 0 else newline + 1
        yield text[start:end]
        start = end


def _read_file(path: str, text_field: str, advance: Callable[[int], Any] | None) -> Iterator[Piece]:
    place = Path(path).expanduser()
    name = place.name.lower()
    is_gzip = name.endswith(".gz")
    if place.is_dir():
        raise PonderingError(f"{path} is a folder: give the files in it")
    try:
        with place.open("rb") as raw, gzip.open(raw, "rb") if is_gzip else contextlib.nullcontext(raw) as file:
            _check_beginning(file, path)
            done = 0
            for piece in _reader_of(name.removesuffix(".gz"), file)(file, path, text_field):
                yield piece
                if advance is not None and raw.seekable():  # of a pipe nobody knows how far it is
                    advance(raw.tell() - done)
                    done = raw.tell()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise PonderingError(f"{path} is not a whole gzip file ({error}): get it again") from error
    except FileNotFoundError as error:
        raise PonderingError(f"there is no file {path}: check the path") from error
    except OSError as error:
        raise PonderingError(f"cannot read {path}: {error.strerror or error}") from error


def _check_beginning(file: Any, path: str) -> None:
    beginning = file.peek(16)
    for start, advice in _OTHER_FILES.items():
        if beginning.startswith(start):
            raise PonderingError(f"{path} is not text: {advice}")


def _reader_of(name: str, file: Any) -> Callable[[Any, str, str], Iterator[Piece]]:
    if not name.endswith(JSON_ENDINGS):
        return _read_plain
    is_array = name.endswith(".json") and file.peek(PIECE_SIZE).removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"["
    return _read_array if is_array else _read_jsonl


def _read_plain(file: BinaryIO, path: str, text_field: str) -> Iterator[Piece]:
    decoder = _bytes_decoder()
    line, starts_document = 1, True
    while raw := file.read(PIECE_SIZE):
        if not raw.endswith(b"\n"):
            raw += file.readline(PIECE_SIZE)
        text = _decode(decoder, raw, path, line)
        if text:  # a character of an overlong line may still be incomplete
            yield Piece(text, path, line, starts_document)
            starts_document = False
        line += raw.count(b"\n")
    _decode(decoder, b"", path, line, final=True)


def _read_jsonl(file: BinaryIO, path: str, text_field: str) -> Iterator[Piece]:
    line = 0
    while raw := file.readline(MAX_JSON_LINE + 1):
        line += 1
        if len(raw) > MAX_JSON_LINE:
            raise PonderingError(
                f"line {line} of {path} is longer than {MAX_JSON_LINE >> 20} MiB: split the document into several"
            )
        content = _decode(_bytes_decoder(line == 1), raw, path, line, final=True).strip()
        if content:
            try:
                row = json.loads(content)
            except (ValueError, RecursionError) as error:
                raise PonderingError(
                    f"line {line} of {path} is not JSON ({error}): one object a line is needed"
                ) from error
            yield from _row_pieces(row, path, line, text_field, f"line {line} of {path}")


def _read_array(file: BinaryIO, path: str, text_field: str) -> Iterator[Piece]:
    for number, row in enumerate(_rows_of_array(file, path), start=1):
        yield from _row_pieces(row, path, number, text_field, f"row {number} of {path}")


def _rows_of_array(file: BinaryIO, path: str) -> Iterator[Any]:
    """What an array of JSON holds, one after another. No more than one of them is in memory."""
    characters = _Characters(file, path)
    characters.take("[")
    number = 0
    while characters.next() != "]":
        if number:
            characters.take(",")
        number += 1
        yield characters.take_value(number)
    characters.take("]")
    if characters.next():
        raise characters.no_json(f"after its array comes {characters.next()!r}")


class _Characters:
    """The characters of a file of JSON, taken from its front."""

    def __init__(self, file: BinaryIO, path: str) -> None:
        self.file, self.path, self.line = file, path, 1
        self.bytes_decoder, self.decoder = _bytes_decoder(), json.JSONDecoder()
        self.ahead, self.place, self.is_whole = "", 0, False  # what was read, how much of it is taken, is it the end

    def next(self) -> str:
        """The next character that is no white space, not taken; "" at the end of the file."""
        while True:
            while self.place < len(self.ahead) and self.ahead[self.place] in " \t\n\r":
                self.place += 1
            if self.place < len(self.ahead) or self.is_whole:
                return self.ahead[self.place : self.place + 1]
            self.read(1)

    def take(self, expected: str) -> None:
        if self.next() != expected:
            raise self.no_json(f"{expected!r} is missing before {self.next()!r}" if self.next() else "it is cut off")
        self.place += 1

    def take_value(self, number: int) -> Any:
        self.next()
        while True:
            try:
                value, self.place = self.decoder.raw_decode(self.ahead, self.place)
                return value
            except (ValueError, RecursionError) as error:
                reason = f"row {number}: {getattr(error, 'msg', error)}"
                if self.is_whole or not isinstance(error, json.JSONDecodeError):
                    raise self.no_json(reason) from error
                length = len(self.ahead) - self.place
                if length > MAX_JSON_LINE:
                    raise PonderingError(
                        f"row {number} of {self.path} is longer than {MAX_JSON_LINE >> 20} MiB, or no JSON "
                        f"({error.msg}): split the document into several"
                    ) from error
            self.read(length)  # as much again each time, so that a long row is not tried too often

    def read(self, length: int) -> None:
        """Read at least so many characters more, if there are any."""
        parts, self.place = [self.ahead[self.place :]], 0
        while length > 0 and not self.is_whole:
            raw = self.file.read(PIECE_SIZE)
            self.is_whole = not raw
            parts.append(_decode(self.bytes_decoder, raw, self.path, self.line, final=self.is_whole))
            self.line += raw.count(b"\n")
            length -= len(parts[-1])
        self.ahead = "".join(parts)

    def no_json(self, reason: str) -> PonderingError:
        return PonderingError(f"{self.path} is not JSON ({reason}): one array of objects, or one object a line")


def _row_pieces(row: Any, path: str, number: int, text_field: str, place: str) -> Iterator[Piece]:
    """The pieces of the text in an object; `number` and `place` say which one it is."""
    for index, part in enumerate(cut(_field(row, place, text_field).replace("\r\n", "\n"))):
        yield Piece(part, path, number, index == 0)


def _bytes_decoder(at_beginning: bool = True) -> codecs.IncrementalDecoder:
    """Of UTF-8; at the very beginning of a file it drops a byte order mark."""
    return codecs.getincrementaldecoder("utf-8-sig" if at_beginning else "utf-8")()


def _decode(decoder: codecs.IncrementalDecoder, raw: bytes, path: str, line: int, final: bool = False) -> str:
    """Decode bytes that begin in this line of the file."""
    if b"\0" in raw:
        line += raw[: raw.index(b"\0")].count(b"\n")
        raise PonderingError(f"{path} is not text (line {line} has a NUL byte): give a text file in UTF-8")
    try:
        text = decoder.decode(raw, final)
    except UnicodeDecodeError as error:
        line += error.object[: error.start].count(b"\n")
        raise PonderingError(
            f"{path} is not UTF-8 text (line {line} has the byte 0x{error.object[error.start]:02x}): convert it"
        ) from error
    return text.replace("\r\n", "\n")


def _field(row: Any, place: str, text_field: str) -> str:
    if not isinstance(row, dict):
        raise PonderingError(f"{place} is not a JSON object: one with a field of text is needed")
    if text_field not in row:
        has = ", ".join(map(repr, row)) or "none"
        raise PonderingError(
            f"{place} has no field {text_field!r} (its fields: {has}): name the one that holds the text"
        )
    text = row[text_field]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise PonderingError(f"{place}: the field {text_field!r} is not text but {type(text).__name__}")
    with contextlib.suppress(UnicodeEncodeError):
        text.encode("utf-8")
        return text
    raise PonderingError(f"{place} has half a character (a lone surrogate) in its text: repair the line")
