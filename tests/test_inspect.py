"""`ponder-hf inspect`: what a checkpoint is, without loading its weights."""

import json
import shutil

import checkpoints
import hub_client
import hub_server
import pytest
import torch
from checkpoints import run

from ponder_hf import PonderingForCausalLM, __version__
from ponder_hf.conversion import convert


FIELDS = {"pondering_steps": 2, "pondering_top_k": 20, "pondering_gate": "zero_init", "embedding_scale": 2.0}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    torch.manual_seed(0)
    checkpoints.save_base(folder / "base", "gpt2", torch.bfloat16, tokenizer=True)
    convert(folder / "base", folder / "model", max_shard_size="40KB", **FIELDS)
    (folder / "code").mkdir()
    for name in ("config.json", "README.md"):
        (folder / "code" / name).write_bytes((folder / "model/config.json").read_bytes())
    return folder


def inspected(capsys, *words):
    capsys.readouterr()
    assert run("inspect", *words, "--json") == 0
    return json.loads(capsys.readouterr().out)


def test_a_folder(made, capsys):
    result = inspected(capsys, made / "model")
    model = PonderingForCausalLM.from_pretrained(made / "model")
    assert {name: result["pondering"][name] for name in FIELDS} == FIELDS
    assert (result["draft_heads"], result["format_version"], result["tokenizer"]) == (0, 1, True)
    backbone = result["backbone"]
    assert (backbone["model_type"], backbone["tie_word_embeddings"]) == ("gpt2", True)
    for name in ("vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings"):
        assert backbone[name] == getattr(model.config, name)
    weights = result["weights"]
    assert weights["parameters"] == model.num_parameters(), "tied weights count once"
    assert (weights["dtypes"], weights["bytes"]) == (["bfloat16"], 2 * weights["parameters"])
    assert weights["files"] == sorted(path.name for path in (made / "model").glob("*.safetensors"))
    assert len(weights["files"]) > 1
    assert (result["code"]["status"], result["code"]["release"]) == ("same", __version__)


def test_for_people_and_changed_code(made, tmp_path, capsys):
    copy = shutil.copytree(made / "model", tmp_path / "copy")
    (copy / "pondering_vocabulary_loss.py").write_text("raise SystemExit('it ran')")
    assert run("inspect", copy) == 0
    rows = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines() if not line.startswith(" "))
    values = {name: value.strip() for name, value in rows.items()}
    assert (values["pondering steps"], values["pondering top k"], values["backbone"]) == ("2", "20", "gpt2")
    assert values["cost of a token"] == "3 forward passes of the backbone"
    assert values["code"] == "changed"


def test_draft_heads_and_a_model_without_tokenizer(made, tmp_path, capsys):
    model = PonderingForCausalLM.from_pretrained(made / "model")
    model.add_draft_heads()
    model.save_pretrained(tmp_path / "heads")
    result = inspected(capsys, tmp_path / "heads")
    assert (result["draft_heads"], result["tokenizer"]) == (2, False)
    assert result["weights"]["parameters"] == model.num_parameters()


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("base", "convert it first"),
        ("./nowhere", "there is no folder"),
        ("nowhere", "no folder nowhere"),
        ("truncated", "is truncated"),
        ("newer", "pondering_format_version"),
    ],
)
def test_refusals(made, monkeypatch, capsys, source, says):
    monkeypatch.chdir(made)
    for name in ("truncated", "newer"):
        shutil.copytree("model", name, dirs_exist_ok=True)
    shard = next((made / "truncated").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-10])
    checkpoints.change_config(made / "newer", pondering_format_version=99)
    assert run("inspect", source) == 2
    out, err = capsys.readouterr()
    assert (out, len(err.splitlines())) == ("", 1)
    assert says in err


def test_on_the_hub_the_weights_stay_there(made, capsys, tmp_path):
    here = inspected(capsys, made / "model")
    with hub_server.serving() as hub, hub_client.connected(hub, tmp_path) as client:
        commit = hub.add("somebody/model", made / "model").references["main"]
        result = client.json("inspect", "somebody/model")
        assert result.pop("revision") == commit
        assert not list(client.home.rglob("*.safetensors"))
        client.json("export", "somebody/model", "plain")  # which downloads them
        client.python("import huggingface_hub.constants as c\nc.HF_HUB_OFFLINE = True")
        assert client.json("inspect", "somebody/model")["weights"] == result["weights"]
        client.python("import huggingface_hub.constants as c\nc.HF_HUB_OFFLINE = False")
        assert "no weights" in client.refused("inspect", hub.add("somebody/bare", made / "code").name)
    for name in ("backbone", "pondering", "weights", "tokenizer"):
        assert result[name] == here[name], name
    assert result["code"]["status"] == "same"
