"""What a user may name as text: files, folders of them, and data sets of the library `datasets`."""

import difflib
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ponder_hf.errors import walk
from ponder_hf.modeling import PonderingError
from ponder_hf.progress import progress_bar

from .tables import import_optional, read_dataset, read_parquet, using_datasets
from .text import JSON_ENDINGS, Piece, closed_at_exit, read_text


_LOGGER = logging.getLogger(__name__)
_TEXT_ENDINGS = (".txt", ".text", *JSON_ENDINGS)
_ENDINGS = (".parquet", *_TEXT_ENDINGS, *(f"{ending}.gz" for ending in _TEXT_ENDINGS))
_TABLE_ENDINGS = (".csv", ".tsv", ".xlsx", ".arrow")
# Names that `datasets.load_dataset` takes for file formats; it would read whatever lies in the current folder.
_FORMATS = frozenset(
    "text json csv parquet arrow pandas sql spark generator xml webdataset hdf5 lance cache "
    "imagefolder audiofolder videofolder pdffolder".split()
)
# How `datasets` recognises the split of a file: by a word of its path.
_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}


# What a user names: a path or an id, or several in the order in which they are read.
Names = str | os.PathLike | Sequence[str | os.PathLike]


@dataclass(frozen=True)
class TextSource:
    """A file, or a data set that the library `datasets` opened.

    Args:
        place: what distinguishes it from others: its path or id; of a data set also configuration and split.
        label: what messages call it: a file's path as the user gave it, or below a folder that the user gave.
        read: gives the pieces; takes `text_field` and, of a file, `advance`, which is called with numbers of bytes.
        num_bytes: of a file on the disk; None: rows are counted instead.
        num_rows: None where it is not known before it is read.
        is_pipe: it can be read only once, as /dev/stdin.
    """

    place: str | tuple[str, str | None, str]
    label: str
    read: Callable[..., Iterator[Piece]]
    num_bytes: int | None = None
    num_rows: int | None = None
    is_pipe: bool = False


def find_sources(
    sources: Names, name: str | None = None, split: str = "train", streaming: bool = False
) -> list[TextSource]:
    """What the user named, as a list. No text is read yet.

    Args:
        sources: a path or id, or a list of them, in the order in which they are read. A path that exists is a file or
            a folder; all else is the id of a data set on the Hub.
        name: the configuration of the data sets.
        split: the split of the data sets, and of folders whose files are named for splits.
        streaming: whether data sets are read while they are downloaded.

    Raises:
        PonderingError: something does not exist, or cannot be read as text.
    """
    found: list[TextSource] = []
    for source in as_list(sources):
        place = Path(source).expanduser()
        try:
            if place.is_dir():
                found += _open_folder(source, name, split, streaming)
            elif place.exists():
                _check_file(source, name, split)
                found.append(_file(source))
            else:
                found.append(_open_id(source, name, split, streaming))
        except OSError as error:
            raise PonderingError(f"cannot read {source}: {error.strerror or error}") from error
    if not found:
        raise PonderingError("there is no text: name at least one file, folder or data set")
    return found


def usual_split(names: Names) -> str:
    """The split to evaluate on where none is named: "train" of what all lies here, else "validation"."""
    # What lies here was put together by the user, and the default of everything local is the split "train".
    return "train" if all(Path(name).expanduser().exists() for name in as_list(names)) else "validation"


def as_list(names: Names) -> list[str]:
    """What a user named, as a list of text."""
    return list(map(str, [names] if isinstance(names, (str, os.PathLike)) else names))


def _check_file(path, name, split):
    if name is not None:
        raise PonderingError(f"{path} is a file, it has no configuration {name!r}: leave the name out")
    if split != "train":
        raise PonderingError(
            f"{path} is a file, it has no split {split!r}: give a data set, or the file that you want"
        )
    ending = Path(path.lower().removesuffix(".gz")).suffix
    if ending in _TABLE_ENDINGS:
        raise PonderingError(f"{path} is a table in a format that is not read: make it .jsonl or .parquet")
    if path.lower().endswith(".parquet.gz"):
        raise PonderingError(f"{path} is a compressed parquet file: unpack it, parquet compresses by itself")


def _file(path: str) -> TextSource:
    there = Path(path).expanduser()
    return TextSource(
        place=os.path.realpath(there),
        label=path,
        read=partial(read_parquet, path) if path.lower().endswith(".parquet") else partial(read_text, [path]),
        num_bytes=there.stat().st_size if there.is_file() else 0,
        is_pipe=there.exists() and not there.is_file(),
    )


def _open_folder(folder, name, split, streaming):
    place = Path(folder).expanduser()
    if any((place / file).exists() for file in ("dataset_dict.json", "state.json")):
        return [_open_saved(folder, name, split)]
    if name is not None or (place / "dataset_infos.json").exists() or _has_configurations(place / "README.md"):
        return [_open_dataset(folder, name, split, streaming)]
    files, others = [], []
    for parent, folders, names in walk(place):
        folders[:] = sorted(each for each in folders if not each.startswith("."))
        for file in sorted(each for each in names if not each.startswith(".")):
            inside = (Path(parent) / file).relative_to(place).as_posix()
            (files if file.lower().endswith(_ENDINGS) else others).append(inside)
    if not files:
        has = f"it has {_some(others)}" if others else "it is empty"
        raise PonderingError(f"the folder {folder} has no file that ends in {', '.join(_ENDINGS[:6])} or .gz: {has}")
    if others:
        _LOGGER.warning("%s: passed over what is not known as text: %s", folder, _some(others))
    return [_file(os.path.join(folder, file)) for file in _of_split(files, split, folder)]


