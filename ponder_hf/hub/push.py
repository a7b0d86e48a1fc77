"""Push a checkpoint's folder to the Hub: in one commit, so that nobody ever sees half of it."""

import json
import logging
import os
import re
import tempfile
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import RevisionNotFoundError, validate_repo_id
from huggingface_hub.utils.sha import git_hash, sha_fileobj
from transformers import PreTrainedTokenizerBase

from ponder_hf.conversion import open_checkpoint
from ponder_hf.conversion.checkpoint import download_small_files
from ponder_hf.conversion.files import ADAPTER_CONFIG, CONFIG, copy_files, read_json, travelling_files
from ponder_hf.conversion.stored_weights import stored_weights, warnings_of_nan
from ponder_hf.errors import pushing
from ponder_hf.modeling import PonderingError, PonderingForCausalLM, PonderingModel

from . import card as cards
from .card import facts_of_folder, hub_id, with_base_card
from .code import installed_code
from .push_contents import read_contents


logger = logging.getLogger(__name__)

MAIN = "main"
# Files of an earlier push that transformers would load in place of the new ones, or beside them.
_STALE = re.compile(r"(model|adapter_model)(-\d+-of-\d+)?\.safetensors(\.index\.json)?")


@dataclass
class Upload:
    """What is to be pushed.

    Attributes:
        folder: of the checkpoint.
        repository: the Hub id.
        files: each path in the repository to a file here, or to its content.
        left_out: the files of the folder that stay.
    """

    folder: Path
    repository: str
    files: dict[str, Path | bytes]
    left_out: list[str]

    def listing(self) -> list[dict[str, Any]]:
        return [{"path": path, "size": size_of(content)} for path, content in sorted(self.files.items())]


def push(
    folder: str | os.PathLike,
    repository: str,
    *,
    revision: str | None = None,
    private: bool | None = False,
    create_pr: bool = False,
    dry_run: bool = False,
    message: str | None = None,
    base_model: str | None = None,
    allow: str | Collection[str] = (),
    skip_unsafe: bool = False,
    token: str | None = None,
    tags: Iterable[str] = (),
) -> dict[str, Any]:
    """Push a checkpoint, with its code, tokenizer, generation defaults and model card.

    Args:
        folder: a pondering checkpoint or a PEFT adapter of one.
        repository: the Hub id, "name/model". It is made where it does not exist; alone "model" is below the user.
        revision: the branch to push to, made where it does not exist; None: main.
        private: whether a repository that is made here is private.
        create_pr: open a pull request in place of a commit to main.
        dry_run: do nothing, only say what would be pushed. The Hub is not asked.
        message: of the commit.
        base_model: the Hub id of the base, where the files do not say it.
        allow: kinds of files, "pickles", "secrets", "optimiser-states" or "links" (out of the folder), that are pushed
            although they should not be.
        skip_unsafe: leave such files out, in place of refusing the folder.
        token: in place of HF_TOKEN and of `hf auth login`.
        tags: more of them for the model card.

    Returns:
        What was done, as a dict that JSON can hold. "uploaded": the files that were new or had changed.

    Raises:
        PonderingError: something cannot be used; nothing was pushed.
        PushStopped: it began and did not come to its end. The repository is as it was.
    """
    check_name(repository)
    if create_pr and revision not in (None, MAIN):
        raise PonderingError("`create_pr` opens a pull request to main: leave `revision` out")
    folder = Path(str(folder)).expanduser()
    names, left_out = read_contents(_checked(folder), allow, skip_unsafe)
    for warning in warnings_of_nan(str(folder), stored_weights(folder, filter(_is_weights, names))):
        logger.warning(warning)
    upload = Upload(folder, repository, _files_to_push(folder, names, base_model), left_out)
    if dry_run:
        return {"repository": repository, "dry_run": True, "files": upload.listing(), "left_out": left_out}
    if (token or get_token()) is None:
        raise PonderingError("pushing needs a token: set HF_TOKEN, or log in with `hf auth login`")
    api = HfApi(token=token)
    with pushing(repository):
        upload.repository = api.create_repo(repository, private=private or None, exist_ok=True).repo_id
        head, remote = _remote(api, upload.repository, MAIN if create_pr else revision or MAIN)
        upload.files[cards.CARD] = _card(upload, api, remote, head, base_model, tags).encode()
        return _commit(api, upload, head, remote, revision or MAIN, create_pr, message)


