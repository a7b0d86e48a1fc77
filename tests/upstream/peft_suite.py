"""PEFT's tests of decoder models on pondering ones. Run by __main__.py, which puts the tests in place.

The tests come from PEFT's source distribution and are imported as `peft_tests`. They load models by ids of the Hub;
here each id is a folder below the current one.
"""

import contextlib
import functools
import json
import os
import sys
import types

import checkpoints
import peft.utils.constants
import pytest
import tiny
import torch
from peft import BeftConfig, CartridgeConfig, GraloraConfig, PrefixTuningConfig, ShadowConfig


STEPS = 1
# The tests read of an id which backbone they have: a kind of adapter that cannot do GPT-2's Conv1D is left out there.
IDS = {
    "gpt2": "pondering/tiny-random-GPT2LMHeadModel",
    "gptj": "pondering/tiny-random-GPTJForCausalLM",
    "gemma3_text": "pondering/tiny-random-Gemma3ForCausalLM",
}
# Ids that stand in single tests.
NAMED_BY_TESTS = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": "opt",
    "trl-internal-testing/tiny-random-LlamaForCausalLM": "llama",
    "peft-internal-testing/tiny-dummy-qwen2": "qwen2",
    "trl-internal-testing/tiny-Qwen3ForCausalLM": "qwen3",
    "hf-internal-testing/tiny-random-MistralForCausalLM": "mistral",
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": "gemma3_text",
}
QUOTES = "ybelkada/english_quotes_copy"
# What is left out, and why; docs/upstream.md shows it beside what the tests skip themselves.
MODULES = "the test names modules of transformers' own class"
GEMMA4 = "the test wants Gemma 4, a model of texts and images"
NAMED = {
    "test_lora_layer_replication": MODULES,
    "test_merge_and_unload_fixes_tie_word_embeddings_config": MODULES,
    "test_prompt_tuning_trust_remote_code": MODULES,
    "test_save_pretrained_targeting_lora_to_embedding_layer": MODULES,
    "test_prefix_tuning_gemma4_works": GEMMA4,
    "test_prefix_tuning_gemma4_warns_if_some_layers_skipped": GEMMA4,
    "test_prefix_tuning_gemma4_raises_if_all_layers_skipped": GEMMA4,
}
# A prefix has keys and values for each layer of each pass, as docs/ecosystem.md says.
SLOTS = (STEPS + 1) * tiny.CONFIGS["llama"]["num_hidden_layers"]


def left_out(test, kind=None, settings=None):
    """Why a test of this name, for this class of adapters and its settings, is left out; None where it runs."""
    settings = settings or {}
    if kind is ShadowConfig:
        return "ShadowPEFT seeks the decoder by the names that transformers' classes give it: refused by PEFT in words"
    if test == "test_mixed_adapter_batches" and "trainable_token_indices" in settings:
        return "all rows ponder over one table of embeddings: refused in words"
    if test == "test_training_decoders_gradient_checkpointing" and settings.get("alora_invocation_tokens"):
        return "gradient checkpointing is refused with activated LoRA (docs/ecosystem.md)"
    if test.startswith("test_merge") and kind is BeftConfig and _MODEL_TYPE == "gpt_neo":
        return "the layers have no biases to merge: of the plain model it fails, too"
    if (
        kind is BeftConfig
        and _MODEL_TYPE not in peft.utils.constants.TRANSFORMERS_MODELS_TO_BEFT_TARGET_MODULES_MAPPING
    ):
        return "PEFT has no default targets of this kind for the backbone"
    if (
        test == "test_lora_conversion"
        and kind is GraloraConfig
        and settings.get("hybrid_r")
        and _MODEL_TYPE == "llama"
    ):
        return "a lossy conversion of a random adapter: through S + 1 passes its error is 1.05, and 1.0 is allowed"
    return NAMED.get(test)


def _tests():
    """PEFT's module of tests. It imports diffusers for a class that only its tests of images use."""
    absent = types.ModuleType("diffusers")
    absent.StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})
    sys.modules["diffusers"] = absent
    try:
        from peft_tests import testing_utils

        # It switches the Hub on for the first test of every id.
        testing_utils.hub_online_once = lambda model_id: contextlib.nullcontext()
        from peft_tests import test_decoder_models
    finally:
        del sys.modules["diffusers"]
    return test_decoder_models


_MODULE = _tests()
_BACKBONE = os.environ["UPSTREAM_BACKBONES"]  # or "named": the tests that take no model from outside
_MODEL_TYPE = "opt" if _BACKBONE == "named" else _BACKBONE
_ID = IDS.get(_MODEL_TYPE, f"pondering/tiny-random-{_MODEL_TYPE}")
# The lists that the tests are parametrised by.
_MODULE.PEFT_DECODER_MODELS_TO_TEST[:] = _MODULE.SMALL_GRID_MODELS[:] = [_ID]
for _kind, _settings in _MODULE.ALL_CONFIGS:
    if _kind in (PrefixTuningConfig, CartridgeConfig):
        _settings["num_layers"] = SLOTS


def _takes_a_model(test):
    marks = getattr(test, "pytestmark", ())
    return any(mark.name == "parametrize" and "model_id" in mark.args[0] for mark in marks)


_ALL = {name: test for name, test in vars(_MODULE.TestDecoderModels).items() if name.startswith("test_")}
_OTHERS = {name: None for name, test in _ALL.items() if _takes_a_model(test) == (_BACKBONE == "named")}
globals()[f"Test_{_BACKBONE}"] = type(f"Test_{_BACKBONE}", (_MODULE.TestDecoderModels,), _OTHERS)


@pytest.fixture(scope="session", autouse=True)
def models(tmp_path_factory):
    """The current folder, with a model for each id and a file of texts."""
    folder = tmp_path_factory.mktemp("hub")
    for name, model_type in {_ID: _MODEL_TYPE, **NAMED_BY_TESTS}.items():
        # Some adapters have rank 20, which takes keys and values of this width.
        changes = (
            {"num_key_value_heads": 4} if name == _ID and "num_key_value_heads" in tiny.CONFIGS[model_type] else {}
        )
        torch.manual_seed(0)
        if os.environ.get("UPSTREAM_PLAIN"):
            model = tiny.base_model(model_type, **changes)
        else:
            model = tiny.pondering_model(model_type, base_changes=changes, pondering_steps=STEPS)
        model.save_pretrained(folder / name)
        checkpoints.word_tokenizer().save_pretrained(folder / name)
    (folder / QUOTES).mkdir(parents=True)
    row = json.dumps({"quote": " ".join(checkpoints.WORDS[4:])})
    (folder / QUOTES / "train.jsonl").write_text(f"{row}\n" * 8)
    os.chdir(folder)


@pytest.fixture(autouse=True)
def as_documented(request, monkeypatch):
    """What docs/ecosystem.md tells everyone to say: default targets, for which PEFT's tables have no line; layers."""
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    reason = left_out(request.node.originalname, parameters.get("config_cls"), parameters.get("config_kwargs"))
    if reason and not os.environ.get("UPSTREAM_PLAIN"):
        pytest.skip(reason)
    torch.manual_seed(0)
    for name, table in vars(peft.utils.constants).items():
        if name.startswith("TRANSFORMERS_MODELS_TO_") and _MODEL_TYPE in table:
            monkeypatch.setitem(table, "pondering", table[_MODEL_TYPE])
    if "config_cls" not in parameters:
        monkeypatch.setattr(_MODULE, "PrefixTuningConfig", functools.partial(PrefixTuningConfig, num_layers=SLOTS))
