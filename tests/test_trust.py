"""The code that ships with a checkpoint: what it may do, read off its syntax tree and seen while it runs.

And `ponder-hf inspect-code`, which says whose code lies in a checkpoint.
"""

import ast
import json
import shutil
import sys
from pathlib import Path

import checkpoints
import pytest
import torch
from elsewhere import run as run_elsewhere

from ponder_hf import __version__
from ponder_hf.conversion import convert
from ponder_hf.hub import code


MODELING = Path(__file__).resolve().parents[1] / "modeling"
FILES = sorted(MODELING.glob("*.py"))

# Modules of the standard library that reach beyond the process, or run what is not in the file.
FORBIDDEN_MODULES = set(
    "asyncio code codeop ctypes ftplib glob http importlib io marshal multiprocessing os pathlib pickle pty runpy "
    "shelve shutil signal smtplib socket socketserver sqlite3 ssl subprocess sys tempfile threading urllib webbrowser "
    "xmlrpc zipfile zipimport".split()
)
FORBIDDEN_NAMES = set("__import__ breakpoint compile eval exec getattr_static globals input locals open vars".split())
FORBIDDEN_ATTRIBUTES = set("hub load load_state_dict_from_url save system popen urlopen __globals__ __code__".split())


def problems(source):
    """What in a file's syntax tree could read, write, send or run something, as "line N: what"."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [] if ast.unparse(node) == "from threading import Lock" else [node.module]  # it starts no thread
        for name in names:
            root = name.partition(".")[0]
            if root not in {"torch", "transformers", *sys.stdlib_module_names} or root in FORBIDDEN_MODULES:
                found.append(f"line {node.lineno}: imports {name}")
        if isinstance(node, ast.Name) and node.id in FORBIDDEN_NAMES:
            found.append(f"line {node.lineno}: {node.id}")
        is_torch = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch"
        if isinstance(node, ast.Attribute) and node.attr in FORBIDDEN_ATTRIBUTES and (is_torch or node.attr[0] == "_"):
            found.append(f"line {node.lineno}: {ast.unparse(node)}")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_the_syntax_tree_holds_nothing_that_reaches_out(path):
    assert problems(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "line",
    [
        "import os",
        "from subprocess import run",
        "import requests",
        "open('x')",
        "eval('1')",
        "exec('x')",
        "torch.load('x')",
        "__import__('os')",
        "(lambda: 0).__globals__",
        "from pickle import loads",
        "import torch.hub, socket",
    ],
)
def test_the_look_at_the_syntax_tree_sees(line):
    assert len(problems(line)) == 1


# Loads a checkpoint by its own code, and then, under an audit hook, computes, generates and trains with it.
# Opening a file to read it is what an import does, and transformers and torch import late; so every event is held
# against the stack: it counts where a frame of the checkpoint's code asked for it and no import lies between.
AUDITED = """
import torch
from transformers import AutoModel, AutoModelForCausalLM

WATCHED = (
    "open socket subprocess os.system os.exec os.posix_spawn os.spawn os.fork os.remove os.rename os.mkdir os.rmdir "
    "shutil ctypes pickle exec compile urllib ftplib smtplib webbrowser os.putenv os.listdir os.scandir"
).split()
seen, counted = [], []

def own_frame(event):
    frame = sys._getframe(2)
    if event in ("compile", "exec"):  # dataclass and torch.compile make code; only our own doing so counts
        return frame if frame.f_globals.get("__name__", "").startswith("transformers_modules.") else None
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name.startswith("importlib") or frame.f_code.co_filename.startswith("<frozen importlib"):
            return None
        if name.startswith("transformers_modules."):
            return frame
        if frame.f_code.co_filename.endswith(("transformers/modeling_utils.py", "configuration_utils.py")):
            return None  # from_pretrained, which reads the checkpoint whoever calls it
        if name.startswith("torch._dynamo") or name == "inspect" or name == "linecache":
            return None
        frame = frame.f_back
    return None

def hook(event, arguments):
    if not any(event == name or event.startswith(name + ".") for name in WATCHED):
        return
    counted.append(event)
    frame = own_frame(event)
    if frame is not None:
        seen.append(f"{event} {arguments!r:.100} in {frame.f_code.co_filename}:{frame.f_lineno}")

source = sys.argv[1]
sys.addaudithook(hook)
model = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=True)
assert counted, "the hook sees nothing"
ids = torch.arange(3, 27).view(2, 12)
mask = torch.ones_like(ids)
mask[0, :4] = 0
with torch.no_grad():
    AutoModel.from_pretrained(source, trust_remote_code=True)(ids, attention_mask=mask)
