"""Find a checkpoint, in a folder or on the Hub, and check that it is whole before anything heavy is done with it."""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import list_repo_files, snapshot_download
from huggingface_hub.utils import TensorInfo
from huggingface_hub.utils.sha import git_hash, sha_fileobj

from ponder_hf.errors import DownloadStopped, reading
from ponder_hf.modeling import PonderingConfig, PonderingError

from .files import ADAPTER_CONFIG, CONFIG, TRAVELLING_FILES, read_json
from .stored_weights import INDEX, WEIGHTS, no_weights, num_bytes, read_headers, shard_names


# What git allows in no name of a branch or tag. The Hub's client would read any file here that one is the path of.
_NO_REVISION = re.compile(r"^$|^/|/$|//|\.\.|[ ~^:?*\[\\]|@\{|^-|(^|/)\.|\.lock$")
_NUMBERS_OF_LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")  # as configurations call it
_SHA256, _GIT = re.compile("[0-9a-f]{64}"), re.compile("[0-9a-f]{40}")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that has been found and whose files are whole.

    Attributes:
        name: what the user called it.
        folder: where its files lie.
        revision: its commit, where it came from the Hub.
        config: the contents of config.json.
        tensors: each stored weight's name to its dtype and shape.
    """

    name: str
    folder: Path
    revision: str | None
    config: dict[str, Any]
    tensors: dict[str, TensorInfo] = field(repr=False)

    @property
    def is_pondering(self) -> bool:
        return self.config.get("model_type") == PonderingConfig.model_type

    @property
    def num_bytes(self) -> int:
        return num_bytes(self.tensors)


def open_checkpoint(source: str | os.PathLike, revision: str | None = None) -> Checkpoint:
    """Find the checkpoint `source` and check that it is whole.

    Args:
        source: a folder, or a Hub id. Of a model on the Hub only the files that are needed are downloaded; a token
            comes from the environment (HF_TOKEN) or from `hf auth login`.
        revision: the branch, tag or commit of a model on the Hub.

    Raises:
        PonderingError: there is no such checkpoint, or a file of it is missing, broken or truncated.
    """
    name = str(source)
    folder = find_folder(name, revision)
    commit = None
    if folder is None:
        folder = _download(name, revision)
        commit = folder.name
    if not (folder / CONFIG).is_file():
        raise PonderingError(not_a_model(name, folder))
    checkpoint = Checkpoint(name, folder, commit, read_json(folder / CONFIG), read_headers(folder))
    _check_layers(checkpoint)
    return checkpoint


def _check_layers(checkpoint):
    """Before a model is built, even one without weights: a billion layers take hours, and all memory."""
    base = checkpoint.config.get("base_config")
    for config in (checkpoint.config, base if isinstance(base, dict) else {}):
        for name in _NUMBERS_OF_LAYERS:
            num_layers = config.get(name)
            if isinstance(num_layers, int) and checkpoint.tensors and num_layers > len(checkpoint.tensors):
                raise PonderingError(
                    f"config.json of {checkpoint.name} has {num_layers:,} layers (`{name}`), but its weights are "
                    f"{len(checkpoint.tensors):,} tensors in all: they do not belong together, get both again"
                )


def find_folder(name: str, revision: str | None = None) -> Path | None:
    """The folder that `name` is the path of, or None where it is a Hub id.

    Raises:
        PonderingError: it is neither, or a revision is given for a folder, which has none.
    """
    if not name.strip():
        raise PonderingError("the name of the checkpoint is empty: give a folder or a Hub id")
    folder = Path(name).expanduser()
    with reading(name):
        is_folder, exists = folder.is_dir(), folder.exists()
    if exists and not is_folder:
        raise PonderingError(f"{name} is a file: give the folder that holds config.json and the weights")
    if is_folder and revision is not None:
        raise PonderingError(f"{name} is a folder, which has no revisions: leave `revision` out")
    if is_folder:
        return folder
    if name.startswith((".", "~", "/")) or "\\" in name:
        raise PonderingError(f"there is no folder {name}: check the path")
    if revision is not None and (_NO_REVISION.search(revision) or not revision.isprintable()):
        raise PonderingError(f"`revision` {revision!r} cannot be one: give a branch, a tag or a commit")
    return None


def not_a_model(name: str, folder: Path) -> str:
    """What to say of a folder without config.json."""
    if (folder / ADAPTER_CONFIG).exists():
        return f"{name} is a PEFT adapter: merge it into its base model and save that first"
    return f"{name} is not a model: it has no {CONFIG}"


def download(name: str, patterns: Iterable[str], revision: str | None = None) -> Path:
    """The folder in the Hub's cache with those files of a model whose names match one of `patterns`.

    Raises:
        PonderingError: there is no such model, or a file arrived damaged.
    """
    patterns = list(patterns)
    with reading(name):
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
        paths = sorted({path for pattern in patterns for path in folder.rglob(pattern) if path.is_file()})
    check_files(name, paths)
    return folder


def download_small_files(name: str, revision: str | None = None) -> Path:
    """The folder in the Hub's cache with all files of a model that its weights are not: configuration, tokenizer."""
    return download(name, [CONFIG, INDEX, ADAPTER_CONFIG, *TRAVELLING_FILES], revision)


