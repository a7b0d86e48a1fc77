"""Checkpoints of pickled weights: the refusal names a command, and that command works."""

import re
import shutil
import sys

import checkpoints
import hub_client
import hub_server
import prepared
import pytest
import torch
from checkpoints import run, stored

from ponder_hf import PonderingError, PonderingForCausalLM


def pickled(folder, shards=1):
    """A checkpoint of GPT-NeoX with a weight that its class does not know, in so many pickles. Returns its tensors."""
    checkpoints.save_base(folder, tokenizer=True)
    tensors = {**stored(folder), "adapter.weight": torch.ones(32, 64)}
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    for index in range(shards):
        name = "pytorch_model.bin" if shards == 1 else f"pytorch_model-{index + 1:05}-of-{shards:05}.bin"
        torch.save({name: tensors[name] for name in names[index::shards]}, folder / name)
    (folder / "training_args.bin").write_bytes(b"not weights")
    return tensors


def follow(line, folder):
    """Run what the refusal says."""
    program = re.search(r'python -c "(.*)", and give the folder F', line).group(1)
    done = prepared.run([sys.executable, "-c", program], cwd=folder)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("shards", [1, 3])
def test_a_folder(tmp_path, capsys, monkeypatch, shards):
    monkeypatch.chdir(tmp_path)
    tensors = pickled(tmp_path / "it's a base", shards)
    assert run("convert", "it's a base", "made") == 2
    follow(capsys.readouterr().err.splitlines()[-1], tmp_path)
    assert run("convert", "it's a base", "made") == 0
    made = stored(tmp_path / "made")
    assert set(made) == {f"backbone.{name}" for name in tensors if name != "adapter.weight"}
    assert all(
        torch.equal(made[f"backbone.{name}"], tensor) for name, tensor in tensors.items() if "adapter" not in name
    )
    assert "adapter.weight" in capsys.readouterr().err, "no tensor was lost on the way"


def test_from_base_says_where_the_command_stands(tmp_path):
    pickled(tmp_path / "base")
    with pytest.raises(PonderingError, match="has no safetensors files, and pickled weights are never read"):
        PonderingForCausalLM.from_base(tmp_path / "base")


def test_the_hub(tmp_path):
    pickled(tmp_path / "base")
    with hub_server.serving() as hub, hub_client.connected(hub, tmp_path) as client:
        hub.add("somebody/pickled", tmp_path / "base")
        line = client.refused("convert", "somebody/pickled", "made", "--revision", "main")
        assert "somebody/pickled has only pickled weights (pytorch_model.bin)" in line
        program = re.search(r'python -c "(.*)", and give the folder F', line).group(1)
        client.done(program + "; result = None")
        assert client.json("convert", "somebody-pickled", "made")["warnings"]
    shutil.rmtree(tmp_path / "made")