model(ids, labels=ids, output_pondering=True).loss.backward()
model.train()
model(ids, labels=ids).loss.backward()
model.eval()
shared = dict(max_new_tokens=6, pad_token_id=0)
model.generate(ids, attention_mask=mask, do_sample=True, **shared)
model.generate(ids, num_beams=2, **shared)
model.generate(ids, pondering_exit_threshold=0.5, pondering_exit_criterion="kl", **shared)
model.generate(ids[:1], num_draft_tokens=2, **shared)
model.config.to_json_string()
model.to_base()
if sys.argv[2] == "break":
    frame_code = compile("open('/dev/null').close()", "x", "exec")
    exec(frame_code, {"__name__": "transformers_modules.x"})
print(seen)
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    place = tmp_path_factory.mktemp("trust")
    torch.manual_seed(0)
    checkpoints.save_base(place / "base", tokenizer=True)
    convert(place / "base", place / "checkpoint", pondering_steps=2, pondering_gate="zero_init")
    return place / "checkpoint"


def test_running_it_opens_nothing(checkpoint, tmp_path):
    assert run_elsewhere(AUDITED, tmp_path / "home", checkpoint, "as it is").splitlines()[-1] == "[]"
    broken = run_elsewhere(AUDITED, tmp_path / "another", checkpoint, "break").splitlines()[-1]
    assert "open" in broken, "the hook does not see what such code opens"


# inspect-code


@pytest.fixture
def copy(checkpoint, tmp_path):
    return shutil.copytree(checkpoint, tmp_path / "copy")


def inspected(capsys, *words):
    capsys.readouterr()
    assert checkpoints.run("inspect-code", *words, "--json") == 0
    return json.loads(capsys.readouterr().out)


def test_the_same_code(checkpoint, capsys):
    result = inspected(capsys, checkpoint)
    assert (result["status"], result["release"]) == ("same", __version__)
    assert {each["status"] for each in result["files"]} == {"same"}
    assert len(result["files"]) == len(FILES) - 1  # __init__.py does not ship


def test_changed_code_and_where(copy, capsys):
    path = copy / "pondering_cache.py"
    lines = path.read_text().splitlines()
    lines[4] += "  # and more"
    path.write_text("\n".join(lines) + "\n")
    (copy / "custom_generate").mkdir()
    (copy / "custom_generate/generate.py").write_text("import os")
    (copy / "pondering_vocabulary_loss.py").unlink()
    result = inspected(capsys, copy)
    assert (result["status"], result["release"]) == ("changed", None)
    files = {each["file"]: each for each in result["files"] if each["status"] != "same"}
    assert {name: each["status"] for name, each in files.items()} == {
        "pondering_cache.py": "changed",
        "custom_generate/generate.py": "added",
        "pondering_vocabulary_loss.py": "missing",
    }
    assert (files["pondering_cache.py"]["line"], files["pondering_cache.py"]["text"]) == (5, lines[4].strip())
    checkpoints.run("inspect-code", copy)
    assert "pondering_cache.py: differs from line 5" in capsys.readouterr().out


def test_an_older_releases_code(copy, tmp_path, capsys, monkeypatch):
    (copy / "pondering_cache.py").write_text("# as it was\n")
    known = {name: code.sha256(content) for name, content in code.code_of(copy).items()}
    (tmp_path / "releases.json").write_text(json.dumps({"0.0.9": known}))
    monkeypatch.setattr(code, "RELEASES", tmp_path / "releases.json")
    result = inspected(capsys, copy)
    assert (result["status"], result["release"]) == ("older release", "0.0.9")
    (copy / "pondering_vocabulary_loss.py").write_text("# else")
    assert inspected(capsys, copy)["status"] == "changed"


def test_code_in_another_repository_is_no_same_code(copy, capsys):
    checkpoints.change_config(copy, auto_map={"AutoModelForCausalLM": "other/place--modeling.Model"})
    result = inspected(capsys, copy)
    assert result["status"] == "changed"
    assert result["elsewhere"] == ["config.json: other/place--modeling.Model"]


def test_recording_a_release(tmp_path, monkeypatch):
    (tmp_path / "releases.json").write_text(json.dumps({"0.0.9": {}}))
    monkeypatch.setattr(code, "RELEASES", tmp_path / "releases.json")
    code.record_release()
    assert set(code.releases()) == {"0.0.9", __version__}
    assert set(code.releases()[__version__]) == {path.name for path in FILES} - {"__init__.py"}


def test_inspect_code_refusals(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert inspected(capsys, tmp_path / "empty")["status"] == "no code"
    assert checkpoints.run("inspect-code", tmp_path / "nowhere") == 2
    assert "there is no folder" in capsys.readouterr().err
