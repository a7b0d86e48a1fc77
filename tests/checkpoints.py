"""Small checkpoints on disk, and the command line run on them within the test's process."""

import json

import tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ponder_hf.cli import main
from ponder_hf.conversion import convert


WORDS = [
    "<pad>",
    "<s>",
    "</s>",
    "<unk>",
    *"once upon a time there was one cat and two dogs who sat by the sea".split(),
]
TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"


def save_base(folder, model_type="gpt_neox", dtype=torch.float32, shard_size="5GB", tokenizer=False, **changes):
    """Save a tiny plain model as transformers does. Returns the folder."""
    model = tiny.base_model(model_type, dtype, **changes)
    model.save_pretrained(folder, max_shard_size=shard_size)
    if tokenizer:
        add_tokenizer(folder)
    return folder


def save_base_and_model(folder):
    """Save a tiny plain model to folder/base and its pondering one, S = 2, to folder/model, both with a tokenizer."""
    torch.manual_seed(0)
    save_base(folder / "base", tokenizer=True)
    convert(folder / "base", folder / "model", pondering_steps=2)
    return folder


def word_tokenizer():
    """A word-level tokenizer of WORDS that adds nothing to a text."""
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def add_tokenizer(folder):
    """That tokenizer with a default and a named chat template, and generation defaults, as files of a base."""
    tokenizer = word_tokenizer()
    tokenizer.chat_template = {"default": TEMPLATE, "tools": TEMPLATE + "tools"}
    tokenizer.save_pretrained(folder)
    # Unusual spacing: only a byte-for-byte copy keeps it.
    (folder / "generation_config.json").write_text('{"max_new_tokens":7,\n\n "eos_token_id":  2, "pad_token_id": 0}')


def stored(folder):
    """Every tensor in a checkpoint's safetensors files, by name."""
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(file))
    return tensors


def stored_names(folder):
    """The names of the tensors in a checkpoint's safetensors files."""
    names = set()
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            names.update(opened.keys())
    return names


def change_tensors(folder, change):
    """Rewrite model.safetensors after `change` has been at the dict of its tensors."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder, **fields):
    """Set fields of config.json; a field set to None becomes null."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def listing(folder):
    """Every path below a folder, hidden ones included, with the size and the contents' hash of each file."""
    return {
        path.relative_to(folder).as_posix(): hash(path.read_bytes()) if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def run(*arguments):
    """Run one command line in this process. Returns the exit code."""
    return main([str(argument) for argument in arguments])
