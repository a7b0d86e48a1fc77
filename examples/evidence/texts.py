"""The texts of the evidence as bytes: one part to train on, one that is held out.

`python` is the source of Python's own standard library, which every machine has. The others are read from a folder:
novels-train.txt.gz and novels-valid.txt.gz, tinyshakespeare.txt.gz, wikitext2-test.txt.gz and wikitext2-valid.txt.gz.
"""

import gzip
import os
from pathlib import Path

import torch

from ponder_hf.demo.corpus import standard_library


FOLDER_VARIABLE = "PONDER_TEXTS"
_PYTHON_CHARACTERS = 5_000_000
_SHAKESPEARE_HELD_OUT = 100_000  # bytes at the end


def read_text(name: str, folder: str | Path | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The bytes of a text.

    Args:
        name: "python", "novels", "shakespeare" or "wikitext".
        folder: where the text files are; by default what the environment variable PONDER_TEXTS says.

    Returns:
        Bytes to train on (N,) and held-out bytes (M,), uint8.

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
    return tuple(torch.frombuffer(bytearray(part), dtype=torch.uint8) for part in (training, held_out))


def _unzipped(file_name: str, folder: str | Path | None) -> bytes:
    folder = folder or os.environ.get(FOLDER_VARIABLE)
    if folder is None or not (Path(folder) / file_name).is_file():
        raise SystemExit(f"{file_name} is needed: give its folder with --texts, or set {FOLDER_VARIABLE}")
    return gzip.decompress((Path(folder) / file_name).read_bytes())
