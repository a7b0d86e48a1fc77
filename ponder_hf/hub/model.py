"""`model.push_to_hub`, with a model card and the tokenizer."""

import tempfile
from pathlib import Path

from huggingface_hub import CommitInfo

from ponder_hf import PonderingError
from ponder_hf.conversion.checkpoint import download_small_files
from ponder_hf.conversion.files import copy_files, travelling_files

from .push import push


def push_model(
    model,
    repo_id,
    *,
    commit_message=None,
    private=None,
    token=None,
    revision=None,
    create_pr=False,
    max_shard_size="5GB",
    tags=None,
    tokenizer=None,
):
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


def _copy_tokenizer(model, folder):
    source = model.config._name_or_path or model.config.base_config._name_or_path
    if not source:
        return
    try:
        found = Path(source) if Path(source).is_dir() else download_small_files(source)
        names = [name for name in travelling_files(found) if not (folder / name).exists()]
    except PonderingError:  # where it came from is no longer there: then the model goes alone
        return
    copy_files(names, found, folder)
