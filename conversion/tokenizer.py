"""The tokenizer that lies with a checkpoint, and whether it fits a model. Code of its own is never run."""

import os
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from ponder_hf import PonderingError
from ponder_hf.errors import reading, understanding

from .source import Source, download_small_files
from .travel import TOKENIZER_FILES


def load_tokenizer(source: Source | str | os.PathLike) -> PreTrainedTokenizerBase:
    """Load a checkpoint's tokenizer.

    Args:
        source: a checkpoint as `open_source` gives it; or a folder or a Hub id, where only the tokenizer need lie.

    Returns:
        The tokenizer, as `AutoTokenizer` makes it.

    Raises:
        PonderingError: there is none, or its files are broken.
    """
    if isinstance(source, Source):
        name, folder = source.name, source.folder
    else:
        name, folder = str(source), Path(source).expanduser()
        if not folder.is_dir():
            folder = download_small_files(name)
    if not any((folder / file).is_file() for file in TOKENIZER_FILES):
        raise PonderingError(f"{name} has no tokenizer: put its tokenizer.json and tokenizer_config.json there")
    with reading(name), understanding(name, "the tokenizer"):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, name: str) -> None:
    """Refuse a tokenizer that can give ids for which the model has no embedding.

    Args:
        tokenizer: the tokenizer.
        config: of the model.
        name: what messages call the tokenizer.

    Raises:
        PonderingError: it has more entries than the model has embeddings.
    """
    num_entries = max([len(tokenizer) - 1, *tokenizer.get_vocab().values()]) + 1
    if num_entries > config.vocab_size:
        raise PonderingError(
            f"the tokenizer of {name} has {num_entries} entries, the model only {config.vocab_size} embeddings: use "
            "the model's own tokenizer"
        )
