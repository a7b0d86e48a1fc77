"""Mixtures of experts: the load-balancing loss of every pass counts, and S = 0 is the plain model."""

import inspect

import pytest
import tiny
import torch
from transformers import CONFIG_MAPPING, AutoModel, AutoModelForCausalLM
from transformers.models.mixtral import modeling_mixtral

from ponder_hf import PonderingError, PonderingForCausalLM
from ponder_hf.modeling import PonderingModel, pondering_backbone
from ponder_hf.modeling.pondering_backbone import verify_backbone
from ponder_hf.modeling.pondering_generate_exits import CRITERIA, PonderingExit


_COMMON = {
    "vocab_size": tiny.VOCAB_SIZE,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FAMILIES = {
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    "olmoe": {"num_experts": 4},
    "granitemoe": {"num_local_experts": 4},
    "jetmoe": {"num_local_experts": 4, "kv_channels": 8},  # experts in the attention, too; another name of the weight
}
WEIGHT = {"jetmoe": "aux_loss_coef"}


def plain_model(model_type, dtype=torch.float32, **fields):
    fields = {"output_router_logits": True, WEIGHT.get(model_type, "router_aux_loss_coef"): 5.0, **fields}
    config = CONFIG_MAPPING[model_type](**_COMMON, **FAMILIES[model_type], **fields)
    torch.manual_seed(2)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0 if parameter.ndim > 1 else 1.0)
    return model.to(dtype)


def batch():
    input_ids, mask = tiny.left_padded([tiny.token_ids(9), tiny.token_ids(6, seed=1)])
    return {"input_ids": input_ids, "attention_mask": mask, "labels": input_ids.masked_fill(mask == 0, -100)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_no_steps_is_the_plain_model(model_type, dtype):
    base = plain_model(model_type, dtype)
    expected = base(**batch(), use_cache=False)
    output = PonderingForCausalLM.from_base(base, pondering_steps=0)(**batch())
    assert torch.equal(output.aux_loss, expected.aux_loss)
    assert expected.aux_loss > 1
    torch.testing.assert_close(output.loss, expected.loss.to(output.loss.dtype))
    assert len(output.router_logits) == len(expected.router_logits)
    assert all(map(torch.equal, output.router_logits, expected.router_logits))


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_losses_of_the_passes_are_summed(model_type, training):
    base, inputs = plain_model(model_type), batch()
    passes, embeddings = [], base.get_input_embeddings()(inputs["input_ids"])
    for _ in range(3):
        passes.append(base(inputs_embeds=embeddings, attention_mask=inputs["attention_mask"], use_cache=False))
        embeddings = embeddings + passes[-1].logits.softmax(-1) @ base.get_input_embeddings().weight
    model = PonderingForCausalLM.from_base(base, pondering_steps=2).train(training)
    output = model(**inputs)
    balance = sum(each.aux_loss for each in passes)
    torch.testing.assert_close(output.aux_loss, balance, rtol=1e-5, atol=0)
    expected = model(**inputs, output_router_logits=False).loss + 5.0 * balance
    torch.testing.assert_close(output.loss, expected, rtol=1e-5, atol=0)
    wanted = [logits for each in passes for logits in each.router_logits]
    torch.testing.assert_close(output.router_logits, tuple(wanted), rtol=1e-4, atol=1e-4)
    table = base.get_input_embeddings().weight
    gradients = [torch.autograd.grad(loss, table)[0] for loss in (output.loss, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)


def test_the_switch_is_the_configuration_or_the_argument():
    model = PonderingForCausalLM.from_base(plain_model("mixtral", output_router_logits=False), pondering_steps=1)
    without = model(**batch())
    assert without.aux_loss is None is without.router_logits
    asked = model(**batch(), output_router_logits=True)
    model.config.base_config.output_router_logits = True
    by_configuration = model(**batch())
    torch.testing.assert_close(asked.loss, without.loss + 5.0 * asked.aux_loss)
    torch.testing.assert_close(by_configuration.loss, asked.loss)
    model.config.base_config.router_aux_loss_coef = 0.25
    torch.testing.assert_close(model(**batch()).loss, without.loss + 0.25 * asked.aux_loss)


def test_the_decoder_alone_gives_the_router_logits_of_all_passes(tmp_path):
    model = PonderingForCausalLM.from_base(plain_model("mixtral"), pondering_steps=1)
    inputs = {name: value for name, value in batch().items() if name != "labels"}
    expected = model(**inputs).router_logits
    model.save_pretrained(tmp_path)
    decoder = AutoModel.from_pretrained(tmp_path)
    assert type(decoder) is PonderingModel
    for decoder_of_passes in (model.base_model, decoder):
        torch.testing.assert_close(decoder_of_passes(**inputs).router_logits, expected)


def test_generation_and_exits_go_on_without_the_loss():
    model = PonderingForCausalLM.from_base(plain_model("mixtral"), pondering_steps=1)
    inputs = {name: value for name, value in batch().items() if name != "labels"}
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    assert model.generate(**inputs, **options).shape == (2, 12)
    early = {"pondering_exit_criterion": "kl", "pondering_exit_threshold": 0.1}
    assert model.generate(**inputs, **options, **early).shape == (2, 12)
    with torch.no_grad(), pytest.raises(PonderingError, match="`output_router_logits` needs the same passes"):
        model(**inputs, output_router_logits=True, pondering_exit=PonderingExit(CRITERIA["kl"](), 0.1))


def test_a_balance_of_its_own_is_refused_by_name(monkeypatch):
    def of_keys(gate_logits, num_experts, num_keys, top_k, attention_mask):  # as doge has it
        raise AssertionError

    monkeypatch.setattr(modeling_mixtral, "load_balancing_loss_func", of_keys)
    model = PonderingForCausalLM.from_base(plain_model("mixtral"), pondering_steps=1)
    with pytest.raises(PonderingError, match="'mixtral' balances its experts in a way of its own"):
        model(**batch())
    assert model(**batch(), output_router_logits=False).loss > 0


@pytest.mark.parametrize("model_type", ["mixtral", "llama"])
def test_what_a_class_adds_to_its_loss_by_itself_is_said(model_type, monkeypatch):
    base = plain_model("mixtral") if model_type == "mixtral" else tiny.base_model(model_type)
    warnings = []
    monkeypatch.setattr(pondering_backbone.logger, "warning", warnings.append)
    verify_backbone(base)
    assert not warnings
    forward = type(base).forward

    def with_z_loss(self, *arguments, **keywords):
        output = forward(self, *arguments, **keywords)
        if output.loss is not None:
            output.loss = output.loss + 0.1 * output.logits.logsumexp(-1).square().mean()
        return output

    with_z_loss.__signature__ = inspect.signature(forward)
    monkeypatch.setattr(type(base), "forward", with_z_loss)
    verify_backbone(base)
    assert len(warnings) == 1
    assert f"'{model_type}'" in warnings[0]
    assert "is left out" in warnings[0]
