"""PonderingConfig: what it takes, what it refuses, and what it reads off the backbone's configuration."""

import copy
import json

import pytest
import tiny
from transformers import AutoConfig, GPT2Config, LlamaConfig

from ponder_hf import PonderingConfig, PonderingError
from ponder_hf.modeling.configuration_pondering import AUTO_MAP, FORMAT_VERSION, PONDERING_FIELDS


def test_defaults_are_those_of_the_contract():
    config = PonderingConfig(LlamaConfig())
    assert {name: getattr(config, name) for name in PONDERING_FIELDS} == {
        "pondering_steps": 3,
        "pondering_top_k": None,
        "pondering_temperature": 1.0,
        "embedding_scale": 1.0,
        "input_scale": 1.0,
        "pondering_gate": "none",
        "intermediate_loss_weight": 0.0,
        "draft_heads": 0,
        "pondering_format_version": FORMAT_VERSION,
    }


@pytest.mark.parametrize("given", [LlamaConfig(vocab_size=77), {"model_type": "llama", "vocab_size": 77}], ids=type)
def test_the_base_is_a_config_or_a_dict(given):
    config = PonderingConfig(base_config=given)
    assert isinstance(config.base_config, LlamaConfig)
    assert config.vocab_size == 77


BAD_VALUES = [
    ("pondering_steps", -1),
    ("pondering_steps", 1.5),
    ("pondering_steps", True),
    ("pondering_steps", "3"),
    ("pondering_steps", None),
    ("pondering_top_k", 0),
    ("pondering_top_k", -5),
    ("pondering_top_k", 2.0),
    ("pondering_top_k", True),
    ("pondering_top_k", tiny.VOCAB_SIZE + 1),
    ("pondering_temperature", 0),
    ("pondering_temperature", -1.0),
    ("pondering_temperature", float("nan")),
    ("pondering_temperature", "hot"),
    ("embedding_scale", 0.0),
    ("embedding_scale", float("inf")),
    ("input_scale", -2),
    ("input_scale", None),
    ("pondering_gate", "sigmoid"),
    ("pondering_gate", None),
    ("pondering_gate", ["none"]),
    ("intermediate_loss_weight", -0.1),
    ("intermediate_loss_weight", True),
    ("draft_heads", -1),
    ("draft_heads", None),
    ("draft_heads", True),
    ("draft_heads", "mlp"),
    ("pondering_format_version", FORMAT_VERSION + 1),
    ("pondering_format_version", 0),
]


@pytest.mark.parametrize(("field", "value"), BAD_VALUES, ids=[f"{field}={value}" for field, value in BAD_VALUES])
def test_a_wrong_value_is_refused_at_once_and_later(field, value):
    with pytest.raises(PonderingError, match=field) as error:
        PonderingConfig(tiny.base_config("llama"), **{field: value})
    assert "\n" not in str(error.value)
    config = PonderingConfig(tiny.base_config("llama"))
    before = getattr(config, field)
    with pytest.raises(PonderingError, match=field):
        setattr(config, field, value)
    assert getattr(config, field) == before


def test_the_largest_top_k_is_the_vocabulary():
    assert PonderingConfig(tiny.base_config("llama"), pondering_top_k=tiny.VOCAB_SIZE).pondering_top_k == 131


@pytest.mark.parametrize("base", [None, 3, {}, {"vocab_size": 3}, "gpt2"], ids=str)
def test_a_base_that_is_none_is_refused(base):
    with pytest.raises(PonderingError, match="`base_config` is required"):
        PonderingConfig(base_config=base)


def test_a_base_of_an_unknown_type_is_refused():
    with pytest.raises(PonderingError, match="'martian', which this transformers does not know"):
        PonderingConfig(base_config={"model_type": "martian"})


def test_a_pondering_base_is_refused():
    with pytest.raises(PonderingError, match="itself a pondering configuration"):
        PonderingConfig(PonderingConfig(LlamaConfig()))


def test_a_misspelt_field_is_refused_with_the_right_one():
    with pytest.raises(
        PonderingError, match="`pondering_stepz` is not a pondering field: did you mean `pondering_steps`"
    ):
        PonderingConfig(LlamaConfig(), pondering_stepz=2)


OF_BACKBONE = {
    "vocab_size": 99,
    "hidden_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "max_position_embeddings": 77,
    "bos_token_id": 5,
    "eos_token_id": 6,
    "pad_token_id": 7,
    "tie_word_embeddings": True,
}


@pytest.mark.parametrize("name", OF_BACKBONE)
@pytest.mark.parametrize("config_class", [GPT2Config, LlamaConfig], ids=["gpt2", "llama"])
def test_the_backbone_fields_are_read_and_written_through(config_class, name):
    config = PonderingConfig(config_class(**OF_BACKBONE))
    assert getattr(config, name) == OF_BACKBONE[name]
    other = False if name == "tie_word_embeddings" else 9
    setattr(config, name, other)
    assert getattr(config.base_config, name) == other
    assert name not in config.to_dict(), "a second copy could come to differ from the first"


def test_a_field_that_the_backbone_lacks_is_missing_here_too():
    config = PonderingConfig(AutoConfig.for_model("bloom"))
    assert not hasattr(config, "max_position_embeddings")


@pytest.mark.parametrize("model_type", tiny.SPINE)
def test_saving_and_loading_keeps_every_field(tmp_path, model_type):
    fields = {
        "pondering_steps": 5,
        "pondering_top_k": 10,
        "pondering_temperature": 0.5,
        "embedding_scale": 2.0,
        "input_scale": 3.0,
        "pondering_gate": "zero_init",
        "intermediate_loss_weight": 0.1,
    }
    config = PonderingConfig(tiny.base_config(model_type), **fields)
    config.save_pretrained(tmp_path)
    for loaded in (PonderingConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(loaded) is PonderingConfig
        assert loaded.base_config.to_dict() == config.base_config.to_dict()
        assert {name: getattr(loaded, name) for name in fields} == fields
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["auto_map"] == AUTO_MAP
    assert written["model_type"] == "pondering"
    assert written["base_config"]["model_type"] == model_type


def test_generation_does_not_claim_our_names(tmp_path):
    """`top_k` and `temperature` in a model's configuration are taken for sampling parameters."""
    assert not {"top_k", "temperature"} & set(PONDERING_FIELDS)
    PonderingConfig(LlamaConfig(), pondering_top_k=5, pondering_temperature=0.7).save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).pondering_top_k == 5


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_backbone_keeps_its_choice_of_attention(attention):
    base = LlamaConfig(attn_implementation=attention)
    assert PonderingConfig(base)._attn_implementation == base._attn_implementation == attention
    other = "sdpa" if attention == "eager" else "eager"
    assert PonderingConfig(base, attn_implementation=other).base_config._attn_implementation == other


def test_the_backbone_keeps_its_choice_of_experts():
    base = tiny.base_config("mixtral", experts_implementation="eager")
    PonderingConfig(base)
    assert base._experts_implementation == "eager"


def test_a_copy_is_independent():
    config = PonderingConfig(LlamaConfig())
    other = copy.deepcopy(config)
    other.pondering_steps, other.vocab_size = 1, 10
    assert (config.pondering_steps, config.vocab_size) == (3, 32000)


def test_an_override_while_loading_is_validated(tmp_path):
    PonderingConfig(LlamaConfig()).save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path, pondering_steps=1).pondering_steps == 1
    with pytest.raises(PonderingError, match="pondering_steps"):
        AutoConfig.from_pretrained(tmp_path, pondering_steps=-1)
