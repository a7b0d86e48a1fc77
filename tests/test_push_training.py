"""What a Trainer, PEFT and `push_to_hub` leave on the Hub loads where ponder_hf is not installed, at every commit."""

import re
import shutil

import checkpoints
import hub_client
import hub_server
import pytest
import torch
import training_runs

from ponder_hf.conversion import convert
from ponder_hf.hub.code import installed_code


LOAD = """
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
name, revision = argv
settings = {"trust_remote_code": True, "revision": revision}
model = AutoModelForCausalLM.from_pretrained(name, **settings)
tokenizer = AutoTokenizer.from_pretrained(name, **settings)
inputs = tokenizer("once upon a", return_tensors="pt", return_token_type_ids=False)
result = [type(model).__module__.split(".")[0], model.generate(**inputs, max_new_tokens=4).shape[1]]
"""


LOAD_INSTALLED = """
import ponder_hf
from transformers import AutoModelForCausalLM
result = type(AutoModelForCausalLM.from_pretrained(argv[0])).__module__
"""


@pytest.fixture(scope="module")
def hub():
    with hub_server.serving() as hub:
        yield hub


@pytest.fixture(scope="module")
def client(hub, tmp_path_factory):
    folder = tmp_path_factory.mktemp("client")
    torch.manual_seed(0)
    checkpoints.save_base(folder / "base", tokenizer=True)
    convert(folder / "base", folder / "model")
    training_runs.write_text(folder / "text.txt", 60)
    with hub_client.connected(hub, folder) as client:
        yield client


@pytest.fixture(scope="module")
def stranger(hub, tmp_path_factory):
    """A client that cannot import ponder_hf."""
    with hub_client.connected(hub, tmp_path_factory.mktemp("stranger"), without_ponder_hf=True) as stranger:
        yield stranger


def weights(files):
    return [path for path in files if path.endswith(".safetensors") and "/" not in path]


@pytest.mark.parametrize("strategy", ["end", "every_save", "checkpoint", "all_checkpoints"])
def test_every_strategy_of_trainer(hub, client, stranger, strategy):
    name = f"somebody/{strategy}"
    words = ["train", "base", "--data", "text.txt", "--output", strategy, *training_runs.SMALL, "--max-steps", 4]
    words += ["--save-steps", 2, "--hub-always-push", "true", "--push-to-hub", "true", "--hub-strategy", strategy]
    words += ["--held-out", 4, "--hub-model-id", name, "--hub-token", hub_server.WRITER]
    client.json(*words, token=False)
    token = hub_server.WRITER.encode()
    assert not [
        path for path in (client.folder / strategy).rglob("*") if path.is_file() and token in path.read_bytes()
    ]
    assert not [path for path, content in hub[name].contents().items() if token in content]
    repository = hub[name]
    commits = list(repository.commits.items())[1:]
    # The model at the end is the one of the last checkpoint.
    assert len(commits) == {"end": 1, "every_save": 2, "checkpoint": 4, "all_checkpoints": 4}[strategy]
    for _, commit in commits:
        assert weights(commit.files) == ["model.safetensors"]
        assert set(installed_code()) <= set(commit.files)
        at_top = [path for path in commit.files if "/" not in path]
        assert {"README.md", "tokenizer.json", "generation_config.json"} <= set(at_top)
        assert not [path for path in at_top if path.endswith((".bin", ".pt", ".pth"))], "pickles"
        assert not [path for path in commit.files if path.startswith("_")]
        assert "optimiser steps" in commit.files["README.md"].content.decode()
    folders = {path.split("/")[0] for path in repository.files() if path.endswith("optimizer.pt")}
    expected = {"checkpoint": {"last-checkpoint"}, "all_checkpoints": {"checkpoint-2", "checkpoint-4"}}
    assert folders == expected.get(strategy, set())
    card = repository.contents()["README.md"].decode()
    assert "| optimiser steps | 4 |" in card
    assert "Trained on text.txt" in card
    assert re.search(r"\| held-out loss \|( \d\.\d+ \|){3}", card)
    assert str(client.folder) not in card
    if strategy in ("end", "every_save"):
        for sha, _ in commits:
            assert stranger.done(LOAD, name, sha) == ["transformers_modules", 7]


TRAINER = """
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments
name, how = argv

class Wait(TrainerCallback):  # or Trainer copies the next checkpoint over the files that it is still sending
    def on_step_begin(self, *arguments, **more):
        if getattr(trainer, "push_in_progress", None) is not None:
            trainer.push_in_progress.wait_until_done()

callbacks = [Wait()]
if how == "callback":
    from ponder_hf.hub import CodeOnPush
    callbacks.append(CodeOnPush())
if how != "trusting":
    import ponder_hf
model = AutoModelForCausalLM.from_pretrained("model", trust_remote_code=how == "trusting")
folder = name.split("/")[1]
if how in ("saved", "trusting"):
    model.save_pretrained(folder)
rows = [{"input_ids": list(range(3, 11)), "labels": list(range(3, 11))}] * 4
strategy = "checkpoint" if how == "finished" else "every_save"
settings = dict(push_to_hub=True, hub_model_id=name, hub_strategy=strategy, hub_always_push=True, use_cpu=True)
settings |= dict(save_steps=1, max_steps=2, per_device_train_batch_size=2, report_to="none", disable_tqdm=True)
tokenizer = AutoTokenizer.from_pretrained("model")
trainer = Trainer(
    model, TrainingArguments(folder, **settings), train_dataset=rows, processing_class=tokenizer, callbacks=callbacks
)
trainer.train()
if how == "finished":
    trainer.push_to_hub()
result = type(model).__module__.split(".")[0]
"""


