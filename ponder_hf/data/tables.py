"""Read documents from tables: parquet files and data sets of the library `datasets`. One row is one document.

Errors name the file or data set and the row, counted from 1. pyarrow and datasets are imported when they are needed.
"""

import contextlib
import importlib
import logging
import re
import sys
from pathlib import Path

from torch.utils.data import get_worker_info

from ponder_hf.errors import first_line
from ponder_hf.modeling import PonderingError

from .text import Piece, cut


_ROWS_AT_ONCE = 64
_BUFFER_SIZE = 1 << 20  # bytes of a column that are read at once
_LONGEST_LIST = 20
_TEXT_TYPES = ("string", "large_string", "string_view")


def read_parquet(path, text_field="text", advance=None):
    """Yield the pieces of all documents in a parquet file. Of each row group only this column is read, page by page.

    Args:
        path: the file, as the user gave it.
        text_field: the column that holds the text. Rows where it is empty or null are passed over.
        advance: called with the number of bytes of each row group that was read.

    Raises:
        PonderingError: the file is missing or damaged, has no such column of text, or holds no text.
    """
    pyarrow = import_optional("pyarrow.parquet", f"to read {path}")
    return _checked(_parquet_pieces(pyarrow, str(path), text_field, advance), path)


def read_dataset(dataset, label, text_field="text"):
    """Yield the pieces of all documents in a data set of the library `datasets`, streamed or not.

    Args:
        dataset: `datasets.Dataset` or `datasets.IterableDataset`.
        label: what messages call it.
        text_field: the column that holds the text. Rows where it is empty or null are passed over.

    Raises:
        PonderingError: there is no such column of text, a row cannot be read, or there is no text.
    """
    return _checked(_dataset_pieces(dataset, label, text_field), label)


def import_optional(module, purpose):
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
        raise PonderingError(f"{package} is needed {purpose}: pip install 'ponder-hf[train]'") from error
    return sys.modules[package]


class _FileLog(logging.Handler):
    """Finds the name of the file that cannot be read, which datasets writes only to its log."""

    def __init__(self):
        super().__init__(level=logging.ERROR)
        self.file = None

    def emit(self, record):
        found = re.match(r"Failed to .* from (?:file )?'(.*?)' with error", record.getMessage())
        self.file = found.group(1) if found else self.file


@contextlib.contextmanager
def using_datasets(label):
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


def check_column(names, text_field, label):
    """Refuse a table without this column.

    Raises:
        PonderingError: the message names the columns that there are.
    """
    if text_field not in names:
        has = ", ".join(map(repr, names[:_LONGEST_LIST])) or "none"
        has += ", ..." if len(names) > _LONGEST_LIST else ""
        raise PonderingError(f"{label} has no column {text_field!r} (its columns: {has}): name the one with the text")


def _checked(pieces, name):
    has_text = False
    for piece in pieces:
        has_text = has_text or not piece.text.isspace()
        yield piece
    if not has_text:
        raise PonderingError(f"{name} holds no text: give a file that does")


def _parquet_pieces(pyarrow, path, text_field, advance):
    place = Path(path).expanduser()
    group = None
    try:
        # With a buffer and without reading ahead, a row group is never in memory as a whole.
        with pyarrow.parquet.ParquetFile(
            place, buffer_size=_BUFFER_SIZE, pre_buffer=False, page_checksum_verification=True
        ) as file:
            schema = file.schema_arrow
            check_column(schema.names, text_field, path)
            _check_type(_value_type(pyarrow, schema.field(text_field).type), text_field, path)
            row = 0
            for group in range(file.num_row_groups):
                for batch in file.iter_batches(_ROWS_AT_ONCE, [group], [text_field], use_threads=False):
                    for value in batch.column(0):
                        row += 1
                        yield from _pieces(value.as_py, path, row, text_field)
                if advance is not None:
                    advance(_compressed_size(file.metadata.row_group(group)))
    except FileNotFoundError as error:
        raise PonderingError(f"there is no file {path}: check the path") from error
    except (pyarrow.ArrowException, OSError) as error:
        where = "" if group is None else f" in row group {group + 1}"
        raise PonderingError(f"{path} is damaged{where} ({first_line(error)}): get it again") from error


def _dataset_pieces(dataset, label, text_field):
    if get_worker_info() is not None and "fsspec.asyn" in sys.modules:
        sys.modules["fsspec.asyn"].reset_lock()  # its thread did not survive the fork; datasets does the same
    if dataset.features is not None:
        check_column(list(dataset.features), text_field, label)
        _check_type(getattr(dataset.features[text_field], "dtype", "nested"), text_field, label)
        dataset = dataset.select_columns([text_field])
    row = 0
    with using_datasets(label):
        # Not `for row in dataset`: in a worker of a DataLoader that yields only this worker's share.
        for batch in dataset.with_format(None).iter(_ROWS_AT_ONCE):
            check_column(list(batch), text_field, f"row {row + 1} of {label}")
            for value in batch[text_field]:
                row += 1
                yield from _pieces(lambda value=value: value, label, row, text_field)


def _pieces(get, path, row, text_field):
    try:
        text = get()
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


def _value_type(pyarrow, data_type):
    return data_type.value_type if pyarrow.types.is_dictionary(data_type) else data_type


def _check_type(data_type, text_field, label):
    if str(data_type) not in _TEXT_TYPES:
        raise PonderingError(f"the column {text_field!r} of {label} is not text but {data_type}: name one that is")


def _compressed_size(group):
    return sum(group.column(index).total_compressed_size for index in range(group.num_columns))
