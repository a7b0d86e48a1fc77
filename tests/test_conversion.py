"""Conversions there and back: what a checkpoint predicts, names and holds is the same before and after."""

import json
import shutil

import checkpoints
import elsewhere
import pytest
import tiny
import torch
from checkpoints import run
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ponder_hf import PonderingError, PonderingForCausalLM
from ponder_hf.conversion import convert, export


# What save_base gets: every dtype, tied and untied, one file and several.
BASES = {
    "gpt2 tied": {"model_type": "gpt2"},
    "gpt2 untied, float16": {"model_type": "gpt2", "dtype": torch.float16, "tie_word_embeddings": False},
    "gpt_neox untied, float16": {"model_type": "gpt_neox", "dtype": torch.float16},
    "gpt_neox tied, sharded": {"model_type": "gpt_neox", "tie_word_embeddings": True, "shard_size": "20KB"},
    "llama tied, bfloat16": {"model_type": "llama", "dtype": torch.bfloat16, "tie_word_embeddings": True},
    "llama untied, sharded": {"model_type": "llama", "shard_size": "20KB"},
}
AUTHORS_FIELDS = {
    "gpt_neox_s3_plain": {"pondering_steps": 3, "embedding_scale": 1.0, "input_scale": 1.0},
    "gpt_neox_s3_scaled_multiplied": {"pondering_steps": 3, "embedding_scale": 8.0, "input_scale": 3.0},
    "gpt2_s2_scaled_multiplied": {"pondering_steps": 2, "embedding_scale": 8.0, "input_scale": 2.0},
    "llama_s3_scaled_multiplied_temp": {"pondering_steps": 3, "pondering_temperature": 0.7},
}


@pytest.fixture(params=BASES, ids=list(BASES))
def base(request, tmp_path):
    return checkpoints.save_base(tmp_path / "base", **BASES[request.param])


def logits_of(model):
    with torch.no_grad():
        return model(tiny.token_ids(2, 9)).logits


@pytest.mark.parametrize(
    "flags",
    [["--pondering-steps", 0], ["--pondering-steps", 3, "--pondering-gate", "zero_init"]],
    ids=["S = 0", "S = 3 behind the gate"],
)
def test_a_conversion_predicts_as_its_base(base, tmp_path, flags):
    assert run("convert", base, tmp_path / "pondering", *flags) == 0
    plain = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    pondering = PonderingForCausalLM.from_pretrained(tmp_path / "pondering", dtype="auto")
    assert pondering.dtype == plain.dtype
    assert pondering.config.pondering_steps == flags[1]
    assert torch.equal(logits_of(pondering), logits_of(plain))


def test_pondering_without_a_gate_predicts_something_else(tmp_path):
    base = checkpoints.save_base(tmp_path / "base")
    convert(base, tmp_path / "pondering", pondering_steps=2)
    pondering = PonderingForCausalLM.from_pretrained(tmp_path / "pondering")
    assert not torch.equal(logits_of(pondering), logits_of(AutoModelForCausalLM.from_pretrained(base)))


@pytest.mark.parametrize("gate", ["none", "zero_init", "zero_init_matrix", "random_signs"])
def test_export_gives_back_the_plain_checkpoint(base, tmp_path, gate):
    convert(base, tmp_path / "pondering", pondering_gate=gate)
    assert run("export", tmp_path / "pondering", tmp_path / "plain") == 0
    expected, found = checkpoints.stored(base), checkpoints.stored(tmp_path / "plain")
    assert set(found) == set(expected)
    assert all(found[name].dtype == tensor.dtype for name, tensor in expected.items())
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert json.loads((tmp_path / "plain/config.json").read_text()) == json.loads((base / "config.json").read_text())
    before, after = (
        AutoModelForCausalLM.from_pretrained(folder, dtype="auto") for folder in (base, tmp_path / "plain")
    )
    assert type(after) is type(before)
    assert torch.equal(logits_of(after), logits_of(before))
    assert not list((tmp_path / "plain").glob("*.py"))


def test_shards_are_as_large_as_asked_for(tmp_path):
    base = checkpoints.save_base(tmp_path / "base")
    assert run("convert", base, tmp_path / "pondering", "--max-shard-size", "30KB") == 0
    assert run("export", tmp_path / "pondering", tmp_path / "plain", "--max-shard-size", "30KB") == 0
    for folder in (tmp_path / "pondering", tmp_path / "plain"):
        sizes = [file.stat().st_size for file in folder.glob("*.safetensors")]
        assert len(sizes) > 2
        assert max(sizes) < 40_000


