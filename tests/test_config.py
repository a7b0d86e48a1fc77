"""PonderingConfig: what it takes, what it refuses, and what it reads off the backbone's configuration."""

import copy
import inspect
import json
import pickle

import checkpoints
import elsewhere
import pytest
import tiny
import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
)

from ponder_hf import PonderingConfig, PonderingError, PonderingForCausalLM
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


@pytest.mark.parametrize(
    ("misspelt", "name"),
    [
        ("pondering_stepz", "pondering_steps"),
        ("embeding_scale", "embedding_scale"),
        ("imput_scale", "input_scale"),
        ("draft_head", "draft_heads"),
        ("intermediate_loss_weigth", "intermediate_loss_weight"),
    ],
)
def test_a_misspelt_field_is_refused_with_the_right_one(misspelt, name, tmp_path):
    config = PonderingConfig(LlamaConfig())
    config.save_pretrained(tmp_path)
    words = f"`{misspelt}` is not a pondering field: did you mean `{name}`"
    for base in (LlamaConfig(), LlamaConfig().to_dict()):
        with pytest.raises(PonderingError, match=words):
            PonderingConfig(base, **{misspelt: 2})
    with pytest.raises(PonderingError, match=words):
        setattr(config, misspelt, 2)
    with pytest.raises(PonderingError, match=words):
        AutoConfig.from_pretrained(tmp_path, **{misspelt: 2})
    checkpoints.change_config(tmp_path, **{misspelt: 2})
    with pytest.raises(PonderingError, match=words):
        AutoConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("base", [{}, {"input_scales": 3.0}], ids=["by name", "within"])
def test_a_backbones_own_field_may_be_spelled_nearly_like_one_of_pondering(base, monkeypatch):
    monkeypatch.setattr(LlamaConfig, "input_scales", 1.0, raising=False)
    base = {**LlamaConfig().to_dict(), **base}
    assert PonderingConfig(base, input_scales=2.0).base_config.input_scales == 2.0


def test_every_field_stands_in_the_signature_with_its_type_and_default():
    parameters = dict(inspect.signature(PonderingConfig).parameters)
    for name, (default, _) in PONDERING_FIELDS.items():
        assert parameters[name].default == default
        assert parameters[name].annotation is not inspect.Parameter.empty


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
    assert name not in config.to_diff_dict(), "a second copy could come to differ from the first"


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


LINEAR = {"rope_type": "linear", "factor": 8.0, "rope_theta": 10000.0}
# A backbone, a field of its configuration under one of its names, and another value for it.
BACKBONE_FIELDS = [
    ("llama", "rope_scaling", LINEAR),
    ("llama", "rope_parameters", LINEAR),
    ("llama", "attention_dropout", 0.1),
    ("llama", "use_cache", False),
    ("llama", "num_key_value_heads", 1),
    ("llama", "hidden_act", "relu"),
    ("llama", "rms_norm_eps", 0.5),
    ("llama", "output_hidden_states", True),
    ("llama", "return_dict", False),
    ("llama", "chunk_size_feed_forward", 3),
    ("llama", "num_labels", 5),
    ("llama", "id2label", {0: "cat", 1: "dog", 2: "cow"}),
    ("llama", "problem_type", "regression"),
    ("llama", "dtype", torch.bfloat16),
    ("llama", "bos_token_id", 7),
    ("mistral", "sliding_window", 3),
    ("gpt2", "n_head", 2),
    ("gpt2", "num_attention_heads", 2),
    ("gpt2", "resid_pdrop", 0.5),
    ("gpt2", "n_positions", 40),
    ("gpt2", "max_position_embeddings", 40),
    ("opt", "dropout", 0.5),
    ("gemma2", "final_logit_softcapping", 5.0),
    ("granite", "logits_scaling", 7.0),
]
FIELD_IDS = [f"{model_type}-{name}" for model_type, name, _ in BACKBONE_FIELDS]


def as_plain(config):
    """What a plain configuration has, without what only says where it comes from."""
    fields = config.to_dict()
    return {
        name: fields[name] for name in fields if name not in ("transformers_version", "_name_or_path", "architectures")
    }


@pytest.mark.parametrize(("model_type", "name", "value"), BACKBONE_FIELDS, ids=FIELD_IDS)
@pytest.mark.parametrize("way", ["attribute", "update", "keyword", "loading", "file"])
@pytest.mark.filterwarnings("ignore:`rope_scaling` is deprecated:FutureWarning")
def test_every_field_of_the_backbone_acts_as_on_a_plain_configuration(tmp_path, model_type, name, value, way):
    plain, base = tiny.base_config(model_type), tiny.base_config(model_type)
    setattr(plain, name, copy.deepcopy(value))
    config = PonderingConfig(base, pondering_steps=1)
    assert getattr(config, name) == getattr(base, name) != value
    if way == "attribute":
        setattr(config, name, value)
        assert config.base_config is base
    if way == "update":
        config.update({name: value})
    if way == "keyword":
        config = PonderingConfig(**{**config.to_diff_dict(), name: value})
    if way == "loading":
        config.save_pretrained(tmp_path)
        config = AutoConfig.from_pretrained(tmp_path, **{name: copy.deepcopy(value)})
    if way == "file":
        setattr(config, name, value)
        config.save_pretrained(tmp_path)
        config = AutoConfig.from_pretrained(tmp_path)
    assert as_plain(config.base_config) == as_plain(plain)
    assert getattr(config, name) == getattr(plain, name)
    assert config.pondering_steps == 1


