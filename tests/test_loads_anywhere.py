"""A saved folder is all that anyone needs: it loads, computes, trains and saves where ponder_hf cannot be imported."""

import json
import re
import shutil
import sys
from pathlib import Path

import checkpoints
import elsewhere
import pytest
import tiny
import torch
from safetensors.torch import load_file

from ponder_hf import PonderingForCausalLM
from ponder_hf.conversion import convert


MODELING = Path(__file__).resolve().parents[1] / "modeling"

# Loads a folder by all Auto classes, computes, and saves it again. Arguments: the folder, where to save, results.
USE = """
import json, torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

source, copy, results = sys.argv[1:]
config = AutoConfig.from_pretrained(source, trust_remote_code=True)
model, report = AutoModelForCausalLM.from_pretrained(
    source, trust_remote_code=True, dtype="auto", output_loading_info=True
)
decoder = AutoModel.from_pretrained(source, trust_remote_code=True, dtype="auto")
assert not report["missing_keys"] and not report["unexpected_keys"], report
ids = torch.arange(3, 27).view(2, 12)
output = model(ids, labels=ids)
output.loss.backward()
save_file(
    {
        "logits": output.logits.detach(),
        "loss": output.loss.detach(),
        "hidden": decoder(ids).last_hidden_state.detach().contiguous(),
        "gradient": model.get_input_embeddings().weight.grad.contiguous(),
        "tokens": model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0),
    },
    results,
)
model.save_pretrained(copy)
print(json.dumps([type(each).__name__ for each in (config, decoder, model)]))
assert "ponder_hf" not in sys.modules
assert type(model).__module__.startswith("transformers_modules.")
"""

REFUSED = """
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

for auto_class in (AutoConfig, AutoModel, AutoModelForCausalLM):
    try:
        auto_class.from_pretrained(sys.argv[1])
    except ValueError as error:
        assert "trust_remote_code=True" in str(error), error
    else:
        raise SystemExit(f"{auto_class.__name__} loads it without trust_remote_code")
    print(f"refused by {auto_class.__name__}")
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])  # which is no code
assert tokenizer("once upon")["input_ids"] == [4, 5], tokenizer
assert not [name for name in sys.modules if name.startswith("transformers_modules.") and "pondering" in name]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A converted checkpoint in which everything is on: a gate that is open, top-K, scales, an intermediate loss."""
    place = tmp_path_factory.mktemp("anywhere")
    torch.manual_seed(0)
    base = checkpoints.save_base(place / "base", "gpt2", tokenizer=True)
    fields = {"pondering_steps": 2, "pondering_top_k": 20, "embedding_scale": 2.0, "intermediate_loss_weight": 0.3}
    convert(base, place / "checkpoint", pondering_gate="zero_init", **fields)
    checkpoints.change_tensors(place / "checkpoint", lambda t: t["pondering_gate.weight"].fill_(0.5))
    return place / "checkpoint"


def test_the_folder_holds_what_is_needed(folder):
    code = {path.name for path in MODELING.glob("*.py")} - {"__init__.py"}
    travelled = {"generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert names == {
        *code,
        *travelled,
        "additional_chat_templates/tools.jinja",
        "config.json",
        "model.safetensors",
    }
    for name in code:
        assert (folder / name).read_bytes() == (MODELING / name).read_bytes()
    assert json.loads((folder / "config.json").read_text())["auto_map"] == {
        "AutoConfig": "configuration_pondering.PonderingConfig",
        "AutoModel": "modeling_pondering.PonderingModel",
        "AutoModelForCausalLM": "modeling_pondering.PonderingForCausalLM",
    }


def test_it_works_without_ponder_hf_and_so_does_what_it_saves(folder, tmp_path):
    ids = torch.arange(3, 27).view(2, 12)
    model = PonderingForCausalLM.from_pretrained(folder)
    here = model(ids, labels=ids)
    here.loss.backward()
    expected = {
        "logits": here.logits,
        "loss": here.loss,
        "hidden": model(ids, output_hidden_states=True).hidden_states[-1],
        "gradient": model.get_input_embeddings().weight.grad,
        "tokens": model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0),
    }
    source = folder
    for generation in ("second", "third"):  # the second process loads what the first one saved
        copy, results = tmp_path / generation, tmp_path / f"{generation}.safetensors"
        classes = json.loads(
            elsewhere.run(USE, tmp_path / f"home of {generation}", source, copy, results, python=sys.executable)
        )
        assert classes == ["PonderingConfig", "PonderingModel", "PonderingForCausalLM"]
        found = load_file(results)
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), f"{name} of the {generation} copy"
        assert {path.name for path in copy.glob("*.py")} == {path.name for path in folder.glob("*.py")}
        source = copy


def test_it_is_refused_without_trust(folder, tmp_path):
    output = elsewhere.run(REFUSED, tmp_path / "home", folder)  # with transformers' question whether to trust the code
    assert re.findall(r"refused by (\w+)", output) == ["AutoConfig", "AutoModel", "AutoModelForCausalLM"]


def test_ponder_hf_itself_never_runs_the_folders_code(folder, tmp_path, capsys):
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in folder.iterdir():
        if path.is_file():
            content = b"raise SystemExit('the code of the folder ran')" if path.suffix == ".py" else path.read_bytes()
            (broken / path.name).write_bytes(content)
    assert checkpoints.run("generate", broken, "--prompt", "once upon a", "--max-new-tokens", 3, "--json") == 0
    assert json.loads(capsys.readouterr().out)["new_tokens"] <= 3
    assert checkpoints.run("export", broken, tmp_path / "plain") == 0


def test_a_tokenizer_that_needs_code_is_refused(folder, tmp_path, capsys):
    shutil.copytree(folder, tmp_path / "copy")
    path = tmp_path / "copy/tokenizer_config.json"
    fields = {"tokenizer_class": "Special", "auto_map": {"AutoTokenizer": ["tokenization_special.Special", None]}}
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    (tmp_path / "copy/tokenization_special.py").write_text("raise SystemExit('the code of the folder ran')")
    assert checkpoints.run("generate", tmp_path / "copy", "--prompt", "once upon a") == 2
    assert "the tokenizer of" in capsys.readouterr().err


def test_the_tests_own_model_really_ponders(folder):
    ids = tiny.token_ids(1, 5)
    model = PonderingForCausalLM.from_pretrained(folder)
    assert not torch.allclose(model(ids).logits, model(ids, pondering_steps=0).logits)
