"""Write the golden checkpoints of this version, from the repository's root:

    PYTHONPATH=tests .venv/bin/python -m golden               # weights, and what was computed from them
    PYTHONPATH=tests .venv/bin/python -m golden --with-code   # when the version is released: its code beside them

Each lies in tests/golden/VERSION/, and beside it what it computed when it was written; the code of all lies in
VERSION/code, and the tests put it into copies of them. Weights and numbers are written
once and never again: today's code and that of every later version must load them and compute the same. Until the
version is released they have no code, as it still changes; the tests try them with today's.
"""

import argparse
import sys
from pathlib import Path

import transformers
from compat.written import write

from ponder_hf import __version__
from ponder_hf.hub.code import code_of, installed_code, releases


GOLDEN = Path(__file__).parent
# Smaller than those of `make compat`, as they stay in the repository for good.
SIZES = {"vocab_size": 67, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
# A gate, K and weights that have other names on disk than in memory; grouped heads and draft heads.
MODEL_TYPES = ("gpt_neox", "llama")
CODE = "code"


def add_code(checkpoint, code=None):
    """Put modeling files, {name: bytes}, into a checkpoint's folder; by default those that are installed."""
    for name, content in (installed_code() if code is None else code).items():
        (checkpoint / name).write_bytes(content)


def main():
    parser = argparse.ArgumentParser(prog="golden", description="Write the golden checkpoints of this version.")
    parser.add_argument("--with-code", action="store_true", help="add this version's code, as its release does")
    args = parser.parse_args()
    if __version__ in releases():
        sys.exit(f"{__version__} is released, so its golden checkpoints stay as they are: raise the version first")
    folder = GOLDEN / __version__
    if not folder.exists():
        transformers.logging.disable_progress_bar()
        for model_type in MODEL_TYPES:
            write(folder, model_type, base_changes=SIZES)
            for name in code_of(folder / model_type):
                (folder / model_type / name).unlink()
    elif not args.with_code:
        sys.exit(f"{folder} is there already: what was computed then must be computed now")
    if args.with_code:
        (folder / CODE).mkdir(exist_ok=True)
        add_code(folder / CODE)
    print(f"{folder}: {sum(path.stat().st_size for path in folder.rglob('*') if path.is_file()):,} bytes")


if __name__ == "__main__":
    main()
