"""What is used of other libraries without being promised by them stands in docs/design.md, and is still there.

A name that moves fails here first, with where it was used, and not in the middle of a generation.
"""

import ast
import importlib
import inspect
import re
from pathlib import Path

import pytest


REPOSITORY = Path(__file__).resolve().parents[1]
SOURCES = sorted(
    path for place in ("modeling", "conversion", "ponder_hf") for path in (REPOSITORY / place).rglob("*.py")
)
# Strings that look like names: prefixes and suffixes of measures.
NOT_NAMES = {"_loss", "_entropy", "_norm_ratio", "_agreement", "_pass_"}


def own_names(trees):
    """Every private name that this project defines itself."""
    found = set()
    for tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                found.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
            elif (
                isinstance(node, ast.Attribute)
                and isinstance(node.ctx, ast.Store)
                and ast.unparse(node.value) in {"self", "model"}
            ):
                found.add(node.attr)
    return found


def private_names(path, own):
    """The private names of others that a file uses: attributes, imports, and strings for `getattr` and its like."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.ImportFrom):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
            found.add(node.value)
    return {name for name in found if re.match(r"_[A-Za-z]", name)} - own - NOT_NAMES


def listed():
    """Map each name of the table in docs/design.md to (the module that has it, the files that use it)."""
    text = (REPOSITORY / "docs/design.md").read_text(encoding="utf-8")
    section = text.partition("## Private names of other libraries")[2].partition("\n## ")[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("| `")]
    found = {}
    for names, module, files, *_ in rows:
        for name in re.findall(r"`([^`]+)`", names):
            found[name] = module.strip().strip("`"), set(re.findall(r"`([^`]+)`", files))
    return found


def used():
    """Map each private name of others to the files that use it."""
    own = own_names(ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES)
    found = {}
    for path in SOURCES:
        for name in private_names(path, own):
            found.setdefault(name, set()).add(path.relative_to(REPOSITORY).as_posix())
    return found


def test_the_table_is_what_is_used():
    assert {name: files for name, (_, files) in listed().items()} == used()


@pytest.mark.parametrize("name", sorted(listed()))
def test_it_is_still_there(name):
    module_name = listed()[name][0]
    try:
        module = importlib.import_module(module_name)
    except ImportError:
        pytest.skip(f"needs {module_name.partition('.')[0]}")
    assert hasattr(module, name) or re.search(rf"\b{name}\b", inspect.getsource(module)), module_name
