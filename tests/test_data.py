"""From what a user names as text to blocks of tokens: sources, packing in memory and streamed, held-out blocks."""

import gzip
import itertools
import json
import os
import sys
import textwrap
import threading

import prepared
import pytest
import tiny
import torch
from accelerate.data_loader import prepare_data_loader
from small_tokenizer import train_tokenizer
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, Trainer, TrainingArguments

from ponder_hf import PonderingError
from ponder_hf.data import StreamedBlocks, check_apart, load_blocks, split_held_out, text


pa = pytest.importorskip("pyarrow", reason="needs ponder-hf[train]")
parquet = pytest.importorskip("pyarrow.parquet", reason="needs ponder-hf[train]")
datasets = pytest.importorskip("datasets", reason="needs ponder-hf[train]")

STORIES = [f"Story {number}: the cat saw {number * 37} birds.\r\nIt said “miau”.\n" for number in range(90)]
SOURCES = ["jsonl", "jsonl.gz", "ndjson", "parquet", "row groups", "dictionary", "folder", "list", "saved", "splits"]
SOURCES += ["configurations", "split folder"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer("".join(STORIES), vocab_size=300, positions=64)


def json_lines(stories):
    return "".join(json.dumps({"id": number, "text": story}) + "\n" for number, story in enumerate(stories))


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content.encode()) if path.suffix == ".gz" else content.encode())
    return path


def write_source(kind, folder):
    """The STORIES as a source of this kind. Returns it, and what else `load_blocks` needs to read it."""
    thirds = STORIES[:30], STORIES[30:60], STORIES[60:]
    table = {"id": list(range(90)), "text": STORIES}
    if kind in ("parquet", "row groups", "dictionary"):
        column = pa.array(STORIES).dictionary_encode() if kind == "dictionary" else STORIES
        path = folder / "stories.parquet"
        parquet.write_table(
            pa.table({**table, "text": column}), path, row_group_size=7 if kind == "row groups" else 90
        )
        return path, {}
    if kind in ("folder", "list", "split folder"):
        name = "train-" if kind == "split folder" else ""
        first = write(folder / f"some/{name}a.jsonl", json_lines(thirds[0]))
        second = write(folder / f"some/{name}b.jsonl.gz", json_lines(thirds[1]))
        third = folder / f"some/deeper/{name}c.parquet"
        third.parent.mkdir()
        parquet.write_table(pa.table({"text": thirds[2]}), third)
        if kind == "split folder":
            write(folder / "some/test-a.txt", "never read")
        write(folder / "some/.hidden.txt", "never read")
        return (str(folder / "some"), {}) if kind != "list" else ([first, second, third], {})
    if kind == "saved":
        datasets.Dataset.from_dict(table).save_to_disk(folder / "saved")
        return folder / "saved", {}
    if kind == "splits":
        splits = {"train": ["never read"], "more": STORIES}
        datasets.DatasetDict({k: datasets.Dataset.from_dict({"text": v}) for k, v in splits.items()}).save_to_disk(
            folder / "saved"
        )
        return folder / "saved", {"split": "more"}
    if kind == "configurations":
        for number, third in enumerate(thirds):
            write(folder / f"some/{number}.jsonl", json_lines(third))
        write(folder / "some/other.jsonl", json_lines(["never read"]))
        lines = ["---", "configs:", "- config_name: one", '  data_files: ["0.jsonl", "1.jsonl", "2.jsonl"]']
        write(folder / "some/README.md", "\n".join([*lines, "- config_name: two", "  data_files: other.jsonl", "---"]))
        return folder / "some", {"name": "one"}
    return write(folder / f"stories.{kind}", json_lines(STORIES)), {}


def expected_rows(tokenizer, block_size=8):
    """The blocks of the STORIES, by nothing but the tokenizer."""
    ids = []
    for story in STORIES:
        ids += ([tokenizer.eos_token_id] if ids else []) + tokenizer(story.replace("\r\n", "\n"))["input_ids"]
    return [ids[start : start + block_size] for start in range(0, len(ids) - block_size + 1, block_size)]


def rows_of(blocks):
    return [block["input_ids"].tolist() for block in blocks]


def stream(source, tokenizer, block_size=8, **arguments):
    return load_blocks(source, tokenizer, block_size, streaming=True, **{"repeat": False, **arguments})


@pytest.fixture
def jsonl(tmp_path):
    return write(tmp_path / "stories.jsonl", json_lines(STORIES))


@pytest.mark.parametrize("kind", SOURCES)
def test_every_kind_of_source_gives_the_same_blocks(tmp_path, tokenizer, kind):
    source, arguments = write_source(kind, tmp_path)
    expected = expected_rows(tokenizer)
    assert len(expected) > 200
    assert rows_of(load_blocks(source, tokenizer, 8, progress=False, **arguments)) == expected
    streamed = stream(source, tokenizer, **arguments)
    assert isinstance(streamed, StreamedBlocks)
    assert rows_of(streamed) == expected
    assert rows_of(streamed) == expected, "another iteration gives the same"
    from_workers = rows_of(DataLoader(streamed, batch_size=None, num_workers=2))
    assert sorted(from_workers) == sorted(expected), "each block from one worker"


