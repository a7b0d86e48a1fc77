"""One round trip: push to a private repository, load it elsewhere, delete it. With the real Hub if you ask for it:

PONDER_REAL_HUB=1 HF_TOKEN=... python -m pytest tests/test_real_hub.py

The token must be allowed to create and delete repositories of its user. Nothing else of that user is touched.
"""

import os
import secrets
from contextlib import ExitStack

import checkpoints
import hub_client
import hub_server
import pytest
import torch

from ponder_hf.conversion import convert


ASKED = os.environ.get("PONDER_REAL_HUB") == "1" and bool(os.environ.get("HF_TOKEN"))
REAL = pytest.param(
    "the real Hub",
    marks=pytest.mark.skipif(not ASKED, reason="asks for PONDER_REAL_HUB=1 and a token that may write in HF_TOKEN"),
)
WHO = "from huggingface_hub import whoami\nresult = whoami()['name']"
IS_THERE = "from huggingface_hub import repo_exists\nresult = repo_exists(argv[0])"
DELETE = "from huggingface_hub import delete_repo\ndelete_repo(argv[0], missing_ok=True)"
INFO = "from huggingface_hub import model_info\ninfo = model_info(argv[0])\nresult = [info.private, info.sha]"
LOAD = """
from transformers import AutoModelForCausalLM, AutoTokenizer
name, *commit = argv
settings = {"trust_remote_code": True, "revision": commit[0] if commit else None}
model, tokenizer = (auto.from_pretrained(name, **settings) for auto in (AutoModelForCausalLM, AutoTokenizer))
inputs = tokenizer("once upon a", return_tensors="pt", return_token_type_ids=False)
result = {
    "code": type(model).__module__.split(".")[0],
    "logits": model(**inputs).logits[0, -1].tolist(),
    "new": model.generate(**inputs, max_new_tokens=4, eos_token_id=None).shape[1] - 3,
}
"""


@pytest.fixture(params=["the tests' Hub", REAL])
def clients(request, tmp_path):
    """Two processes of one user: one with ponder_hf, and one that cannot import it, with a cache of its own."""
    with ExitStack() as stack:
        hub, token = None, os.environ.get("HF_TOKEN")
        if request.param != "the real Hub":
            hub, token = stack.enter_context(hub_server.serving()), hub_server.WRITER
        found = []
        for place in ("here", "elsewhere"):
            (tmp_path / place).mkdir()
            settings = {"without_ponder_hf": place == "elsewhere", "token": token}
            found.append(stack.enter_context(hub_client.connected(hub, tmp_path / place, **settings)))
        yield found


def test_push_load_elsewhere_and_delete(clients, tmp_path):
    here, elsewhere = clients
    torch.manual_seed(0)
    checkpoints.save_base(tmp_path / "base", tokenizer=True)
    convert(tmp_path / "base", tmp_path / "model")
    name = f"{here.done(WHO)}/ponder-hf-test-{secrets.token_hex(4)}"
    try:
        first = here.json("push", tmp_path / "model", name, "--private")
        assert here.json("push", tmp_path / "model", name)["uploaded"] == []
        found = elsewhere.done(LOAD, name, first["commit"])
        expected = here.done(LOAD, tmp_path / "model")
        assert (found["code"], found["new"]) == ("transformers_modules", 4)
        assert here.done(INFO, name) == [True, first["commit"]]
        assert found["logits"] == expected["logits"]
        assert elsewhere.python(LOAD, name, first["commit"], token=False)["result"] == "raised", "it is private"
        assert here.json("inspect-code", name)["status"] == "same"
    finally:
        here.done(DELETE, name)
    assert here.done(IS_THERE, name) is False
