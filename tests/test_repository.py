"""The rules of the repository: what the archives contain, how modeling/ imports, how large files may be."""

import ast
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from transformers.dynamic_module_utils import get_imports, get_relative_imports


REPOSITORY = Path(__file__).resolve().parents[1]
MODELING_FILES = sorted((REPOSITORY / "modeling").glob("*.py"))
LIBRARY_FILES = sorted(
    path for folder in ("ponder_hf", "modeling", "conversion") for path in (REPOSITORY / folder).rglob("*.py")
)

MAX_FUNCTION_LINES = 90
MAX_FILE_LINES = 700
MAX_FILE_BYTES = 1_000_000
PICKLE_SUFFIXES = {".pkl", ".pickle", ".pt", ".pth", ".ckpt", ".bin", ".joblib"}
# Where the folders of the checkout lie once they are installed.
INSTALLED_FOLDERS = {"ponder_hf": "ponder_hf", "modeling": "ponder_hf/modeling", "conversion": "ponder_hf/conversion"}


def relative_name(path: Path) -> str:
    return path.relative_to(REPOSITORY).as_posix()


def repository_files() -> list[Path]:
    """The files that git tracks or would add; all but hidden folders and build outputs where there is no git."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listing = subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        skipped = {"build", "dist", "__pycache__", "ponder-demo"}
        paths = (path.relative_to(REPOSITORY) for path in REPOSITORY.rglob("*"))
        names = [str(p) for p in paths if not any(part in skipped or part.startswith(".") for part in p.parts)]
    else:
        names = listing.split("\0")
    return [path for path in (REPOSITORY / name for name in names if name) if path.is_file()]


@pytest.fixture(scope="module")
def archives(tmp_path_factory) -> Path:
    """A folder with the source archive and the wheel built from it, made from a copy of the tree, without network."""
    pytest.importorskip("build", reason="needs ponder-hf[test]")
    copy = tmp_path_factory.mktemp("source") / "tree"
    for path in repository_files():
        target = copy / path.relative_to(REPOSITORY)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    folder = tmp_path_factory.mktemp("archives")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(copy)]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


@pytest.mark.slow
def test_wheel_contains_exactly_the_packages(archives):
    (wheel,) = archives.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    expected = set()
    for source, installed in INSTALLED_FOLDERS.items():
        for path in repository_files():
            inside = path.relative_to(REPOSITORY)
            if inside.parts[0] == source and path.suffix in {".py", ".html", ".js", ".json", ".md", ".typed", ".yaml"}:
                expected.add(f"{installed}/{inside.relative_to(source).as_posix()}")
    assert names == expected


@pytest.mark.slow
def test_wheel_works_from_any_folder(archives, tmp_path):
    (wheel,) = archives.glob("*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
        (entry_points,) = [name for name in archive.namelist() if name.endswith("entry_points.txt")]
        assert "ponder-hf = ponder_hf.cli:main" in archive.read(entry_points).decode()
    program = (
        f"import sys; sys.path.insert(0, {str(site)!r})\n"
        "import ponder_hf, ponder_hf.cli, ponder_hf.conversion, ponder_hf.modeling\n"
        "print(ponder_hf.__file__, ponder_hf.modeling.__file__, ponder_hf.conversion.__file__, sep='\\n')"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    expected = [site / folder / "__init__.py" for folder in INSTALLED_FOLDERS.values()]
    assert [Path(line) for line in result.stdout.split()] == expected


def import_problems(path: Path) -> list[str]:
    """What in a modeling/ file's imports would keep it from shipping with a checkpoint or from loading anywhere.

    transformers requires every package that `get_imports` finds, and copies every file that `get_relative_imports`
    finds. The latter reads lines, not syntax, so it misses some imports and takes lines of docstrings for imports.
    """
    siblings = {file.stem for file in path.parent.glob("*.py")}
    allowed = {"torch", "transformers", *sys.stdlib_module_names}
    problems = [f"requires {name}" for name in get_imports(path) if name not in allowed]
    relative = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            absolute = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            absolute = [node.module]
        elif isinstance(node, ast.ImportFrom):
            absolute = []
            relative.add(node.module)
            if node.level > 1 or node.module not in siblings:
                problems.append(f"line {node.lineno}: only `from .sibling import name` is followed by transformers")
        else:
            continue
        if any(name.partition(".")[0] == "ponder_hf" for name in absolute):
            problems.append(
                f"line {node.lineno}: imports ponder_hf, which is not installed where checkpoints are used"
            )
    shipped = set(get_relative_imports(path))
    if shipped != relative:
        problems.append(f"transformers ships {sorted(shipped)}, but Python imports {sorted(map(str, relative))}")
    return problems


@pytest.mark.parametrize("path", MODELING_FILES, ids=relative_name)
def test_modeling_file_is_self_contained(path):
    assert import_problems(path) == []


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("from . import sibling", "only `from .sibling import name`"),
        ("from ..sibling import name", "only `from .sibling import name`"),
        ("from .missing import name", "only `from .sibling import name`"),
        ("def load():\n    from .sibling.part import name", "only `from .sibling import name`"),
        ("import ponder_hf", "imports ponder_hf"),
        ("try:\n    from ponder_hf import name\nexcept ImportError:\n    name = None", "imports ponder_hf"),
        ("def load():\n    from numpy.linalg import norm", "requires numpy"),
        ("if TYPE_CHECKING:\n    import peft", "requires peft"),
        ('"""Example.\n\nfrom .usage import name\n"""', "transformers ships"),
    ],
)
def test_import_problems_are_found(tmp_path, source, problem):
    (tmp_path / "sibling.py").touch()
    path = tmp_path / "modeling_example.py"
    path.write_text("import torch\nfrom .sibling import name\n", encoding="utf-8")
    assert import_problems(path) == []
    path.write_text(source, encoding="utf-8")
    assert any(problem in found for found in import_problems(path))


def test_modeling_is_flat():
    assert MODELING_FILES, "modeling/ has no Python files"
    assert sorted((REPOSITORY / "modeling").rglob("*.py")) == MODELING_FILES


@pytest.mark.parametrize("path", LIBRARY_FILES, ids=relative_name)
def test_file_and_its_functions_are_short(path):
    source = path.read_text(encoding="utf-8")
    assert source.count("\n") <= MAX_FILE_LINES
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    lengths = {
        f"{node.name} (line {node.lineno})": node.end_lineno - node.lineno + 1
        for node in ast.walk(ast.parse(source))
        if isinstance(node, functions)
    }
    assert {name: length for name, length in lengths.items() if length > MAX_FUNCTION_LINES} == {}


def signatures(node: ast.AST, within: str = ""):
    """Each public function and method below `node`, with its dotted name: no part of it begins with an underscore."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            if not child.name.startswith("_") or child.name in ("__init__", "__call__"):
                yield within + child.name, child
        elif isinstance(child, ast.ClassDef):
            if not child.name.startswith("_"):
                yield from signatures(child, f"{within}{child.name}.")
        else:
            yield from signatures(child, within)