def _is_weights(name: str) -> bool:
    return name.endswith(".safetensors")


def check_name(repository: str) -> None:
    """Raise a PonderingError unless `repository` can be a model's id on the Hub."""
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise PonderingError(f"{repository!r} cannot be the name of a model on the Hub: say NAME/MODEL") from error


def _checked(folder: Path) -> Path:
    """The folder, if it holds a whole pondering checkpoint or an adapter."""
    if not folder.is_dir():
        raise PonderingError(f"there is no folder {folder}: give the folder of a checkpoint")
    if (folder / ADAPTER_CONFIG).is_file():
        read_json(folder / ADAPTER_CONFIG)
        if not (folder / "adapter_model.safetensors").is_file():
            raise PonderingError(f"{folder} has no adapter_model.safetensors: it is not a whole adapter")
        return folder
    found = open_checkpoint(folder)
    if not found.is_pondering:
        raise PonderingError(f"{folder} is a plain checkpoint: convert it first, with `ponder_hf.convert`")
    return folder


def _files_to_push(folder: Path, names: list[str], base_model: str | None) -> dict[str, Path | bytes]:
    """Each path to push to where its content is. Paths of this machine in config files are not pushed."""
    files: dict[str, Path | bytes] = {name: folder / name for name in names}
    if ADAPTER_CONFIG in files:  # its run may have written the base that it belongs to beside it
        files[ADAPTER_CONFIG] = _adapter_config(folder, base_model)
        return {name: content for name, content in files.items() if not name.startswith("base/")}
    if not any(name.endswith(".py") for name in names):
        files.update(installed_code())
    config = read_json(folder / CONFIG)
    base = config.get("base_config", {})
    named = base_model or hub_id(base.get("_name_or_path")) or ""
    if base.get("_name_or_path", "") != named:
        config["base_config"] = {**base, "_name_or_path": named}
        files[CONFIG] = _json(config)
    return files


def _adapter_config(folder: Path, base_model: str | None) -> bytes:
    config = read_json(folder / ADAPTER_CONFIG)
    named = base_model or hub_id(config.get("base_model_name_or_path"))
    if named is None:
        raise PonderingError(
            f"{folder} belongs to the base {config.get('base_model_name_or_path')}, which is not on the Hub: push "
            "that first, then this with `base_model` and its name there"
        )
    config["base_model_name_or_path"] = named
    if isinstance(config.get("auto_mapping"), dict):  # a class of this process; the base brings its own
        config["auto_mapping"] = None
    return _json(config)


def _json(content: dict) -> bytes:
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


def _remote(api: HfApi, repository: str, revision: str) -> tuple[str | None, dict[str, RepoFile]]:
    """The commit of a branch, and each path there to its RepoFile. A branch that does not exist yet begins as main."""
    try:
        head = api.model_info(repository, revision=revision).sha
    except RevisionNotFoundError:
        head = api.model_info(repository).sha
    entries = api.list_repo_tree(repository, revision=head, recursive=True)
    return head, {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}


def _card(
    upload: Upload,
    api: HfApi,
    remote: dict[str, RepoFile],
    head: str | None,
    base_model: str | None,
    tags: Iterable[str],
) -> str:
    """The model card to push: facts, and what people wrote in the folder's or the repository's card."""
    facts = facts_of_folder(upload.folder, upload.repository)
    facts = replace(facts, base_model=base_model or facts.base_model, more_tags=tuple(tags))
    card = cards.render(with_base_card(facts))
    local = upload.folder / cards.CARD
    is_edited = False
    if local.is_file():
        text = local.read_text(encoding="utf-8")
        card, is_edited = cards.merge(card, text), not cards.is_untouched(text)
    if cards.CARD in remote and not is_edited:
        path = api.hf_hub_download(upload.repository, cards.CARD, revision=head)
        card = cards.merge(card, Path(path).read_text(encoding="utf-8"))
    cards.check(card)
    return card


