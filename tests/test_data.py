"""From what a user names as text to blocks of tokens: sources, packing in memory and streamed, held-out blocks."""

import json

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

from ponder_hf import PonderingError
from ponder_hf.data import StreamedBlocks, check_tokenizer, load_blocks, split_held_out
from ponder_hf.demo.material import Document, train_tokenizer


STORIES = [f"Story {number}: the cat saw {number * 37} birds.\nThen it slept.\n" for number in range(90)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([Document("stories", "".join(STORIES))], vocab_size=300, positions=64)


@pytest.fixture
def jsonl(tmp_path):
    path = tmp_path / "stories.jsonl"
    path.write_text("".join(json.dumps({"text": story}) + "\n" for story in STORIES))
    return path


def rows_of(blocks):
    return [block["input_ids"].tolist() for block in blocks]


def stream(source, tokenizer, **arguments):
    return load_blocks(source, tokenizer, 8, streaming=True, **{"repeat": False, **arguments})


def test_streamed_blocks_are_those_in_memory(jsonl, tokenizer):
    streamed = stream(jsonl, tokenizer)
    assert isinstance(streamed, StreamedBlocks)
    expected = rows_of(load_blocks(jsonl, tokenizer, 8, progress=False))
    assert len(expected) > 100
    assert rows_of(streamed) == expected
    assert rows_of(streamed) == expected, "another iteration gives the same"


def test_real_text_with_real_tokenizer_loses_nothing(shared):
    tokenizer = AutoTokenizer.from_pretrained(shared / "data/tokenizers/pythia")
    path = shared / "data/text/tinystories-sample.txt.gz"
    blocks = load_blocks(path, tokenizer, 128, vocab_size=50304, progress=False)
    import gzip

    text = gzip.decompress(path.read_bytes()).decode()
    found = tokenizer.decode(blocks.rows.flatten().tolist())
    assert text.startswith(found)
    assert len(text) - len(found) < 128 * 10


def test_held_out_blocks(jsonl, tokenizer):
    blocks = load_blocks(jsonl, tokenizer, 8, progress=False)
    for amount in (5, 0.05):
        training, held_out = split_held_out(blocks, amount)
        assert rows_of(training) + rows_of(held_out) == rows_of(blocks)
        assert len(held_out) == 5 if amount == 5 else abs(len(held_out) - len(blocks) * 0.05) <= 0.5
    training, held_out = split_held_out(stream(jsonl, tokenizer), 5)
    assert rows_of(held_out) + rows_of(training) == rows_of(blocks)


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("buffer", [0, 16])
def test_workers_share_the_blocks(jsonl, tokenizer, workers, buffer):
    streamed = stream(jsonl, tokenizer, shuffle_buffer=buffer)
    found = torch.cat([batch["input_ids"] for batch in DataLoader(streamed, batch_size=3, num_workers=workers)])
    assert sorted(found.tolist()) == sorted(rows_of(load_blocks(jsonl, tokenizer, 8, progress=False)))


def test_tokenizer_with_more_entries_than_embeddings(jsonl, tokenizer):
    class Config:
        vocab_size = len(tokenizer)

    check_tokenizer(tokenizer, Config, "it")
    Config.vocab_size -= 1
    with pytest.raises(PonderingError, match=f"tokenizer of it has {len(tokenizer)} entries, the model only"):
        check_tokenizer(tokenizer, Config, "it")
    with pytest.raises(PonderingError, match=r"gave the token \d+ for .*stories.jsonl \(near line 1\)"):
        load_blocks(jsonl, tokenizer, 8, vocab_size=200, progress=False)
