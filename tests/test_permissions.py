"""Folders and files that may not be read or written: one line that names them, exit code 2, and nothing lost."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import checkpoints
import hub_client
import hub_server
import pytest
import torch

from ponder_hf.conversion import convert


CLOSED, READ_ONLY, WRITE_ONLY = 0, 0o555, 0o333
TRAIN = "train pondering --max-steps 1 --block-size 8 --data"

# For each: the modes of some paths, a command line, and what its message names.
CASES = {
    "convert, closed folder": ({"base": CLOSED}, "convert base out", "base"),
    "convert, in a closed folder": ({"closed": CLOSED}, "convert closed/base out", "closed/base"),
    "convert, configuration": ({"base/config.json": CLOSED}, "convert base out", "base/config.json"),
    "convert, weights": ({"base/model.safetensors": CLOSED}, "convert base out", "base/model.safetensors"),
    "convert, tokenizer": ({"base/tokenizer.json": CLOSED}, "convert base out", "base/tokenizer.json"),
    "convert, templates": (
        {"base/additional_chat_templates": CLOSED},
        "convert base out",
        "base/additional_chat_templates",
    ),
    "convert, output": ({"here": READ_ONLY}, "convert base here/out", "here/out"),
    "convert, new folders": ({"here": READ_ONLY}, "convert base here/new/out", "here/new/out"),
    "convert, output in a closed folder": ({"here": CLOSED}, "convert base here/out", "here/out"),
    "convert, output in one that cannot be listed": ({"here": WRITE_ONLY}, "convert base here/out", "here"),
    "convert, overwriting": ({"here": READ_ONLY}, "convert base here/old --overwrite", "here/old"),
    "convert, overwriting what stays": ({"here/old": READ_ONLY}, "convert base here/old --overwrite", "here/old"),
    "convert, overwriting what stays inside": (
        {"here/old/inside": READ_ONLY},
        "convert base here/old --overwrite",
        "here/old/inside",
    ),
    "convert, overwriting a closed folder": ({"here/old": CLOSED}, "convert base here/old --overwrite", "here/old"),
    "export, weights": (
        {"pondering/model.safetensors": CLOSED},
        "export pondering out",
        "pondering/model.safetensors",
    ),
    "export, output": ({"here": READ_ONLY}, "export pondering here/out", "here/out"),
    "export, overwriting": ({"here": READ_ONLY}, "export pondering here/old --overwrite", "here/old"),
    "generate, closed folder": ({"pondering": CLOSED}, "generate pondering --prompt once", "pondering"),
    "generate, in a closed folder": ({"closed": CLOSED}, "generate closed/base --prompt once", "closed/base"),
    "generate, weights": (
        {"pondering/model.safetensors": CLOSED},
        "generate pondering --prompt once",
        "pondering/model.safetensors",
    ),
    "generate, tokenizer": ({"pondering/tokenizer.json": CLOSED}, "generate pondering --prompt once", "tokenizer"),
    "eval, text": ({"text.txt": CLOSED}, "eval pondering --block-size 8 --data text.txt", "text.txt"),
    "eval, text in a closed folder": (
        {"closed": CLOSED},
        "eval pondering --block-size 8 --data closed/text.txt",
        "closed/text.txt",
    ),
    "eval, a file of several": ({"texts/b.txt": CLOSED}, "eval pondering --block-size 8 --data texts", "texts/b.txt"),
    "eval, a folder in a folder": (
        {"texts/inside": CLOSED},
        "eval pondering --block-size 8 --data texts",
        "texts",
    ),
    "eval, table": ({"table.parquet": CLOSED}, "eval pondering --block-size 8 --data table.parquet", "table.parquet"),
    "eval, card": ({"pondering": READ_ONLY}, "eval pondering --data text.txt --card", "pondering"),
    "eval, card that cannot be read": (
        {"pondering/README.md": CLOSED},
        "eval pondering --data text.txt --card",
        "pondering/README.md",
    ),
    "eval, items": (
        {"items/piqa.jsonl": CLOSED},
        "eval pondering --tasks piqa --tasks-from items",
        "items/piqa.jsonl",
    ),
    "eval, folder of items": ({"items": CLOSED}, "eval pondering --tasks piqa --tasks-from items", "items"),
    "eval, answers": ({"home": READ_ONLY}, "eval pondering --tasks piqa --tasks-from items", "home"),
    "lens, text": ({"text.txt": CLOSED}, "lens pondering --file text.txt", "text.txt"),
    "lens, whole text": ({"text.txt": CLOSED}, "lens pondering --data text.txt --block-size 8", "text.txt"),
    "lens, output": ({"here": READ_ONLY}, "lens pondering --prompt once --html here/new.html", "here/new.html"),
    "lens, overwriting": ({"here": READ_ONLY}, "lens pondering --prompt once --html here/a.html --overwrite", "here"),
    "lens, output in a closed folder": ({"here": CLOSED}, "lens pondering --prompt once --html here/new.html", "here"),
    "inspect, configuration": ({"pondering/config.json": CLOSED}, "inspect pondering", "pondering/config.json"),
    "inspect, in a closed folder": ({"closed": CLOSED}, "inspect closed/base", "closed/base"),
    "inspect-code, a file": (
        {"pondering/modeling_pondering.py": CLOSED},
        "inspect-code pondering",
        "pondering/modeling_pondering.py",
    ),
    "inspect-code, a folder in it": (
        {"pondering/additional_chat_templates": CLOSED},
        "inspect-code pondering",
        "pondering/additional_chat_templates",
    ),
    "push, a file": ({"pondering/LICENSE": CLOSED}, "push pondering somebody/model", "pondering/LICENSE"),
    "push, a folder in it": (
        {"pondering/additional_chat_templates": CLOSED},
        "push pondering somebody/model",
        "pondering/additional_chat_templates",
    ),
    "push, card": ({"pondering/README.md": CLOSED}, "push pondering somebody/model --dry-run", "pondering/README.md"),
    "push, closed folder": ({"pondering": CLOSED}, "push pondering somebody/model", "pondering"),
    "doctor, weights": (
        {"pondering/model.safetensors": CLOSED},
        "doctor --checkpoint pondering",
        "pondering/model.safetensors",
    ),
    "train, text": ({"text.txt": CLOSED}, f"{TRAIN} text.txt --output out", "text.txt"),
    "train, streamed text": ({"text.txt": CLOSED}, f"{TRAIN} text.txt --streaming --output out", "text.txt"),
    "train, validation": (
        {"text.txt": CLOSED},
        f"{TRAIN} texts --validation text.txt --output out",
        "text.txt",
    ),
    "train, arguments": ({"arguments.yaml": CLOSED}, "train pondering --arguments arguments.yaml", "arguments.yaml"),
    "train, configuration": (
        {"base/config.json": CLOSED},
        "train --config base/config.json --tokenizer base --data text.txt --output out",
        "base/config.json",
    ),
    "train, output": ({"here": READ_ONLY}, f"{TRAIN} text.txt --output here/out", "here/out"),
    "train, into a folder": ({"here/empty": READ_ONLY}, f"{TRAIN} text.txt --output here/empty", "here/empty"),
    "train, overwriting what stays inside": (
        {"here/old/inside": READ_ONLY},
        f"{TRAIN} text.txt --output here/old --overwrite",
        "here/old/inside",
    ),
    "train, draft heads": (
        {"pondering/model.safetensors": CLOSED},
        f"{TRAIN} text.txt --draft-heads --output out",
        "pondering/model.safetensors",
    ),
    "demo, text": ({"text.txt": CLOSED}, "demo --quick --text text.txt --output out", "text.txt"),
    "demo, output": ({"here": READ_ONLY}, "demo --quick --output here/out", "here/out"),
    "demo, overwriting what stays": ({"here/old": READ_ONLY}, "demo --output here/old --overwrite", "here/old"),
    "demo, base": (
        {"base/model.safetensors": CLOSED},
        "demo --quick --base base --text text.txt --output out",
        "base/model.safetensors",
    ),
    "cache, read-only": ({"home": READ_ONLY}, "inspect somebody/model", "home"),
    "cache, closed": ({"home": CLOSED}, "generate somebody/model --prompt once", "home"),
    "cache, token": ({"home/token": CLOSED}, "convert nowhere out", "home/token"),
}


@pytest.fixture(scope="module")
def endings(tmp_path_factory):
    """How each case ended, all of them in one process, since starting it takes longest."""
    folder = tmp_path_factory.mktemp("permissions")
    torch.manual_seed(0)
    checkpoints.save_base(folder / "base", tokenizer=True)
    convert(folder / "base", folder / "pondering")
    (folder / "pondering/README.md").write_text("---\nlicense: mit\n---\n\nWhat I wrote.\n")
    (folder / "pondering/LICENSE").write_text("mine")
    shutil.copytree(folder / "base", folder / "closed/base")
    text = "once upon a time there was one cat " * 20
    for name in ("text.txt", "closed/text.txt", "texts/a.txt", "texts/b.txt", "texts/inside/c.txt"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    (folder / "arguments.yaml").write_text("data: text.txt")
    (folder / "items").mkdir()
    item = {"query": "once upon", "choices": ["a time", "the sea"], "gold": 0}
    (folder / "items/piqa.jsonl").write_text(json.dumps(item) + "\n")
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs ponder-hf[train]")
    import pyarrow

    parquet.write_table(pyarrow.table({"text": [text]}), folder / "table.parquet")
    (folder / "here/old/inside").mkdir(parents=True)
    (folder / "here/old/inside/mine").write_text("mine")
    (folder / "here/a.html").write_text("mine")
    (folder / "here/empty").mkdir()
    (folder / "home").mkdir()
    (folder / "home/token").write_text(hub_server.WRITER)
    with hub_server.serving() as hub:
        hub.add("somebody/model", folder / "pondering")
        cases = [{"modes": modes, "arguments": line.split()} for modes, line, _ in CASES.values()]
        done = subprocess.run(
            [
                *(sys.executable, "-W", "ignore", str(Path(__file__).with_name("forbidding.py"))),
                json.dumps({"folder": str(folder), "template": str(folder.with_name("template")), "cases": cases}),
            ],
            env=hub_client.environment(hub, folder / "home"),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
    is_possible, *endings = map(json.loads, done.stdout.splitlines())
    if not is_possible:
        pytest.skip("this user may read and write everything, and cannot give that up here")
    return dict(zip(CASES, endings, strict=True))


@pytest.mark.parametrize("case", CASES)
def test_what_may_not_be_read_or_written(endings, case):
    ending, (_, _, named) = endings[case], CASES[case]
    assert ending["code"] == 2, ending["err"]
    lines = ending["err"].replace("\r", "\n").splitlines()
    (error,) = (line for line in lines if line.startswith("ponder-hf: error: "))
    assert error == lines[-1]
    assert named in error
    assert "unexpected" not in error
    assert "Traceback" not in ending["err"]
    assert ending["out"] == ""
    assert ending["changed"] == []
