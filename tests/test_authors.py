"""Checkpoints of the method's authors, and their relatives: what config.json lacks is asked for, never guessed."""

import json
import shutil

import checkpoints
import pytest
import torch
from checkpoints import run
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from ponder_hf import PonderingError, PonderingForCausalLM
from ponder_hf.conversion import convert
from ponder_hf.modeling import pondering_backbone_checkpoint


FLAGS = ("ponderinglm", "recurrent_model", "pondering_steps", "scale_embeds", "mutiply_pondering_steps")
FLAGS += ("softmax_temperature", "checkpoint_num_layers")
# Which fields say of each reference checkpoint what its flags said, beside `authors=True`.
STRIPPED = {
    "gpt_neox_s3_scaled_multiplied": {},
    "gpt2_s2_scaled_multiplied": {"pondering_steps": 2},
    "gpt_neox_s3_scaled": {"input_scale": 1.0},
    "gpt_neox_s1_plain": {"pondering_steps": 1, "embedding_scale": 1.0, "input_scale": 1.0},
    "llama_s2_tied": {"pondering_steps": 2, "embedding_scale": 1.0, "input_scale": 1.0},
    "llama_s3_scaled_multiplied_temp": {"pondering_temperature": 0.7},
}
WARNING = "the weight adapter.weight says that the authors"


def drop_fields(folder, *names):
    path = folder / "config.json"
    path.write_text(
        json.dumps({name: value for name, value in json.loads(path.read_text()).items() if name not in names})
    )


@pytest.fixture
def theirs(tmp_path, shared):
    """A function that gives a copy of a reference checkpoint without their flags, and what their code computed."""

    def make(case):
        folder = shutil.copytree(shared / "reference" / case / "checkpoint", tmp_path / case)
        drop_fields(folder, *FLAGS)
        return folder, load_file(shared / "reference" / case / "expected.safetensors")

    return make


def check_logits(model, expected):
    with torch.no_grad():
        logits = model(expected["input_ids"]).logits
    scale = expected["logits"].abs().max().clamp(min=1.0)
    assert (logits.double() - expected["logits"]).abs().max() <= 1e-3 * scale


@pytest.mark.parametrize("case", STRIPPED)
def test_without_their_flags(theirs, case):
    folder, expected = theirs(case)
    fields = STRIPPED[case]
    check_logits(PonderingForCausalLM.from_base(folder, authors=True, **fields), expected)
    plain = AutoModelForCausalLM.from_pretrained(folder)
    check_logits(PonderingForCausalLM.from_base(plain, authors=True, **fields), expected)
    flags = [part for name, value in fields.items() for part in (f"--{name.replace('_', '-')}", value)]
    assert run("convert", folder, folder / "made", "--authors", *flags) == 0
    check_logits(PonderingForCausalLM.from_pretrained(folder / "made"), expected)


def test_flags_that_are_left_count(theirs):
    folder, _ = theirs("gpt_neox_s3_scaled_multiplied")
    checkpoints.change_config(folder, scale_embeds=False, pondering_steps=2)
    config = PonderingForCausalLM.from_base(folder, authors=True).config
    assert (config.pondering_steps, config.embedding_scale, config.input_scale) == (2, 1.0, 2.0)
    assert PonderingForCausalLM.from_base(folder, authors=True, pondering_steps=0).config.pondering_steps == 0


def test_a_weight_of_theirs_without_their_flags_is_said(theirs, capsys, monkeypatch):
    folder, _ = theirs("gpt_neox_s3_plain")
    assert run("convert", folder, folder / "made") == 0
    assert f"ponder-hf: warning: {WARNING}" in capsys.readouterr().err
    assert "--authors" in convert(folder, folder / "again")["warnings"][0]
    said = []
    monkeypatch.setattr(pondering_backbone_checkpoint.logger, "warning", said.append)
    PonderingForCausalLM.from_base(folder)
    assert WARNING in said.pop()
    assert run("convert", folder, folder / "theirs", "--authors") == 0
    assert "warning" not in capsys.readouterr().err
    PonderingForCausalLM.from_base(folder, authors=True)
    assert not said


@pytest.mark.parametrize(
    ("flags", "missing"),
    [
        ({"ponderinglm": True}, "pondering_steps"),
        ({"pondering_steps": 3}, "ponderinglm"),
        ({"scale_embeds": True, "mutiply_pondering_steps": True}, "pondering_steps"),
    ],
    ids=str,
)
def test_half_of_their_flags(tmp_path, flags, missing):
    base = checkpoints.save_base(tmp_path / "base")
    checkpoints.change_config(base, **flags)
    with pytest.raises(PonderingError, match=f"not `{missing}`.*convert --authors"):
        convert(base, tmp_path / "made")
    model = AutoModelForCausalLM.from_pretrained(base)
    with pytest.raises(PonderingError, match=f"the base has the field .* not `{missing}`"):
        PonderingForCausalLM.from_base(model)
    assert convert(base, tmp_path / "made", authors=True)["pondering"]["embedding_scale"] == 32**0.5


def test_their_flags_on_a_model_in_memory(tmp_path, shared):
    folder = shared / "reference/gpt_neox_s3_scaled_multiplied"
    model = PonderingForCausalLM.from_base(AutoModelForCausalLM.from_pretrained(folder / "checkpoint"))
    check_logits(model, load_file(folder / "expected.safetensors"))