@pytest.mark.parametrize(
    ("file", "name"), [("novels-valid", "tokenizers/gpt2"), ("tinystories-sample", "models/stories260K-llama")]
)
def test_real_text_with_real_tokenizers_loses_nothing(shared, file, name):
    path = shared / f"data/text/{file}.txt.gz"
    tokenizer = AutoTokenizer.from_pretrained(shared / "data" / name)
    blocks = load_blocks(path, tokenizer, 128, vocab_size=len(tokenizer), progress=False)
    whole = gzip.decompress(path.read_bytes()).decode().removeprefix("\ufeff").replace("\r\n", "\n")
    found = tokenizer.decode(blocks.rows.flatten().tolist(), clean_up_tokenization_spaces=False)
    assert blocks.rows.dtype == torch.int32
    assert whole.startswith(found.lstrip() if "llama" in name else found)
    assert 0 <= len(whole) - len(found) < 128 * 20


def test_long_document_of_llama_gets_no_spaces_where_it_is_cut(shared, tmp_path, monkeypatch):
    monkeypatch.setattr(text, "PIECE_SIZE", 64)
    tokenizer = AutoTokenizer.from_pretrained(shared / "data/models/stories260K-llama")
    lines = [f"There once was a cat, number {number}.\n" for number in range(40)]
    path = write(tmp_path / "cats.txt", "".join(lines))
    found = load_blocks(path, tokenizer, 2, progress=False).rows.flatten().tolist()
    assert found == tokenizer("".join(lines), add_special_tokens=False)["input_ids"][: len(found)]


def test_first_blocks_only(jsonl, tokenizer):
    expected = expected_rows(tokenizer)[:30]
    assert rows_of(load_blocks(jsonl, tokenizer, 8, max_blocks=30, progress=False)) == expected
    assert rows_of(stream(jsonl, tokenizer, max_blocks=30)) == expected


def test_held_out_blocks(jsonl, tokenizer):
    blocks, expected = load_blocks(jsonl, tokenizer, 8, progress=False), expected_rows(tokenizer)
    for amount, count in ((5, 5), (0.1, round(len(expected) / 10)), (1e-6, 1)):
        training, held_out = split_held_out(blocks, amount)
        assert len(held_out) == count
        assert rows_of(training) + rows_of(held_out) == expected
    training, held_out = split_held_out(stream(jsonl, tokenizer, max_blocks=40), 5)
    assert rows_of(held_out) == expected[:5]
    assert rows_of(training) == expected[5:40]
    training, held_out = split_held_out(stream(jsonl, tokenizer, shuffle_buffer=1000), 5)
    assert rows_of(held_out) == expected[:5], "held-out blocks are not shuffled into the training"
    assert sorted(rows_of(training)) == sorted(expected[5:])


@pytest.mark.parametrize("amount", [0, -1, 0.0, 1.0, 1000, 0.9999])
def test_held_out_blocks_that_cannot_be(jsonl, tokenizer, amount):
    with pytest.raises(PonderingError, match=r"can be held out|leaves none to train on"):
        split_held_out(load_blocks(jsonl, tokenizer, 8, max_blocks=20, progress=False), amount)
    with pytest.raises(
        PonderingError, match=r"can be held out|leaves none to train on|hold out a number of its blocks"
    ):
        split_held_out(stream(jsonl, tokenizer, max_blocks=20), amount)


def test_held_out_files_are_not_trained_on(tmp_path, jsonl):
    other = write(tmp_path / "other/more.txt", "other text")
    check_apart([jsonl], [other])
    for held_out in (jsonl, tmp_path / "other" / ".." / "stories.jsonl", tmp_path):
        with pytest.raises(PonderingError, match=r"stories.jsonl is both trained on and held out"):
            check_apart([other, jsonl], held_out)
    datasets.Dataset.from_dict({"text": ["x"]}).save_to_disk(tmp_path / "saved")
    with pytest.raises(PonderingError, match="both trained on and held out"):
        check_apart(tmp_path / "saved", tmp_path / "saved")


def test_stream_starts_over(jsonl, tokenizer):
    expected = expected_rows(tokenizer)
    found = rows_of(itertools.islice(stream(jsonl, tokenizer, repeat=True), 2 * len(expected) + 3))
    assert found == 2 * expected + expected[:3]