def test_files_travel_byte_for_byte(tmp_path):
    base = checkpoints.save_base(tmp_path / "base", tokenizer=True)
    (base / "LICENSE").write_text("do as you please\n")
    (base / "README.md").write_text("a card of the base, not of the copy\n")
    names = [path.relative_to(base) for path in base.rglob("*") if path.is_file()]
    travelling = [name for name in names if name.name not in ("config.json", "model.safetensors", "README.md")]
    assert {name.as_posix() for name in travelling} == {
        "LICENSE",
        "additional_chat_templates/tools.jinja",
        "chat_template.jinja",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    run("convert", base, tmp_path / "pondering")
    run("export", tmp_path / "pondering", tmp_path / "plain")
    for folder in (tmp_path / "pondering", tmp_path / "plain"):
        for name in travelling:
            assert (folder / name).read_bytes() == (base / name).read_bytes(), f"{folder.name}: {name}"
        assert not (folder / "README.md").exists()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "pondering")
    messages = [{"role": "user", "content": "once upon"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "once upon\n"


@pytest.mark.parametrize("told_by", ["model_type", "config.json"])
def test_a_tokenizer_whose_class_its_own_files_do_not_tell(tmp_path, shared, told_by):
    base = checkpoints.save_base(tmp_path / "base", "gpt2" if told_by == "model_type" else "llama")
    if told_by == "config.json":
        checkpoints.change_config(base, tokenizer_class="GPT2Tokenizer")
    shutil.copyfile(shared / "data/tokenizers/gpt2/tokenizer.json", base / "tokenizer.json")
    (base / "tokenizer_config.json").write_text('{"model_max_length": 1024}')  # as in OpenAI's own repository
    convert(base, tmp_path / "pondering")
    before, after = (AutoTokenizer.from_pretrained(folder) for folder in (base, tmp_path / "pondering"))
    assert type(after) is type(before)
    assert after.eos_token == before.eos_token == "<|endoftext|>"
    settings = json.loads((tmp_path / "pondering/tokenizer_config.json").read_text())
    assert settings == {"model_max_length": 1024, "tokenizer_class": "GPT2Tokenizer"}
    (base / "tokenizer_config.json").unlink()
    convert(base, tmp_path / "pondering", overwrite=True)
    program = """
from transformers import AutoTokenizer
print(AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=False).eos_token)
"""
    assert elsewhere.run(program, tmp_path / "home", tmp_path / "pondering") == "<|endoftext|>\n"


def authors_checkpoint(folder, **flags):
    """A tiny checkpoint of theirs: a GPT-NeoX with their flags and the weight that no forward pass uses."""
    checkpoints.save_base(folder)
    checkpoints.change_config(folder, ponderinglm=True, pondering_steps=2, scale_embeds=True, **flags)
    checkpoints.change_tensors(folder, lambda tensors: tensors.update({"adapter.weight": torch.ones(32, 64)}))
    return folder


def test_an_authors_checkpoint_keeps_what_it_says(tmp_path):
    source = authors_checkpoint(tmp_path / "source", mutiply_pondering_steps=True)
    convert(source, tmp_path / "as it is")
    convert(source, tmp_path / "changed", input_scale=1.5, pondering_top_k=7)
    fields = {"pondering_steps": 2, "embedding_scale": 32**0.5, "input_scale": 2.0, "pondering_top_k": None}
    for name, expected in {
        "as it is": fields,
        "changed": {**fields, "input_scale": 1.5, "pondering_top_k": 7},
    }.items():
        config = AutoConfig.from_pretrained(tmp_path / name)
        assert {field: getattr(config, field) for field in expected} == expected
    assert not [name for name in checkpoints.stored_names(tmp_path / "as it is") if "adapter" in name]


@pytest.mark.parametrize("case", AUTHORS_FIELDS)
def test_the_authors_own_files_convert(tmp_path, shared, case):
    source = shared / "reference" / case / "checkpoint"
    result = convert(source, tmp_path / "pondering")
    assert result["authors_checkpoint"]
    assert {name: result["pondering"][name] for name in AUTHORS_FIELDS[case]} == AUTHORS_FIELDS[case]
    expected = PonderingForCausalLM.from_base(source)
    assert torch.equal(logits_of(PonderingForCausalLM.from_pretrained(tmp_path / "pondering")), logits_of(expected))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: checkpoints.change_config(folder, ponder_harder=True), "ponder_harder"),
        (
            lambda folder: checkpoints.change_tensors(folder, lambda t: t.update({"adapter.bias": torch.ones(3)})),
            r"adapter\.bias",
        ),
        (
            lambda folder: checkpoints.change_tensors(folder, lambda t: t.pop("gpt_neox.final_layer_norm.bias")),
            r"lacks the weight gpt_neox\.final_layer_norm\.bias",
        ),
    ],
    ids=["flag", "weight too many", "weight too few"],
)
def test_what_is_unknown_or_missing_is_named(tmp_path, spoil, message):
    source = authors_checkpoint(tmp_path / "source")
    spoil(source)
    with pytest.raises(PonderingError, match=message):
        convert(source, tmp_path / "pondering")
    assert not (tmp_path / "pondering").exists()


