"""transformers' shared model tests, one class for each backbone. Run by __main__.py, which puts the tests in place.

The tests come from transformers' source distribution and are imported as `transformers_tests`.
"""

import copy
import os
import unittest

import tiny
import torch
from transformers import set_seed
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES
from transformers_tests.test_modeling_common import ModelTesterMixin

from ponder_hf import PonderingConfig, PonderingForCausalLM, PonderingModel


# What is left out here, by the beginning of its name, and why; docs/upstream.md shows it beside what the mixin skips.
LEFT_OUT = {"test_generation_tester_mixin_inheritance": "the archive has no tests of generation"}
WITHOUT_EXPERTS = {
    "test_eager_matches_batched_and_grouped_inference": "for backbones with experts; before there is one the class "
    "answers for all of them"
}
WITH_EXPERTS = ("mixtral",)
OF_ONE_BACKBONE = {
    "gemma2": {
        "test_sdpa_can_dispatch_non_composite_models": "the backbone has eager attention by default; before there is "
        "one the class answers for all of them"
    }
}
# Where the mixin fails with the plain backbone in the tests' own configuration, too. Two dimensions of a head that
# rotate are too few for a scaling that divides by their number less two. Of Gemma 3 a layer of each kind is needed.
# Mixtral's scalings read `head_dim`.
CHANGES = {
    "gpt_neox": {"rotary_pct": 0.5},
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"]},
    "mixtral": {"head_dim": 8},
}


# Which classes have no loss and no head the mixin knows by their names, too.
MODEL_MAPPING_NAMES.setdefault(PonderingConfig.model_type, PonderingModel.__name__)


class Tester:
    """What the mixin asks about a model: a small configuration and inputs."""

    batch_size, seq_length, num_hidden_layers, is_training = 3, 7, 2, True

    def __init__(self, parent, model_type):
        self.parent, self.model_type = parent, model_type
        self.changes = CHANGES.get(model_type, {})
        base = tiny.base_config(model_type, **self.changes)
        self.hidden_size, self.num_attention_heads = base.hidden_size, base.num_attention_heads

    def get_config(self):
        return PonderingConfig(tiny.base_config(self.model_type, **self.changes), pondering_steps=1)

    def prepare_config_and_inputs_for_common(self):
        ids = torch.randint(3, tiny.VOCAB_SIZE, (self.batch_size, self.seq_length))
        mask = torch.ones_like(ids)
        return self.get_config(), {"input_ids": ids, "attention_mask": mask}

    prepare_config_and_inputs = prepare_config_and_inputs_for_common


class _Suite(ModelTesterMixin):
    all_model_classes = (PonderingModel, PonderingForCausalLM)
    model_type: str

    def setUp(self):
        set_seed(0)
        self.model_tester = Tester(self, self.model_type)

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        # The mixin knows by lists of names which class takes labels.
        inputs = copy.deepcopy(inputs_dict)
        if return_labels and model_class is PonderingForCausalLM:
            inputs["labels"] = inputs["input_ids"].clone()
        return inputs


def _skipped(name, reason):
    def test(self):
        self.skipTest(reason)

    test.__name__ = name
    return test


for _model_type in os.environ.get("UPSTREAM_BACKBONES", " ".join(tiny.SPINE)).split():
    _reasons = {**LEFT_OUT, **OF_ONE_BACKBONE.get(_model_type, {})}
    if _model_type not in WITH_EXPERTS:
        _reasons |= WITHOUT_EXPERTS
    _own = {
        name: _skipped(name, reason)
        for start, reason in _reasons.items()
        for name in dir(_Suite)
        if name.startswith(start)
    }
    globals()[f"Test_{_model_type}"] = type(
        f"Test_{_model_type}", (_Suite, unittest.TestCase), {"model_type": _model_type, "__module__": __name__, **_own}
    )
