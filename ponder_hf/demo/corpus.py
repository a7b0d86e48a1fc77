"""What the demo trains on: Python's own source files or the user's text, split in two, and a tokenizer of bytes."""

import contextlib
import hashlib
import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from ponder_hf.data.text import Piece, cut, read_text
from ponder_hf.modeling import PonderingError


HELD_OUT_SHARE = 0.05
FEW_DOCUMENTS = 40  # below this number, every document gives its end to the held-out text
# Tests, other people's packages, and tables of data in the form of code.
_SKIPPED_FOLDERS = frozenset(
    "site-packages dist-packages test tests idle_test __pycache__ encodings lib2to3 pydoc_data turtledemo".split()
)
_SKIPPED_STARTS = ("_sysconfigdata", "config-")


@dataclass(frozen=True)
class Document:
    """A text and the name of where it comes from."""

    name: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """Documents to train on and documents, or ends of documents, that are held out.

    Args:
        source: what the text is, in words.
        held_out_rule: how it was split, in words.
        training: to train on.
        held_out: to measure losses on.
    """

    source: str
    held_out_rule: str
    training: list[Document]
    held_out: list[Document]

    @property
    def training_characters(self) -> int:
        return sum(len(document.text) for document in self.training)


def standard_library(limit: int) -> Corpus:
    """Source files of the running Python as a Corpus, up to `limit` characters to train on.

    The order, and which files are held out, follow from hashes of their names: on every machine with this Python they
    are the same.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    names = sorted(_library_files(folder), key=_hash)
    training = _read_sources(folder, [name for name in names if not _is_held_out(name)], limit)
    held_out = _read_sources(folder, [name for name in names if _is_held_out(name)], limit // 10)
    if not training or not held_out:
        raise PonderingError("this Python comes without its library's source files: give a `text` of your own")
    rule = f"whole files, about {HELD_OUT_SHARE:.0%} of them, chosen by a hash of their names"
    return Corpus("source files of Python's standard library", rule, training, held_out)


def own_text(paths: Sequence[str | os.PathLike], text_field: str, limit: int) -> Corpus:
    """The user's files as a Corpus, at most their first `limit` characters.

    Raises:
        PonderingError: a file cannot be used.
    """
    documents: list[Document] = []
    parts: list[str] = []
    name, left = "", limit
    for piece in read_text(paths, text_field):
        if piece.starts_document and parts:
            documents.append(Document(name, "".join(parts)))
            parts = []
        if piece.starts_document:
            name = f"{piece.path}:{piece.line}"
        parts.append(piece.text[:left])
        left -= len(parts[-1])
        if left <= 0:
            break
    documents.append(Document(name, "".join(parts)))
    source = ", ".join(str(path) for path in paths)
    if len(documents) >= FEW_DOCUMENTS:
        # By content, so that a document that occurs twice is on one side.
        held_out = [document for document in documents if _is_held_out(document.text)]
        training = [document for document in documents if not _is_held_out(document.text)]
        if training and held_out:
            rule = f"whole documents, about {HELD_OUT_SHARE:.0%} of them, chosen by a hash of their text"
            return Corpus(source, rule, training, held_out)
    halves = [_cut_end(document) for document in documents]
    training, held_out = ([half for half in side if half.text] for side in zip(*halves, strict=True))
    return Corpus(source, f"the last {HELD_OUT_SHARE:.0%} of each document", training, held_out)


def pieces(documents: Sequence[Document]) -> Iterator[Piece]:
    """The documents as pieces, for `ponder_hf.data.packing.pack`."""
    for document in documents:
        for index, part in enumerate(cut(document.text)):
            yield Piece(part, document.name, 1, index == 0)


def byte_tokenizer(positions: int) -> PreTrainedTokenizerFast:
    """A tokenizer whose 256 tokens are the bytes of UTF-8: id 97 is "a". Every text comes back as it was.

    It is a byte-level BPE without merges, so AutoTokenizer loads it as any other. It has no special tokens.

    Args:
        positions: the longest sequence, in tokens, that its model is meant for.
    """
    vocabulary = {character: byte for byte, character in bytes_to_unicode().items()}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=positions, clean_up_tokenization_spaces=False
    )


def _library_files(folder):
    """Names of source files below `folder`, relative to it and with slashes."""
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not (name in _SKIPPED_FOLDERS or name.startswith(_SKIPPED_STARTS))]
        for name in names:
            if name.endswith(".py") and not name.startswith(_SKIPPED_STARTS):
                yield Path(parent, name).relative_to(folder).as_posix()


def _read_sources(folder, names, limit):
    """Documents of the first of these files, as many as together have no more than `limit` characters."""
    documents, left = [], limit
    for name in names:
        with contextlib.suppress(OSError, UnicodeDecodeError):  # one file less does not matter
            text = (folder / name).read_text(encoding="utf-8")
            left -= len(text)
            if left < 0:
                break
            if text:
                documents.append(Document(name, text))
    return documents


def _hash(text):
    return hashlib.sha256(text.encode("utf-8")).digest()


def _is_held_out(text):
    return int.from_bytes(_hash(f"held out? {text}")[:4], "big") < HELD_OUT_SHARE * 2**32


def _cut_end(document):
    """A document's beginning and its end, cut after a line if there is one near."""
    position = int(len(document.text) * (1 - HELD_OUT_SHARE))
    newline = document.text.find("\n", position, position + 1000)
    position = position if newline < 0 else newline + 1
    return Document(document.name, document.text[:position]), Document(document.name, document.text[position:])
