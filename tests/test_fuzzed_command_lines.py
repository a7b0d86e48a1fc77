"""Command lines put together at random: done, or exit code 2 with one line and nothing written; never a traceback."""

import argparse
import os
import random
import shutil
import sys

import pytest
from checkpoints import listing, run

from ponder_hf.cli import COMMANDS, build_parser


pytest_plugins = ["refusals"]

# More of them by hand: PONDER_FUZZ=500 make test PYTEST_ARGS=tests/test_fuzzed_command_lines.py
LINES = int(os.environ.get("PONDER_FUZZ", "12"))

VALUES = [
    *("", " ", "-", "--", "null", "true", "None", "[]", "{}", "a,b", "1,,2", "0,1", "%s", "{0}", "$HOME", "~nobody/x"),
    *("0", "1", "-1", "2", "1.5", "1e400", "-1e400", "nan", "inf", "-inf", "0x10", "1_000", "\u0663", "\u00b2", "*"),
    *(str(2**31), str(2**63), str(-(2**63) - 1), "9" * 400, "9" * 5000, "x" * 300, "x" * 5000),
    *("é", "日本語", "\u202e", "\x00", "\x1b[31m", "\x07", "a\nb", "a\r\nb", "a\tb", "\udcff", "\ud800", "🙂"),
    *("base", "pondering", "text.txt", "missing", "missing/deeper", "base/config.json", "text.txt/below", ".", ".."),
    *("/dev/null", "/dev/full", "link", "broken link", "a/b/c", "nobody/nothing", "../../..", "float32", "cpu"),
    *("latin.txt", "blank.txt", "nul.txt", "empty.txt", "bad.jsonl", "bad.yaml", "list.yaml", "tagged.yaml"),
]  # fmt: skip
# What a line ends with, so that one that happens to be good is over soon.
LAST = {
    "demo": ["--text", "missing"],
    "train": ["--max-steps", "1", "--block-size", "8", "--per-device-train-batch-size", "1"],
    "generate": ["--max-new-tokens", "2"],
    "push": ["--dry-run"],
}
FILES = {
    "text.txt": b"once upon a time there was one cat and two dogs\n" * 20,
    "latin.txt": b"caf\xe9\n" * 20,
    "blank.txt": b" \n\t\n",
    "nul.txt": b"once\0upon",
    "empty.txt": b"",
    "bad.jsonl": b'{"text": "\\ud800"}\n',
    "bad.yaml": b"a: [",
    "list.yaml": b"- 1\n",
    "tagged.yaml": b"learning_rate: !!python/object/apply:os.system ['touch hacked']\n",
}


@pytest.fixture
def full_place(place):
    """The checkpoints of `place`, texts of several kinds, and links."""
    for name, content in FILES.items():
        (place / name).write_bytes(content)
    (place / "link").symlink_to("pondering")
    (place / "broken link").symlink_to("nowhere")
    return place


def parser_of(command):
    (subparsers,) = (action for action in build_parser()._actions if isinstance(action, argparse._SubParsersAction))
    return subparsers.choices[command]


def line_of(command, chance):
    """Positional arguments, sometimes one too few, and up to four flags with values that are mostly none."""
    actions = [action for action in parser_of(command)._actions if action.nargs != 0 or action.const]
    flags = [action for action in actions if action.option_strings and "--help" not in action.option_strings]
    words = []
    for action in actions:
        if not action.option_strings and chance.random() < 0.95:
            words.append(chance.choice(["pondering", "base", "text.txt", chance.choice(VALUES)]))
    if command in ("train", "eval", "lens") and chance.random() < 0.7:
        words += ["--data", chance.choice(["text.txt", chance.choice(VALUES)])]
    if command in ("convert", "export") and len(words) > 1:
        words[1] = "out"
    if command == "train" and chance.random() < 0.9:
        words += ["--output", "out"]
    if command == "generate" and chance.random() < 0.9:
        words += ["--prompt", chance.choice(["once upon", chance.choice(VALUES)])]
    for action in chance.choices(flags, k=chance.randint(0, 4)):
        values = [chance.choice(VALUES) for _ in range(chance.randint(0, 3) if action.nargs in ("+", "*") else 1)]
        if action.choices and chance.random() < 0.5:
            values = [str(chance.choice(list(action.choices)))]
        flag = chance.choice(action.option_strings)
        words += [f"{flag}={values[0]}"] if values and chance.random() < 0.2 else [flag, *values * (action.nargs != 0)]
    return [command, *words, *LAST.get(command, []), *(["--json"] if chance.random() < 0.3 else [])]


@pytest.mark.parametrize("command", COMMANDS)
def test_any_line_is_done_or_refused_in_one(full_place, capsys, monkeypatch, command):
    before = listing(full_place)
    for seed in range(LINES):
        line = line_of(command, random.Random(f"{command} {seed}"))
        monkeypatch.setattr(sys, "stdin", open(os.devnull))  # noqa: SIM115 (closed with the test)
        capsys.readouterr()
        code = run(*line)
        said = capsys.readouterr()
        errors = [each for each in said.err.splitlines() if each.startswith("ponder-hf: error: ")]
        assert "Traceback" not in said.err, line
        assert "unexpected" not in "".join(errors).replace("unexpected argument", ""), (line, errors)
        assert code in (0, 2), (line, code, said.err)
        assert len(errors) == (code == 2), (line, errors)
        assert all(len(each) < 2000 and each.isprintable() for each in errors), (line, errors)
        after = {name: content for name, content in listing(full_place).items() if name.split("/")[0] != "out"}
        made = set(after) - set(before)
        assert code == 0 or not made, (line, made)
        assert {name: after[name] for name in before} == before, line
        assert code == 0 or not (full_place / "out").exists(), line
        for name in sorted(made | {"out"}, reverse=True):
            path = full_place / name
            if path.is_dir():
                shutil.rmtree(path)
            elif path.exists():
                path.unlink()
