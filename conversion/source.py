"""Find a checkpoint, in a folder or on the Hub, and check it before anything heavy is done with it."""

from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import list_repo_files, snapshot_download

from ponder_hf import PonderingConfig, PonderingError
from ponder_hf.errors import reading

from .checksums import check_files
from .headers import INDEX, WEIGHTS, no_weights, read_headers, read_json, shard_names
from .travel import TEMPLATE_PATTERN, TRAVELLING_FILES, TRAVELLING_FOLDERS


CONFIG = "config.json"
_PATH_STARTS = (".", "~", "/")


@dataclass(frozen=True)
class Source:
    """A checkpoint that has been found and whose files are whole.

    name: what the user called it. folder: where its files lie. revision: its commit, where it came from the Hub.
    config: the contents of config.json. tensors: each stored weight's name to a StoredTensor.
    """

    name: str
    folder: Path
    revision: str | None
    config: dict
    tensors: dict = field(repr=False)

    @property
    def is_pondering(self):
        return self.config.get("model_type") == PonderingConfig.model_type

    @property
    def num_bytes(self):
        return sum(tensor.num_bytes for tensor in self.tensors.values())


def open_source(source, revision=None):
    """Find the checkpoint `source` and check that it is whole.

    Args:
        source: a folder, or a Hub id. Of a model on the Hub only the files that are needed are downloaded; a token
            comes from the environment (HF_TOKEN) or from `hf auth login`.
        revision: the branch, tag or commit of a model on the Hub.

    Raises:
        PonderingError: there is no such checkpoint, or a file of it is missing, broken or truncated.
    """
    name = str(source)
    if not name.strip():
        raise PonderingError("the name of the checkpoint is empty: give a folder or a Hub id")
    folder = Path(name).expanduser()
    with reading(name):
        is_folder, exists = folder.is_dir(), folder.exists()
    if exists and not is_folder:
        raise PonderingError(f"{name} is a file: give the folder that holds config.json and the weights")
    commit = None
    if is_folder and revision is not None:
        raise PonderingError(f"{name} is a folder, which has no revisions: leave the revision out")
    if not is_folder:
        if name.startswith(_PATH_STARTS) or "\\" in name:
            raise PonderingError(f"there is no folder {name}: check the path")
        folder = _download(name, revision)
        commit = folder.name
    if not (folder / CONFIG).is_file():
        raise PonderingError(_not_a_model(name, folder))
    return Source(name, folder, commit, read_json(folder / CONFIG), read_headers(folder))


def download_small_files(name, revision=None):
    """The folder in the Hub's cache with all files of a model that its weights are not: configuration, tokenizer."""
    patterns = [CONFIG, INDEX, "adapter_config.json", *TRAVELLING_FILES]
    patterns += [f"{folder}/{TEMPLATE_PATTERN}" for folder in TRAVELLING_FOLDERS]
    with reading(name):
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    check_files(name, _matching(folder, patterns))
    return folder


def _matching(folder, patterns):
    return [path for pattern in patterns for path in sorted(folder.glob(pattern)) if path.is_file()]


def _download(name, revision):
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


def _nothing_downloaded(name, folder, revision):
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


def _not_a_model(name, folder):
    if (folder / "adapter_config.json").exists():
        return f"{name} is a PEFT adapter: merge it into its base model and save that first"
    return f"{name} is not a model: it has no {CONFIG}"
