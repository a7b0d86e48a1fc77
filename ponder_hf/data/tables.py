"""Read documents from tables: parquet files and data sets of the library `datasets`. One row is one document.

Errors name the file or data set and the row, counted from 1. pyarrow and datasets are imported when they are needed.
"""

import contextlib
import importlib
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from torch.utils.data import get_worker_info

from ponder_hf.errors import first_line
from ponder_hf.modeling import PonderingError

from .text import Piece, cut, with_text


_ROWS_AT_ONCE = 64
_BUFFER_SIZE = 1 << 20  # bytes of a column that are read at once
_LONGEST_LIST = 20
_TEXT_TYPES = ("string", "large_string", "string_view")


def read_parquet(
    path: str | os.PathLike, text_field: str = "text", advance: Callable[[int], Any] | None = None
) -> Iterator[Piece]:
    """Yield the pieces of all documents in a parquet file. Of each row group only this column is read, page by page.

    Args:
        path: the file, as the user gave it.
        text_field: the column that holds the text. Rows where it is empty or null are passed over.
        advance: called with the number of bytes of each row group that was read.

    Raises:
        PonderingError: the file is missing or damaged, has no such column of text, or holds no text.
    """
    pyarrow = import_optional("pyarrow.parquet", f"to read {path}")
    return with_text(_parquet_pieces(pyarrow, str(path), text_field, advance), str(path))


def read_dataset(dataset: Any, label: str, text_field: str = "text") -> Iterator[Piece]:
    """Yield the pieces of all documents in a data set of the library `datasets`, streamed or not.

    Args:
        dataset: `datasets.Dataset` or `datasets.IterableDataset`.
        label: what messages call it.
        text_field: the column that holds the text. Rows where it is empty or null are passed over.

    Raises:
        PonderingError: there is no such column of text, a row cannot be read, or there is no text.
    """
    return with_text(_dataset_pieces(dataset, label, text_field), label)


def import_optional(module: str, purpose: str, extra: str = "train") -> ModuleType:
    """Import a module of a package that only some need.

    Raises:
        PonderingError: it is not installed; the message says what installs it.
    """
    package = module.partition(".")[0]
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != package:
            raise
        raise PonderingError(f"{package} is needed {purpose}: pip install 'ponder-hf[{extra}]'") from error
    return sys.modules[package]


class _FileLog(logging.Handler):
    """Finds the name of the file that cannot be read, which datasets writes only to its log."""

    def __init__(self) -> None:
        super().__init__(level=logging.ERROR)
        self.file: str | None = None

    def emit(self, record: logging.LogRecord) -> None:
        found = re.match(r"Failed to .* from (?:file )?'(.*?)' with error", record.getMessage())
        self.file = found.group(1) if found else self.file


@contextlib.contextmanager
def using_datasets(label: str) -> Iterator[None]:
    """Translate what the library `datasets` raises while a data set is looked up, downloaded or read."""
    pyarrow = import_optional("pyarrow", f"to read {label}")
    exceptions = import_optional("datasets.exceptions", f"to read {label}").exceptions
    log = _FileLog()
    logging.getLogger("datasets").addHandler(log)
    try:
        yield
    except PonderingError:
        raise
    except (exceptions.DatasetsError, pyarrow.ArrowException, OSError, ValueError, LookupError, RuntimeError) as error:
        # "An error occurred while generating the dataset" says nothing; what it was made from does.
        cause = error.__cause__ if isinstance(error, exceptions.DatasetGenerationError) else None
        reason = first_line(" ".join(str(cause or error).split()) or type(error).__name__)
        where = f" (file {log.file})" if log.file else ""
        raise PonderingError(f"cannot read the data set {label}{where}: {reason}") from error
    finally:
        logging.getLogger("datasets").removeHandler(log)


def _check_column(names: list[str], text_field: str, label: str) -> None:
    if text_field not in names:
        has = ", ".join(map(repr, names[:_LONGEST_LIST])) or "none"
        has += ", ..." if len(names) > _LONGEST_LIST else ""
        raise PonderingError(f"{label} has no column {text_field!r} (its columns: {has}): name the one with the text")


def _parquet_pieces(
    pyarrow: ModuleType, path: str, text_field: str, advance: Callable[[int], Any] | None
) -> Iterator[Piece]:
    place = Path(path).expanduser()
    group = None
    try:
        # With a buffer and without reading ahead, a row group is never in memory as a whole.
        with pyarrow.parquet.ParquetFile(
            place, buffer_size=_BUFFER_SIZE, pre_buffer=False, page_checksum_verification=True
        ) as file:
            schema = file.schema_arrow
            _check_column(schema.names, text_field, path)
            data_type = schema.field(text_field).type
            is_dictionary = pyarrow.types.is_dictionary(data_type)
            _check_type(data_type.value_type if is_dictionary else data_type, text_field, path)
            row = 0
            for group in range(file.num_row_groups):
                for batch in file.iter_batches(_ROWS_AT_ONCE, [group], [text_field], use_threads=False):
                    for value in batch.column(0):
                        row += 1
                        yield from _pieces(value, path, row, text_field)
                if advance is not None:
                    columns = file.metadata.row_group(group)
                    advance(sum(columns.column(index).total_compressed_size for index in range(columns.num_columns)))
    except FileNotFoundError as error:
        raise PonderingError(f"there is no file {path}: check the path") from error
    except (pyarrow.ArrowException, OSError) as error:
        where = "" if group is None else f" in row group {group + 1}"
        raise PonderingError(f"{path} is damaged{where} ({first_line(error)}): get it again") from error


def _dataset_pieces(dataset: Any, label: str, text_field: str) -> Iterator[Piece]:
    if get_worker_info() is not None and "fsspec.asyn" in sys.modules:
        sys.modules["fsspec.asyn"].reset_lock()  # its thread did not survive the fork; datasets does the same
    if dataset.features is not None:
        _check_column(list(dataset.features), text_field, label)
        _check_type(getattr(dataset.features[text_field], "dtype", "nested"), text_field, label)
        dataset = dataset.select_columns([text_field])
    row = 0
    with using_datasets(label):
        # Not `for row in dataset`: in a worker of a DataLoader that yields only this worker's share.
        for batch in dataset.with_format(None).iter(_ROWS_AT_ONCE):
            _check_column(list(batch), text_field, f"row {row + 1} of {label}")
            for value in batch[text_field]:
                row += 1
                yield from _pieces(value, label, row, text_field)


def _pieces(value: Any, path: str, row: int, text_field: str) -> Iterator[Piece]:
    """The pieces of a cell, which is what Python calls it or a scalar of pyarrow's, not decoded yet."""
    try:
        text = value.as_py() if hasattr(value, "as_py") else value
        if text is not None and not isinstance(text, str):
            raise PonderingError(
                f"row {row} of {path}: the column {text_field!r} is not text but {type(text).__name__}"
            )
        for index, part in enumerate(cut((text or "").replace("\r\n", "\n"))):
            part.encode("utf-8")
            yield Piece(part, path, row, index == 0)
    except UnicodeDecodeError as error:
        raise PonderingError(
            f"row {row} of {path} is not UTF-8 text (byte 0x{error.object[error.start]:02x}): convert it"
        ) from error
    except UnicodeEncodeError as error:
        raise PonderingError(f"row {row} of {path} has half a character (a lone surrogate): repair the row") from error


def _check_type(data_type: Any, text_field: str, label: str) -> None:
    if str(data_type) not in _TEXT_TYPES:
        raise PonderingError(f"the column {text_field!r} of {label} is not text but {data_type}: name one that is")
