"""Weights from scratch: the authors' standard deviations, on the matrices that they mean."""

import math

import pytest
import tiny
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ponder_hf import PonderingConfig, PonderingError, PonderingForCausalLM
from ponder_hf.training.arguments import complete_arguments, learning_rate
from ponder_hf.training.initialisation import OUTPUT_PROJECTIONS, initialise


LARGER = {"gpt2": {"n_embd": 128}}


def from_scratch(model_type, **fields):
    changes = LARGER.get(model_type, {"hidden_size": 128})
    return initialise(PonderingForCausalLM(PonderingConfig(tiny.base_config(model_type, **changes), **fields)))


@pytest.mark.parametrize("model_type", OUTPUT_PROJECTIONS)
def test_standard_deviations(model_type):
    model = from_scratch(model_type, pondering_steps=3, pondering_gate="zero_init")
    num_layers = model.config.num_hidden_layers
    std = math.sqrt(2 / (5 * 128))
    small = std / math.sqrt(2 * num_layers * 4)
    found = {"small": 0, "std": 0}
    for name, module in model.backbone.named_modules():
        if not isinstance(module, (nn.Linear, Conv1D, nn.Embedding)):
            continue
        is_small = name.endswith(OUTPUT_PROJECTIONS[model_type])
        expected = small if is_small else std
        # A normal distribution cut at three standard deviations is a little narrower.
        assert module.weight.std().item() == pytest.approx(0.986 * expected, rel=0.05), name
        assert module.weight.abs().max() <= 3 * expected
        assert getattr(module, "bias", None) is None or not module.bias.any()
        found["small" if is_small else "std"] += 1
    assert found["small"] == 2 * num_layers, "an output projection has another name"
    assert found["std"] > num_layers
    assert not model.pondering_gate.weight.any()


def test_ties_and_padding_stay():
    tied = from_scratch("gpt2")
    assert tied.get_output_embeddings().weight is tied.get_input_embeddings().weight
    padded = from_scratch("llama")
    assert padded.get_input_embeddings().padding_idx == 0
    assert not padded.get_input_embeddings().weight[0].any()


def test_the_seed_decides():
    torch.manual_seed(1)
    first = from_scratch("gpt_neox")
    torch.manual_seed(1)
    for one, other in zip(first.parameters(), from_scratch("gpt_neox").parameters(), strict=True):
        assert torch.equal(one, other)


def test_an_unknown_backbone_is_refused():
    model = PonderingForCausalLM(PonderingConfig(tiny.base_config("opt")))
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(PonderingError, match=r"'opt'.*`initialisation="):
        initialise(model)
    assert all(map(torch.equal, before, model.parameters()))


def test_the_recipe():
    rates = [learning_rate("scratch", size, False) for size in (70e6, 160e6, 410e6, 3e9)]
    assert rates == [1e-3, 6e-4, 3e-4, 3e-4]
    assert learning_rate("plain", 70e6, False) == pytest.approx(1e-3 / 3)
    assert learning_rate("plain", 70e6, True) == 2e-4
    arguments = complete_arguments({"learning_rate": 5.0, "lr_scheduler_type": "linear"}, "plain", 1, False, True)
    assert arguments["learning_rate"] == 5.0
    assert "lr_scheduler_kwargs" not in arguments
    assert arguments["eval_strategy"] == "steps"
    with pytest.raises(PonderingError, match="did you mean `learning_rate`"):
        complete_arguments({"learning_rat": 1}, "plain", 1, False, False)
    with pytest.raises(PonderingError, match="it is `output`"):
        complete_arguments({"output_dir": "x"}, "plain", 1, False, False)
