"""What is used of other libraries without being promised by them stands in docs/design.md, and is still there.

A name that moves fails here first, with where it was used, and not in the middle of a generation.
"""

import ast
import importlib
import inspect
import re
import sys
from importlib import metadata
from pathlib import Path

import pytest

from ponder_hf.modeling.pondering_errors import NEWEST


REPOSITORY = Path(__file__).resolve().parents[1]
SOURCES = sorted(
    path for place in ("modeling", "conversion", "ponder_hf") for path in (REPOSITORY / place).rglob("*.py")
)
# Strings that look like names: prefixes and suffixes of measures and of files.
NOT_NAMES = {"_loss", "_entropy", "_norm_ratio", "_agreement", "_pass_", "_stderr", "_sysconfigdata"}
# What the machinery of classes puts into each of them.
MADE = {"_abc_impl", "_auto_class", "_backward_cls"}


def own_names(tree):
    """Every name that a file defines itself."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Store):
            owner = ast.unparse(node).rpartition(".")[0]
            found.update({ast.unparse(node).rpartition(".")[2]} if owner in {"", "self", "model"} else ())
    return found


def private_names(path):
    """The private names of others that a file uses: attributes, imports, and strings for `getattr` and its like."""
    tree, found = ast.parse(path.read_text(encoding="utf-8")), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.ImportFrom):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            words = node.value.split()
            found.update(words if all(word.isidentifier() for word in words) else ())
    return {name for name in found if re.match(r"_[A-Za-z]", name)} - own_names(tree) - NOT_NAMES


def overridden(path):
    """The private names that a file's classes define anew and that a class of another library has."""
    place = path.relative_to(REPOSITORY).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")
    try:
        module = importlib.import_module(place if place.startswith("ponder_hf") else f"ponder_hf.{place}")
    except ModuleNotFoundError as error:
        if error.name != "vllm":  # which has an environment of its own
            raise
        return set()
    found = set()
    for each in [*vars(module).values()]:
        if inspect.isclass(each) and each.__module__ == module.__name__:
            theirs = {
                name for base in each.__mro__ if not base.__module__.startswith("ponder_hf") for name in vars(base)
            }
            found |= {name for name in vars(each) if re.match(r"_[a-z]", name)} & theirs
    return found - MADE


def listed():
    """Map each name of the table in docs/design.md to (what has it, the files that use it, where it was seen)."""
    text = (REPOSITORY / "docs/design.md").read_text(encoding="utf-8")
    section = text.partition("## Private names of other libraries")[2].partition("\n## ")[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("| `")]
    found = {}
    for names, owner, files, seen, _ in rows:
        for name in re.findall(r"`([^`]+)`", names):
            found[name] = owner.strip().strip("`"), set(re.findall(r"`([^`]+)`", files)), seen.strip()
    return found


def used():
    """Map each private name of others to the files that use it."""
    found = {}
    for path in SOURCES:
        for name in private_names(path) | overridden(path):
            found.setdefault(name, set()).add(path.relative_to(REPOSITORY).as_posix())
    return found


def test_the_table_is_what_is_used():
    assert {name: files for name, (_, files, _) in listed().items()} == used()


def is_expected(owner, seen):
    """Whether the installed version should have it: it is in the range, or newer than a range that ends today."""
    first, last = (tuple(map(int, version.split("."))) for version in (re.findall(r"\d+\.\d+", seen) * 2)[:2])
    library = owner.partition(".")[0]
    version = ".".join(map(str, sys.version_info)) if library == "argparse" else metadata.version(library)
    installed = tuple(map(int, version.split(".")[:2]))
    return first <= installed and (library != "transformers" or installed <= last or last == NEWEST)


@pytest.mark.parametrize(
    "name", sorted(name for name, (owner, _, seen) in listed().items() if is_expected(owner, seen))
)
def test_it_is_still_there(name):
    owner = listed()[name][0]
    parts = owner.split(".")
    found = importlib.import_module(parts[0])
    for index, part in enumerate(parts[1:], 2):
        found = getattr(found, part, None) or importlib.import_module(".".join(parts[:index]))
    assert hasattr(found, name) or re.search(rf"\b{name}\b", inspect.getsource(found)), owner
