"""Reading text files and packing them into blocks of tokens."""

import copy
import gzip
import json
import tracemalloc

import pytest
import torch
from small_tokenizer import train_tokenizer

from ponder_hf import PonderingError
from ponder_hf.data import text
from ponder_hf.data.blocks import pack_all
from ponder_hf.data.packing import pack
from ponder_hf.data.text import Piece, read_text
from ponder_hf.demo.corpus import Document, pieces


STORY = "The cat sat.\n\n  It saw a bird: “wäh”.\nThe end.\n"


def write(path, content):
    """Write text or bytes, compressed if the name says so. Returns the path as a string."""
    content = content.encode("utf-8") if isinstance(content, str) else content
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return str(path)


def rows(*texts, **more):
    return "".join(json.dumps({"text": text, **more}) + "\n" for text in texts)


def documents(paths, **arguments):
    """The documents in these files, each as one text."""
    found = []
    for piece in read_text(paths, **arguments):
        if piece.starts_document:
            found.append("")
        found[-1] += piece.text
    return found


@pytest.mark.parametrize("suffix", [".txt", ".txt.gz", ".md"])
def test_plain_text_is_one_document(tmp_path, suffix):
    assert documents([write(tmp_path / f"story{suffix}", STORY)]) == [STORY]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".JSONL"])
def test_jsonl_is_one_document_a_line(tmp_path, suffix):
    path = write(tmp_path / f"stories{suffix}", rows(STORY, "") + "\n" + rows("Second."))
    assert documents([path]) == [STORY, "Second."]


@pytest.mark.parametrize("suffix", [".json", ".json.gz"])
def test_json_file_of_one_array(tmp_path, suffix):
    content = json.dumps([{"text": STORY, "id": 1}, {"text": ""}, {"text": "2020-01-01T00:00:00Z"}], indent=2)
    path = write(tmp_path / f"a{suffix}", content)
    assert documents([path]) == [STORY, "2020-01-01T00:00:00Z"]
    assert [piece.line for piece in read_text([path])] == [1, 3]
    for content, message in (
        ('[{"text": "x"}, {"body": "x"}]', r"row 2 of .*a.json.* has no field 'text' .*'body'"),
        ('["x"]', r"row 1 of .* is not a JSON object"),
        ('[{"text": "x"}', r"a.json.* is not JSON"),
        ('[{"text": "x"},]', r"a.json.* is not JSON \(row 2: Expecting value\)"),
        ('[{"text": "x"} {"text": "x"}]', r"""a.json.* is not JSON \(',' is missing before '{'\)"""),
        ('[{"text": "x"}] x', r"a.json.* is not JSON \(after its array comes 'x'\)"),
        ('[{"text": "x"}, ' + "[" * 100_000, r"a.json.* is not JSON \(row 2: .*recursion"),
        ('[{"text": "x", "n": ' + "1" * 5000 + "}]", r"a.json.* is not JSON \(row 1: .*4300 digits"),
        ("[]", r"a.json.* holds no text"),
    ):
        with pytest.raises(PonderingError, match=message):
            list(read_text([write(tmp_path / f"a{suffix}", content)]))


@pytest.mark.parametrize("size", [1, 3, 8, 1 << 16])
def test_an_array_is_read_alike_in_pieces_of_any_size(tmp_path, monkeypatch, size):
    rows = [{"text": text} for text in (STORY, "", 'two\\"\\\\ words, ["x"]', "😀\r\nend")]
    path = write(tmp_path / "a.json", b"\xef\xbb\xbf" + json.dumps(rows, indent=1, ensure_ascii=False).encode())
    monkeypatch.setattr(text, "PIECE_SIZE", size)
    assert documents([path]) == [row["text"].replace("\r\n", "\n") for row in rows if row["text"]]


def test_text_field_and_several_files_in_their_order(tmp_path):
    first = write(tmp_path / "a.jsonl", json.dumps({"text": "not this", "content": "this"}))
    second = write(tmp_path / "b.txt", "plain")
    assert documents([second, first], text_field="content") == ["plain", "this"]