def _of_split(files, split, folder):
    splits = {file: _split_named_in(file) for file in files}
    chosen = [file for file in files if splits[file] == split]
    unnamed = [file for file in files if splits[file] is None]
    others = [file for file in files if splits[file] not in (None, split)]
    if not others and split == "train":
        return files
    if unnamed and len(unnamed) < len(files):
        raise PonderingError(
            f"some files of the folder {folder} are named for a split ({_some(others or chosen)}), others are not "
            f"({_some(unnamed)}): name the files to read"
        )
    if not chosen:
        raise PonderingError(f"the folder {folder} has no file that is named for the split {split!r}: {_some(files)}")
    return chosen


def _split_named_in(path):
    words = set(re.split(r"[^a-z]+", path.lower()))
    return next((split for split, names in _SPLITS.items() if words.intersection(names)), None)


def _has_configurations(readme):
    try:
        head = readme.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return False
    header = head.split("\n---", 1)[0] if head.startswith("---\n") else ""
    return re.search(r"^(configs|dataset_info):", header, re.MULTILINE) is not None


def _open_saved(folder, name, split):
    if name is not None:
        raise PonderingError(f"{folder} is a saved data set, it has no configuration {name!r}: leave the name out")
    datasets = import_optional("datasets", f"to read {folder}")
    with using_datasets(folder):
        dataset = datasets.load_from_disk(str(Path(folder).expanduser()))
        if isinstance(dataset, datasets.DatasetDict):
            if split not in dataset:
                raise PonderingError(f"{folder} has no split {split!r}: it has {_some(list(dataset))}")
            return _as_source(folder, None, split, dataset[split])
    if split not in ("train", str(dataset.split)):
        raise PonderingError(f"{folder} is one saved data set, it has no split {split!r}: leave the split out")
    return _as_source(folder, None, str(dataset.split or split), dataset)


def _open_id(source, name, split, streaming):
    is_path = source.startswith((".", "/", "~")) or source.lower().endswith((*_ENDINGS, *_TABLE_ENDINGS))
    if not is_path and source not in _FORMATS:
        try:
            validate_repo_id(source)
        except HFValidationError:
            is_path = True
    if is_path or source in _FORMATS:
        shown = source if source.isprintable() else repr(source)
        raise PonderingError(f"there is no file or folder {shown}{_near_misses(source)}: check the path")
    return _open_dataset(source, name, split, streaming)


def _open_dataset(source, name, split, streaming):
    datasets = import_optional("datasets", f"to read {source}")
    is_folder = Path(source).expanduser().is_dir()
    where = str(Path(source).expanduser()) if is_folder else source
    try:
        with using_datasets(source):
            dataset = datasets.load_dataset(where, name, split=split, streaming=streaming)
    except PonderingError as error:
        if is_folder or not isinstance(error.__cause__, (ConnectionError, FileNotFoundError)):
            raise
        if isinstance(error.__cause__, ConnectionError):
            reason = "as a data set it is not in the cache, and the Hub cannot be reached"
        else:
            reason = "the Hub has no such data set that you may read"
        raise PonderingError(
            f"there is no file or folder {source}{_near_misses(source)}, and {reason}: check the name and the network"
        ) from error
    return _as_source(source, name, split, dataset)


def _as_source(source, name, split, dataset):
    place = os.path.realpath(Path(source).expanduser()) if Path(source).expanduser().exists() else source
    label = f"{source} ({f'{name}, ' if name else ''}split {split})"
    num_rows = len(dataset) if hasattr(dataset, "__len__") else None
    return TextSource((place, name, split), label, partial(read_dataset, dataset, label), num_rows=num_rows)


def _near_misses(source):
    place = Path(source).expanduser()
    try:
        names = os.listdir(place.parent)
    except OSError:
        return ""
    close = difflib.get_close_matches(place.name, names, n=3)
    return f" (there is {', '.join(str(Path(source).parent / each) for each in close)})" if close else ""


def _some(names):
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


@closed_at_exit
def read_pieces(sources: Sequence[TextSource], text_field: str, progress: bool = False) -> Iterator[Piece]:
    """Yield the pieces of all these sources in order.

    Args:
        sources: as `find_sources` gives them.
        text_field: the field or column that holds the text.
        progress: whether a bar shows how far it is: in bytes where all are files, else in documents.
    """
    in_bytes = all(source.num_bytes is not None for source in sources)
    counts = [source.num_bytes if in_bytes else source.num_rows for source in sources]
    known = [count for count in counts if count is not None]
    total = sum(known) if len(known) == len(counts) else None
    unit, scale = ("B", {"unit_divisor": 1024}) if in_bytes else (" documents", {})
    with progress_bar("tokenising", unit, total, shown=progress, unit_scale=True, **scale) as bar:
        for source in sources:
            for piece in source.read(text_field, advance=bar.update) if in_bytes else source.read(text_field):
                yield piece
                if not in_bytes:
                    bar.update(piece.starts_document)
