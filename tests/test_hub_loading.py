"""A repository loads over HTTP, in a process that cannot import ponder_hf, whatever the connection does meanwhile."""

import importlib.util
import shutil
import sys
from pathlib import Path

import checkpoints
import hub_client
import hub_server
import pytest
import torch

from ponder_hf import PonderingForCausalLM
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
LOGITS = """
import sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
name, settings = argv[0], eval(argv[1])
model = AutoModelForCausalLM.from_pretrained(name, **settings)
module = sys.modules[type(model).__module__]
where = "remote" if module.__name__.startswith("transformers_modules.") else module.__name__
logits = model(torch.arange(3, 9)[None]).logits[0, -1, :4].tolist()
result = [where, getattr(module, "RELEASE", "this"), str(model.dtype), logits, type(model).__name__]
"""
QUANTISED = """
import torch
from peft import LoraConfig, get_peft_model
from torchao.quantization import Int8WeightOnlyConfig
from transformers import AutoModelForCausalLM, TorchAoConfig
name, with_head = argv[0], argv[1] == "head"
settings = TorchAoConfig(Int8WeightOnlyConfig(), include_input_output_embeddings=with_head)
model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True, quantization_config=settings)
plain = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True)
ids = torch.arange(3, 19)[None]
head, calls = model.get_output_embeddings(), []
with torch.no_grad():
    model(ids)  # a backbone is held against itself when it is first used
    hook = head.register_forward_hook(lambda *_: calls.append(1))
    model(ids)
    hook.remove()
    quantised, whole = model(ids, labels=ids), plain(ids, labels=ids)
    rounded = {n: m.weight.dequantize() for n, m in model.named_modules() if hasattr(getattr(m, "weight", 0), "qdata")}
    for name, weight in rounded.items():
        plain.get_submodule(name).weight.copy_(weight)
    expected = plain(ids, labels=ids)
kinds = [type(m.weight).__name__ for m in model.modules() if isinstance(m, torch.nn.Linear)]
result = {
    "kinds": kinds,
    "head": type(head.weight).__name__,
    "kernel": model.pondering_kernel,
    "calls": len(calls),
    "losses": [each.loss.item() for each in (quantised, whole, expected)],
    "logits": [(quantised.logits - each.logits).abs().max().item() for each in (whole, expected)],
    "spread": whole.logits.std().item(),
    "tokens": model.generate(ids, max_new_tokens=4, pad_token_id=0).shape[1],
}
adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["query_key_value"])).train()
adapted(input_ids=ids, labels=ids).loss.backward()
result["gradients"] = [bool(each.grad.isfinite().all()) for each in adapted.parameters() if each.requires_grad]
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """The Hub with one model. `older`: a commit of it with other weights and other code; `newest`: the one after."""
    folder = tmp_path_factory.mktemp("made")
    torch.manual_seed(0)
    checkpoints.save_base(folder / "base", tokenizer=True)
    convert(folder / "base", folder / "model")
    older = shutil.copytree(folder / "model", folder / "older")
    checkpoints.change_tensors(older, lambda tensors: tensors["backbone.embed_out.weight"].mul_(2))
    with (older / "modeling_pondering.py").open("a") as file:
        file.write('\nRELEASE = "older"\n')
    with hub_server.serving() as hub:
        hub.folder = folder / "model"
        repository = hub.add("somebody/model", older)
        hub.older, hub.newest = repository.references["main"], repository.add_folder(hub.folder)
        yield hub


@pytest.fixture(scope="module")
def stranger(hub, tmp_path_factory):
    with hub_client.connected(hub, tmp_path_factory.mktemp("stranger"), without_ponder_hf=True) as stranger:
        yield stranger


@pytest.fixture(scope="module")
def torchao(hub, tmp_path_factory):
    """As `stranger`, with torchao, which lies beside the environment: transformers imports it wherever it is found."""
    place = Path(sys.prefix, "overlays", "torchao")
    if not place.is_dir():
        pytest.skip("torchao is not there: `make setup` puts it beside the environment")
    folder = tmp_path_factory.mktemp("torchao")
    with hub_client.connected(hub, folder, without_ponder_hf=True, packages=place) as client:
        yield client


@pytest.fixture(scope="module")
def installed(hub, tmp_path_factory):
    """A client that has ponder_hf."""
    with hub_client.connected(hub, tmp_path_factory.mktemp("installed")) as client:
        client.done("import ponder_hf")
        yield client


def logits(folder):
    """What LOGITS gives for a checkpoint on disk."""
    with torch.no_grad():
        return PonderingForCausalLM.from_pretrained(folder)(torch.arange(3, 9)[None]).logits[0, -1, :4].tolist()


def loaded(client, name="somebody/model", **settings):
    return client.done(LOGITS, name, settings)


def test_auto_classes_pipeline_and_snapshot(hub, stranger):
    assert stranger.done(USE, "somebody/model") == [3, [1, 6, 32], True, True]


def test_a_revision_has_its_own_weights_and_its_own_code(hub, stranger):
    newest, older = logits(hub.folder), logits(hub.folder.with_name("older"))
    assert newest != older
    for revision, release, expected in ((hub.older, "older", older), (hub.newest, "this", newest)):
        where, found, _, values, _ = loaded(stranger, revision=revision, trust_remote_code=True)
        assert (where, found, values) == ("remote", release, expected)
    # Which one was loaded last does not matter.
    assert loaded(stranger, revision=hub.older, trust_remote_code=True)[1] == "older"


def test_dtype_and_device_map(hub, stranger, tmp_path):
    model = PonderingForCausalLM.from_pretrained(hub.folder, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "bfloat16")
    hub.add("somebody/bfloat16", tmp_path / "bfloat16")
    settings = {"trust_remote_code": True, "dtype": "auto", "device_map": "auto"}
    assert loaded(stranger, "somebody/bfloat16", **settings)[2] == "torch.bfloat16"
    where, _, dtype, values, _ = loaded(stranger, **settings)
    assert (where, dtype, values) == ("remote", "torch.float32", logits(hub.folder))


def test_offline_after_a_first_load(hub, stranger):
    """The same home, no Hub, and the environment's own word for it."""
    online = loaded(stranger, trust_remote_code=True)
    pinned = loaded(stranger, revision=hub.older, trust_remote_code=True)
    stranger.done(USE, "somebody/model")
    with hub_client.connected(hub, stranger.folder, without_ponder_hf=True, HF_HUB_OFFLINE="1") as offline:
        before = len(hub.requests)
        assert loaded(offline, trust_remote_code=True) == online
        assert loaded(offline, revision=hub.older, trust_remote_code=True) == pinned
        assert offline.done(USE, "somebody/model")[2:] == [True, True]
        assert offline.python(LOGITS, "somebody/other", {"trust_remote_code": True})["result"] == "raised"
        assert len(hub.requests) == before