def test_shuffle_buffer(jsonl, tokenizer):
    expected = expected_rows(tokenizer)
    num_blocks = len(expected)

    def passes(**arguments):
        streamed = stream(jsonl, tokenizer, repeat=True, **{"shuffle_buffer": 16, **arguments})
        found = rows_of(itertools.islice(streamed, 2 * num_blocks))
        return found[:num_blocks], found[num_blocks:]

    first, second = passes()
    assert sorted(first) == sorted(second) == sorted(expected)
    assert first not in (expected, second)
    assert passes() == (first, second)
    assert passes(seed=1)[0] != first
    for place, row in enumerate(first):
        assert row in expected[: place + 17], "a block comes no earlier than the buffer allows"
    streamed = stream(jsonl, tokenizer, shuffle_buffer=16)
    streamed.set_epoch(1)
    assert rows_of(streamed) == second


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("buffer", [0, 16])
def test_ranks_share_the_blocks(jsonl, tokenizer, workers, buffer):
    streamed = stream(jsonl, tokenizer, max_blocks=48, shuffle_buffer=buffer)
    found = []
    for rank in range(2):
        loader = DataLoader(streamed, batch_size=4, num_workers=workers)
        prepared = prepare_data_loader(
            loader, num_processes=2, process_index=rank, put_on_device=False, dispatch_batches=False
        )
        found.append([row for batch in prepared for row in batch["input_ids"].tolist()])
    assert len(found[0]) == len(found[1]) == 24
    assert sorted(found[0] + found[1]) == sorted(expected_rows(tokenizer)[:48])


DISPATCHING = """
    import json, sys
    import torch
    from accelerate import Accelerator, DataLoaderConfiguration
    from transformers import AutoTokenizer
    from ponder_hf.data import load_blocks

    stream = load_blocks(sys.argv[1], AutoTokenizer.from_pretrained(sys.argv[2]), 8, streaming=True, repeat=False,
                         max_blocks=48)
    dispatch = {"None": None, "False": False}[sys.argv[4]]
    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(dispatch_batches=dispatch))
    loader = accelerator.prepare(torch.utils.data.DataLoader(stream, batch_size=4, num_workers=1))
    rows = [row for batch in loader for row in batch["input_ids"].tolist()]
    json.dump(rows, open(f"{sys.argv[3]}/{accelerator.process_index}.json", "w"))
    accelerator.end_training()
"""


@pytest.mark.slow
@pytest.mark.parametrize("dispatch", ["None", "False"])
def test_two_processes_share_the_blocks(jsonl, tokenizer, tmp_path, dispatch):
    program = write(tmp_path / "program.py", textwrap.dedent(DISPATCHING))
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    prepared.run_two([sys.executable, program, jsonl, tmp_path / "tokenizer", tmp_path, dispatch])
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert len(found[0]) == len(found[1]) == 24
    assert sorted(found[0] + found[1]) == sorted(expected_rows(tokenizer)[:48])


def train(streamed, folder, vocab_size, **arguments):
    """Six steps of Trainer. Returns the weights."""
    torch.manual_seed(0)
    model = tiny.pondering_model("gpt2", pondering_steps=1, base_changes={"vocab_size": vocab_size})
    arguments = {"max_steps": 6, "save_steps": 4, "learning_rate": 1e-2, "report_to": "none", **arguments}
    arguments |= {"use_cpu": True, "disable_tqdm": True, "gradient_accumulation_steps": 2}
    trainer = Trainer(
        model, TrainingArguments(folder, per_device_train_batch_size=3, **arguments), train_dataset=streamed
    )
    checkpoint = folder / "checkpoint-4"
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint.is_dir() else None)
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("workers", [0, 1])
def test_trainer_resumes_in_the_second_pass_of_a_stream(jsonl, tokenizer, tmp_path, workers):
    def once():
        # 10 blocks a pass, 36 blocks in all; the checkpoint after step 4 lies within the third pass.
        streamed = stream(jsonl, tokenizer, repeat=True, max_blocks=10, shuffle_buffer=4)
        return train(streamed, tmp_path / "out", len(tokenizer), dataloader_num_workers=workers)

    uninterrupted = once()
    assert (tmp_path / "out/checkpoint-4").is_dir()
    resumed = once()
    assert all(torch.equal(uninterrupted[name], resumed[name]) for name in uninterrupted)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs a system with named pipes")
@pytest.mark.parametrize("ending", [".txt", ".jsonl.gz"])
def test_pipes_are_read_once_and_not_streamed(tmp_path, tokenizer, ending):
    path = tmp_path / f"pipe{ending}"
    os.mkfifo(path)
    with pytest.raises(PonderingError, match=f"pipe{ending} is no file but a pipe, .* leave out `streaming`"):
        stream(path, tokenizer)
    content = "".join(STORIES) if ending == ".txt" else json_lines(STORIES)
    file = write(tmp_path / f"file{ending}", content)
    writer = threading.Thread(target=lambda: path.write_bytes(file.read_bytes()))
    writer.start()
    blocks = load_blocks(path, tokenizer, 8)
    writer.join()
    assert rows_of(blocks) == rows_of(load_blocks(file, tokenizer, 8, progress=False))


def test_progress_is_shown_on_standard_error(tmp_path, jsonl, tokenizer, capsys):
    load_blocks(jsonl, tokenizer, 8)
    assert "tokenising: 100%" in capsys.readouterr().err
    saved, _ = write_source("saved", tmp_path)
    load_blocks([saved, jsonl], tokenizer, 8)
    assert "tokenising: 180 documents [" in capsys.readouterr().err
    load_blocks(jsonl, tokenizer, 8, progress=False)
    rows_of(stream(jsonl, tokenizer))
    output = capsys.readouterr()
    assert output.err == output.out == ""
