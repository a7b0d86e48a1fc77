"""Write the golden checkpoints of this version, from the repository's root:

    PYTHONPATH=tests .venv/bin/python -m golden

Each lies in tests/golden/VERSION/ with its own code, and beside it what it computed when it was written. They are made
again until the version is released and never after that: a later version must load them and compute the same.
"""

import shutil
import sys
from pathlib import Path

import transformers
from compat.written import write

from ponder_hf import __version__
from ponder_hf.hub.code import releases


GOLDEN = Path(__file__).parent
# Smaller than those of `make compat`, as they stay in the repository for good.
SIZES = {"vocab_size": 67, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
# A gate, K and weights that have other names on disk than in memory; grouped heads and draft heads.
MODEL_TYPES = ("gpt_neox", "llama")


def main():
    if __version__ in releases():
        sys.exit(f"{__version__} is released, so its golden checkpoints stay as they are: raise the version first")
    transformers.logging.disable_progress_bar()
    folder = GOLDEN / __version__
    shutil.rmtree(folder, ignore_errors=True)
    for model_type in MODEL_TYPES:
        write(folder, model_type, base_changes=SIZES)
    print(f"{folder}: {sum(path.stat().st_size for path in folder.rglob('*') if path.is_file()):,} bytes")


if __name__ == "__main__":
    main()
