"""Fixtures for tests of training: bases and text in one folder."""

import checkpoints
import pytest
import torch
import training_runs


DROPOUT = {"embd_pdrop": 0.1, "attn_pdrop": 0.1, "resid_pdrop": 0.1}


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A folder with plain bases `base` (GPT-NeoX) and `dropout` (GPT-2), both with a tokenizer, and texts."""
    folder = tmp_path_factory.mktemp("material")
    torch.manual_seed(0)
    checkpoints.save_base(folder / "base", tokenizer=True)
    checkpoints.save_base(folder / "dropout", "gpt2", tokenizer=True, **DROPOUT)
    training_runs.write_text(folder / "text.txt", 300)
    training_runs.write_text(folder / "other.txt", 40, seed=1)
    return folder


@pytest.fixture
def folder(material, tmp_path, monkeypatch):
    """An empty current folder in which the material can be reached by its names."""
    for path in material.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path
