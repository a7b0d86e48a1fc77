"""What cannot be done is said in one line that names cause and next step; nothing is changed or written then."""

import gzip
import json
import subprocess
import sys

import checkpoints
import elsewhere
import prepared
import pytest
import tiny
import torch
from patience import PATIENCE
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    GenerationConfig,
    LlamaModel,
)

from ponder_hf import PonderingConfig, PonderingError, PonderingForCausalLM
from ponder_hf.conversion import convert
from ponder_hf.modeling.pondering_backbone import num_positions


# The vocabulary


def test_a_vocabulary_keeps_the_k_most_probable():
    model = tiny.pondering_model("llama", pondering_top_k=100)
    before = model.state_dict()
    for size, multiple in ((50, None), (1, None), (33, 64)):
        with pytest.raises(PonderingError, match=r"more than the \d+ entries .* set `model.config.pondering_top_k`"):
            model.resize_token_embeddings(size, pad_to_multiple_of=multiple)
    assert model.config.vocab_size == tiny.VOCAB_SIZE
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.get_output_embeddings().weight.shape[0] == tiny.VOCAB_SIZE
    model.config.pondering_top_k = 50
    model.resize_token_embeddings(50)
    assert model(torch.tensor([[3, 4]])).logits.shape == (1, 2, 50)


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_a_vocabulary_that_grows_or_shrinks_is_saved_and_loads(tmp_path, model_type):
    model = tiny.pondering_model(model_type, pondering_top_k=40, pondering_steps=1)
    for index, size in enumerate((140, 48, 40)):
        model.resize_token_embeddings(size)
        model.save_pretrained(tmp_path / str(index))
        again = PonderingForCausalLM.from_pretrained(tmp_path / str(index))
        ids = tiny.token_ids(1, 6) % 40
        assert again.config.vocab_size == size
        torch.testing.assert_close(again(ids).logits, model(ids).logits)
        assert again(ids).logits.shape[-1] == size


def test_a_vocabulary_that_is_set_by_hand(tmp_path):
    model = tiny.pondering_model("llama", pondering_top_k=100)
    words = "`pondering_top_k` is 100, but the vocabulary has 50 entries: use at most 50"
    with pytest.raises(PonderingError, match=words):
        model.config.vocab_size = 50
    assert model.config.vocab_size == tiny.VOCAB_SIZE
    model.to_base().resize_token_embeddings(50)  # past the pondering model
    with pytest.raises(PonderingError, match=words):
        model(torch.tensor([[3, 4]]))
    for thing in (model, model.config):
        with pytest.raises(PonderingError, match=words):
            thing.save_pretrained(tmp_path / "made")
    assert not (tmp_path / "made").exists()
    model.config.pondering_top_k = 50
    assert model(torch.tensor([[3, 4]])).logits.shape == (1, 2, 50)


def test_a_configuration_with_another_vocabulary():
    base = tiny.base_config("llama")
    assert PonderingConfig(base, vocab_size=50, pondering_top_k=50).vocab_size == 50
    with pytest.raises(PonderingError, match="vocabulary has 50 entries"):
        PonderingConfig(base, vocab_size=50, pondering_top_k=51)


@pytest.mark.parametrize("name", ["intermediate_loss", "pondering_step", "embeding_scale"])
def test_a_field_that_was_meant_is_named_wherever_it_is_set(name):
    base = tiny.base_config("gpt_neox")
    with pytest.raises(PonderingError, match=f"`{name}` is not a pondering field: did you mean `"):
        PonderingConfig(base, **{name: 0.5})
    with pytest.raises(PonderingError, match=f"`{name}` is not a pondering field: did you mean `"):
        setattr(PonderingConfig(base), name, 0.5)


def test_an_exit_that_is_none_is_named():
    model = tiny.pondering_model()
    for call in (model, model.generate):
        with pytest.raises(PonderingError, match="`pondering_exit` must be a PonderingExit, got 1"):
            call(torch.ones(1, 3, dtype=torch.long), pondering_exit=1)


# from_base

WRONG_ARGUMENTS = {
    "quantization_config": (
        {"quantization_config": {}},
        "from_base takes no `quantization_config`: make the model from",
    ),
    "trust_remote_code": ({"trust_remote_code": True}, "no `trust_remote_code`: code of a base is never run"),
    "use_safetensors": ({"use_safetensors": False}, "only safetensors are read"),
    "config": ({"config": None}, "the base's own configuration is read"),
    "gguf_file": ({"gguf_file": "x.gguf"}, "no `gguf_file`: load the plain model with it, by AutoModelForCausalLM"),
    "load_in_8bit": ({"load_in_8bit": True}, "no `load_in_8bit`: load the plain model with it"),
    "near a field": ({"pondering_step": 1}, "did you mean `pondering_steps`"),
    "near a field without the prefix": ({"embeding_scale": 2.0}, "did you mean `embedding_scale`"),
    "near another": ({"draft_head": 1}, "did you mean `draft_heads`"),
    "near an argument": ({"revison": "x"}, "`revison` is not a pondering field, .* did you mean `revision`"),
    "unknown": ({"xyz": 1}, "it takes pondering_steps, .* authors, .* attn_implementation"),
}


