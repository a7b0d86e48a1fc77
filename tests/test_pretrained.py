"""What a transformers user does with any model: save, shard, resize, tie, cast, copy, checkpoint, train."""

import copy
import json
from pathlib import Path

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.dynamic_module_utils import get_relative_imports

from ponder_hf import PonderingConfig, PonderingForCausalLM
from ponder_hf.modeling import modeling_pondering
from ponder_hf.modeling.configuration_pondering import AUTO_MAP


MODELING_FILES = {
    "configuration_pondering.py",
    "modeling_pondering.py",
    "pondering_backbone.py",
    "pondering_backbone_checkpoint.py",
    "pondering_cache.py",
    "pondering_errors.py",
    "pondering_generate.py",
    "pondering_generate_drafts.py",
    "pondering_generate_exits.py",
    "pondering_generate_speculation.py",
    "pondering_generate_tokens.py",
    "pondering_generate_wave.py",
    "pondering_vocabulary.py",
    "pondering_vocabulary_cpu.py",
    "pondering_vocabulary_embedding.py",
    "pondering_vocabulary_loss.py",
}


@pytest.fixture
def input_ids():
    return tiny.token_ids(2, 7)


def names_on_disk(folder):
    index = folder / "model.safetensors.index.json"
    if index.exists():
        return set(json.loads(index.read_text())["weight_map"])
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


@pytest.mark.parametrize("model_type", tiny.SPINE)
def test_the_weights_keep_the_backbones_names_below_one_prefix(tmp_path, model_type):
    base = tiny.base_model(model_type)
    base.save_pretrained(tmp_path / "plain")
    PonderingForCausalLM.from_base(base, pondering_gate="zero_init").save_pretrained(tmp_path / "pondering")
    expected = {f"backbone.{name}" for name in names_on_disk(tmp_path / "plain")} | {"pondering_gate.weight"}
    assert names_on_disk(tmp_path / "pondering") == expected


@pytest.mark.parametrize("model_type", tiny.SPINE)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_tied_or_not_survives_saving(tmp_path, model_type, tied):
    model = tiny.pondering_model(model_type, base_changes={"tie_word_embeddings": tied})
    model.save_pretrained(tmp_path)
    loaded, report = PonderingForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    one_tensor = loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight
    assert one_tensor == tied
    state = loaded.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_a_saved_folder_holds_the_code(tmp_path):
    tiny.pondering_model().save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.glob("*.py")} == MODELING_FILES
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == AUTO_MAP
    assert not list(tmp_path.glob("*.bin"))


def test_the_main_file_imports_every_other_by_itself():
    """transformers 4.57 does not follow imports of imports when it loads code from a folder."""
    main = Path(modeling_pondering.__file__)
    assert {f"{name}.py" for name in get_relative_imports(main)} | {main.name} == MODELING_FILES
    assert {path.name for path in main.parent.glob("*.py")} - {"__init__.py"} == MODELING_FILES


def test_shards(tmp_path, input_ids):
    model = tiny.pondering_model("llama")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    loaded = PonderingForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(input_ids).logits, model(input_ids).logits)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dtypes_while_loading(tmp_path, dtype, input_ids):
    model = tiny.pondering_model("gpt2", pondering_gate="zero_init")
    model.save_pretrained(tmp_path)
    loaded = PonderingForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert {parameter.dtype for parameter in loaded.parameters()} == {getattr(torch, dtype)}
    expected = model(input_ids).logits
    torch.testing.assert_close(loaded(input_ids).logits.float(), expected, atol=5e-2, rtol=5e-2)


def test_dtype_auto_is_what_was_saved(tmp_path):
    tiny.pondering_model("llama", torch.bfloat16).save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").dtype == torch.bfloat16


def test_half_and_back(input_ids):
    model = tiny.pondering_model("llama", pondering_gate="zero_init")
    expected = model(input_ids).logits
    assert model.half().dtype == torch.float16
    logits = model(input_ids, labels=input_ids)
    assert logits.logits.dtype == torch.float16
    assert logits.loss.dtype == torch.float32
    torch.testing.assert_close(logits.logits.float(), expected, atol=2e-2, rtol=2e-2)
    assert model.float()(input_ids).logits.dtype == torch.float32


def test_device_map(tmp_path, input_ids):
    model = tiny.pondering_model("gpt2")
    model.save_pretrained(tmp_path)
    loaded = PonderingForCausalLM.from_pretrained(tmp_path, device_map="cpu")
    assert loaded.device.type == "cpu"
    assert torch.equal(loaded(input_ids).logits, model(input_ids).logits)


def test_layers_that_must_not_be_split_are_the_backbones():
    model = tiny.pondering_model("gpt_neox")
    assert set(model._no_split_modules) == set(model.backbone._no_split_modules) == {"GPTNeoXLayer"}


