"""Text that cannot be used: one line that names the file, the line or row, and what to do. In memory and streamed.

What can be wrong within a text file is in test_text.py.
"""

import gzip
import json
import sys
import tracemalloc
from types import SimpleNamespace

import pytest
from small_tokenizer import train_tokenizer
from torch.utils.data import DataLoader

from ponder_hf import PonderingError
from ponder_hf.conversion import check_tokenizer
from ponder_hf.data import load_blocks, text


pa = pytest.importorskip("pyarrow", reason="needs ponder-hf[train]")
parquet = pytest.importorskip("pyarrow.parquet", reason="needs ponder-hf[train]")
datasets = pytest.importorskip("datasets", reason="needs ponder-hf[train]")

STORY = "The cat sat and saw a bird.\n"
# A column of text whose first row is no UTF-8.
NO_UTF8 = pa.Array.from_buffers(
    pa.string(), 2, [None, pa.array([0, 3, 6], pa.int32()).buffers()[1], pa.py_buffer(b"ab\xffabc")]
)
CONFIGURATIONS = """---
configs:
- config_name: one
  data_files: one.jsonl
- config_name: broken
  data_files: broken.jsonl
---
"""


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(STORY * 3, vocab_size=280, positions=64)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a bit of everything, as the current one."""
    monkeypatch.chdir(tmp_path)
    column = {"text": [f"{STORY} {number}" * 50 for number in range(300)]}
    parquet.write_table(pa.table(column), "stories.parquet", row_group_size=30)
    parquet.write_table(pa.table({"body": [STORY], "id": [1]}), "body.parquet")
    parquet.write_table(pa.table({"text": [1, 2]}), "numbers.parquet")
    parquet.write_table(pa.table({"text": [b"x"]}), "bytes.parquet")
    parquet.write_table(pa.table({"text": [{"a": "x"}]}), "nested.parquet")
    parquet.write_table(pa.table({"text": pa.array([None, " "], pa.string())}), "blank.parquet")
    parquet.write_table(pa.table({"text": pa.concat_arrays([pa.array([STORY]), NO_UTF8])}), "latin.parquet")
    whole = (tmp_path / "stories.parquet").read_bytes()
    middle = parquet.ParquetFile("stories.parquet").metadata.row_group(4).column(0).dictionary_page_offset
    files = {
        "novels_train.txt": STORY,
        "stories.jsonl": json.dumps({"text": STORY}) + "\n",
        "second.jsonl": json.dumps({"text": STORY}) + "\n{broken\n",
        "null.jsonl": '{"text": null}\n',
        "short.txt": "a b",
        "empty.txt.gz": gzip.compress(b""),
        "cut.txt.gz": gzip.compress(STORY.encode() * 99)[:-9],
        "cut.parquet": whole[:-30],
        "damaged.parquet": whole[:middle] + b"\xff" * 64 + whole[middle + 64 :],
        "empty.parquet": b"",
        "text.parquet": STORY * 9,
        "twice.parquet.gz": gzip.compress(whole),
        "hidden.txt": whole,
        "zip.txt": b"PK\x03\x04...",
        "gzip.txt": gzip.compress(b"x"),
        "paper.txt": b"%PDF-1.7",
        "picture.png": b"\x89PNG\r\n\x1a\n\0\0",
        "table.csv": "a,b\n",
        "table.tsv.gz": gzip.compress(b"a\tb\n"),
        "others/model.bin": b"x",
        "named/train.txt": STORY,
        "named/test.txt": STORY,
        "half/valid.txt": STORY,
        "half/story.txt": STORY,
        "hub/README.md": CONFIGURATIONS,
        "hub/one.jsonl": json.dumps({"text": STORY}),
        "hub/broken.jsonl": json.dumps({"text": STORY}) + "\n{broken\n",
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    (tmp_path / "nothing").mkdir()
    rows = {"text": [STORY] * 3, "id": [1, 2, 3]}
    datasets.Dataset.from_dict(rows).save_to_disk("saved")
    datasets.DatasetDict(train=datasets.Dataset.from_dict(rows)).save_to_disk("saved_splits")
    datasets.Dataset.from_dict(rows).save_to_disk("damaged_saved")
    (table,) = (tmp_path / "damaged_saved").glob("*.arrow")
    table.write_bytes(table.read_bytes()[:100])
    return tmp_path


REFUSED = {
    "nothing": ([], {}, "name at least one file"),
    "missing": ("novel-train.txt", {}, r"no file or folder novel-train.txt \(there is novels_train.txt\): check the"),
    "missing in no folder": ("no/such/folder/a.txt", {}, "no file or folder no/such/folder/a.txt: check the path"),
    "line break in the name": ("a\nb", {}, r"no file or folder 'a\\nb'"),
    "only the name of a format": ("json", {}, "no file or folder json"),
    "unknown id": ("no/such", {}, "no file or folder no/such, and as a data set it is not in the cache, and the Hub"),
    "fields": ("body.parquet", {}, r"body.parquet has no column 'text' \(its columns: 'body', 'id'\)"),
    "numbers": ("numbers.parquet", {}, "column 'text' of numbers.parquet is not text but int64"),
    "bytes": ("bytes.parquet", {}, "column 'text' of bytes.parquet is not text but binary"),
    "nested": ("nested.parquet", {}, "column 'text' of nested.parquet is not text but struct"),
    "blank table": ("blank.parquet", {}, "blank.parquet holds no text"),
    "bytes in text": ("latin.parquet", {}, r"row 2 of latin.parquet is not UTF-8 text \(byte 0xff\)"),
    "cut table": ("cut.parquet", {}, "cut.parquet is damaged"),
    "damaged table": ("damaged.parquet", {}, "damaged.parquet is damaged in row group 5"),
    "empty table": ("empty.parquet", {}, "empty.parquet is damaged"),
    "no table": ("text.parquet", {}, "text.parquet is damaged"),
    "compressed table": ("twice.parquet.gz", {}, "twice.parquet.gz is a compressed parquet file: unpack it"),
    "table with another name": ("hidden.txt", {}, "it is a parquet file: name it .parquet"),
    "zip": ("zip.txt", {}, "zip.txt is not text: it is a zip archive: unpack it"),
    "gzip": ("gzip.txt", {}, "gzip.txt is not text: it is a gzip file: name it .gz"),
    "pdf": ("paper.txt", {}, "paper.txt is not text: it is a PDF"),
    "picture": ("picture.png", {}, "picture.png is not text"),
    "csv": ("table.csv", {}, r"table.csv is a table in a format that is not read: make it .jsonl or .parquet"),
    "tsv": ("table.tsv.gz", {}, r"table.tsv.gz is a table"),
    "cut gzip": ("cut.txt.gz", {}, "cut.txt.gz is not a whole gzip file"),
    "empty gzip": ("empty.txt.gz", {}, "empty.txt.gz holds no text"),
    "null only": ("null.jsonl", {}, "null.jsonl holds no text"),
    "second line": ("second.jsonl", {}, "line 2 of second.jsonl is not JSON"),
    "field": (
        "stories.jsonl",
        {"text_field": "body"},
        r"line 1 of stories.jsonl has no field 'body' \(its fields: 'text'",
    ),
    "short": ("short.txt", {}, "short.txt has fewer tokens than one block of 8"),
    "folder of nothing": ("nothing", {}, r"the folder nothing has no file .*: it is empty"),
    "folder of others": ("others", {}, r"the folder others has no file .*: it has model.bin"),
    "split of a folder": (
        "named",
        {"split": "validation"},
        "named has no file that is named for the split 'validation'",
    ),
    "folder partly named": (
        "half",
        {},
        r"named for a split \(valid.txt\), others are not \(story.txt\): name the files",
    ),
    "split of a file": ("stories.jsonl", {"split": "test"}, "stories.jsonl is a file, it has no split 'test'"),
    "configuration of a file": ("stories.jsonl", {"name": "one"}, "stories.jsonl is a file, it has no configuration"),
    "no column saved": (
        "saved",
        {"text_field": "body"},
        r"saved .* has no column 'body' \(its columns: 'text', 'id'\)",
    ),
    "numbers saved": ("saved", {"text_field": "id"}, r"column 'id' of saved .* is not text but int64"),
    "no split saved": ("saved", {"split": "test"}, "saved is one saved data set, it has no split 'test'"),
    "no such split saved": ("saved_splits", {"split": "test"}, "saved_splits has no split 'test': it has train"),
    "damaged saved": ("damaged_saved", {}, "cannot read the data set damaged_saved"),
    "no configuration": ("hub", {}, "cannot read the data set hub: Config name is missing. .*'one', 'broken'"),
    "unknown configuration": ("hub", {"name": "two"}, "data set hub: .*'two' not found. Available: .*'one', 'broken'"),
    "unknown split": ("hub", {"name": "one", "split": "test"}, r"data set hub: .*test.*\['train'\]"),
    "no column": ("hub", {"name": "one", "text_field": "x"}, r"hub \(one, split train\) has no column 'x'"),
    "damaged configuration": ("hub", {"name": "broken"}, r"cannot read the data set hub.*broken.jsonl\): JSON parse"),
    "block of one": ("stories.jsonl", {"block_size": 1}, "`block_size` must be at least 2, got 1"),
    "no blocks": ("stories.jsonl", {"max_blocks": 0}, "`max_blocks` must be at least 1, got 0"),
    "vocabulary": (
        "stories.jsonl",
        {"vocab_size": 30},
        r"token \d+ for stories.jsonl \(near line 1\); the model has only 30",
    ),
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("case", REFUSED)
def test_refused(place, tokenizer, case, streaming):
    sources, arguments, message = REFUSED[case]
    arguments = {"block_size": 8, "progress": False, **arguments}
    with pytest.raises(PonderingError, match=message) as caught:
        list(load_blocks(sources, tokenizer, streaming=streaming, **arguments))
    assert "\n" not in str(caught.value)


def test_a_workers_error_is_one_line(place, tokenizer):
    loader = DataLoader(load_blocks("second.jsonl", tokenizer, 4, streaming=True), num_workers=1)
    with pytest.raises(PonderingError, match=r"^line 2 of second.jsonl is not JSON") as caught:
        list(loader)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("package", "source"), [("pyarrow", "stories.parquet"), ("datasets", "saved")])
def test_missing_package(place, tokenizer, monkeypatch, package, source):
    for module in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        PonderingError, match=rf"{package} is needed to read {source}: pip install 'ponder-hf\[train\]'"
    ):
        load_blocks(source, tokenizer, 8, progress=False)
    assert len(load_blocks("stories.jsonl", tokenizer, 4, progress=False))


def test_other_files_of_a_folder_are_named(place, tokenizer, caplog):
    (place / "named/README").write_text("not read")
    load_blocks("named", tokenizer, 4, progress=False)
    assert "named: passed over what is not known as text: README" in caplog.text


class Counter:
    """A tokenizer that is faster than any: one token for a hundred characters."""

    eos_token_id = None

    def __call__(self, texts, **kwargs):
        return {"input_ids": [[0] * (len(each) // 100) for each in texts]}


def peak_of(call):
    tracemalloc.start()
    try:
        result = call()
        return result, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.fixture(scope="module")
def long_line(tmp_path_factory):
    """100 MB without a line break."""
    path = tmp_path_factory.mktemp("long") / "line.txt"
    with path.open("wb") as file:
        for _ in range(100):
            file.write(b"words and " * 100_000)
    return path


def test_long_line_of_plain_text_is_never_held(long_line):
    blocks, peak = peak_of(lambda: load_blocks(long_line, Counter(), 100, progress=False))
    assert 9_900 < len(blocks) <= 10_000
    assert peak < 20e6


def test_long_line_of_jsonl_is_refused(long_line, tmp_path):
    path = tmp_path / "line.jsonl"
    path.write_bytes(b'{"text": "short"}\n{"text": "' + long_line.read_bytes() + b'"}\n')

    def load():
        with pytest.raises(PonderingError, match=r"line 2 of .*line.jsonl is longer than 64 MiB: split the document"):
            load_blocks(path, Counter(), 100, progress=False)

    assert peak_of(load)[1] < 2.1 * text.MAX_JSON_LINE


def test_an_array_is_never_held(tmp_path, monkeypatch):
    """Rows beyond the limit are refused when that much was read, and all others need no more than one row does."""
    monkeypatch.setattr(text, "MAX_JSON_LINE", 1 << 20)
    rows = ", ".join(json.dumps({"text": f"row {number} " * 10_000}) for number in range(200))
    path = tmp_path / "rows.json"
    path.write_text(f" [ {rows} ] ")
    blocks, peak = peak_of(lambda: load_blocks(path, Counter(), 100, progress=False))
    assert len(blocks) > 150
    assert path.stat().st_size > 14e6
    assert peak < 5e6
    path.write_text(f'[{{"text": "short"}}, {{"text": "{rows!r}"}}]')

    def refused():
        with pytest.raises(PonderingError, match=r"row 2 of .*rows.json is longer than 1 MiB, or no JSON \("):
            load_blocks(path, Counter(), 100, progress=False)

    assert peak_of(refused)[1] < 6e6


def test_long_cell_of_a_table_is_read(long_line, tmp_path):
    path = tmp_path / "cell.parquet"
    parquet.write_table(pa.table({"text": ["short", long_line.read_text(), "short"]}), path)
    blocks, peak = peak_of(lambda: load_blocks(path, Counter(), 100, progress=False))
    assert 9_900 < len(blocks) <= 10_000
    assert peak < 120e6, "what Python holds; pyarrow holds the cell as well"


def test_tokenizer_with_more_entries_than_embeddings(tokenizer):
    check_tokenizer(tokenizer, SimpleNamespace(vocab_size=len(tokenizer)), "it")
    with pytest.raises(PonderingError, match=f"tokenizer of it has {len(tokenizer)} entries, the model only"):
        check_tokenizer(tokenizer, SimpleNamespace(vocab_size=len(tokenizer) - 1), "it")
    tokenizer.add_tokens(["<one more>"])
    with pytest.raises(PonderingError, match=f"has {len(tokenizer)} entries"):
        check_tokenizer(tokenizer, SimpleNamespace(vocab_size=len(tokenizer) - 1), "it")