@pytest.mark.parametrize(("arguments", "words"), WRONG_ARGUMENTS.values(), ids=WRONG_ARGUMENTS)
def test_arguments_of_from_base(tmp_path, arguments, words):
    base = checkpoints.save_base(tmp_path / "base")
    with pytest.raises(PonderingError, match=words):
        PonderingForCausalLM.from_base(base, **arguments)


def test_arguments_of_from_base_that_transformers_takes_as_well(tmp_path):
    base = checkpoints.save_base(tmp_path / "base")
    harmless = {"trust_remote_code": False, "use_safetensors": True, "max_memory": None, "low_cpu_mem_usage": True}
    model = PonderingForCausalLM.from_base(base, torch_dtype=torch.float16, **harmless)
    assert model.dtype == torch.float16
    assert PonderingForCausalLM.from_base(base, torch_dtype="bfloat16").dtype == torch.bfloat16


class Adapter(torch.nn.Module):
    """As a PeftModel is to from_base."""

    def merge_and_unload(self):
        raise AssertionError("not called")


def test_bases_that_are_no_causal_language_model():
    llama = tiny.base_config("llama")
    for base, words in (
        (LlamaModel(llama), "the base is a LlamaModel, where a LlamaForCausalLM of transformers is needed"),
        (AutoModelForSequenceClassification.from_config(llama), "is a LlamaForSequenceClassification"),
        (Adapter(), r"got Adapter: merge the adapter first, by its merge_and_unload\(\)"),
        (tiny.pondering_model("llama"), "a pondering model already: use its to_base()"),
        (None, "got NoneType"),
    ):
        with pytest.raises(PonderingError, match=words):
            PonderingForCausalLM.from_base(base)


# A checkpoint's own code beside the library

BOTH = """
import sys
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
remote = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
import ponder_hf
assert type(remote).__module__.startswith("transformers_modules")
calls = {
    "a pondering model already: use its to_base()": lambda: ponder_hf.PonderingForCausalLM.from_base(remote),
    "is itself a pondering configuration": lambda: ponder_hf.PonderingConfig(remote.config),
    "must be an integer >= 0": lambda: remote.generate(torch.tensor([[1]]), pondering_steps=-1),
    "did you mean `pondering_steps`": lambda: remote(torch.tensor([[1, 2]]), pondering_step=0),
    "more than the 3 entries": lambda: remote.resize_token_embeddings(3),
}
for words, call in calls.items():
    try:
        call()
    except ponder_hf.PonderingError as error:
        assert words in str(error), error
        assert isinstance(error, ValueError)
    else:
        raise AssertionError(words)
print("all caught")
"""


def test_errors_of_its_code_are_the_librarys(tmp_path):
    checkpoints.save_base(tmp_path / "base")
    convert(tmp_path / "base", tmp_path / "made", pondering_steps=1, pondering_top_k=9)
    command = [sys.executable, "-W", "ignore", "-c", BOTH, str(tmp_path / "made")]
    result = prepared.run(command, cwd=tmp_path)
    assert result.stdout.endswith("all caught\n"), result.stderr


# Keywords about pondering


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("pondering_step", "did you mean `pondering_steps`"),
        ("num_steps", "did you mean `pondering_steps`"),
        ("num_pondering_steps", "did you mean `pondering_steps`"),
        ("output_ponderings", "did you mean `output_pondering`"),
        ("pondering_exits", "did you mean `pondering_exit`"),
        ("pondring_steps", "did you mean `pondering_steps`"),
        ("output_pondring", "did you mean `output_pondering`"),
    ],
)
def test_typing_errors_in_a_forward_pass(name, words):
    model = tiny.pondering_model("llama")
    for called in (model, model.base_model):
        with pytest.raises(PonderingError, match=f"takes no `{name}`: {words}"):
            called(tiny.token_ids(1, 3), **{name: 1})


def test_keywords_of_the_loss_and_the_backbone_pass():
    model = tiny.pondering_model("llama").train()
    ids = tiny.token_ids(1, 6)
    expected = model(ids, labels=ids).loss * 5
    torch.testing.assert_close(model(ids, labels=ids, num_items_in_batch=1, of_another=3).loss, expected)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("pondering_step", "pondering_steps"),
        ("num_steps", "pondering_steps"),
        ("num_draft_token", "num_draft_tokens"),
        ("drafts_source", "draft_source"),
        ("pondering_exit_threshhold", "pondering_exit_threshold"),
        ("ponder_exit_criterion", "pondering_exit_criterion"),
        ("exit_threshold", "pondering_exit_threshold"),
        ("num_darft_tokens", "num_draft_tokens"),
    ],
)
def test_typing_errors_in_generate(monkeypatch, name, meant):
    model = tiny.pondering_model("llama")
    words = f"`{name}` is no setting of generate: did you mean `{meant}`"
    monkeypatch.setattr(model.backbone.base_model, "forward", None)
    ids = tiny.token_ids(1, 3)
    with pytest.raises(PonderingError, match=words):
        model.generate(ids, max_new_tokens=2, **{name: 0})
    with pytest.raises(PonderingError, match=words):
        model.generate(ids, GenerationConfig(max_new_tokens=2, **{name: 0}))
    setattr(model.generation_config, name, 0)
    with pytest.raises(PonderingError, match=words):
        model.generate(ids, max_new_tokens=2)