@pytest.mark.parametrize("spelling", ["rope_theta", "rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("way", ["attribute", "loading", "keyword", "keyword of a dict"])
def test_old_names_of_rotary_embeddings_change_the_rotation(tmp_path, spelling, way):
    value = 123.0 if spelling == "rope_theta" else {"rope_type": "linear", "factor": 8.0, "rope_theta": 123.0}
    config = PonderingConfig(tiny.base_config("llama"), pondering_steps=0)
    if way == "attribute":
        setattr(config, spelling, value)
    elif way == "loading":
        config.save_pretrained(tmp_path)
        config = AutoConfig.from_pretrained(tmp_path, **{spelling: value})
    else:
        base = tiny.base_config("llama")
        config = PonderingConfig(base if way == "keyword" else base.to_dict(), pondering_steps=0, **{spelling: value})
    expected = {"rope_type": "default", "rope_theta": 123.0} if spelling == "rope_theta" else value
    assert config.base_config.rope_parameters == expected
    assert config.rope_theta == 123.0
    inverse = PonderingForCausalLM(config).backbone.model.rotary_emb.inv_freq
    factor = 1 if spelling == "rope_theta" else 8
    torch.testing.assert_close(inverse, 123.0 ** (-torch.arange(4) / 4) / factor)


def test_a_scaling_without_a_base_frequency_keeps_the_one_that_is_there():
    config = PonderingConfig(tiny.base_config("llama", rope_parameters={"rope_type": "default", "rope_theta": 5e5}))
    config.rope_scaling = {"type": "linear", "factor": 2.0}
    assert config.base_config.rope_parameters["rope_theta"] == 5e5
    assert config.base_config.rope_parameters["rope_type"] == "linear"


def test_one_rotation_for_several_kinds_of_layers_is_refused():
    config = PonderingConfig(tiny.base_config("gemma3_text"))
    with pytest.raises(
        PonderingError, match="`rope_theta` differs by the kind of layer in this backbone: set `rope_p"
    ):
        config.rope_theta = 5.0


def test_a_field_of_a_model_that_is_built_acts_as_on_the_plain_model():
    model = tiny.pondering_model("llama", pondering_steps=1)
    ids = tiny.token_ids(1, 5)
    assert model(ids).past_key_values is not None
    model.config.use_cache = False
    assert model(ids).past_key_values is None
    assert model.backbone.config.use_cache is False
    model.config.output_hidden_states = True
    assert len(model(ids).hidden_states) == 3
    model.config.return_dict = False
    assert isinstance(model(ids), tuple)
    assert "use_cache" not in model.config.__dict__


def test_a_plain_model_that_gives_hidden_states_does_so_when_it_ponders():
    backbone = tiny.base_model("llama", output_hidden_states=True)
    assert len(PonderingForCausalLM.from_base(backbone, pondering_steps=2)(tiny.token_ids(1, 5)).hidden_states) == 3


def test_a_model_loads_with_a_field_of_its_backbone(tmp_path):
    tiny.pondering_model("llama", pondering_steps=1).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attention_dropout=0.25, rope_scaling=LINEAR)
    assert model.backbone.model.layers[0].self_attn.attention_dropout == 0.25
    assert model.backbone.model.rotary_emb.rope_type == "linear"
    with pytest.raises(TypeError, match="attention_dropuot"):  # as for any model of transformers
        AutoModelForCausalLM.from_pretrained(tmp_path, attention_dropuot=0.25)


def test_a_name_that_nobody_knows_is_treated_as_on_a_plain_configuration(tmp_path):
    plain, config = tiny.base_config("llama"), PonderingConfig(tiny.base_config("llama"))
    for one in (plain, config):
        with pytest.raises(AttributeError, match="weather"):
            _ = one.weather
        one.weather = "fine"
    config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).weather == "fine"
    assert AutoConfig.from_pretrained(tmp_path).base_config.weather == "fine"
    _, unused = AutoConfig.from_pretrained(tmp_path, wether="fine", return_unused_kwargs=True)
    assert unused == {"wether": "fine"}
    del config.weather
    assert not hasattr(config, "weather")
    with pytest.raises(PonderingError, match="`pondering_stepz` is not a pondering field: did you mean"):
        config.pondering_stepz = 2


def duplicates(written):
    """Fields that config.json has beside the backbone's and within them."""
    return (set(written) & set(written["base_config"])) - {"architectures", "model_type", "_name_or_path"}


