"""Push a checkpoint's folder to the Hub: in one commit, so that nobody ever sees half of it."""

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import RevisionNotFoundError, validate_repo_id
from huggingface_hub.utils.sha import git_hash, sha_fileobj

from ponder_hf import PonderingError
from ponder_hf.conversion import open_checkpoint
from ponder_hf.conversion.files import read_json

from . import card as cards
from .code import installed_code
from .contents import read_contents
from .facts import facts_of_folder, hub_id, with_base_card
from .failures import pushing


MAIN = "main"
CONFIG, ADAPTER_CONFIG = "config.json", "adapter_config.json"
# Files of an earlier push that transformers would load in place of the new ones, or beside them.
_STALE = re.compile(r"(model|adapter_model)(-\d+-of-\d+)?\.safetensors(\.index\.json)?")


@dataclass(frozen=True)
class Plan:
    """What is to be pushed: each path in the repository to a Path here or to bytes; `left_out`: files that stay."""

    folder: Path
    repository: str
    files: dict
    left_out: tuple

    def listing(self):
        return [{"path": path, "size": size_of(content)} for path, content in sorted(self.files.items())]


def push(
    folder,
    repository,
    *,
    revision=None,
    private=False,
    create_pr=False,
    dry_run=False,
    message=None,
    base_model=None,
    allowed=(),
    skip_unsafe=False,
    token=None,
    tags=(),
):
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
        allowed, skip_unsafe: see contents.read_contents.
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
        raise PonderingError("--create-pr opens a pull request to main: leave --revision out")
    folder = Path(str(folder)).expanduser()
    contents = read_contents(_checked(folder), allowed, skip_unsafe)
    plan = Plan(folder, repository, _files_of(contents, base_model), contents.left_out)
    if dry_run:
        return {"repository": repository, "dry_run": True, "files": plan.listing(), "left_out": list(plan.left_out)}
    if (token or get_token()) is None:
        raise PonderingError("pushing needs a token: set HF_TOKEN, or log in with `hf auth login`")
    api = HfApi(token=token)
    with pushing(repository):
        repository = api.create_repo(repository, private=private or None, exist_ok=True).repo_id
        head, remote = _remote(api, repository, MAIN if create_pr else revision or MAIN)
        plan = Plan(folder, repository, dict(plan.files), plan.left_out)
        plan.files[cards.CARD] = write_card(plan, api, remote, head, base_model, tags).encode()
        return _commit(api, plan, head, remote, revision or MAIN, create_pr, message)


def check_name(repository):
    """Raise a PonderingError unless `repository` can be a model's id on the Hub."""
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise PonderingError(f"{repository!r} cannot be the name of a model on the Hub: say NAME/MODEL") from error


def _checked(folder):
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
        raise PonderingError(f"{folder} is a plain checkpoint: convert it first, with `ponder-hf convert`")
    return folder


def _files_of(contents, base_model):
    """Each path to push to where its content is. Paths of this machine in config files are not pushed."""
    folder, files = contents.folder, {name: contents.folder / name for name in contents.files}
    if ADAPTER_CONFIG in files:
        return {**_adapter_files(files), ADAPTER_CONFIG: _adapter_config(folder, base_model)}
    if not any(name.endswith(".py") for name in files):
        files.update(installed_code())
    config = read_json(folder / CONFIG)
    base = config.get("base_config", {})
    named = base_model or hub_id(base.get("_name_or_path")) or ""
    if base.get("_name_or_path", "") != named:
        config["base_config"] = {**base, "_name_or_path": named}
        files[CONFIG] = _json(config)
    return files


def _adapter_files(files):
    """Those of an adapter alone: its run may have written the base that it belongs to beside it."""
    return {name: path for name, path in files.items() if not name.startswith("base/")}


def _adapter_config(folder, base_model):
    config = read_json(folder / ADAPTER_CONFIG)
    named = base_model or hub_id(config.get("base_model_name_or_path"))
    if named is None:
        raise PonderingError(
            f"{folder} belongs to the base {config.get('base_model_name_or_path')}, which is not on the Hub: push "
            "that first, then this with --base-model and its name there"
        )
    changes = {"base_model_name_or_path": named}
    mapping = config.get("auto_mapping")
    if isinstance(mapping, dict):  # a class of this process; the base brings its own
        changes["auto_mapping"] = None
    return _json({**config, **changes})


def _json(content):
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


def _remote(api, repository, revision):
    """The commit of a branch, and each path there to its RepoFile. A branch that does not exist yet begins as main."""
    try:
        head = api.model_info(repository, revision=revision).sha
    except RevisionNotFoundError:
        head = api.model_info(repository).sha
    entries = api.list_repo_tree(repository, revision=head, recursive=True)
    return head, {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}


def write_card(plan, api, remote, head, base_model=None, tags=()):
    """The model card to push: facts, and what people wrote in the folder's or the repository's card."""
    facts = replace(facts_of_folder(plan.folder, plan.repository), more_tags=tuple(tags))
    if base_model is not None or facts.is_adapter:
        base_model = base_model or json.loads(plan.files[ADAPTER_CONFIG])["base_model_name_or_path"]
        facts = replace(facts, base_model=base_model)
    new = cards.render(with_base_card(facts))
    local = plan.folder / cards.CARD
    local = local.read_text(encoding="utf-8") if local.is_file() else None
    if local is not None and cards.is_untouched(local):
        new, local = cards.complete(new, local), None
    old = local
    if old is None and cards.CARD in remote:
        path = api.hf_hub_download(plan.repository, cards.CARD, revision=head)
        old = Path(path).read_text(encoding="utf-8")
    card = cards.merge(new, old)
    cards.check(card)
    return card


def _commit(api, plan, head, remote, revision, create_pr, message):
    changed = {path: content for path, content in plan.files.items() if not _is_there(remote.get(path), content)}
    stale = [path for path in remote if _STALE.fullmatch(path) and path not in plan.files]
    result = {
        "repository": plan.repository,
        "dry_run": False,
        "files": plan.listing(),
        "left_out": list(plan.left_out),
        "uploaded": sorted(changed),
        "deleted": stale,
        "revision": revision,
        "commit": head,
        "pull_request": None,
        "url": f"{api.endpoint}/{plan.repository}",
    }
    if not changed and not stale:
        return result
    operations = [CommitOperationAdd(path, str(c) if isinstance(c, Path) else c) for path, c in changed.items()]
    operations += [CommitOperationDelete(path) for path in stale]
    if revision != MAIN and not create_pr:
        api.create_branch(plan.repository, branch=revision, revision=head, exist_ok=True)
    done = api.create_commit(
        plan.repository,
        operations,
        commit_message=message or f"Push {len(changed)} file{'' if len(changed) == 1 else 's'} with ponder_hf",
        revision=None if revision == MAIN else revision,
        create_pr=create_pr,
        parent_commit=head,
    )
    return {**result, "commit": done.oid, "pull_request": done.pr_url}


def _is_there(entry, content):
    """Whether the repository's file has this content already: by the SHA-256 that LFS keeps, or by git's own hash."""
    if entry is None or entry.size != size_of(content):
        return False
    if entry.lfs is None:
        return entry.blob_id == git_hash(content if isinstance(content, bytes) else content.read_bytes())
    if isinstance(content, bytes):
        return False
    with content.open("rb") as file:
        return entry.lfs.sha256 == sha_fileobj(file).hex()


def size_of(content):
    return len(content) if isinstance(content, bytes) else content.stat().st_size