def test_byte_order_mark_and_line_ends(tmp_path):
    assert documents([write(tmp_path / "a.txt", b"\xef\xbb\xbfone\r\ntwo")]) == ["one\ntwo"]
    long = "\ufeffa" * 40_000  # another one later on is a character of the text
    assert documents([write(tmp_path / "a.txt", long)]) == [long[1:]]


def test_pieces_end_with_lines_and_know_where_they_begin(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "PIECE_SIZE", 8)
    path = write(tmp_path / "a.txt", STORY)
    found = list(read_text([path]))
    assert "".join(piece.text for piece in found) == STORY
    assert len(found) > 3
    assert [piece.starts_document for piece in found] == [True] + [False] * (len(found) - 1)
    before = ""
    for piece in found:
        assert piece.line == before.count("\n") + 1
        before += piece.text
    assert found[0] == Piece("The cat sat.\n", path, 1, True)


def test_long_documents_of_jsonl_are_cut_at_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "PIECE_SIZE", 24)
    found = list(read_text([write(tmp_path / "a.jsonl", rows("x", STORY * 3))]))
    assert "".join(piece.text for piece in found) == "x" + STORY * 3
    assert [piece.text for piece in found[1:-1] if not piece.text.endswith("\n")] == []
    assert [piece.starts_document for piece in found] == [True, True] + [False] * (len(found) - 2)
    assert {piece.line for piece in found[1:]} == {2}


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7])
def test_characters_of_several_bytes_are_never_cut(tmp_path, monkeypatch, size):
    monkeypatch.setattr(text, "PIECE_SIZE", size)
    line = "aä€😀" * 5
    for content in (line, f"{line}\n{line}\n"):
        assert documents([write(tmp_path / "a.txt", content)]) == [content]
        assert documents([write(tmp_path / "a.jsonl", rows(content))]) == [content]


def test_long_lines_do_not_fill_the_memory(tmp_path):
    path = write(tmp_path / "a.txt.gz", b"word " * 4_000_000)
    tracemalloc.start()
    try:
        total = sum(len(piece.text) for piece in read_text([path]))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert total == 20_000_000
    assert peak < 2_000_000


BAD_CONTENT = {
    "empty": ("a.txt", b"", "a.txt holds no text"),
    "blank": ("a.txt", b" \n\n\t", "a.txt holds no text"),
    "only empty documents": ("a.jsonl", rows("", " "), "a.jsonl holds no text"),
    "NUL": ("a.txt", b"one\ntwo\0three", r"a.txt is not text \(line 2 has a NUL byte\)"),
    "UTF-16": ("a.txt", "wide".encode("utf-16"), "is not text|is not UTF-8"),
    "Latin-1": ("a.txt", b"one\ntwo\ncaf\xe9\n", r"a.txt is not UTF-8 text \(line 3 has the byte 0xe9\)"),
    "cut character": ("a.txt", b"one\ncut \xe2\x82", r"a.txt is not UTF-8 text \(line 2"),
    "NUL in .gz": ("a.txt.gz", b"one\ntwo\0", r"a.txt.gz is not text \(line 2"),
    "Latin-1 in .jsonl": ("a.jsonl", rows("fine").encode() + b'{"text": "caf\xe9"}', r"not UTF-8 text \(line 2"),
    "no JSON": ("a.jsonl", rows("fine") + "no json\n", r"line 2 of .*a.jsonl is not JSON"),
    "no field": ("a.jsonl", rows("fine") + '\n{"body": "x", "id": 1}', r"line 3 of .*no field 'text' .*'body', 'id'"),
    "no object": ("a.jsonl", rows("fine") + '["x"]', r"line 2 of .* is not a JSON object"),
    "a number": ("a.jsonl", rows("fine", 3), r"line 2 of .* is not text but int"),
    "half a character": ("a.jsonl", '{"text": "\\ud800"}', r"line 1 of .* lone surrogate"),
    "nested too deeply": ("a.jsonl", "[" * 100_000, r"line 1 of .* is not JSON"),
}


@pytest.mark.parametrize("case", BAD_CONTENT)
def test_bad_content_is_named_with_its_line(tmp_path, case):
    name, content, message = BAD_CONTENT[case]
    path = write(tmp_path / name, content)
    with pytest.raises(PonderingError, match=message) as caught:
        list(read_text([path]))
    assert str(caught.value).count("\n") == 0