# Classifiers


def test_classifiers_and_reward_models(tmp_path):
    model = tiny.pondering_model("llama")
    model.save_pretrained(tmp_path / "made")
    words = "classifiers and reward models of them are not supported; `ponder-hf export`"
    for kind in (AutoModelForSequenceClassification, AutoModelForTokenClassification):
        with pytest.raises(PonderingError, match=words):
            kind.from_pretrained(tmp_path / "made")
        with pytest.raises(PonderingError, match=words):
            kind.from_config(model.config)
    program = """
from transformers import AutoModelForSequenceClassification
try:
    AutoModelForSequenceClassification.from_pretrained(sys.argv[1], trust_remote_code=True)
except ValueError as error:
    print(error)
"""
    assert words in elsewhere.run(program, tmp_path / "home", tmp_path / "made")


# Texts and the table of positions


def test_a_text_may_be_as_long_on_the_command_line_as_in_generate(tmp_path, capsys):
    for model_type in ("gpt2", "gpt_neox"):
        checkpoints.save_base(tmp_path / model_type, model_type, tokenizer=True)
        convert(tmp_path / model_type, tmp_path / f"{model_type} made", pondering_steps=1)

    def generate(model_type, num_prompt, num_new):
        prompt = "cat " * num_prompt
        code = checkpoints.run(
            "generate", tmp_path / f"{model_type} made", "--prompt", prompt, "--max-new-tokens", num_new
        )
        return code, capsys.readouterr().err

    assert generate("gpt_neox", 62, 5)[0] == 0, "positions are computed: there is no end"
    assert generate("gpt_neox", 66, 1)[0] == 0
    assert generate("gpt2", 62, 3)[0] == 0, "the last token needs no position"
    code, err = generate("gpt2", 62, 4)
    assert code == 2
    assert "use --max-new-tokens 3 or less" in err
    code, err = generate("gpt2", 65, 1)
    assert code == 2
    assert "only 64 positions: give a shorter text" in err


@pytest.mark.parametrize(("model_type", "limit"), [("mpt", 64), ("xglm", None), ("ctrl", 64)])
def test_positions_are_as_many_as_the_backbone_has(model_type, limit, monkeypatch):
    sizes = {
        "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 1, "max_seq_len": 64},
        "xglm": {"d_model": 32, "attention_heads": 4, "num_layers": 1, "ffn_dim": 64, "max_position_embeddings": 64},
        "ctrl": {"n_embd": 32, "n_head": 4, "n_layer": 1, "n_positions": 64, "dff": 64},
    }[model_type]
    monkeypatch.setitem(tiny.CONFIGS, model_type, {"vocab_size": tiny.VOCAB_SIZE})
    backbone = tiny.base_model(model_type, **sizes)
    assert num_positions(backbone) == limit
    assert backbone(tiny.token_ids(1, 64)).logits.isfinite().all()
    if limit is None:
        assert backbone(tiny.token_ids(1, 70)).logits.isfinite().all()
    else:
        with pytest.raises((IndexError, RuntimeError)):
            backbone(tiny.token_ids(1, 70))


# A stream that is not read to its end

STREAM = """
import sys
import torch
from torch.utils.data import DataLoader
from transformers import AutoTokenizer
from ponder_hf.data import load_blocks
from ponder_hf.data.text import read_text
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=False)
left = []
for path in sys.argv[2:]:
    stream = load_blocks(path, tokenizer, block_size=8, streaming=True, shuffle_buffer=2)
    left += [iter(stream), iter(DataLoader(stream, batch_size=2))]
    if not path.endswith(".parquet"):
        left.append(read_text([path]))
for each in left:
    next(each)
"""


def test_streams_that_are_left_end_without_noise(tmp_path):
    """Of every kind of file, in one process: each of them alone would be heard."""
    pyarrow = pytest.importorskip("pyarrow", reason="needs ponder-hf[train]")
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs ponder-hf[train]")
    lines = ["once upon a time there was one cat and two dogs who sat by the sea"] * 3000
    (tmp_path / "text.txt").write_text("\n".join(lines))
    with gzip.open(tmp_path / "text.txt.gz", "wt") as file:
        file.write("\n".join(lines))
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in lines))
    parquet.write_table(pyarrow.table({"text": lines}), tmp_path / "text.parquet", row_group_size=100)
    checkpoints.save_base(tmp_path / "base", tokenizer=True)
    files = [str(tmp_path / f"text{ending}") for ending in (".txt", ".txt.gz", ".jsonl", ".parquet")]
    command = [sys.executable, "-W", "ignore", "-c", STREAM, str(tmp_path / "base"), *files]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE)
    assert (result.returncode, result.stderr) == (0, "")
