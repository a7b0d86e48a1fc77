"""The files of a checkpoint beside its weights: what they are called, and those that go along with the weights."""

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from ponder_hf.errors import first_line, reading, understanding, walk
from ponder_hf.modeling import PonderingError


CONFIG = "config.json"
ADAPTER_CONFIG = "adapter_config.json"
GENERATION_CONFIG = "generation_config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"

# Everything that transformers' tokenizers of decoder-only models read.
TOKENIZER_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "merges.txt",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tekken.json",
    "tiktoken.model",
    "tokenizer.json",
    "tokenizer.model",
    TOKENIZER_CONFIG,
    "vocab.bpe",
    "vocab.json",
    "vocab.txt",
)
LICENCE_FILES = ("LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE", "NOTICE.txt")
# Patterns of what is copied byte for byte. Further chat templates lie in transformers' own folder, or an older one.
TRAVELLING_FILES = (
    *TOKENIZER_FILES,
    GENERATION_CONFIG,
    *LICENCE_FILES,
    "additional_chat_templates/*.jinja",
    "chat_templates/*.jinja",
)


def files_below(folder: Path) -> list[Path]:
    """Every file below `folder`, sorted.

    Raises:
        OSError: a folder in it may not be read. `Path.rglob` would pass over it without a word.
    """
    return sorted(Path(parent, name) for parent, _, names in walk(folder) for name in names)


def has_tokenizer(folder: Path) -> bool:
    """Whether a file of a tokenizer lies in `folder`."""
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        PonderingError: the file cannot be read, or holds something else.
    """
    with reading(path):
        text = path.read_bytes()
    try:
        content = json.loads(text.decode())  # bytes of other encodings Python would read, and transformers not
    except (ValueError, RecursionError) as error:
        raise PonderingError(f"{path} is not valid JSON ({first_line(error)}): get it again") from error
    if not isinstance(content, dict):
        raise PonderingError(f"{path} does not hold a JSON object: get it again")
    return content


def travelling_files(folder: Path) -> list[Path]:
    """The paths of the TRAVELLING_FILES in `folder`, relative to it, sorted.

    Raises:
        PonderingError: one of them is broken; a copy of it would not load either.
    """
    with reading(folder):
        for inner in {Path(pattern).parent for pattern in TRAVELLING_FILES if "/" in pattern}:
            if (folder / inner).is_dir():
                os.listdir(folder / inner)  # which fails where it may not be read; glob would find nothing there
        found = [path for pattern in TRAVELLING_FILES for path in folder.glob(pattern) if path.is_file()]
    for path in found:
        if path.suffix == ".json":
            read_json(path)
    if (folder / GENERATION_CONFIG) in found:
        with understanding(folder, GENERATION_CONFIG):
            GenerationConfig.from_pretrained(folder)
    return sorted(path.relative_to(folder) for path in found)


def copy_files(names: Iterable[Path], source: Path, destination: Path) -> None:
    """Copy the files `names`, relative paths, from one folder into another."""
    for name in names:
        (destination / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, destination / name)