def _commit(
    api: HfApi,
    upload: Upload,
    head: str | None,
    remote: dict[str, RepoFile],
    revision: str,
    create_pr: bool,
    message: str | None,
) -> dict[str, Any]:
    changed = {path: content for path, content in upload.files.items() if not _is_there(remote.get(path), content)}
    stale = [path for path in remote if _STALE.fullmatch(path) and path not in upload.files]
    result = {
        "repository": upload.repository,
        "dry_run": False,
        "files": upload.listing(),
        "left_out": upload.left_out,
        "uploaded": sorted(changed),
        "deleted": stale,
        "revision": revision,
        "commit": head,
        "pull_request": None,
        "url": f"{api.endpoint}/{upload.repository}",
    }
    if not changed and not stale:
        return result
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        *(CommitOperationAdd(path, str(c) if isinstance(c, Path) else c) for path, c in changed.items()),
        *(CommitOperationDelete(path) for path in stale),
    ]
    if revision != MAIN and not create_pr:
        api.create_branch(upload.repository, branch=revision, revision=head, exist_ok=True)
    done = api.create_commit(
        upload.repository,
        operations,
        commit_message=message or f"Push {len(changed)} file{'' if len(changed) == 1 else 's'} with ponder_hf",
        revision=None if revision == MAIN else revision,
        create_pr=create_pr,
        parent_commit=head,
    )
    return {**result, "commit": done.oid, "pull_request": done.pr_url}


def _is_there(entry: RepoFile | None, content: Path | bytes) -> bool:
    """Whether the repository's file has this content already: by the SHA-256 that LFS keeps, or by git's own hash."""
    if entry is None or entry.size != size_of(content):
        return False
    if entry.lfs is None:
        return entry.blob_id == git_hash(content if isinstance(content, bytes) else content.read_bytes())
    if isinstance(content, bytes):
        return False
    with content.open("rb") as file:
        return entry.lfs.sha256 == sha_fileobj(file).hex()


def size_of(content: Path | bytes) -> int:
    """In bytes."""
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def push_model(
    model: PonderingForCausalLM | PonderingModel,
    repo_id: str,
    *,
    commit_message: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    max_shard_size: int | str = "5GB",
    tags: Iterable[str] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> CommitInfo:
    """Push a model with its code, generation defaults, model card and tokenizer, in one commit.

    Args:
        model: a PonderingForCausalLM or a PonderingModel.
        repo_id, commit_message, private, token, revision, create_pr, max_shard_size, tags: as transformers has them.
        tokenizer: the one to push; None: that of the checkpoint which the model was loaded or made from, where it has
            one.

    Returns:
        huggingface_hub's CommitInfo.
    """
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / repo_id.rpartition("/")[2]
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        else:
            _copy_tokenizer(model, folder)
        result = push(
            folder,
            repo_id,
            revision=revision,
            private=private,
            create_pr=create_pr,
            message=commit_message,
            token=token,
            tags=tags or (),
        )
    return CommitInfo(
        commit_url=f"{result['url']}/commit/{result['commit']}",
        commit_message=commit_message or "",
        commit_description="",
        oid=result["commit"],
        pr_url=result["pull_request"],
    )


def _copy_tokenizer(model: PonderingForCausalLM | PonderingModel, folder: Path) -> None:
    source = model.config._name_or_path or model.config.base_config._name_or_path
    if not source:
        return
    try:
        found = Path(source) if Path(source).is_dir() else download_small_files(source)
        names = [name for name in travelling_files(found) if not (folder / name).exists()]
    except PonderingError:  # where it came from is no longer there: then the model goes alone
        return
    copy_files(names, found, folder)
