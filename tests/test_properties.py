"""Properties of any configuration, by hypothesis: it builds, computes and round trips, or an error says why."""

import json

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from ponder_hf import PonderingConfig, PonderingError, PonderingForCausalLM


hypothesis = pytest.importorskip("hypothesis", reason="hypothesis is not installed (ponder-hf[test])")
st = hypothesis.strategies

# Not timed, the same examples in every run, and none kept in a folder of the user's.
SETTINGS = hypothesis.settings(
    deadline=None,
    max_examples=30,
    derandomize=True,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.function_scoped_fixture],
)
POSITIVE = st.floats(1e-3, 1e3, allow_nan=False)
# Every field of pondering with the values that it may have.
FIELDS = {
    "pondering_steps": st.integers(0, 4),
    "pondering_top_k": st.none() | st.integers(1, tiny.VOCAB_SIZE),
    "pondering_temperature": POSITIVE,
    "embedding_scale": st.floats(1e-2, 30),
    "input_scale": st.floats(1e-2, 30),
    "pondering_gate": st.sampled_from(["none", "zero_init", "zero_init_matrix", "random_signs"]),
    "intermediate_loss_weight": st.floats(0, 10),
}
MODEL_TYPES = st.sampled_from(tiny.SPINE)
# What a JSON file may hold where a field is.
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)


def attempt(function):
    """What the function returns, and None; or None, and what it raises."""
    try:
        return function(), None
    except Exception as error:
        return None, error


def logits_of(model):
    with torch.no_grad():
        return model.eval()(tiny.token_ids(1, 3).clamp(max=model.config.vocab_size - 1)).logits


@SETTINGS
@hypothesis.given(model_type=MODEL_TYPES, fields=st.fixed_dictionaries({}, optional=FIELDS), data=st.data())
def test_a_configuration_of_the_right_shape_builds_and_computes(tmp_path_factory, model_type, fields, data):
    """Logits are finite, a loss has gradients, and a round trip through a folder keeps every field and every bit."""
    model = PonderingForCausalLM(PonderingConfig(tiny.base_config(model_type), **fields)).eval()
    shape = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 9)), label="batch, tokens")
    ids = tiny.token_ids(*shape)
    output = model(ids, labels=ids if shape[1] > 1 else None)
    assert output.logits.shape == (*shape, tiny.VOCAB_SIZE)
    assert output.logits.isfinite().all()
    if output.loss is not None:
        output.loss.backward()
        assert all(each.grad is None or each.grad.isfinite().all() for each in model.parameters())
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert {name: getattr(loaded.config, name) for name in FIELDS} == {
        name: getattr(model.config, name) for name in FIELDS
    }
    assert loaded.config.to_diff_dict() == PonderingConfig.from_pretrained(folder).to_diff_dict()
    expected, found = model.state_dict(), loaded.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@SETTINGS
@hypothesis.given(name=st.sampled_from(sorted(FIELDS)), value=JSON)
def test_any_value_of_a_field_is_taken_or_refused_by_name(name, value):
    """At construction, later, and from JSON alike; what was refused changed nothing."""
    base = tiny.base_config("llama")
    config = PonderingConfig(base)
    before = config.to_dict()
    made, error = attempt(lambda: PonderingConfig(base, **{name: value}))
    if error is not None:
        assert isinstance(error, PonderingError)
        assert isinstance(error, ValueError)
        assert f"`{name}`" in str(error)
        with pytest.raises(PonderingError, match=name):
            setattr(config, name, value)
        assert config.to_dict() == before
        with pytest.raises(PonderingError, match=name):
            PonderingConfig.from_dict(json.loads(json.dumps({**before, name: value})))
        return
    assert getattr(made, name) == value
    again = PonderingConfig.from_dict(json.loads(json.dumps(made.to_dict())))
    assert again.to_dict() == made.to_dict()
    setattr(config, name, value)
    assert config.to_dict() == made.to_dict()


@SETTINGS
@hypothesis.given(base=JSON)
def test_any_base_that_is_none_is_refused(base):
    with pytest.raises(PonderingError, match="base_config"):
        PonderingConfig.from_dict({"model_type": "pondering", "base_config": base})


@SETTINGS
@hypothesis.given(
    model_type=MODEL_TYPES,
    name=st.sampled_from(["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"]),
    value=st.integers(-3, 140) | JSON,
)
def test_any_size_of_a_backbone_computes_or_is_refused_in_words(model_type, name, value):
    """Where the backbone by itself computes, it also ponders, and otherwise there is an error, not a number."""
    config_class = type(tiny.base_config(model_type))
    given = json.loads(json.dumps(tiny.base_config(model_type).to_dict(), default=str))
    given[config_class.attribute_map.get(name, name)] = value
    plain, _ = attempt(lambda: logits_of(AutoModelForCausalLM.from_config(config_class.from_dict(given))))
    logits, error = attempt(lambda: logits_of(PonderingForCausalLM(PonderingConfig(given, pondering_steps=1))))
    assert (plain is None) == (logits is None), error
    assert logits is None or logits.isfinite().all()
