"""accelerate's big-model loading on pondering models: weights that wait in memory, on disk or in no file yet.

accelerate's own published tests hold these functions with toy modules only (docs/upstream.md).
"""

import pytest
import tiny
import torch
from accelerate import (
    cpu_offload,
    cpu_offload_with_hook,
    disk_offload,
    dispatch_model,
    infer_auto_device_map,
    init_empty_weights,
    load_checkpoint_and_dispatch,
)
from accelerate.hooks import remove_hook_from_submodules
from accelerate.utils import compute_module_sizes
from transformers import AutoModelForCausalLM

from ponder_hf import PonderingForCausalLM


CPU = torch.device("cpu")
GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
CALLS = {
    "plain": {},
    "drafts": {"num_draft_tokens": 2},
    "exits": {"pondering_exit_criterion": "kl", "pondering_exit_threshold": 0.3},
}
# GPT-2's head is its embedding, GPT-NeoX's is not, OPT's embeddings are narrower than the rest, Gemma 2 scales, caps.
BACKBONES = ["gpt2", "gpt_neox", "opt", "gemma2"]


def model_of(model_type):
    torch.manual_seed(0)
    model = tiny.pondering_model(model_type, pondering_steps=2, pondering_top_k=20, pondering_gate="zero_init")
    torch.nn.init.constant_(model.pondering_gate.weight, 0.7)
    return model


def computes(model):
    """What a model computes: logits, tokens in each way to generate."""
    ids, mask = tiny.left_padded([tiny.token_ids(6), tiny.token_ids(4, seed=3)])
    with torch.no_grad():
        logits = model(ids, attention_mask=mask).logits[mask.bool()]
    return logits, {
        name: model.generate(ids, attention_mask=mask, **GREEDY, **words).tolist() for name, words in CALLS.items()
    }


def assert_same(model, expected):
    logits, tokens = computes(model)
    torch.testing.assert_close(logits, expected[0], rtol=1e-4, atol=1e-5)
    assert tokens == expected[1]


def memory_for(model):
    """Bytes for the embeddings and not for all; accelerate keeps room for the largest layer that it fetches."""
    return compute_module_sizes(model)[""] * 6 // 10


def parts(model):
    """A device map by accelerate itself: what fits in memory, the rest on disk."""
    places = infer_auto_device_map(
        model, max_memory={"cpu": memory_for(model)}, no_split_module_classes=model._no_split_modules
    )
    assert set(places.values()) == {"cpu", "disk"}
    return places


def on_disk(model):
    """How many of its parameters wait on disk."""
    return sum(parameter.device.type == "meta" for parameter in model.parameters())


OFFLOADED = {
    "memory": lambda model, folder: cpu_offload(model, CPU),
    "memory, whole": lambda model, folder: cpu_offload_with_hook(model, CPU)[0],
    "memory, buffers too": lambda model, folder: cpu_offload(model, CPU, offload_buffers=True),
    "disk": lambda model, folder: disk_offload(model, folder, CPU),
    "disk, buffers too": lambda model, folder: disk_offload(model, folder, CPU, offload_buffers=True),
    "partly on disk": lambda model, folder: dispatch_model(model, parts(model), offload_dir=folder),
}


@pytest.mark.parametrize("offload", OFFLOADED.values(), ids=OFFLOADED)
@pytest.mark.parametrize("model_type", BACKBONES)
def test_an_offloaded_model_computes_the_same(model_type, offload, tmp_path):
    model = model_of(model_type)
    expected = computes(model)
    offloaded = offload(model, tmp_path)
    assert_same(offloaded, expected)
    remove_hook_from_submodules(offloaded)
    assert_same(offloaded, expected)


# accelerate takes the file's names for the model's; GPT-NeoX's head has another one there, of the plain class, too.
@pytest.mark.parametrize("model_type", ["gpt2", "llama", "opt", "gemma2"])
def test_a_checkpoint_fills_a_model_that_has_no_weights_yet(model_type, tmp_path):
    """accelerate's way to load: an empty model, then load_checkpoint_and_dispatch, also from shards and onto disk."""
    model = model_of(model_type)
    expected = computes(model)
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    for name, places in (("whole", {"": "cpu"}), ("shards", parts(model))):
        with init_empty_weights():
            empty = PonderingForCausalLM(model.config).eval()
        empty.tie_weights()
        assert on_disk(empty) == len(list(empty.parameters()))
        loaded = load_checkpoint_and_dispatch(
            empty, tmp_path / name, places, offload_folder=tmp_path / "offloaded", strict=True
        )
        assert (on_disk(loaded) > 0) == ("disk" in places.values())
        assert_same(loaded, expected)


@pytest.mark.parametrize("model_type", BACKBONES)
def test_from_pretrained_leaves_on_disk_what_does_not_fit(model_type, tmp_path):
    model = model_of(model_type)
    expected = computes(model)
    model.save_pretrained(tmp_path / "model")
    for number, places in enumerate((parts(model), "auto")):
        loaded = AutoModelForCausalLM.from_pretrained(
            tmp_path / "model",
            device_map=places,
            max_memory={"cpu": memory_for(model)},
            offload_folder=tmp_path / f"offloaded {number}",
        )
        assert on_disk(loaded) > 0
        assert_same(loaded, expected)
        loaded.save_pretrained(tmp_path / f"again {number}")
        again = PonderingForCausalLM.from_pretrained(tmp_path / f"again {number}")
        for (name, one), (_, other) in zip(again.named_parameters(), model.named_parameters(), strict=True):
            assert torch.equal(one, other), name