@pytest.mark.parametrize("model_type", ["gpt2", "gpt_neox", "llama"])
@pytest.mark.parametrize("size", [tiny.VOCAB_SIZE + 13, tiny.VOCAB_SIZE - 20], ids=["larger", "smaller"])
def test_resize_token_embeddings(tmp_path, model_type, size):
    model = tiny.pondering_model(model_type, pondering_steps=2)
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    model.resize_token_embeddings(size)
    assert model.config.vocab_size == model.backbone.config.vocab_size == size
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
    input_ids = tiny.token_ids(2, 7) % size
    logits = model(input_ids).logits
    assert logits.shape == (2, 7, size)
    model.save_pretrained(tmp_path)
    assert torch.equal(PonderingForCausalLM.from_pretrained(tmp_path)(input_ids).logits, logits)


def test_tie_weights_of_a_tied_model():
    model = tiny.pondering_model("gpt2")
    model.set_output_embeddings(torch.nn.Linear(32, tiny.VOCAB_SIZE, bias=False))
    model.tie_weights()
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_a_deep_copy_is_equal_and_independent(input_ids):
    model = tiny.pondering_model("llama", pondering_gate="zero_init")
    other = copy.deepcopy(model)
    assert torch.equal(other(input_ids).logits, model(input_ids).logits)
    assert other.config.base_config is other.backbone.config
    with torch.no_grad():
        other.get_input_embeddings().weight.zero_()
    assert model.get_input_embeddings().weight.abs().max() > 0


@pytest.mark.parametrize("model_type", tiny.SPINE)
def test_gradient_checkpointing_gives_the_same_gradients(model_type, input_ids):
    model = tiny.pondering_model(model_type, torch.float64, pondering_steps=2).train()
    gradients = []
    for recompute in (False, True):
        if recompute:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.zero_grad()
        model(input_ids, labels=input_ids).loss.backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-6, atol=1e-9)


def test_gradient_checkpointing_recomputes(input_ids):
    model = tiny.pondering_model("llama", pondering_steps=2).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    calls = []
    model.backbone.model.layers[0].input_layernorm.register_forward_hook(lambda *args: calls.append(1))
    model(input_ids, labels=input_ids).loss.backward()
    assert len(calls) == 2 * 3


def test_a_new_model_starts_from_the_backbones_own_initialisation():
    config = PonderingConfig(tiny.base_config("gpt_neox"), pondering_gate="zero_init")
    model = PonderingForCausalLM(config)
    weight = model.backbone.gpt_neox.layers[0].mlp.dense_h_to_4h.weight
    assert 0.015 < weight.std().item() < 0.025
    assert not model.pondering_gate.weight.any()


def test_loading_never_initialises_again(tmp_path):
    model = tiny.pondering_model("llama", pondering_gate="zero_init")
    torch.nn.init.normal_(model.pondering_gate.weight)
    model.save_pretrained(tmp_path)
    state = PonderingForCausalLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_attention_implementation_is_the_backbones(tmp_path, attention):
    tiny.pondering_model("llama").save_pretrained(tmp_path)
    model = PonderingForCausalLM.from_pretrained(tmp_path, attn_implementation=attention)
    assert model.backbone.config._attn_implementation == model.config._attn_implementation == attention
    again = PonderingForCausalLM.from_base(tiny.base_model("llama", attn_implementation=attention))
    assert again.backbone.config._attn_implementation == again.config._attn_implementation == attention


def test_a_backbone_without_sdpa_keeps_its_own():
    model = tiny.pondering_model("gemma2")
    assert model.config._attn_implementation == model.backbone.config._attn_implementation == "eager"


def test_trainer_trains_saves_code_and_accumulates_alike(tmp_path):
    """Four micro-batches of one row give the loss of one batch of four: `num_items_in_batch` is honoured."""
    rows = [{"input_ids": row, "labels": row} for row in tiny.token_ids(16, 12)]
    for row in rows[::2]:
        row["labels"] = row["labels"].clone()
        row["labels"][:6] = -100
    losses = []
    for size, accumulation in ((4, 1), (1, 4)):
        torch.manual_seed(0)
        model = tiny.pondering_model("gpt2", pondering_steps=2)
        arguments = TrainingArguments(
            output_dir=str(tmp_path / str(size)),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            max_steps=4,
            logging_steps=1,
            save_steps=4,
            learning_rate=1e-3,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            seed=0,
        )
        trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[:4])
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        assert trainer.evaluate()["eval_loss"] > 0
        checkpoint = tmp_path / str(size) / "checkpoint-4"
        assert {path.name for path in checkpoint.glob("*.py")} == MODELING_FILES
        loaded = AutoModelForCausalLM.from_pretrained(checkpoint)
        ids = tiny.token_ids(1, 5)
        assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)
    assert losses[0][-1] < losses[0][0]