def missing_annotations(source: str) -> list[str]:
    missing = []
    for name, function in signatures(ast.parse(source)):
        given = function.args
        parameters = [*given.posonlyargs, *given.args]
        is_static = any(isinstance(each, ast.Name) and each.id == "staticmethod" for each in function.decorator_list)
        if "." in name and not is_static:
            parameters = parameters[1:]
        parameters += [*given.kwonlyargs, *filter(None, (given.vararg, given.kwarg))]
        missing += [f"{name}({each.arg})" for each in parameters if each.annotation is None]
        if function.returns is None:
            missing.append(f"{name} -> ?")
    return missing


@pytest.mark.parametrize("path", LIBRARY_FILES, ids=relative_name)
def test_public_signatures_are_annotated(path):
    assert missing_annotations(path.read_text(encoding="utf-8")) == []


def test_missing_annotations_are_found():
    source = """
def _private(a): pass
class _Private:
    def method(self, a): pass
class Public:
    def __init__(self, a: int, *args, b=1, **kwargs): pass
    @staticmethod
    def static(a): pass
    @classmethod
    def made(cls) -> "Public": pass
try:
    import x
except ImportError:
    def x() -> None:
        def inner(a): pass
"""
    assert missing_annotations(source) == [
        "Public.__init__(b)",
        "Public.__init__(args)",
        "Public.__init__(kwargs)",
        "Public.__init__ -> ?",
        "Public.static(a)",
        "Public.static -> ?",
    ]


def test_repository_holds_no_large_files():
    sizes = {relative_name(path): path.stat().st_size for path in repository_files()}
    assert {name: size for name, size in sizes.items() if size > MAX_FILE_BYTES} == {}


def is_pickle(path: Path) -> bool:
    """Whether a file is named like a pickle, begins like one, or is an archive of torch.save."""
    with path.open("rb") as file:
        start = file.read(2)
    if path.suffix in PICKLE_SUFFIXES or (start[:1] == b"\x80" and start[1:] in {b"\2", b"\3", b"\4", b"\5"}):
        return True
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith(".pkl") for name in archive.namelist())


def test_repository_holds_no_pickles():
    assert [relative_name(path) for path in repository_files() if is_pickle(path)] == []


def test_make_help_lists_every_target():
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"^([a-z][a-z-]*):(?!=)", makefile, flags=re.MULTILINE)
    assert {"help", "setup", "demo", "test", "style", "compat", "bench", "clean"} <= set(targets)
    result = subprocess.run(["make", "help"], cwd=REPOSITORY, check=True, capture_output=True, text=True)
    listed = {line.split()[0]: line.split()[1:] for line in result.stdout.splitlines() if line.startswith("  ")}
    assert sorted(listed) == sorted(targets)
    assert all(listed.values()), "a target has no description"