def test_line_of_a_bad_byte_far_into_a_file(tmp_path):
    path = write(tmp_path / "a.txt", b"a line of text\n" * 20_000 + b"\xff\n")
    with pytest.raises(PonderingError, match="line 20001 has the byte 0xff"):
        list(read_text([path]))


@pytest.mark.parametrize("damage", ["cut", "another length", "garbage inside", "not gzip"])
def test_damaged_gzip_file(tmp_path, damage):
    data = gzip.compress(STORY.encode() * 50)
    damaged = {
        "cut": data[:-20],
        "another length": data[:-1] + b"\x7f",
        "garbage inside": data[:10] + b"\xff" * 20 + data[30:],
        "not gzip": STORY.encode(),
    }
    path = tmp_path / "a.txt.gz"
    path.write_bytes(damaged[damage])
    with pytest.raises(PonderingError, match=r"a.txt.gz is not a whole gzip file"):
        list(read_text([path]))


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(PonderingError, match=r"there is no file .*nowhere.txt: check the path"):
        list(read_text([tmp_path / "nowhere.txt"]))
    with pytest.raises(PonderingError, match="is a folder: give the files in it"):
        list(read_text([tmp_path]))


def test_overlong_json_line(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "MAX_JSON_LINE", 100)
    with pytest.raises(PonderingError, match=r"line 2 of .* is longer than"):
        list(read_text([write(tmp_path / "a.jsonl", rows("short", "long " * 20))]))


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(STORY * 3, vocab_size=280, positions=64)


def test_tokenizer_gives_every_text_back(tokenizer):
    for content in (STORY, "other words, 漢字 and \t tabs"):
        assert tokenizer.decode(tokenizer(content)["input_ids"]) == content
    assert tokenizer.eos_token_id == 0


def test_blocks_are_the_documents_with_eos_between_them(tokenizer):
    texts = [STORY, "Second one.", STORY[::-1]]
    expected = []
    for content in texts:
        expected += ([tokenizer.eos_token_id] if expected else []) + tokenizer(content)["input_ids"]
    for size in (1, 7, 16):
        blocks = pack_all(pieces([Document("name", content) for content in texts]), tokenizer, size)
        assert blocks.rows.flatten().tolist() == expected[: len(expected) // size * size]
        assert blocks.rows.shape[1] == size


def test_blocks_lose_nothing_between_pieces_and_batches(tokenizer):
    parts = [Piece(line, "a", 1, index == 0) for index, line in enumerate(STORY.splitlines(keepends=True) * 300)]
    expected = [token for part in parts for token in tokenizer(part.text)["input_ids"]]
    chunks = list(pack(iter(parts), tokenizer, 5))
    assert len(chunks) == 2
    assert torch.cat(chunks).flatten().tolist() == expected[: len(expected) // 5 * 5]


def test_without_eos_documents_follow_each_other(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.eos_token = None
    parts = [Piece("one", "a", 1, True), Piece("two", "b", 1, True)]
    found = pack_all(parts, tokenizer, 1).rows.flatten().tolist()
    assert found == tokenizer("one")["input_ids"] + tokenizer("two")["input_ids"]


def test_too_little_text_for_a_block(tokenizer):
    with pytest.raises(PonderingError, match="my text has fewer tokens than one block of 64: give more text"):
        pack_all(pieces([Document("name", "short")]), tokenizer, 64, "my text")


def test_rows_are_labels_and_shuffling_keeps_them(tokenizer):
    blocks = pack_all(pieces([Document("name", STORY * 4)]), tokenizer, 8)
    assert blocks[1]["input_ids"].tolist() == blocks[1]["labels"].tolist() == blocks.rows[1].tolist()
    shuffled = blocks.shuffled(1)
    assert shuffled.rows.tolist() != blocks.rows.tolist()
    assert sorted(shuffled.rows.tolist()) == sorted(blocks.rows.tolist())
    assert shuffled.rows.tolist() == blocks.shuffled(1).rows.tolist()
