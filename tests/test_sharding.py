"""Weights that are not whole, and what else distributed training asks of a model, tested in one process."""

import copy

import pytest
import tiny
import torch
from torch import distributed
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from transformers import AutoModelForCausalLM

from ponder_hf import PonderingForCausalLM
from ponder_hf.modeling.pondering_backbone import backbone_readout, bare_table, embedding_table


BACKBONES = ["gpt_neox", "gpt2", "llama"]


@pytest.fixture
def mesh():
    """A mesh of this process alone."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield distributed.init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


def as_dtensor(module, mesh, placement):
    module.weight = torch.nn.Parameter(distribute_tensor(module.weight.detach(), mesh, [placement]))


@pytest.mark.parametrize("placement", [Shard(0), Replicate()], ids=["shard", "replica"])
@pytest.mark.parametrize("part", ["get_input_embeddings", "get_output_embeddings"])
def test_no_kernel_gets_a_dtensor(mesh, part, placement):
    model = tiny.pondering_model("llama", pondering_top_k=9)
    assert model.pondering_kernel == "top_k"
    as_dtensor(getattr(model, part)(), mesh, placement)
    assert model.pondering_kernel == "plain"
    if part == "get_output_embeddings":
        assert backbone_readout(model.backbone) is None  # the loss does not read it either
        with pytest.raises(
            RuntimeError, match="DTensor"
        ):  # outside a sharded module nothing gathers it: torch says so
            model(tiny.token_ids(1, 5))
    else:
        assert bare_table(model.backbone) is None


def as_if_of_torch(hook):
    """A hook that looks like one of FSDP's, which puts a weight in place, and not like one about tokens."""
    hook.__module__ = "torch.distributed.fsdp"
    return hook


def with_zero3(*modules):
    """As DeepSpeed's ZeRO-3: a weight is empty but for the time between the hooks before and after its module."""
    whole = {module.weight: module.weight.data for module in modules}

    def gather(module, arguments):
        module.weight.data = whole[module.weight]

    def release(module, arguments, output):
        module.weight.data = torch.empty(0, dtype=module.weight.dtype)
        return output

    for number, module in enumerate(modules):
        module.weight.ds_id = number
        module.register_forward_pre_hook(gather)
        module.register_forward_hook(release)
        release(module, None, None)


@pytest.mark.parametrize("top_k", [None, 9], ids=["whole", "top_k"])
@pytest.mark.parametrize("model_type", BACKBONES)
def test_weights_that_are_there_only_within_their_modules(model_type, top_k):
    model = tiny.pondering_model(model_type, pondering_steps=2, pondering_top_k=top_k, pondering_gate="zero_init")
    torch.nn.init.constant_(model.pondering_gate.weight, 0.5)
    ids = tiny.token_ids(2, 9)
    expected = model(ids, labels=ids, output_pondering=True)
    with_zero3(model.get_input_embeddings(), model.get_output_embeddings())
    assert model.pondering_kernel == "plain"
    with torch.no_grad():
        output = model(ids, labels=ids, output_pondering=True)
    torch.testing.assert_close(output.logits, expected.logits)
    torch.testing.assert_close(output.pondering_losses, expected.pondering_losses)