def test_an_unknown_weight_of_a_plain_model_is_named(tmp_path):
    base = checkpoints.save_base(tmp_path / "base", "llama")
    checkpoints.change_tensors(base, lambda tensors: tensors.update({"model.layers.0.extra.weight": torch.ones(3)}))
    with pytest.raises(PonderingError, match=r"layers\.0\.extra\.weight"):
        convert(base, tmp_path / "pondering")


def test_a_missing_head_is_not_made_up(tmp_path):
    base = checkpoints.save_base(tmp_path / "base", "llama", tie_word_embeddings=False)
    checkpoints.change_tensors(base, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(PonderingError, match=r"lacks the weight lm_head\.weight"):
        convert(base, tmp_path / "pondering")


LEGACY = {
    "gpt2": {
        "transformer.h.0.attn.bias": torch.ones(1, 1, 64, 64),
        "transformer.h.1.attn.masked_bias": torch.tensor(-1e4),
    },
    "gpt_neox": {
        "gpt_neox.layers.0.attention.bias": torch.ones(1, 1, 64, 64, dtype=torch.bool),
        "gpt_neox.layers.0.attention.masked_bias": torch.tensor(-1e9),
        "gpt_neox.layers.0.attention.rotary_emb.inv_freq": torch.ones(4),
    },
}


@pytest.mark.parametrize("model_type", LEGACY)
def test_mask_buffers_of_old_checkpoints_are_no_weights(tmp_path, model_type):
    base = checkpoints.save_base(tmp_path / "base", model_type, torch.float16)
    checkpoints.change_tensors(base, lambda tensors: tensors.update(LEGACY[model_type]))
    result = convert(base, tmp_path / "pondering", pondering_steps=0)
    assert result["dtype"] == "float16", "the float32 buffers are no weights"
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float16)
    pondering = PonderingForCausalLM.from_pretrained(tmp_path / "pondering", dtype="auto")
    assert torch.equal(logits_of(pondering), logits_of(plain))


def test_a_weight_that_is_named_like_a_mask_buffer_counts(tmp_path):
    base = checkpoints.save_base(tmp_path / "base", "gpt2", torch.float16)
    name = "transformer.h.0.attn.c_attn.bias"
    checkpoints.change_tensors(base, lambda tensors: tensors.update({name: tensors[name].float() + 1e-7}))
    assert convert(base, tmp_path / "pondering")["dtype"] == "float32"
    found = checkpoints.stored(tmp_path / "pondering")[f"backbone.{name}"]
    assert torch.equal(found, checkpoints.stored(base)[name])


def test_names_without_the_prefix_of_the_decoder(tmp_path):
    base = checkpoints.save_base(tmp_path / "base", "gpt2")

    def strip(tensors):  # as in OpenAI's own repository
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)

    checkpoints.change_tensors(base, strip)
    convert(base, tmp_path / "pondering", pondering_steps=0)
    plain, pondering = (AutoModelForCausalLM.from_pretrained(folder) for folder in (base, tmp_path / "pondering"))
    assert torch.equal(logits_of(pondering), logits_of(plain))


def test_of_several_dtypes_the_widest_is_kept(tmp_path):
    base = checkpoints.save_base(tmp_path / "base", "llama", torch.bfloat16)

    def widen(tensors):
        tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.float16)

    checkpoints.change_tensors(base, widen)
    assert convert(base, tmp_path / "pondering")["dtype"] == "float32"
    found = checkpoints.stored(tmp_path / "pondering")
    for name, tensor in checkpoints.stored(base).items():
        assert torch.equal(found[f"backbone.{name}"], tensor.float()), "nothing may be lost"


