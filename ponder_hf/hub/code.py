"""The code that a checkpoint brings, held against the code of this release by SHA-256."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import ponder_hf.modeling
from ponder_hf import __version__
from ponder_hf.conversion.checkpoint import download, find_folder
from ponder_hf.conversion.files import ADAPTER_CONFIG, CONFIG, TOKENIZER_CONFIG, files_below, read_json
from ponder_hf.errors import reading


SAME, OLDER, CHANGED, NO_CODE = "same", "older release", "changed", "no code"
MODELING = Path(ponder_hf.modeling.__file__).parent
# Each release's files and their SHA-256, written when it is made: `python -m ponder_hf.hub.code`.
RELEASES = Path(__file__).with_name("releases.json")
_CONFIGS = (CONFIG, TOKENIZER_CONFIG, ADAPTER_CONFIG, "processor_config.json")


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def installed_code() -> dict[str, bytes]:
    """Map the name of each file that ships with a checkpoint to its bytes, as it is installed here."""
    return {path.name: path.read_bytes() for path in sorted(MODELING.glob("*.py")) if path.name != "__init__.py"}


def code_of(folder: Path) -> dict[str, bytes]:
    """Map the path of each Python file in a checkpoint's folder to its bytes."""
    with reading(folder):
        paths = [path for path in files_below(folder) if path.suffix == ".py"]
        found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
    return {
        name: content
        for name, content in found.items()
        if not any(part.startswith((".", "__pycache__")) for part in name.split("/"))
    }


def releases() -> dict[str, dict[str, str]]:
    """Map each earlier release to its files' SHA-256."""
    return json.loads(RELEASES.read_text(encoding="utf-8"))


def inspect_code(source: str | os.PathLike, revision: str | None = None) -> dict[str, Any]:
    """Say whether the code in a checkpoint is this release's, an older one's, or something else. None of it is run.

    Args:
        source: a folder or a Hub id. Of a model on the Hub only its code and configuration are downloaded.
        revision: the branch, tag or commit of a model on the Hub.

    Returns:
        A dict that JSON can hold. "status": "same", "older release", "changed" or "no code". "files": for each file
        "same", "changed" with the line of the first difference, "added" (no release has it) or "missing".
        "elsewhere": code that config files name in other repositories, where this look does not reach.

    Raises:
        PonderingError: there is no such checkpoint.
    """
    folder, commit = find_folder(str(source), revision), None
    if folder is None:
        folder = download(str(source), ["*.py", *_CONFIGS], revision)  # "*" reaches into folders
        commit = folder.name
    found, installed = code_of(folder), installed_code()
    # A checkpoint of a run may lie in a folder of its own, with the same files.
    wanted = {name: installed.get(name.rpartition("/")[2]) for name in found} | installed
    files = [_compared(name, found.get(name), wanted[name]) for name in sorted(wanted)]
    elsewhere = _elsewhere(folder)
    release = None
    if not found:
        status, files = NO_CODE, []
    elif all(each["status"] == "same" for each in files):
        status, release = SAME, __version__
    else:
        hashes = {name: sha256(content) for name, content in found.items()}
        release = next((version for version, known in releases().items() if known == hashes), None)
        status = CHANGED if release is None else OLDER
    if elsewhere:
        status = CHANGED
    return {
        "source": str(source),
        "revision": commit,
        "installed": __version__,
        "status": status,
        "release": release,
        "files": files,
        "elsewhere": elsewhere,
    }


def _compared(name: str, found: bytes | None, installed: bytes | None) -> dict[str, Any]:
    entry = {"file": name, "sha256": None if found is None else sha256(found)}
    if found is None:
        return {**entry, "status": "missing"}
    if installed is None:
        return {**entry, "status": "added"}
    if found == installed:
        return {**entry, "status": "same"}
    line, text = _first_difference(found, installed)
    return {**entry, "status": "changed", "line": line, "text": text}


def _first_difference(found: bytes, installed: bytes) -> tuple[int, str]:
    """The number of the first line that differs, and what the checkpoint has there."""
    ours, theirs = installed.splitlines(keepends=True), found.splitlines(keepends=True)
    for index, line in enumerate(theirs):
        if index >= len(ours) or line != ours[index]:
            return index + 1, line.decode("utf-8", "replace").strip()
    return len(theirs) + 1, ""


def _elsewhere(folder: Path) -> list[str]:
    """Code in other repositories that a file of configuration names, as "file: name"."""
    named = []
    for file in _CONFIGS:
        if (folder / file).is_file():
            named += [f"{file}: {value}" for value in _references(read_json(folder / file)) if "--" in value]
    return named


def _references(value: Any) -> list[str]:
    if not isinstance(value, dict):
        return []
    found = []
    for name, inner in value.items():
        if name == "auto_map" and isinstance(inner, dict):
            for reference in inner.values():
                found += [each for each in (reference if isinstance(reference, list) else [reference]) if each]
        else:
            found += _references(inner)
    return found


def record_release() -> None:
    """Write the installed code's SHA-256 into releases.json, under this version."""
    known = {**releases(), __version__: {name: sha256(content) for name, content in installed_code().items()}}
    RELEASES.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    record_release()