def _download(name: str, revision: str | None) -> Path:
    """The folder in the Hub's cache with the model's files: the small ones first, which say where the weights are."""
    folder = download_small_files(name, revision)
    if not (folder / CONFIG).exists():
        return folder
    names = shard_names(folder) or [WEIGHTS]
    missing = [folder / name for name in names if not (folder / name).exists()]  # the rest was checked when it came
    with reading(name):
        snapshot_download(name, revision=folder.name, allow_patterns=names)
    check_files(name, [path for path in missing if path.exists()])
    if shard_names(folder) is None:
        raise PonderingError(_nothing_downloaded(name, folder, revision))
    return folder


def _nothing_downloaded(name: str, folder: Path, revision: str | None) -> str:
    """What to say of a model on the Hub that has no safetensors files, by the names of the files that it has."""
    try:
        with reading(name):
            names = list_repo_files(name, revision=folder.name)
    except PonderingError:  # offline: what is in the cache
        names = [path.name for path in folder.iterdir()]
    at = "" if revision is None else f", revision={revision!r}"
    copy = name.replace("/", "-")
    place = f"F=h.snapshot_download({name!r}{at}, local_dir={copy!r})"
    return no_weights(name, sorted(name for name in names if "/" not in name), place)


def check_files(source: str, paths: Iterable[Path]) -> None:
    """Hold files in the Hub's cache against the hash that the Hub gave with them, and take a damaged one out.

    The client looks at a file's size only when it arrives; its own `HfApi.verify_repo_checksums` asks the Hub for the
    list of files at every call and reads all of them. In the cache a snapshot's file is a link to a blob that is named
    by the hash: SHA-256 of a large file, git's own of any other.

    Args:
        source: the Hub id, for the message.
        paths: of files in a snapshot. Where a cache has no links (Windows without the right to make them) nothing is
            known of their hash, and they pass.

    Raises:
        DownloadStopped: a file arrived damaged. The next download fetches it again.
    """
    for path in paths:
        with reading(source):
            if not path.is_symlink() or _is_whole(path, path.readlink().name):
                continue
            (path.parent / path.readlink()).unlink(missing_ok=True)
            path.unlink()
        raise DownloadStopped(
            f"{path.name} of {source} arrived damaged (its hash is another): it is removed, try again"
        )


def _is_whole(path: Path, expected: str) -> bool:
    if _SHA256.fullmatch(expected):
        with path.open("rb") as file:
            return sha_fileobj(file).hex() == expected
    return not _GIT.fullmatch(expected) or git_hash(path.read_bytes()) == expected
