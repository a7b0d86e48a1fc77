"""`ponder-hf push` against a Hub of our own: what arrives, what is refused, and what happens when something breaks."""

import json
import re
import shutil

import checkpoints
import hub_client
import hub_server
import pytest
import torch

from ponder_hf.conversion import convert


@pytest.fixture(scope="module")
def hub():
    with hub_server.serving() as hub:
        yield hub


@pytest.fixture(scope="module")
def client(hub, tmp_path_factory):
    with hub_client.connected(hub, tmp_path_factory.mktemp("client")) as client:
        yield client


@pytest.fixture(scope="module")
def with_xet(hub, tmp_path_factory):
    pytest.importorskip("hf_xet", reason="needs hf_xet, which huggingface_hub installs where it can")
    with hub_client.connected(hub, tmp_path_factory.mktemp("xet"), HF_HUB_DISABLE_XET="0") as client:
        yield client


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A pondering checkpoint `model` with a tokenizer and `sharded`, the same in several files."""
    folder = tmp_path_factory.mktemp("made")
    torch.manual_seed(0)
    checkpoints.save_base(folder / "base", tokenizer=True)
    convert(folder / "base", folder / "model")
    convert(folder / "base", folder / "sharded", max_shard_size="60KB")
    return folder


@pytest.fixture
def folder(made, tmp_path):
    """A copy of the checkpoint that may be changed."""
    return shutil.copytree(made / "model", tmp_path / "model")


@pytest.fixture
def name(request):
    """The id of a repository that no other test has."""
    return "somebody/" + re.sub(r"[^\w]", "-", request.node.name).replace("--", "-").strip("-")[:90]


@pytest.fixture(autouse=True)
def no_faults(hub):
    yield
    hub.faults.clear()


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_arrives_is_the_folder_and_a_card(hub, client, made, name):
    result = client.json("push", made / "model", name)
    found = hub[name].contents()
    card = found.pop("README.md").decode()
    assert found == contents(made / "model")
    assert result["commit"] == hub[name].references["main"]
    assert sorted(result["uploaded"]) == sorted([*found, "README.md"])
    assert "pipeline_tag: text-generation" in card
    assert hub[name].files()["model.safetensors"].is_lfs


def test_pushing_twice_uploads_nothing(hub, client, made, name):
    first = client.json("push", made / "sharded", name)
    arrived = len(hub.uploaded)
    again = client.json("push", made / "sharded", name)
    assert again["uploaded"] == []
    assert (again["commit"], len(hub[name].commits)) == (first["commit"], 2)
    assert len(hub.uploaded) == arrived
    assert "are there already" in client.command("push", made / "sharded", name)[2]


def test_only_what_changed_is_uploaded_and_stale_weights_go(hub, client, made, name):
    client.json("push", made / "model", name)
    result = client.json("push", made / "sharded", name)
    weights = {path.name for path in (made / "sharded").glob("model*") if path.suffix != ".py"}
    assert {path for path in result["uploaded"] if path != "README.md"} == weights
    assert result["deleted"] == ["model.safetensors"], "transformers would load it in place of the shards"
    assert {path for path in hub[name].contents() if ".safetensors" in path} == weights


def test_a_dry_run_lists_files_and_does_nothing(hub, client, made, name):
    before = len(hub.requests)
    code, out, err = client.command("push", made / "model", name, "--dry-run", token=False)
    assert (code, len(hub.requests)) == (0, before)
    listed = {line.split()[1]: int(line.split()[0].replace(",", "")) for line in out.splitlines()}
    assert listed == {path: len(content) for path, content in contents(made / "model").items()}
    assert "would be pushed" in err


def test_private_branch_and_pull_request(hub, client, made, name):
    client.json("push", made / "model", name, "--private", "--revision", "trial")
    repository = hub[name]
    assert repository.private
    assert repository.contents() == {}, "nothing on main"
    assert "config.json" in repository.contents("trial")
    result = client.json("push", made / "model", name, "--create-pr")
    assert result["pull_request"].endswith("/discussions/1")
    assert repository.contents() == {}
    assert "config.json" in repository.contents("refs/pr/1")
    line = client.refused("push", made / "model", name, "--create-pr", "--revision", "trial")
    assert "leave --revision out" in line


def test_progress_bars(client, made, name):
    assert "model.safetensors: 100%" in client.command("push", made / "model", name)[2]


# What must not be pushed


@pytest.mark.parametrize(
    ("file", "content", "kind"),
    [
        ("pytorch_model.bin", b"anything", "pickles"),
        ("notes", b"\x80\x04\x95pickled", "pickles"),
        ("sub/optimizer.pt", b"anything", "optimiser-states"),
        ("notes.txt", b"export HF_TOKEN=hf_" + b"a" * 34, "secrets"),
        ("id_rsa", b"anything", "secrets"),
    ],
)
def test_unsafe_files_are_refused_unless_told(hub, client, folder, name, file, content, kind):
    (folder / file).parent.mkdir(exist_ok=True)
    (folder / file).write_bytes(content)
    line = client.refused("push", folder, name)
    assert file in line
    assert f"--allow {kind}" in line
    assert name not in hub.repositories
    assert file in client.json("push", folder, name, "--skip-unsafe", "--dry-run")["left_out"]
    client.json("push", folder, name, "--allow", kind)
    assert hub[name].contents()[file] == content


def test_what_is_no_part_of_the_model_stays(hub, client, folder, name):
    for file in ("checkpoint-4/optimizer.pt", ".env", "runs/events", "_partial-model/x.bin"):
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_text("secret")
    result = client.json("push", folder, name)
    assert len(result["left_out"]) == 4
    assert not set(result["left_out"]) & set(hub[name].contents())


def test_paths_of_this_machine_stay(hub, client, folder, name):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["base_config"]["_name_or_path"] = str(folder)
    path.write_text(json.dumps(config))
    client.json("push", folder, name)
    assert str(folder).encode() not in b"".join(hub[name].contents().values())


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["nowhere", "somebody/x"], "there is no folder"),
        (["model", "somebody/x/y"], "cannot be the name"),
        (["base", "somebody/x"], "convert it first"),
        (["broken", "somebody/x"], "truncated"),
    ],
)
def test_what_is_no_checkpoint_is_refused(hub, client, made, words, says):
    if not (made / "broken").exists():
        shutil.copytree(made / "model", made / "broken")
        content = (made / "broken/model.safetensors").read_bytes()
        (made / "broken/model.safetensors").write_bytes(content[:-10])
    before = len(hub.requests)
    assert says in client.refused("push", made / words[0], *words[1:])
    assert len(hub.requests) == before


# Rights


@pytest.mark.parametrize(
    ("repository", "token", "says"),
    [
        ("somebody/rights", False, "needs a token"),
        ("somebody/rights", "hf_" + "x" * 34, "does not accept the token"),
        ("somebody/rights", hub_server.READER, "may not write"),
        ("else/rights", hub_server.WRITER, "may not write"),
    ],
)
def test_rights(hub, client, made, repository, token, says):
    code, out, err = client.command("push", made / "model", repository, token=token)
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert says in err
    assert "hf_" not in err
    assert repository not in hub.repositories


def test_a_token_is_never_shown(client, made, hub, name):
    """Not even where the server says it, or a traceback is asked for."""
    program = "import os; os.environ['PONDER_HF_DEBUG'] = '1'\n" + hub_client.COMMAND
    program += "\ndel os.environ['PONDER_HF_DEBUG']"
    hub.fail("POST", "/api/repos/create", status=400, headers={"X-Error-Message": f"bad {hub_server.WRITER}"})
    reply = client.python(program, "push", str(made / "model"), name)
    assert reply["result"] == 1
    assert "Traceback" in reply["err"]
    assert hub_server.WRITER not in reply["err"] + reply["out"]


# Faults: what is said, that no reader sees half of it, and that a second try completes it


FAULTS = {
    "500": ("POST", "/commit/", {"status": 500, "times": 99}, "the Hub did not take"),
    "503": ("PUT", "/lfs/", {"status": 503, "times": 99}, "the Hub did not take"),
    "429": ("POST", "/preupload/", {"status": 429, "times": 99, "headers": {"Retry-After": "3"}}, "no more requests"),
    "dropped": ("PUT", "/lfs/", {"drop": True, "times": 99}, "connection to"),
    "checksum": ("PUT", "/lfs/", {"corrupt": True, "times": 99}, "SHA-256"),
    "409": ("POST", "/commit/", {"status": 409}, "the Hub did not take"),
    "412": ("POST", "/commit/", {"status": 412}, "somebody else changed"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults(hub, client, made, name, fault):
    method, path, what, says = FAULTS[fault]
    hub.fail(method, path, **what)
    line = client.refused("push", made / "sharded", name, code=1)
    assert says in line
    assert "push again" in line
    assert hub[name].contents() == {}, "half of it can be seen"
    before = len(hub.uploaded)
    hub.faults.clear()
    client.json("push", made / "sharded", name)
    found = hub[name].contents()
    assert {path: found[path] for path in contents(made / "sharded")} == contents(made / "sharded")
    shards = len(list((made / "sharded").glob("*.safetensors")))
    expected = shards if path == "/lfs/" or fault == "429" else 0
    assert len(hub.uploaded) - before == expected, "what had arrived was sent again"


@pytest.fixture
def in_parts(hub):
    """Parts of so many bytes, which cut the one file of weights into several."""
    hub.part_size = 50_000
    yield hub.part_size
    hub.part_size = None


def parts_sent(hub, start=0):
    return [int(path.rpartition("/")[2]) for method, path in hub.requests[start:] if re.search(r"/lfs/.*/\d+$", path)]


def test_a_large_file_goes_in_parts(hub, client, made, name, in_parts):
    start, size = len(hub.requests), (made / "model/model.safetensors").stat().st_size
    client.json("push", made / "model", name)
    assert parts_sent(hub, start) == [*range(1, -(-size // in_parts) + 1)]
    assert len(parts_sent(hub, start)) > 2
    assert hub[name].contents()["model.safetensors"] == (made / "model/model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("method", "path", "what", "says"),
    [
        ("PUT", r"/lfs/.*/2$", {"drop": True, "times": 99}, "connection to"),
        ("PUT", r"/lfs/.*/2$", {"status": 503, "times": 99}, "the Hub did not take"),
        ("PUT", r"/lfs/.*/2$", {"corrupt": True}, "SHA-256"),
        ("POST", r"/lfs/.*/[0-9a-f]{64}$", {"drop": True, "times": 99}, "connection to"),
    ],
    ids=["a part breaks off", "a part is refused", "a part arrives damaged", "they are not put together"],
)
def test_parts_that_do_not_arrive(hub, client, made, name, in_parts, method, path, what, says):
    hub.fail(method, path, **what)
    assert says in client.refused("push", made / "model", name, code=1)
    assert hub[name].contents() == {}
    hub.faults.clear()
    start = len(hub.requests)
    client.json("push", made / "model", name)
    assert parts_sent(hub, start)[0] == 1, "the client does not remember parts: an unfinished file begins anew"
    assert hub[name].contents()["model.safetensors"] == (made / "model/model.safetensors").read_bytes()


def test_a_part_that_breaks_once_is_sent_again(hub, client, made, name, in_parts):
    start = len(hub.requests)
    hub.fail("PUT", r"/lfs/.*/2$", drop=True)
    client.json("push", made / "model", name)
    assert parts_sent(hub, start)[:4] == [1, 2, 2, 3]


@pytest.mark.parametrize(
    ("what", "code", "says"),
    [
        ({}, 2, "HF_HUB_DISABLE_XET=1"),
        ({"status": 403}, 2, "does not accept the token"),
        ({"status": 401}, 2, "does not accept the token"),
        ({"status": 400}, 1, "broke"),
    ],
    ids=["no Xet here", "403", "401", "400"],
)
def test_xet_storage_that_does_not_answer(hub, with_xet, made, name, what, code, says):
    """hf_xet never falls back to LFS by itself. This Hub has no Xet: only the way to its failures is tested."""
    hub.fail("GET", "xet-write-token", times=99, **what)  # it may ask more than once
    assert says in with_xet.refused("push", made / "model", name, code=code)
    assert hub[name].contents() == {}


def test_a_short_fault_is_waited_out(hub, client, made, name):
    hub.fail("POST", "/preupload/", status=429, headers={"Retry-After": "3"})
    hub.fail("PUT", "/lfs/", status=503)
    hub.fail("PUT", "/lfs/", drop=True)
    reply = client.python(hub_client.COMMAND, "push", made / "model", name)
    assert reply["result"] == 0, reply["err"]
    assert reply["waits"][0] >= 3, "Retry-After counts"
    assert "model.safetensors" in hub[name].contents()


def test_a_branch_that_moves_meanwhile(hub, client, made, name):
    """The real thing: somebody else's commit lands between our look at the branch and our own commit."""
    client.json("push", made / "model", name)
    repository = hub[name]

    def preupload(handler, repository_name, revision, body):
        if repository_name == name and not repository.contents().get("other.txt"):
            repository.commit("main", "other", [("file", {"path": "other.txt", "content": b"other"})])
        return hub_server.Handler.preupload(handler, repository_name, revision, body)

    routes = hub_server.ROUTES
    index = next(i for i, (_, pattern, _) in enumerate(routes) if "preupload" in pattern)
    kept = routes[index]
    routes[index] = (*kept[:2], preupload)
    try:
        line = client.refused("push", made / "sharded", name, code=1)
    finally:
        routes[index] = kept
    assert "somebody else changed" in line
    assert "model.safetensors.index.json" not in repository.contents()
    client.json("push", made / "sharded", name)
    assert {"other.txt", "model.safetensors.index.json"} <= set(repository.contents())
