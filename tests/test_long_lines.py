"""A line without an end, given to every command that reads text: a refusal that says so, or no more memory than usual.

What the readers of files make of long lines is in test_text.py and test_bad_data.py.
"""

import io
import json
import os
import subprocess
import sys

import checkpoints
import pytest

from ponder_hf.cli import prompt
from ponder_hf.data import text
from ponder_hf.evaluation.tasks import items


pytest_plugins = ["refusals"]

# A line of so many bytes for each command: PONDER_LONG_LINE=1000000000 make test PYTEST_ARGS=tests/test_long_lines.py
LENGTH = int(os.environ.get("PONDER_LONG_LINE", "0"))
PROGRAM = "import sys; from ponder_hf.cli import main; sys.exit(main())"
WORDS = b"once upon a time there was one cat "
TRAIN = "train pondering --max-steps 1 --block-size 16 --per-device-train-batch-size 2 --output out --data"
REFUSED = {
    "generate --prompt -": ("generate pondering --prompt -", "standard input has more than 16 MiB"),
    "lens --prompt -": ("lens pondering --prompt -", "standard input has more than 16 MiB"),
    "lens --file": ("lens pondering --file line.txt --max-tokens 3", "line.txt has more than 16 MiB"),
    "lens --data": ("lens pondering --data line.jsonl --block-size 16", "line 1 of line.jsonl is longer than 64 MiB"),
    "eval --data": ("eval pondering --data line.json --block-size 16", "row 1 of line.json is longer than 64 MiB"),
    "eval --tasks": ("eval pondering --tasks piqa --tasks-from items", "line 1 of items/piqa.jsonl is longer than"),
    "train": (f"{TRAIN} line.jsonl", "line 1 of line.jsonl is longer than 64 MiB"),
    "train, a draft head": (f"{TRAIN} line.jsonl --draft-heads", "line 1 of line.jsonl is longer than 64 MiB"),
    "train, streaming": (f"{TRAIN} line.jsonl --streaming --held-out 1", "line 1 of line.jsonl is longer than"),
    "demo": ("demo --quick --text line.jsonl --output out", "line 1 of line.jsonl is longer than 64 MiB"),
}
READ = {
    "lens --data": "lens pondering --data line.txt --block-size 16 --max-blocks 2",
    "eval --data": "eval pondering --data line.txt --block-size 16 --max-blocks 2",
    "eval --data, from a pipe": "eval pondering --data /dev/stdin --block-size 16 --max-blocks 2",
    "train, streaming": f"{TRAIN} line.txt --streaming",
    "train, all of it": f"{TRAIN} line.txt",
}


# The same line as plain text, as .jsonl, as an array and as an item of a task: what stands before and behind it.
FILES = {
    "line.txt": (b"", b""),
    "line.jsonl": (b'{"text": "', b'"}'),
    "line.json": (b'[{"text": "', b'"}]'),
    "items/piqa.jsonl": (b'{"query": "', b'", "choices": ["a", "b"], "gold": 0}'),
}


def write_line(place, command, length):
    """Write the file that a command reads, with a line of so many bytes. Returns its path."""
    name = next((name for name in FILES if name.split("/")[0] in command), "line.txt")
    start, end = FILES[name]
    (place / name).parent.mkdir(exist_ok=True)
    with open(place / name, "wb") as file:
        file.write(start)
        for _ in range(length // (len(WORDS) << 15) + 1):
            file.write(WORDS * (1 << 15))
        file.write(end)
    return place / name


@pytest.mark.parametrize("case", REFUSED)
def test_a_line_that_is_too_long_is_refused(place, capsys, monkeypatch, case):
    """With limits that a line of two megabytes is beyond."""
    line, message = REFUSED[case]
    path = write_line(place, line, 1 << 21)
    for module, name in ((prompt, "LONGEST"), (text, "MAX_JSON_LINE"), (items, "LONGEST_LINE")):
        monkeypatch.setattr(module, name, 1 << 20)
    given = io.StringIO(path.read_text())
    monkeypatch.setattr(sys, "stdin", given)
    if "tasks" in line:
        pytest.importorskip("lm_eval", reason="needs ponder-hf[eval]")
    before = checkpoints.listing(place)
    assert checkpoints.run(*line.split()) == 2
    output = capsys.readouterr()
    message = message.replace(" 16 ", " 1 ").replace(" 64 ", " 1 ")
    assert output.out == ""
    assert output.err.splitlines()[-1].startswith(f"ponder-hf: error: {message}")  # behind what a bar has said
    assert checkpoints.listing(place) == before
    assert given.tell() == ((1 << 20) + 1 if line.endswith("-") else 0)


def test_a_text_as_long_as_the_limit_is_read(place, monkeypatch, tmp_path):
    monkeypatch.setattr(prompt, "LONGEST", 100)
    for length, is_read in ((100, True), (101, False)):
        (tmp_path / "text").write_text("a" * length)
        monkeypatch.setattr(sys, "stdin", io.StringIO("a" * length))
        for file in (None, str(tmp_path / "text")):
            if is_read:
                assert prompt.read_prompt(file, "empty") == "a" * length
            else:
                with pytest.raises(Exception, match="too much for one text: shorten it"):
                    prompt.read_prompt(file, "empty")


def test_what_is_no_utf_8_on_standard_input_is_said(place, check_refused, monkeypatch):
    for errors in ("strict", "surrogateescape"):  # the latter without a locale
        given = io.TextIOWrapper(io.BytesIO(b"caf\xe9"), encoding="utf-8", errors=errors)
        monkeypatch.setattr(sys, "stdin", given)
        check_refused("generate", "pondering", "--prompt", "-", words=["standard input is not UTF-8 text: convert it"])


@pytest.mark.skipif(not LENGTH, reason="a gigabyte on the disk and minutes: set PONDER_LONG_LINE to a number of bytes")
@pytest.mark.parametrize("case", [*REFUSED, *(f"{name}: read" for name in READ)])
def test_a_line_of_so_many_bytes(made_once, place, case):
    line, message = REFUSED.get(case) or (READ[case.removesuffix(": read")], None)
    path = write_line(place, line, LENGTH)
    with open(path, "rb") as given, open(place / "said", "w+b") as said:
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *line.split()], cwd=place, stdin=given, stdout=said, stderr=said
        )
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        said.seek(0)
        words = said.read().decode().replace("\r", "\n").splitlines()
    path.unlink()
    print(json.dumps({"case": case, "MB": used.ru_maxrss >> 10, "seconds": round(used.ru_utime)}))
    assert process.returncode == (2 if message else 0), words[-3:]
    if message:
        assert words[-1].startswith(f"ponder-hf: error: {message}")
        assert not (place / "out").exists()
    limit = 8 * LENGTH if case == "train, all of it: read" else 0  # four bytes a token in memory, all else is bounded
    assert used.ru_maxrss << 10 < 2e9 + limit
