"""A model of the evidence as a checkpoint, to look into with `ponder-hf lens` or examples/interventions.py.

    python examples/evidence/checkpoint.py shakespeare-2layers-S3-seed0 FOLDER --results evidence

It reads the weights that `run.py` left. Models of bytes only: their tokenizer is one whose ids are the bytes.
"""

import argparse
from pathlib import Path

import torch
from run import with_bases
from runs import TABLES, VOCABULARY
from training import make_model

from ponder_hf.demo.corpus import byte_tokenizer


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="its name, as that of its result")
    parser.add_argument("folder", type=Path, help="to write into")
    parser.add_argument("--results", type=Path, default=Path("evidence"), help="the folder that run.py wrote")
    arguments = parser.parse_args(argv)
    runs = {run.name: run for table in TABLES.values() for run in with_bases(table)}
    run = runs.get(arguments.run)
    weights = arguments.results / "work" / f"{arguments.run}.weights"
    if run is None or run.vocabulary != VOCABULARY or run.feeds_back_hidden_state or run.gate_matrix:
        raise SystemExit(f"{arguments.run} is no run of bytes whose model transformers can load")
    if not weights.is_file():
        raise SystemExit(f"{weights} is not there: measure the run first, with run.py")
    model = make_model(run)
    model.load_state_dict(torch.load(weights, map_location="cpu"))
    model.save_pretrained(arguments.folder)
    byte_tokenizer(run.block).save_pretrained(arguments.folder)


if __name__ == "__main__":
    main()