def test_their_plain_model_is_plain(tmp_path):
    base = checkpoints.save_base(tmp_path / "base")
    checkpoints.change_config(base, ponderinglm=False, pondering_steps=2, scale_embeds=True)
    result = convert(base, tmp_path / "made", pondering_steps=1)
    assert not result["authors_checkpoint"]
    assert result["pondering"]["embedding_scale"] == 1.0
    saved = json.loads((tmp_path / "made/config.json").read_text())["base_config"]
    assert not set(saved) & set(FLAGS)


def authors_checkpoint(folder):
    checkpoints.save_base(folder)
    checkpoints.change_config(folder, ponderinglm=True, pondering_steps=2, wandb_run="x", more=1)
    return folder


def test_an_unknown_field_can_be_left_out(tmp_path, capsys):
    base = authors_checkpoint(tmp_path / "base")
    assert run("convert", base, tmp_path / "made") == 2
    assert "the field `wandb_run`" in (line := capsys.readouterr().err)
    assert "--ignore-field wandb_run" in line
    assert 'ignore_fields=["wandb_run"]' in line
    assert run("convert", base, tmp_path / "made", "--ignore-field", "wandb_run") == 2
    assert "`more`" in capsys.readouterr().err
    assert run("convert", base, tmp_path / "made", "--ignore-field", "wandb_run", "--ignore-field", "more") == 0
    saved = json.loads((tmp_path / "made/config.json").read_text())
    assert saved["pondering_steps"] == 2
    assert not {"wandb_run", "more"} & {*saved, *saved["base_config"]}
    assert PonderingForCausalLM.from_base(base, ignore_fields=["wandb_run", "more"]).config.pondering_steps == 2


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["mor"], "no field `mor` to ignore"),
        (["hidden_size"], "`hidden_size` is a field of gpt_neox itself"),
        ("more", "must be a list of names"),
    ],
)
def test_what_cannot_be_ignored(tmp_path, names, words):
    base = authors_checkpoint(tmp_path / "base")
    with pytest.raises(PonderingError, match=words):
        PonderingForCausalLM.from_base(base, ignore_fields=names)


SECOND = {"num_latent_thoughts": 1, "num_jacobi_iterations": 3, "interpolation": False, "interpolation_use_topk": True}
CODE = {"auto_map": {"AutoConfig": "modeling.X", "AutoModelForCausalLM": "modeling.Y"}}


@pytest.mark.parametrize("field", SECOND)
def test_the_second_generation_is_another_method(tmp_path, capsys, field):
    base = checkpoints.save_base(tmp_path / "base")
    checkpoints.change_config(base, **{field: SECOND[field]}, **CODE)
    for arguments in ([], ["--ignore-code"], ["--ignore-field", field], ["--authors"]):
        assert run("convert", base, tmp_path / "made", *arguments) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert "PonderLM-2" in line
        assert f"`{field}`" in line
        assert not (tmp_path / "made").exists()
    drop_fields(base, "auto_map")
    with pytest.raises(PonderingError, match="feeds back hidden states"):
        PonderingForCausalLM.from_base(AutoModelForCausalLM.from_pretrained(base))


def test_a_tokenizer_with_code_of_its_own_is_said(tmp_path):
    base = checkpoints.save_base(tmp_path / "base", tokenizer=True)
    assert convert(base, tmp_path / "made")["warnings"] == []
    path = base / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": {"AutoTokenizer": [None, "own.Tokens"]}}))
    (warning,) = convert(base, tmp_path / "again")["warnings"]
    assert "has code of its own (`auto_map` in tokenizer_config.json)" in warning


def test_a_checkpoint_with_code_of_its_own(tmp_path, capsys):
    base = checkpoints.save_base(tmp_path / "base")
    checkpoints.change_config(base, **CODE)
    assert run("convert", base, tmp_path / "made") == 2
    assert "code of its own" in (line := capsys.readouterr().err)
    assert "--ignore-code" in line
    assert not (tmp_path / "made").exists()
    with pytest.raises(PonderingError, match="ignore_code=True"):
        PonderingForCausalLM.from_base(base)
    assert run("convert", base, tmp_path / "made", "--ignore-code") == 0
    assert "modeling.Y" not in (tmp_path / "made/config.json").read_text()
    assert PonderingForCausalLM.from_base(base, ignore_code=True).config.pondering_steps == 3
    checkpoints.change_config(base, auto_map={"AutoTokenizer": [None, "tokenization.Z"]})  # not the model's code
    assert PonderingForCausalLM.from_base(base).config.pondering_steps == 3
    checkpoints.change_config(base, model_type="nothing", **CODE)
    with pytest.raises(PonderingError, match="needs code of its own"):
        PonderingForCausalLM.from_base(base, ignore_code=True)


def test_the_command_warns_once(theirs, tmp_path, capsys, caplog):
    folder, _ = theirs("gpt_neox_s3_scaled_multiplied")
    assert checkpoints.run("convert", folder, tmp_path / "converted") == 0
    assert (capsys.readouterr().err + caplog.text).count(WARNING) == 1