@pytest.mark.parametrize("told", ["float32", "float16", None])
def test_the_dtype_is_that_of_the_weights_whatever_the_configuration_says(tmp_path, told):
    base = checkpoints.save_base(tmp_path / "base", "llama", torch.bfloat16)
    checkpoints.change_config(base, dtype=told)
    assert convert(base, tmp_path / "pondering")["dtype"] == "bfloat16"
    assert {tensor.dtype for tensor in checkpoints.stored(tmp_path / "pondering").values()} == {torch.bfloat16}


def closed_gate(model):
    pass


def opened_gate(model):
    with torch.no_grad():
        model.pondering_gate.weight[0] = 1e-3


@pytest.mark.parametrize(
    ("fields", "change", "expected"),
    [
        ({"pondering_steps": 0}, None, []),
        ({"pondering_gate": "zero_init"}, closed_gate, []),
        ({"pondering_gate": "zero_init"}, opened_gate, ["pondering is lost"]),
        ({"pondering_gate": "zero_init_matrix"}, opened_gate, ["pondering is lost"]),
        ({"pondering_gate": "random_signs"}, lambda model: None, ["pondering is lost"]),
        ({"pondering_steps": 2}, None, ["pondering is lost"]),
        ({"pondering_steps": 2, "embedding_scale": 8.0}, None, ["pondering is lost", "never trained"]),
        ({"pondering_steps": 0, "input_scale": 3.0}, None, ["never trained"]),
        ({"pondering_steps": 0, "input_scale": 0.5, "embedding_scale": 2.0}, None, []),
    ],
    ids=[
        "S = 0",
        "closed gate",
        "opened gate",
        "opened matrix",
        "signs",
        "S = 2",
        "S = 2 scaled",
        "S = 0 scaled",
        "S = 0, scales cancel",
    ],
)
def test_export_warns_of_what_is_lost(tmp_path, capsys, fields, change, expected):
    model = tiny.pondering_model(**fields)
    if change is not None:
        change(model)
    model.save_pretrained(tmp_path / "pondering")
    warnings = export(tmp_path / "pondering", tmp_path / "plain")["warnings"]
    assert len(warnings) == len(expected)
    assert all(words in warning for words, warning in zip(expected, warnings, strict=True))
    predicts_the_same = torch.equal(
        logits_of(model), logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "plain"))
    )
    assert predicts_the_same == (not expected)
    capsys.readouterr()
    assert run("export", tmp_path / "pondering", tmp_path / "again") == 0
    shown = [line for line in capsys.readouterr().err.splitlines() if line.startswith("ponder-hf: warning: ")]
    assert shown == [f"ponder-hf: warning: {warning}" for warning in warnings]


def greedy_story(model, tokenizer):
    inputs = tokenizer("Once upon a time", return_tensors="pt", return_token_type_ids=False)
    tokens = model.generate(**inputs, max_new_tokens=64, do_sample=False, pad_token_id=0)[0]
    assert len(tokens) > 60
    return tokens.tolist()


@pytest.mark.parametrize("fields", [{"pondering_steps": 0}, {"pondering_gate": "zero_init"}], ids=["S = 0", "gate"])
def test_stories260k_tells_the_same_story(tmp_path, shared, fields):
    source = shared / "data/models/stories260K-llama"
    convert(source, tmp_path / "pondering", **fields)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "pondering")
    model = PonderingForCausalLM.from_pretrained(tmp_path / "pondering")
    expected = greedy_story(AutoModelForCausalLM.from_pretrained(source), AutoTokenizer.from_pretrained(source))
    assert greedy_story(model, tokenizer) == expected
    export(tmp_path / "pondering", tmp_path / "plain")
    assert greedy_story(AutoModelForCausalLM.from_pretrained(tmp_path / "plain"), tokenizer) == expected


def test_sort_gpt2_still_sorts(tmp_path, shared):
    convert(shared / "data/models/sort-gpt2", tmp_path / "pondering", pondering_steps=0)
    model = PonderingForCausalLM.from_pretrained(tmp_path / "pondering")
    inputs = torch.cartesian_prod(*[torch.arange(3)] * 6)
    outputs = model.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=6,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert len(inputs) == 729
    assert torch.equal(outputs[:, 6:], inputs.sort(dim=1).values)
