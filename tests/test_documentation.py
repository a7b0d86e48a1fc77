"""The pages of docs/: the navigation has all of them, links lead somewhere, the first page is what happens today."""

import importlib.util
import json
import re
import shlex
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from checkpoints import save_base

from ponder_hf import PonderingForCausalLM, convert
from ponder_hf.cli import COMMANDS, main


ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
START = (DOCS / "index.md").read_text(encoding="utf-8")
OUTSIDE = {"changelog.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md", "security.md": "SECURITY.md"}


def hook(name):
    pytest.importorskip("mkdocs", reason="needs ponder-hf[docs]")
    spec = importlib.util.spec_from_file_location(f"documentation_{name}", DOCS / "hooks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def in_navigation(entries):
    for entry in entries:
        for value in entry.values():
            yield from in_navigation(value) if isinstance(value, list) else [value]


def test_every_page_is_in_the_navigation():
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    pages = list(in_navigation(settings["nav"]))
    assert len(pages) == len(set(pages))
    assert set(pages) - set(OUTSIDE) == {path.name for path in PAGES} - {"README.md"}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    """What is written in the repository; `make docs` checks the same of the site, and anchors."""
    links = re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8"))
    files = [link.partition("#")[0] for link in links if not re.match(r"[a-z]+:|#", link)]
    assert [file for file in files if not (DOCS / file).exists()] == []


def test_the_reference_has_every_command_and_every_field():
    reference = hook("reference")
    commands, fields = reference.commands(), reference.fields()
    assert re.findall(r"^## (.*)$", commands, flags=re.MULTILINE) == list(COMMANDS)
    assert "| `--pondering-top-k N` |" in commands
    named = re.findall(r"^\| `(\w+)`", fields, flags=re.MULTILINE)
    own = tiny.pondering_model("gpt2").config.to_dict().keys() & set(named)
    assert named[:2] == ["base_config", "pondering_steps"]
    assert {"pondering_gate", "draft_heads", "pondering_format_version"} <= own
    assert "| `pondering_steps` | `int` | `3` |" in fields


@pytest.mark.parametrize(
    ("page", "fetched"),
    [
        ('<script src="https://somewhere/x.js"></script>', ["https://somewhere/x.js"]),
        ('<link rel="stylesheet" href="//somewhere/x.css">', ["//somewhere/x.css"]),
        ('<img src="https://somewhere/x.png">', ["https://somewhere/x.png"]),
        ('<pre class="mermaid">', ["a mermaid diagram"]),
        ('<a href="https://somewhere/">x</a><script src="assets/x.js"></script>', []),
    ],
)
def test_what_a_page_fetches_from_elsewhere_is_noticed(page, fetched):
    found = hook("outside")._Fetched()
    found.feed(page)
    assert found.elsewhere == fetched


def skeleton(text):
    """The lines of an output without its numbers, which differ between machines, and without the width of columns."""
    lines = (re.sub(r"[-+]?\d[\d.,]*", "N", line) for line in re.split(r"[\n\r]", text))
    return [line for line in (" ".join(line.split()) for line in lines) if line]


@pytest.mark.slow
def test_the_first_page_is_what_happens(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    said = ""
    for language, block in re.findall(r"```(bash|text|python)\n(.*?)```", START, flags=re.DOTALL):
        if language == "python":
            exec(compile(block, "docs/index.md", "exec"), {})
            assert capsys.readouterr().out.startswith("def ")
        elif language == "text":
            assert [line for line in skeleton(block) if line not in skeleton(said)] == [], said
        else:
            said = ""
            for line in block.strip().splitlines():
                words = shlex.split(line)
                if words[0] == "cat":
                    parts = sorted(Path(json.__path__[0]).glob("*.py"))
                    Path("my_text.txt").write_text("".join(part.read_text(encoding="utf-8") for part in parts))
                else:
                    assert main(words[1:]) == 0, line
                    said += "\n".join(capsys.readouterr())
    assert {"plain", "pondering", "trained"} <= {path.name for path in tmp_path.iterdir()}


def test_the_loop_that_explains_pondering_is_what_the_model_does():
    page = (DOCS / "pondering.md").read_text(encoding="utf-8")
    (loop,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    backbone = tiny.base_model("gpt_neox").eval()
    names = {"backbone": backbone, "S": 2, "torch": torch, "input_ids": torch.arange(10, 20).view(1, -1)}
    with torch.no_grad():
        exec(compile(loop, "docs/pondering.md", "exec"), names)
        model = PonderingForCausalLM.from_base(backbone, pondering_steps=2)
        torch.testing.assert_close(names["logits"], model(names["input_ids"]).logits, rtol=1e-5, atol=1e-5)


def test_the_errors_are_what_is_said(tmp_path, monkeypatch, capsys):
    page = (DOCS / "errors.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    save_base(Path("plain"), tokenizer=True, vocab_size=512, max_position_embeddings=256)
    convert("plain", "pondering", pondering_steps=3)
    Path("trained/checkpoint-10").mkdir(parents=True)
    Path("my_text.txt").write_text("a text\n" * 900, encoding="utf-8")
    pairs = re.findall(r"```bash\n(.*)\n```\n+```text\n(.*)\n```", page)
    assert len(pairs) > 8
    for command, message in pairs:
        assert main(shlex.split(command)[1:]) == 2, command
        assert capsys.readouterr().err.splitlines()[-1].replace(f"{tmp_path}/", "") == message
    assert not Path("new").exists()