def test_nothing_is_written_twice_and_tools_read_sizes(tmp_path):
    config = PonderingConfig(tiny.base_config("gpt2"), dtype="bfloat16")
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert not duplicates(written)
    assert written["dtype"] == "bfloat16"
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert loaded.dtype == loaded.base_config.dtype == torch.bfloat16
    shown = config.to_dict()
    assert (shown["hidden_size"], shown["num_hidden_layers"], shown["num_attention_heads"]) == (32, 2, 4)
    assert shown["tie_word_embeddings"] is True
    assert shown["base_config"]["n_embd"] == 32


def test_a_copy_of_a_size_that_contradicts_is_refused():
    fields = PonderingConfig(tiny.base_config("gpt2")).to_dict()
    with pytest.raises(PonderingError, match="`hidden_size` is 64, but 32 in `base_config`: change it only there"):
        PonderingConfig.from_dict({**fields, "hidden_size": 64})
    fields["base_config"]["n_layer"] = 5
    with pytest.raises(PonderingError, match="`num_hidden_layers` is 2, but 5 in `base_config`"):
        PonderingConfig.from_dict(fields)


@pytest.mark.parametrize("model_type", sorted(tiny.CONFIGS))
def test_copies_of_all_kinds_are_equal_and_independent(tmp_path, model_type):
    config = PonderingConfig(tiny.base_config(model_type), pondering_steps=2, pondering_top_k=7)
    config.save_pretrained(tmp_path)
    copies = {
        "deepcopy": copy.deepcopy(config),
        "pickle": pickle.loads(pickle.dumps(config)),
        "dict": PonderingConfig.from_dict(copy.deepcopy(config.to_dict())),
        "diff": PonderingConfig.from_dict(config.to_diff_dict()),
        "string": PonderingConfig.from_dict(json.loads(config.to_json_string())),
        "whole string": PonderingConfig.from_dict(json.loads(config.to_json_string(use_diff=False))),
        "file": AutoConfig.from_pretrained(tmp_path),
    }
    written = json.loads((tmp_path / "config.json").read_text())
    assert not duplicates(written)
    for other in copies.values():
        other._name_or_path = config._name_or_path
        assert other == config
        assert other.base_config is not config.base_config
        assert repr(other) == repr(config)
        other.initializer_range = 0.5
        assert other != config
    assert copies["deepcopy"] != PonderingConfig(tiny.base_config(model_type), pondering_steps=3, pondering_top_k=7)


def test_every_backbone_that_transformers_has_makes_a_configuration(tmp_path):
    """What transformers adds to one class of configurations must not stop its pondering."""
    tried = 0
    for config_class in MODEL_FOR_CAUSAL_LM_MAPPING:
        try:
            base = config_class()
            base.save_pretrained(tmp_path / "plain")
            expected = as_plain(config_class.from_pretrained(tmp_path / "plain"))
        except Exception:  # some have no defaults, and some of those that have cannot be saved
            continue
        before = base.to_dict()
        config = PonderingConfig(base)
        assert base.to_dict() == before, config_class
        config.save_pretrained(tmp_path)
        assert as_plain(AutoConfig.from_pretrained(tmp_path).base_config) == expected, config_class
        tried += 1
    assert tried > 100


def test_a_setting_of_training_is_no_field_of_the_checkpoint_itself():
    """transformers takes it and deletes it."""
    config = PonderingConfig(LlamaConfig())
    config.gradient_checkpointing = True
    model = PonderingForCausalLM(PonderingConfig(tiny.base_config("llama", gradient_checkpointing=True)))
    assert model.is_gradient_checkpointing
    assert not hasattr(model.config, "gradient_checkpointing")


# Arguments: a checkpoint, and where to save what is changed.
WITHOUT_THE_LIBRARY = """
from transformers import AutoConfig, AutoModelForCausalLM

source, target = sys.argv[1:]
rope = {"rope_type": "linear", "factor": 8.0, "rope_theta": 10000.0}
config = AutoConfig.from_pretrained(source, trust_remote_code=True, rope_parameters=rope, attention_dropout=0.1)
config.use_cache = False
assert config.base_config.use_cache is False and config.base_config.attention_dropout == 0.1
model = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=True, config=config)
assert model.backbone.model.rotary_emb.rope_type == "linear"
model.save_pretrained(target)
"""


@pytest.mark.slow
def test_a_checkpoint_s_own_code_does_the_same(tmp_path):
    tiny.pondering_model("llama", pondering_steps=1).save_pretrained(tmp_path / "source")
    elsewhere.run(WITHOUT_THE_LIBRARY, tmp_path / "home", tmp_path / "source", tmp_path / "target")
    written = json.loads((tmp_path / "target" / "config.json").read_text())
    assert not duplicates(written)
    assert written["base_config"]["rope_parameters"] == LINEAR
    assert (written["base_config"]["use_cache"], written["base_config"]["attention_dropout"]) == (False, 0.1)


def test_a_typing_error_in_a_keyword_of_loading_is_named(tmp_path):
    tiny.pondering_model().save_pretrained(tmp_path)
    for load in (AutoConfig.from_pretrained, PonderingForCausalLM.from_pretrained):
        with pytest.raises(
            PonderingError, match="`pondering_step` is not a pondering field: did you mean `pondering_steps`"
        ):
            load(tmp_path, pondering_step=1)
