"""A repository loads over HTTP, in a process that cannot import ponder_hf, whatever the connection does meanwhile."""

import checkpoints
import hub_client
import hub_server
import pytest
import torch

from ponder_hf.conversion import convert


USE = """
import torch
from huggingface_hub import snapshot_download
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, pipeline
name, = argv
trust = {"trust_remote_code": True}
ids = torch.arange(3, 9)[None]
config = AutoConfig.from_pretrained(name, **trust)
hidden = AutoModel.from_pretrained(name, **trust)(ids).last_hidden_state
model = AutoModelForCausalLM.from_pretrained(name, dtype="auto", **trust)
text = pipeline("text-generation", model=name, **trust)("once upon a", max_new_tokens=4)[0]["generated_text"]
folder = AutoModelForCausalLM.from_pretrained(snapshot_download(name), **trust)
same = bool((folder(ids).logits == model(ids).logits).all())
result = [config.pondering_steps, list(hidden.shape), text.startswith("once upon a"), same]
"""
LOAD = """
import safetensors.torch
from huggingface_hub import hf_hub_download
result = len(safetensors.torch.load_file(hf_hub_download(argv[0], "model.safetensors"))) > 0
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    torch.manual_seed(0)
    checkpoints.save_base(folder / "base", tokenizer=True)
    convert(folder / "base", folder / "model")
    with hub_server.serving() as hub:
        hub.folder = folder / "model"
        yield hub


@pytest.fixture(scope="module")
def stranger(hub, tmp_path_factory):
    with hub_client.connected(hub, tmp_path_factory.mktemp("stranger"), without_ponder_hf=True) as stranger:
        yield stranger


def test_auto_classes_pipeline_and_snapshot(hub, stranger):
    hub.add("somebody/model", hub.folder)
    assert stranger.done(USE, "somebody/model") == [3, [1, 6, 32], True, True]


@pytest.mark.parametrize(
    "fault", [{"drop": True}, {"status": 429}, {"keep": 100, "times": 99}, {"status": 500}], ids=str
)
def test_a_download_that_breaks_is_whole_or_not_there(hub, stranger, fault):
    name = "somebody/" + "-".join(fault) + str(fault.get("status", ""))
    hub.add(name, hub.folder)
    hub.fail("GET", r"resolve/.*model\.safetensors$", **fault)
    reply = stranger.python(LOAD, name)
    hub.faults.clear()
    assert reply["result"] in (True, "raised")
    assert (reply["result"] == "raised") == ("keep" in fault or fault.get("status") == 500), reply["err"]
    assert stranger.done(LOAD, name) is True
