"""The texts of the evidence as tokens, mostly bytes: one part to train on, one that is held out.

`python` is the source of Python's own standard library, which every machine has. The others are read from a folder:
novels-train.txt.gz and novels-valid.txt.gz, tinyshakespeare.txt.gz, wikitext2-test.txt.gz and wikitext2-valid.txt.gz.
"""

import gzip
import os
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from ponder_hf.demo.corpus import standard_library


FOLDER_VARIABLE = "PONDER_TEXTS"
_PYTHON_CHARACTERS = 5_000_000
_SHAKESPEARE_HELD_OUT = 100_000  # bytes at the end
_LEARNED_FROM, _TOKENIZED = 5_000_000, 30_000_000  # characters at the beginning


def read_text(name: str, folder: str | Path | None = None, vocabulary: int = 256) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens of a text.

    Args:
        name: "python", "novels", "shakespeare" or "wikitext".
        folder: where the text files are; by default what the environment variable PONDER_TEXTS says.
        vocabulary: 256: bytes. Otherwise the size of a byte-level BPE that is learned from the text.

    Returns:
        Token ids to train on (N,) and held-out ones (M,): uint8 for bytes, otherwise int16.

    Raises:
        SystemExit: there is no such text.
    """
    if name == "python":
        corpus = standard_library(_PYTHON_CHARACTERS)
        parts = ("\n".join(document.text for document in side) for side in (corpus.training, corpus.held_out))
        training, held_out = (part.encode() for part in parts)
    elif name == "novels":
        training, held_out = (_unzipped(f"novels-{part}.txt.gz", folder) for part in ("train", "valid"))
    elif name == "wikitext":  # of WikiText-2 the training part is the hardest to come by
        training, held_out = (_unzipped(f"wikitext2-{part}.txt.gz", folder) for part in ("test", "valid"))
    elif name == "shakespeare":
        whole = _unzipped("tinyshakespeare.txt.gz", folder)
        training, held_out = whole[:-_SHAKESPEARE_HELD_OUT], whole[-_SHAKESPEARE_HELD_OUT:]
    else:
        raise SystemExit(f"there is no text {name!r}: python, novels, shakespeare or wikitext")
    if vocabulary != 256:
        return _byte_pairs(training, held_out, vocabulary)
    return tuple(torch.frombuffer(bytearray(part), dtype=torch.uint8) for part in (training, held_out))


def _byte_pairs(training: bytes, held_out: bytes, vocabulary: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The ids of both parts under a BPE that is learned from the beginning of the first."""
    training, held_out = (part.decode(errors="replace") for part in (training, held_out))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(_pieces(training[:_LEARNED_FROM]), trainer)
    parts = []
    for part in (training[:_TOKENIZED], held_out):
        encodings = tokenizer.encode_batch(_pieces(part), add_special_tokens=False)
        parts.append(torch.tensor([i for encoding in encodings for i in encoding.ids], dtype=torch.int16))
    return tuple(parts)


def _pieces(text: str) -> list[str]:
    """The paragraphs of a text, so that a tokenizer works on all cores."""
    return [piece + "\n\n" for piece in text.split("\n\n")]


def _unzipped(file_name: str, folder: str | Path | None) -> bytes:
    folder = folder or os.environ.get(FOLDER_VARIABLE)
    if folder is None or not (Path(folder) / file_name).is_file():
        raise SystemExit(f"{file_name} is needed: give its folder with --texts, or set {FOLDER_VARIABLE}")
    return gzip.decompress((Path(folder) / file_name).read_bytes())
