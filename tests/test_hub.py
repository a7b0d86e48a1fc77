"""Models on the Hub, which a small server stands in for: what is downloaded, and what is refused."""

import re
from collections import Counter

import checkpoints
import hub_client
import hub_server
import pytest

from ponder_hf import PonderingForCausalLM


def test_a_model_on_the_hub(tmp_path):
    base = tmp_path / "repository"
    checkpoints.save_base(base, "llama", shard_size="30KB", tokenizer=True)
    shards = {path.name for path in base.glob("*.safetensors")}
    assert len(shards) > 1
    for name in ("pytorch_model.bin", "modeling_special.py", "README.md", "model.fp16.safetensors"):
        (base / name).write_text("not to be downloaded")
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_bytes((base / "config.json").read_bytes())
    (pickled / "pytorch_model.bin").write_text("pickled")
    with hub_server.serving() as hub, hub_client.connected(hub, tmp_path) as client:
        commit = hub.add("somebody/model", base).references["main"]
        hub.add("somebody/pickled", pickled)
        hub.add("somebody/gated", pickled, gated=True)
        assert client.json("convert", "somebody/model", "out")["revision"] == commit
        client.json("convert", "somebody/model", "again", "--revision", commit)
        refusals = {
            ("somebody/model", "no", "--revision", "nothing"): "no such revision",
            ("somebody/gated", "no"): "is gated",
            ("nobody/model", "no"): "no such model on the Hub",
            ("somebody/pickled", "no"): "somebody/pickled has only pickled weights (pytorch_model.bin)",
        }
        for words, says in refusals.items():
            assert says in client.refused("convert", *words)
    wanted = {path.relative_to(base).as_posix() for path in base.rglob("*") if path.is_file()}
    wanted -= {"pytorch_model.bin", "modeling_special.py", "README.md", "model.fp16.safetensors"}
    assert sorted(hub.served) == sorted([*wanted, "config.json"]), "each file once, and none that is not needed"
    for folder in ("out", "again"):
        PonderingForCausalLM.from_pretrained(tmp_path / folder)
    assert not (tmp_path / "no").exists()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return checkpoints.save_base(tmp_path_factory.mktemp("made") / "base", "llama", shard_size="30KB", tokenizer=True)


@pytest.fixture(scope="module")
def hub():
    with hub_server.serving() as hub:
        yield hub


@pytest.fixture(scope="module")
def client(hub, tmp_path_factory):
    with hub_client.connected(hub, tmp_path_factory.mktemp("client")) as client:
        yield client


# What is said, with which exit code, and whether a single fault is got over by itself.
FAULTS = {
    "500": ({"status": 500, "times": 99}, 1, "it answered 500"),
    "503": ({"status": 503, "times": 99}, 1, "it answered 503"),
    "429": ({"status": 429, "times": 99, "headers": {"Retry-After": "3"}}, 1, "takes no more requests"),
    "dropped": ({"drop": True, "times": 99}, 1, "the connection broke"),
    "truncated": ({"keep": 20}, 1, "arrived incomplete"),
    "checksum": ({"corrupt": True}, 1, "arrived damaged"),
    "401": ({"status": 401}, 2, "does not accept the token"),
    "403": ({"status": 403}, 2, "may not read"),
}


@pytest.mark.parametrize("file", ["model-00002-of", "/config.json"])
@pytest.mark.parametrize("fault", FAULTS)
def test_downloads_that_break(hub, client, made, fault, file):
    what, code, says = FAULTS[fault]
    name = f"somebody/{fault}-{len(hub.repositories)}"
    hub.add(name, made)
    hub.fail("GET", f"resolve/.*{file}", **what)
    before, start = checkpoints.listing(client.folder).keys(), len(hub.served)
    line = client.refused("convert", name, f"{name}-out", code=code)
    hub.faults.clear()
    assert says in line
    assert "http://" not in line, "an address is no help"
    new = checkpoints.listing(client.folder).keys() - before
    assert not [path for path in new if not path.startswith("home")], "half of it was written"
    client.json("convert", name, f"{name}-out")
    twice = {path for path, count in Counter(hub.served[start:]).items() if count > 1}
    assert twice <= ({path for path in twice if re.search(file, f"/{path}")} if code == 1 else set())
    PonderingForCausalLM.from_pretrained(client.folder / f"{name}-out")


def test_damaged_code_in_a_folder_of_the_repository_is_noticed(hub, client, tmp_path):
    (tmp_path / "checkpoint-4").mkdir()
    (tmp_path / "checkpoint-4/code.py").write_text("pass\n")
    hub.add("somebody/nested", tmp_path)
    hub.fail("GET", "resolve/.*code.py", corrupt=True)
    assert "arrived damaged" in client.refused("inspect-code", "somebody/nested", code=1)
    assert client.json("inspect-code", "somebody/nested")["status"] == "changed"


def test_a_short_fault_of_a_download_is_waited_out(hub, client, made):
    hub.add("somebody/short", made)
    hub.fail("GET", "resolve/.*model-00002-of", status=429, headers={"Retry-After": "3"})
    hub.fail("GET", "resolve/.*model-00003-of", drop=True)
    reply = client.python(hub_client.COMMAND, "convert", "somebody/short", "short")
    assert reply["result"] == 0, reply["err"]
    assert max(reply["waits"]) >= 3, "Retry-After counts"