def test_with_ponder_hf_installed_its_own_code_is_used(hub, installed):
    """Also where remote code is trusted: transformers prefers classes that are registered."""
    for settings in ({}, {"trust_remote_code": True}, {"revision": hub.older, "trust_remote_code": True}):
        before = len(hub.served)
        where, release, _, values, name = loaded(installed, **settings)
        assert (where, release, name) == ("ponder_hf.modeling.modeling_pondering", "this", "PonderingForCausalLM")
        assert values == logits(hub.folder.with_name("older") if "revision" in settings else hub.folder)
        assert not [path for path in hub.served[before:] if path.endswith(".py")], "nothing to run is downloaded"


@pytest.mark.parametrize("part", ["head", "layers"])
def test_int8_weights_by_torchao(hub, torchao, part):
    found = torchao.done(QUANTISED, "somebody/model", part)
    assert found["kinds"].count("Int8Tensor") == (9 if part == "head" else 8), "four linear layers in each of two"
    assert found["head"] == ("Int8Tensor" if part == "head" else "Parameter")
    quantised, whole, expected = found["losses"]
    assert 0 < abs(quantised - whole) < 0.01 * whole
    assert 0 < found["logits"][0] < 0.2 * found["spread"]
    # Every pass, and so the pondering embedding, saw the rounded weights: a plain model of them gives the same.
    assert found["logits"][1] < 1e-4
    assert abs(quantised - expected) < 1e-5
    if part == "head":
        assert (found["kernel"], found["calls"]) == ("plain", 4), "the head's module runs in each of the four passes"
    assert found["tokens"] == 20
    assert found["gradients"] == [True] * 4, "two matrices of an adapter in each of two layers"


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


def test_a_checkpoint_that_was_saved_quantised(hub, torchao, tmp_path, capsys):
    """The commands take it where torchao is, and say what is missing where it is not."""
    save = """
from torchao.quantization import Int8WeightOnlyConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TorchAoConfig
settings = {"trust_remote_code": True, "quantization_config": TorchAoConfig(Int8WeightOnlyConfig())}
AutoModelForCausalLM.from_pretrained(argv[0], **settings).save_pretrained(argv[1])
AutoTokenizer.from_pretrained(argv[0], trust_remote_code=True).save_pretrained(argv[1])
"""
    torchao.done(save, "somebody/model", tmp_path / "int8")
    logits = "model(torch.arange(3, 9)[None]).logits"
    same = f"""
import torch
from torchao.quantization import Int8WeightOnlyConfig
from transformers import AutoModelForCausalLM, TorchAoConfig
model = AutoModelForCausalLM.from_pretrained(argv[1], trust_remote_code=True)
loaded = {logits}
settings = {{"trust_remote_code": True, "quantization_config": TorchAoConfig(Int8WeightOnlyConfig())}}
model = AutoModelForCausalLM.from_pretrained(argv[0], **settings)
result = bool((loaded == {logits}).all())
"""
    assert torchao.done(same, "somebody/model", tmp_path / "int8")
    capsys.readouterr()
    refused = [["export", tmp_path / "int8", tmp_path / "out"]]
    if importlib.util.find_spec("torchao") is None:
        refused.append(["generate", tmp_path / "int8", "--prompt", "once"])
    for words in refused:
        assert checkpoints.run(*words) == 2
        err = capsys.readouterr().err
        assert "is quantised by torchao" in err
        assert len(err.splitlines()) == 1
    assert checkpoints.run("inspect", tmp_path / "int8") == 0
    assert "I8" in capsys.readouterr().out


def test_a_damaged_download_is_what_hf_cache_verify_finds(hub, stranger):
    """transformers takes a file of the right size as it is, so docs/hub.md names the command that does not."""
    hub.add("somebody/damaged", hub.folder)
    hub.fail("GET", r"resolve/.*model\.safetensors$", corrupt=True)
    stranger.done(LOAD, "somebody/damaged")
    program = "from huggingface_hub.cli.hf import main\nimport sys\nsys.argv[1:] = ['cache', 'verify', *argv]\nmain()"
    found = stranger.python(program, "somebody/damaged")
    assert "model.safetensors" in found["out"] + found["err"]
    assert "verification failed" in found["out"] + found["err"]
