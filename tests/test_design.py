"""docs/design.md is held against the tree: its drawing against the imports, its table against the files."""

import ast
import re
from pathlib import Path

import pytest


REPOSITORY = Path(__file__).resolve().parents[1]
DESIGN = (REPOSITORY / "docs/design.md").read_text(encoding="utf-8")
ROOMS, MODELING = (
    [line.split()[0] for line in drawing.strip().splitlines()]
    for drawing in re.findall(r"```\n(.*?)```", DESIGN.partition("## The rooms")[2], flags=re.DOTALL)[:2]
)
TABLE = DESIGN.partition("## To change this, touch that")[2].partition("\n## ")[0]
INSTALLED = {"ponder_hf/modeling": "modeling", "ponder_hf/conversion": "conversion"}


def python_files():
    return [path for place in ("ponder_hf", "modeling", "conversion") for path in (REPOSITORY / place).rglob("*.py")]


def place_of(path):
    """The path of a file as a module of the installed package, without suffix: ponder_hf/modeling/pondering_cache."""
    inside = path.relative_to(REPOSITORY).with_suffix("").as_posix()
    return inside if inside.startswith("ponder_hf") else f"ponder_hf/{inside}"


def imports_of(path):
    """The modules of this project that a file imports anywhere, as paths like those of `place_of`."""
    package = place_of(path).rpartition("/")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            parts = package.split("/")[: len(package.split("/")) - node.level + 1] if node.level else []
            base = "/".join([*parts, *(node.module or "").split(".")]).strip("/")
            yield from (f"{base}/{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name.replace(".", "/") for alias in node.names)


def room_of(place):
    """The drawn room that a module lies in, or None: the package's own first file and what everything may use."""
    for long, short in INSTALLED.items():
        if place == long or place.startswith(long + "/"):
            return short + "/"
    for room in ROOMS:
        if (
            (room.endswith("/") and place.startswith(room))
            or room == f"{place}.py"
            or place.startswith(room[:-3] + "/")
        ):
            return room
    return None


def test_rooms_use_only_rooms_that_are_drawn_below():
    wrong = []
    for path in python_files():
        mine = room_of(place_of(path))
        for name in imports_of(path):
            theirs = room_of(name)
            if mine and theirs and ROOMS.index(theirs) < ROOMS.index(mine):
                wrong.append(f"{path.relative_to(REPOSITORY)} imports {name}")
    assert wrong == []


def test_files_of_modeling_use_only_files_that_are_drawn_below():
    wrong = []
    for index, name in enumerate(MODELING):
        above = {f"ponder_hf/modeling/{file[:-3]}" for file in MODELING[: index + 1]}
        imported = {each.rpartition("/")[0] for each in imports_of(REPOSITORY / "modeling" / name)}
        wrong += [f"{name} imports {each}" for each in sorted(imported & above)]
    assert wrong == []


def test_every_file_of_modeling_is_drawn():
    assert sorted(MODELING) == sorted(path.name for path in (REPOSITORY / "modeling").glob("[!_]*.py"))


def test_every_room_is_in_the_table():
    places = {f"modeling/{path.name}" for path in (REPOSITORY / "modeling").glob("[!_]*.py")} | {"conversion/"}
    for path in (REPOSITORY / "ponder_hf").iterdir():
        if path.is_dir() and (path / "__init__.py").exists():
            places.add(f"ponder_hf/{path.name}/")
        elif path.suffix == ".py" and path.name != "__init__.py":
            places.add(f"ponder_hf/{path.name}")
    named = set(re.findall(r"`([^` ]+)`", TABLE))
    assert places - named == set()


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`([^` ]+/[^` ]*)`", TABLE))))
def test_what_the_table_names_is_there(name):
    assert (REPOSITORY / name).exists()