@pytest.mark.parametrize("apart", [True, False], ids=["embedding apart", "embedding with the model"])
def test_fsdp2_with_a_hook_about_tokens_on_the_embedding(mesh, apart):
    """Its own hooks run when the table is asked for, and drafts allow them: their module tells them apart."""
    torch.manual_seed(0)
    model = tiny.pondering_model("llama", pondering_steps=2)
    ids = tiny.token_ids(2, 7)
    plain = copy.deepcopy(model)
    for layer in model.backbone.model.layers:
        fully_shard(layer, mesh=mesh)
    if apart:
        fully_shard(model.get_input_embeddings(), mesh=mesh)
    fully_shard(model, mesh=mesh)
    for one in (plain, model):
        one.get_input_embeddings().register_forward_hook(lambda module, _, output: output + output.size(2) / 64)
        one.train()(ids, labels=ids).loss.backward()
    for (name, parameter), sharded in zip(plain.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(sharded.grad.full_tensor(), parameter.grad, msg=name, rtol=1e-4, atol=1e-5)
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = plain.eval().generate(ids, **settings).tolist()
    for drafts in (0, 2):
        assert model.eval().generate(ids, num_draft_tokens=drafts, **settings).tolist() == expected


@pytest.mark.parametrize("weight", [torch.empty(0), torch.empty(131, 32, device="meta")], ids=["empty", "meta"])
def test_a_weight_without_rows_is_never_read(weight):
    """FSDP1 leaves such ones outside its units' forward passes, offloading such ones on the meta device."""
    model = tiny.pondering_model("llama", pondering_top_k=9)
    model.get_output_embeddings().weight = torch.nn.Parameter(weight)
    assert backbone_readout(model.backbone) is None
    assert model.pondering_kernel == "plain"


@pytest.mark.parametrize("model_type", ["llama", "gemma"])
def test_the_padding_row_is_a_row_like_others_in_every_kernel(model_type):
    """Through its module an embedding gives its padding row no gradient, but the pondering sum uses that row too."""
    model = tiny.pondering_model(model_type, torch.float64, pondering_steps=1).train()
    padding = model.get_input_embeddings().padding_idx
    assert padding == 0
    asked = copy.deepcopy(model)
    asked.get_input_embeddings().register_forward_pre_hook(as_if_of_torch(lambda module, arguments: None))
    assert (model.pondering_kernel, asked.pondering_kernel) == ("vocabulary", "plain")
    ids = tiny.token_ids(2, 9)
    for one in (model, asked):
        one(ids, labels=ids).loss.backward()
    first, second = (one.get_input_embeddings().weight.grad for one in (model, asked))
    assert first[padding].abs().max() > 0
    torch.testing.assert_close(second, first)
    assert asked.get_input_embeddings().padding_idx == padding


def test_all_rows_of_an_embedding_whose_weight_is_empty():
    model = tiny.pondering_model("gpt2")
    expected = model.get_input_embeddings().weight.detach().clone()
    with_zero3(model.get_input_embeddings())
    torch.testing.assert_close(embedding_table(model.backbone), expected)


@pytest.mark.parametrize("model_type", BACKBONES)
def test_what_wraps_models_finds_the_layers_of_the_backbone(model_type):
    """FSDP's auto wrap, device_map and gradient checkpointing go by these."""
    for model in (tiny.pondering_model(model_type), PonderingForCausalLM(tiny.pondering_model(model_type).config)):
        assert model.base_model_prefix == "backbone"
        assert set(model._no_split_modules) == set(model.backbone._no_split_modules)
        layers = [module for module in model.modules() if type(module).__name__ in model._no_split_modules]
        assert len(layers) == 2
        model.gradient_checkpointing_enable()
        assert all(layer.gradient_checkpointing for layer in layers)


@pytest.mark.parametrize("model_type", BACKBONES)
def test_a_device_map_that_offloads(tmp_path, model_type):
    """Weights come from disk, a module at a time, and logits stay what they are."""
    model = tiny.pondering_model(model_type, pondering_steps=2, pondering_top_k=9)
    ids = tiny.token_ids(2, 9)
    expected = model(ids).logits
    model.save_pretrained(tmp_path / "model")
    parts = [name for name, _ in model.backbone.base_model.named_children()]
    prefix = f"backbone.{model.backbone.base_model_prefix}"
    device_map = {f"{prefix}.{part}": "disk" if part in ("layers", "h") else "cpu" for part in parts}
    head = next(name for name, module in model.named_modules() if module is model.get_output_embeddings())
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map={**device_map, head: "cpu"}, offload_folder=tmp_path / "offload"
    )
    assert any(parameter.device.type == "meta" for parameter in loaded.parameters())
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, expected)


def test_a_state_dict_with_the_names_on_disk(tmp_path):
    """Trainer resumes by `load_state_dict` of a checkpoint's file, not strictly: a wrong name would be left out."""
    model = tiny.pondering_model("gpt_neox")
    official = {key.replace("lm_head", "embed_out"): value for key, value in model.state_dict().items()}
    other = PonderingForCausalLM(model.config)
    result = other.load_state_dict(official, strict=False)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert torch.equal(other.get_output_embeddings().weight, model.get_output_embeddings().weight)
    with pytest.raises(RuntimeError, match="unknown"):
        other.load_state_dict({**official, "unknown": torch.zeros(1)})


KERNELS = {"whole": {}, "top_k": {"pondering_top_k": 9}, "plain": {"pondering_top_k": 9}}


@pytest.mark.parametrize("enable", ["gradient_checkpointing_enable", "activation_checkpointing_enable"])
@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
@pytest.mark.parametrize("steps", [0, 1, 2, 3])
@pytest.mark.parametrize("kernel", KERNELS)
def test_gradient_checkpointing_gives_the_same_gradients(kernel, steps, reentrant, enable):
    model = tiny.pondering_model(
        ["gpt_neox", "gpt2", "llama"][steps % 3],
        torch.float64,
        pondering_steps=steps,
        intermediate_loss_weight=0.3,
        **KERNELS[kernel],
    ).train()
    if not hasattr(model, enable):
        pytest.skip(f"this transformers has no {enable}")
    if kernel == "plain":
        model.get_output_embeddings().register_forward_pre_hook(lambda module, arguments: None)
    ids = tiny.token_ids(2, 9)
    model(ids, labels=ids).loss.backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    getattr(model, enable)({"use_reentrant": reentrant})
    layer = next(module for module in model.modules() if type(module).__name__ in model._no_split_modules)
    calls = []
    next(layer.children()).register_forward_pre_hook(lambda *_: calls.append(1))
    model(ids, labels=ids).loss.backward()
    assert len(calls) == 2 * (steps + 1)  # each pass once more, in the backward pass
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-12, atol=1e-14)