def commits_with_weights(hub, name):
    return [(sha, each) for sha, each in hub[name].commits.items() if weights(each.files)]


@pytest.mark.parametrize("how", ["callback", "saved", "trusting"])
def test_transformers_own_trainer_pushes_the_code(hub, client, stranger, how):
    """With our callback, or with a model that was saved to the output folder first, which needs no ponder_hf."""
    name, trainer = f"somebody/trainer-{how}", stranger if how == "trusting" else client
    if how == "trusting":
        shutil.copytree(client.folder / "model", stranger.folder / "model")
    assert trainer.done(TRAINER, name, how) == ("transformers_modules" if how == "trusting" else "ponder_hf")
    commits = commits_with_weights(hub, name)
    assert commits
    for sha, commit in commits:
        assert set(installed_code()) <= set(commit.files)
        assert stranger.done(LOAD, name, sha) == ["transformers_modules", 7]


def test_transformers_own_trainer_alone_forgets_the_code(hub, client, stranger):
    """What that looks like, and what mends it. Where this fails, Trainer has learnt it: say so in docs/hub.md."""
    name = "somebody/forgetful"
    client.done(TRAINER, name, "alone")
    assert commits_with_weights(hub, name)
    assert not set(installed_code()) & set(hub[name].files())
    reply = stranger.python(LOAD, name, "main")
    assert "configuration_pondering.py" in reply["err"].splitlines()[-1]
    assert client.done(LOAD_INSTALLED, name) == "ponder_hf.modeling.modeling_pondering"
    status = client.json("inspect-code", name)["status"]
    assert status == "no code"
    assert "ponder-hf push" in client.command("inspect-code", name)[2]
    client.json("push", "forgetful/checkpoint-2", name, "--skip-unsafe")
    assert stranger.done(LOAD, name, "main") == ["transformers_modules", 7]


def test_transformers_own_trainer_pushes_the_code_when_it_is_asked_to_push(hub, client, stranger):
    name = "somebody/finished"
    client.done(TRAINER, name, "finished")
    files = set(hub[name].files())
    assert set(installed_code()) <= files
    assert {f"last-checkpoint/{path}" for path in installed_code()} <= files, "a checkpoint to resume from has it, too"
    assert stranger.done(LOAD, name, "main") == ["transformers_modules", 7]


def test_push_to_hub_of_a_model(hub, client, stranger):
    program = """
from ponder_hf import PonderingForCausalLM
model = PonderingForCausalLM.from_pretrained("model")
info = [model.push_to_hub("somebody/direct", max_shard_size="60KB", tags=["mine"]) for _ in range(2)]
result = [each.oid for each in info]
"""
    first, second = client.done(program)
    repository = hub["somebody/direct"]
    assert first == second == repository.references["main"]
    assert len(repository.commits) == 2
    assert len(weights(repository.files())) > 1
    assert "- mine" in repository.contents()["README.md"].decode()
    assert stranger.done(LOAD, "somebody/direct", first) == ["transformers_modules", 7]


def test_an_adapter(hub, client, stranger):
    words = ["train", "base", "--data", "text.txt", "--output", "adapter", *training_runs.SMALL, "--max-steps", 2]
    client.json(*words, "--lora", "--push-to-hub", "true", "--hub-model-id", "somebody/adapter")
    assert "config.json" in hub["somebody/adapter-base"].contents()
    adapter = hub["somebody/adapter"].contents()
    assert b'"base_model_name_or_path": "somebody/adapter-base"' in adapter["adapter_config.json"]
    card = adapter["README.md"].decode()
    assert "base_model_relation: adapter" in card
    assert "library_name: peft" in card
    program = """
from peft import AutoPeftModelForCausalLM
model = AutoPeftModelForCausalLM.from_pretrained(argv[0], trust_remote_code=True)
result = type(model.get_base_model()).__module__.split(".")[0]
"""
    assert stranger.done(program, "somebody/adapter") == "transformers_modules"
    assert "push that first" in client.refused("push", "adapter", "somebody/again")
    client.json("push", "adapter", "somebody/again", "--base-model", "somebody/adapter-base")
    assert stranger.done(program, "somebody/again") == "transformers_modules"


def test_the_snippet_of_the_card_runs_as_it_stands(hub, client, stranger):
    client.json("push", "model", "somebody/snippet")
    card = hub["somebody/snippet"].contents()["README.md"].decode()
    reply = stranger.python(re.search(r"```python\n(.*?)```", card, re.DOTALL)[1])
    assert reply["result"] is None, reply["err"]
    assert reply["out"].strip()


def test_the_bases_licence_and_language_are_inherited(hub, client, tmp_path):
    base = checkpoints.save_base(tmp_path / "base", tokenizer=True)
    (base / "README.md").write_text("---\nlicense: mit\nlanguage: en\n---\n\n# base\n")
    hub.add("somebody/base", base)
    client.json("convert", "somebody/base", "converted")
    client.json("push", "converted", "somebody/converted")
    card = hub["somebody/converted"].contents()["README.md"].decode()
    for line in ("base_model: somebody/base", "base_model_relation: finetune", "license: mit", "language:\n- en"):
        assert line in card


def test_edits_on_the_hub_survive_a_second_push(hub, client):
    client.json("push", "model", "somebody/edited")
    repository = hub["somebody/edited"]
    card = repository.contents()["README.md"].replace(b"## Limits\n", b"## Limits\n\n- It knows no rivers.\n")
    repository.commit("main", "by hand", [("file", {"path": "README.md", "content": card})])
    assert client.json("push", "model", "somebody/edited")["uploaded"] == []
    assert repository.contents()["README.md"] == card
