"""The files that go with a model's weights whatever becomes of them: they are copied byte for byte."""

import shutil
from pathlib import Path

from transformers import GenerationConfig

from ponder_hf.errors import reading, understanding

from .headers import read_json


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
TRAVELLING_FILES = (*TOKENIZER_FILES, GENERATION_CONFIG, *LICENCE_FILES)
# Folders of further chat templates: transformers' own, and an older name for it.
TRAVELLING_FOLDERS = ("additional_chat_templates", "chat_templates")
TEMPLATE_PATTERN = "*.jinja"


def travelling_files(folder):
    """The paths of these files in `folder`, relative to it, sorted.

    Raises:
        PonderingError: one of them is broken; a copy of it would not load either.
    """
    with reading(folder):
        found = [Path(name) for name in TRAVELLING_FILES if (folder / name).is_file()]
        for name in TRAVELLING_FOLDERS:
            found.extend(path.relative_to(folder) for path in (folder / name).glob(TEMPLATE_PATTERN))
    for path in found:
        if path.suffix == ".json":
            read_json(folder / path)
    if Path(GENERATION_CONFIG) in found:
        with understanding(folder, GENERATION_CONFIG):
            GenerationConfig.from_pretrained(folder)
    return sorted(found)


def copy_files(names, source, destination):
    """Copy the files `names`, relative paths, from one folder into another."""
    for name in names:
        (destination / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, destination / name)
