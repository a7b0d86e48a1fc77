"""Every promised backbone ponders with what it really feeds in and puts out, and the others are refused by name."""

import pytest
import tiny
import torch
from transformers import CONFIG_MAPPING

from ponder_hf import PonderingConfig, PonderingError, PonderingForCausalLM
from ponder_hf.modeling import pondering_backbone
from ponder_hf.modeling.pondering_backbone import TESTED, verify_backbone


def test_every_backbone_called_tested_has_a_tiny_model():
    assert set(tiny.CONFIGS) == TESTED
    assert set(tiny.SPINE) <= TESTED


@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no cache"])
@pytest.mark.parametrize("model_type", sorted(TESTED))
def test_no_steps_is_the_plain_backbone_bit_for_bit(model_type, use_cache):
    base = tiny.base_model(model_type)
    input_ids, mask = tiny.left_padded([tiny.token_ids(9), tiny.token_ids(6, seed=1)])
    arguments = {"input_ids": input_ids, "attention_mask": mask, "use_cache": use_cache}
    with torch.no_grad():
        expected = base(**arguments).logits
        logits = PonderingForCausalLM.from_base(base, pondering_steps=0)(**arguments).logits
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("model_type", sorted(TESTED))
def test_two_steps_equal_a_plain_loop(model_type):
    # torch multiplies groups of experts in no wider type than float32.
    dtype, tolerance = (torch.float32, 1e-4) if model_type == "mixtral" else (torch.float64, 1e-6)
    base = tiny.base_model(model_type, dtype)
    input_ids = tiny.token_ids(2, 11)
    with torch.no_grad():
        expected = tiny.plain_pondering(base, input_ids, 2)
        plain = base(input_ids=input_ids, use_cache=False).logits
        logits = PonderingForCausalLM.from_base(base, pondering_steps=2)(input_ids).logits
    scale = expected.abs().max()
    assert (logits - expected).abs().max() <= tolerance * scale  # norms and rotations in float32 inside some backbones
    assert (logits - plain).abs().max() > 1e-3 * scale, "pondering changed nothing: the comparison would prove nothing"


@pytest.mark.parametrize("model_type", sorted(TESTED))
def test_each_tested_backbone_agrees_with_itself_taken_apart(model_type):
    assert verify_backbone(tiny.base_model(model_type)) is None  # raises where taken apart it differs


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("model_type", tiny.SPINE)
def test_a_batch_left_padded_equals_its_rows_alone(model_type, dtype):
    model = tiny.pondering_model(model_type, dtype, pondering_steps=2)
    rows = [tiny.token_ids(10), tiny.token_ids(4, seed=1), tiny.token_ids(7, seed=2)]
    input_ids, mask = tiny.left_padded(rows)
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 5e-2}[dtype]
    with torch.no_grad():
        batch = model(input_ids, attention_mask=mask, position_ids=position_ids).logits
        for index, row in enumerate(rows):
            alone = model(row.unsqueeze(0)).logits[0]
            assert (batch[index, -len(row) :] - alone).abs().max() <= tolerance * alone.abs().max()


def test_an_untested_backbone_is_tried():
    config = CONFIG_MAPPING["biogpt"](
        vocab_size=131, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    assert config.model_type not in TESTED
    base = PonderingForCausalLM(PonderingConfig(config, pondering_steps=2)).eval().backbone  # scales its embeddings
    input_ids = tiny.token_ids(2, 9)
    with torch.no_grad():
        logits = PonderingForCausalLM.from_base(base, pondering_steps=2)(input_ids).logits
        torch.testing.assert_close(logits, tiny.plain_pondering(base, input_ids, 2))


REFUSED = {
    "t5": ({}, "encoder-decoder"),
    "bart": ({}, "encoder-decoder"),
    "vit": ({}, "no causal language model"),
    "mamba": ({}, "recurrent state"),
    "jamba": ({}, "recurrent state"),
    "gemma3n_text": ({}, "embeds the token ids again"),
    "cpmant": ({}, "inputs_embeds"),
    "gemma3": ({}, "multimodal"),
    "lfm2": ({"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2}, "layers of type conv"),
    "gpt2": ({"add_cross_attention": True}, "add_cross_attention"),
    "gemma3_text": ({"use_bidirectional_attention": True}, "later tokens"),
    "bert": ({"is_decoder": True, "num_hidden_layers": 1, "hidden_size": 24}, "between tokens and logits"),
}


@pytest.mark.parametrize("model_type", REFUSED)
def test_a_backbone_that_cannot_ponder_is_refused_by_name(model_type):
    changes, reason = REFUSED[model_type]
    config = PonderingConfig(CONFIG_MAPPING[model_type](**changes))
    with pytest.raises(PonderingError, match=f"model_type '{model_type}' cannot ponder.*{reason}"):
        PonderingForCausalLM(config)


def test_a_model_that_sees_later_tokens_is_refused():
    base = tiny.base_model("llama")
    for layer in base.model.layers:
        layer.self_attn.is_causal = False
    base.config.model_type, base.config.is_causal = "llama_of_its_own", False
    with pytest.raises(PonderingError, match="depend on later tokens"):
        verify_backbone(base)


def test_hidden_work_after_the_head_is_noticed(monkeypatch):
    monkeypatch.setattr(pondering_backbone, "finish_logits", lambda logits, config: logits)
    with pytest.raises(PonderingError, match="does more between tokens and logits"):
        verify_backbone(tiny.base_model("granite"))
