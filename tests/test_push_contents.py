"""What must not get to the Hub by mistake: secrets of every form, and files from outside of the folder."""

import json
import random
import string
import tracemalloc

import pytest

from ponder_hf import PonderingError
from ponder_hf.hub import push_contents
from ponder_hf.hub.push_contents import kind_of, read_contents


CHANCE = random.Random(0)


def chosen(length, letters=string.ascii_letters + string.digits):
    # Made here, so that no scanner takes this file for one that holds secrets. A digit and a letter are always there.
    return "a1" + "".join(CHANCE.choices(letters, k=length - 2))


CAPITALS = string.ascii_uppercase + string.digits
HEX = "0123456789abcdef"
SECRETS = {
    "Hugging Face": "hf_" + chosen(34),
    "an organisation there": "api_org_" + chosen(34),
    "GitHub": "ghp_" + chosen(36),
    "GitHub, fine-grained": "github_pat_" + chosen(82),
    "GitLab": "glpat-" + chosen(20),
    "OpenAI": "sk-" + chosen(48),
    "OpenAI, of a project": "sk-proj-" + chosen(120),
    "Anthropic": "sk-ant-api03-" + chosen(90),
    "AWS": "AKIA" + "".join(CHANCE.choices(CAPITALS, k=16)),
    "AWS, for a while": "ASIA" + "".join(CHANCE.choices(CAPITALS, k=16)),
    "AWS, the secret part": "aws_secret_access_key = " + chosen(40),
    "Azure": "AccountKey=" + chosen(86) + "==",
    "Google": "AIza" + chosen(35),
    "Slack": "xoxb-" + chosen(40),
    "npm": "npm_" + chosen(36),
    "PyPI": "pypi-AgEIcHlwaS5vcmc" + chosen(80),
    "Stripe": "sk_live_" + chosen(24),
    "Databricks": "dapi" + "".join(CHANCE.choices(HEX, k=32)),
    "wandb": "WANDB_API_KEY=" + "a1" + "".join(CHANCE.choices(HEX, k=38)),
    "an RSA key": "-----BEGIN RSA " + "PRIVATE KEY-----\nabc",
    "an OpenSSH key": "-----BEGIN OPENSSH " + "PRIVATE KEY-----\nabc",
    "a PGP key": "-----BEGIN PGP " + "PRIVATE KEY BLOCK-----\nabc",
    "a PuTTY key": "PuTTY-User-" + "Key-File-3: ssh-ed25519",
}
FORMS = {
    "notes.txt": lambda secret: f"before\n{secret}\nafter".encode(),
    "settings.json": lambda secret: json.dumps({"token": secret}, indent=2).encode(),
    "book.ipynb": lambda secret: json.dumps({"cells": [{"outputs": [{"text": [secret + "\n"]}]}]}).encode(),
    "script.py": lambda secret: f"x = '{secret}'".encode(),
    "crlf.yaml": lambda secret: f"a: 1\r\nb: {secret}\r\n".encode(),
    "windows.txt": lambda secret: secret.encode("utf-16"),
    "other.bytes": lambda secret: b"\xff\xfe\x00\x01" + secret.encode() + b"\x00",
}


@pytest.mark.parametrize("secret", SECRETS.values(), ids=SECRETS)
@pytest.mark.parametrize("name", FORMS)
def test_a_secret_is_found(tmp_path, name, secret):
    (tmp_path / name).write_bytes(FORMS[name](secret))
    with pytest.raises(PonderingError, match=f'{name}.*allow="secrets"'):
        read_contents(tmp_path)
    assert read_contents(tmp_path, skip_unsafe=True) == ([], [name])
    assert read_contents(tmp_path, allow="secrets") == ([name], [])


@pytest.mark.parametrize("name", ["prod.env", "server.pem", "my.key", "id_ecdsa", "vault.kdbx", "token", "login.p12"])
def test_a_file_that_is_named_like_a_secret(tmp_path, name):
    (tmp_path / name).write_text("anything")
    assert kind_of(tmp_path / name) == "secrets"


@pytest.mark.parametrize(
    "text",
    [
        "export HF_TOKEN=hf_xxxxx and OPENAI_API_KEY=your_key_goes_here_instead_of_this_text",
        "sk-learn, ghp_, AKIA, hf_hub_download, api_key = os.environ['SOME_API_KEY']",
        "-----BEGIN PUBLIC KEY-----",
        json.dumps({f"Ġtoken{number}": number for number in range(5000)}),
    ],
    ids=range(4),
)
def test_what_is_no_secret_goes(tmp_path, text):
    (tmp_path / "README.md").write_text(text)
    assert read_contents(tmp_path) == (["README.md"], [])


def test_large_files_are_looked_at_in_pieces(tmp_path, monkeypatch):
    """Wherever a secret lies, across two pieces too; memory is that of a few pieces."""
    # A real piece has 16 MiB: what lies across two of them would be looked for in gigabytes.
    monkeypatch.setattr(push_contents, "_PIECE", 1 << 16)
    secret = SECRETS["GitHub, fine-grained"].encode()
    for offset in range((1 << 16) - len(secret) - 1, (1 << 16) + 2, 7):
        (tmp_path / "log.txt").write_bytes(b"\n" * offset + secret + b"\n" * 1000)
        assert kind_of(tmp_path / "log.txt") == "secrets", offset
    with open(tmp_path / "log.txt", "wb") as file:
        file.truncate(1 << 25)  # with nothing in it that takes room on the disk
    tracemalloc.start()
    assert kind_of(tmp_path / "log.txt") is None
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_links_out_of_the_folder(tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/passwords.txt").write_text("mine")
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    (folder / "README.md").write_text("text")
    (folder / "sub/inside.md").symlink_to("../README.md")
    (folder / "nowhere").symlink_to("nothing")
    (folder / "others").symlink_to("../outside", target_is_directory=True)
    assert read_contents(folder) == (["README.md", "sub/inside.md"], [])
    for target in ("../outside/passwords.txt", tmp_path / "outside/passwords.txt"):
        (folder / "notes.txt").symlink_to(target)
        with pytest.raises(PonderingError, match=r'notes\.txt: a link to a file outside.*allow="links"'):
            read_contents(folder)
        assert read_contents(folder, skip_unsafe=True)[1] == ["notes.txt"]
        assert "notes.txt" in read_contents(folder, allow=["links"])[0]
        (folder / "notes.txt").unlink()
    # By way of a link to the folder itself nothing is outside.
    (tmp_path / "link").symlink_to("model", target_is_directory=True)
    assert read_contents(tmp_path / "link") == (["README.md", "sub/inside.md"], [])


def test_a_snapshot_of_the_hubs_cache_may_be_pushed(tmp_path):
    snapshot = tmp_path / "models--me--it/snapshots/abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--me--it/blobs").mkdir()
    (tmp_path / "models--me--it/blobs/123").write_text("{}")
    (tmp_path / "elsewhere").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/123")
    assert read_contents(snapshot) == (["config.json"], [])
    (snapshot / "other.json").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PonderingError, match=r"other\.json"):
        read_contents(snapshot)


def test_what_only_begins_like_an_archive(tmp_path):
    (tmp_path / "notes").write_bytes(b"PK\3\4 is how archives begin")
    assert read_contents(tmp_path) == (["notes"], [])
