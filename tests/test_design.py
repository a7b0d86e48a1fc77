"""docs/design.md is held against the tree: its drawings against the imports, its table against the files."""

import ast
import re
from pathlib import Path

import pytest

import ponder_hf


REPOSITORY = Path(__file__).resolve().parents[1]
DESIGN = (REPOSITORY / "docs/design.md").read_text(encoding="utf-8")
# Each drawing as the list of what stands at the beginning of its lines.
ROOMS, MODELING = (
    [line.split()[0] for line in drawing.strip().splitlines()]
    for drawing in re.findall(r"```\n(.*?)```", DESIGN.partition("## The rooms")[2], flags=re.DOTALL)[:2]
)
TABLE = DESIGN.partition("## To change this, touch that")[2].partition("\n## ")[0]
INSTALLED_FOLDERS = {"ponder_hf": "ponder_hf", "modeling": "ponder_hf/modeling", "conversion": "ponder_hf/conversion"}
# They import others when asked for.
FACE = {"ponder_hf/__init__.py", "ponder_hf/auto_classes.py"}
FILES = sorted(
    path.relative_to(REPOSITORY) for place in INSTALLED_FOLDERS for path in (REPOSITORY / place).rglob("*.py")
)


def short(room):
    """A room's name in an import: "ponder_hf/hub/" is hub, "ponder_hf/errors.py" errors, "modeling/" modeling."""
    return room.removeprefix("ponder_hf/").removesuffix("/").removesuffix(".py")


def room_of(path):
    return (
        path.stem
        if len(path.parts) == 2 and path.parts[0] == "ponder_hf"
        else path.parts[path.parts[0] == "ponder_hf"]
    )


def imported(path):
    """What a file imports from this project, also within functions: dotted names as lists, without ponder_hf."""
    package = [*INSTALLED_FOLDERS[path.parts[0]].split("/"), *path.parts[1:-1]]
    for node in ast.walk(ast.parse((REPOSITORY / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) + 1 - node.level] if node.level else []
            start += node.module.split(".") if node.module else []
            names = [[*start, alias.name] for alias in node.names]
        else:
            continue
        yield from (name[1:] for name in names if name[0] == "ponder_hf" and len(name) > 1)


def imported_rooms(path):
    # By this table the package finds its names: only it says to which room an import from `ponder_hf` goes.
    places = {name: place for place, names in ponder_hf._NAMES.items() for name in names}
    return {places.get(name[0], name[0]) for name in imported(path)} - {"__version__"}


@pytest.mark.parametrize("path", [path for path in FILES if path.as_posix() not in FACE], ids=str)
def test_a_room_uses_only_rooms_that_are_drawn_below(path):
    rooms = [short(room) for room in ROOMS]
    assert imported_rooms(path) <= set(rooms[rooms.index(room_of(path)) :])


@pytest.mark.parametrize("path", sorted(REPOSITORY.glob("modeling/[!_]*.py")), ids=lambda path: path.name)
def test_a_file_of_modeling_uses_only_files_that_are_drawn_below(path):
    names = {f"{name[1]}.py" for name in imported(path.relative_to(REPOSITORY)) if name[0] == "modeling"}
    assert names <= set(MODELING[MODELING.index(path.name) + 1 :])


def test_what_is_drawn_is_there():
    assert [room for room in ROOMS if not (REPOSITORY / room).exists()] == []
    assert [name for name in MODELING if not (REPOSITORY / "modeling" / name).exists()] == []


def test_every_room_is_in_the_table():
    places = {f"modeling/{path.name}" for path in (REPOSITORY / "modeling").glob("[!_]*.py")} | {"conversion/"}
    for path in (REPOSITORY / "ponder_hf").iterdir():
        if path.is_dir() and (path / "__init__.py").exists():
            places.add(f"ponder_hf/{path.name}/")
        elif path.suffix == ".py":
            places.add(f"ponder_hf/{path.name}")
    named = set(re.findall(r"`([^` ]+)`", TABLE))
    assert places - named == set()


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`([^` ]+/[^` ]*)`", TABLE))))
def test_what_the_table_names_is_there(name):
    assert (REPOSITORY / name).exists()
