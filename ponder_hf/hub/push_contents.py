"""Which files of a checkpoint's folder belong on the Hub, which are left out, and which must not get there."""

import re
import zipfile
from collections.abc import Collection
from pathlib import Path

from huggingface_hub import get_token

from ponder_hf.conversion.files import files_below
from ponder_hf.errors import reading
from ponder_hf.modeling import PonderingError


PICKLES, SECRETS, OPTIMISER_STATES, LINKS = "pickles", "secrets", "optimiser-states", "links"
KINDS = {
    PICKLES: "a pickle, which runs code when it is loaded",
    SECRETS: "holds an access token or a private key",
    OPTIMISER_STATES: "the state of an optimiser, which only the run needs that wrote it",
    LINKS: "a link to a file outside of the folder",
}

_LEFT_OUT = re.compile(r"\..*|_.*|checkpoint-\d+|runs|trainer_state\.json|ponder_training\.json")
_PICKLE_SUFFIXES = {".pkl", ".pickle", ".pt", ".pth", ".ckpt", ".bin", ".joblib", ".dill"}
_STATE = re.compile(r"(optimizer|optimiser|scheduler|scaler|rng_state)([_.\-].*)?|global_step\d+|.*\.distcp")
_SECRET_NAMES = {"token", "stored_tokens", "credentials", "netrc", "id_rsa", "id_ed25519", "id_ecdsa", "id_dsa"}
_SECRET_SUFFIXES = (".pem", ".key", ".p12", ".pfx", ".ppk", ".kdbx", ".env")
_SECRETS = re.compile(
    # Hugging Face, GitHub, GitLab, OpenAI and Anthropic, AWS, Google, Slack, npm, PyPI, Stripe, Databricks, SendGrid.
    rb"\b(?:hf|api_org)_[A-Za-z0-9]{30,}|\bgh[pousr]_[A-Za-z0-9]{36,}|\bgithub_pat_\w{40,}|\bglpat-[\w-]{20,}"
    rb"|\bsk-[A-Za-z0-9_-]{32,}|\b(?:AKIA|ASIA)[A-Z0-9]{16}\b|\bAIza[\w-]{35}|\bya29\.[\w-]{30,}"
    rb"|\bxox[abeprs]-[A-Za-z0-9-]{20,}|\bxapp-[A-Za-z0-9-]{20,}|\bnpm_[A-Za-z0-9]{36}|\bpypi-AgE[\w-]{50,}"
    rb"|\b[rs]k_live_[A-Za-z0-9]{20,}|\bdapi[a-f0-9]{32}|\bSG\.[\w-]{20,}\.[\w-]{20,}"
    rb"|-----BEGIN [A-Z ]*PRIVATE KEY(?: BLOCK)?-----|PuTTY-User-Key-File-"
    # What has no form of its own is known by its name: AWS's and Azure's secret keys, wandb's and others' API keys.
    rb"|(?i:secret_?access_?key|account_?key|api_?key|auth_?token)[\"']?\s*[=:]\s*[\"']?"
    rb"(?=[A-Za-z/+_-]*[0-9])(?=[0-9/+_-]*[A-Za-z])[A-Za-z0-9/+_-]{32,}"
)
# Files are looked at in pieces of so many bytes, which overlap by more than a secret is long.
_PIECE, _OVERLAP = 1 << 24, 1 << 10
_WEIGHTS = (".safetensors", ".gguf")  # numbers only; a token in them would be chance


def read_contents(
    folder: Path, allow: str | Collection[str] = (), skip_unsafe: bool = False
) -> tuple[list[str], list[str]]:
    """Look at every file in a folder.

    Left out without a word from the user: hidden files, names with an underscore in front, the checkpoints of a run
    (checkpoint-500), its logs (runs) and its record; none of these is part of the model.

    Args:
        allow: kinds of files, of KINDS, that are pushed although they should not be.
        skip_unsafe: leave files of the other kinds out, in place of refusing the folder.

    Returns:
        The files to push, and those that stay, as paths relative to the folder.

    Raises:
        PonderingError: a file must not be pushed, and which.
    """
    files, left_out, refused = [], [], []
    allow = {allow} if isinstance(allow, str) else allow
    with reading(folder):
        for path in files_below(folder):
            if not path.is_file():  # a link to nothing, a pipe
                continue
            name = path.relative_to(folder).as_posix()
            kind = LINKS if _leads_out(path, folder) else kind_of(path, name)
            if any(_LEFT_OUT.fullmatch(part) for part in name.split("/")):
                left_out.append(name)
            elif kind is None or kind in allow:
                files.append(name)
            elif skip_unsafe:
                left_out.append(name)
            else:
                refused.append((name, kind))
    if refused:
        name, kind = refused[0]
        others = f" (and {len(refused) - 1} more such files)" if len(refused) > 1 else ""
        raise PonderingError(
            f"{folder} has {name}{others}: {KINDS[kind]}; push without with `skip_unsafe=True`, or as it is "
            f'with `allow="{kind}"`'
        )
    return files, left_out


def kind_of(path: Path, name: str | None = None) -> str | None:
    """Why a file should not be pushed, one of KINDS, or None."""
    name = path.name if name is None else name
    if any(_STATE.fullmatch(part) for part in name.split("/")):
        return OPTIMISER_STATES
    if _is_pickle(path):
        return PICKLES
    if path.stem in _SECRET_NAMES or path.suffix in _SECRET_SUFFIXES or (path.suffix not in _WEIGHTS and _tells(path)):
        return SECRETS
    return None


def _leads_out(path: Path, folder: Path) -> bool:
    """Whether a file of `folder` is a link to one that lies outside of it.

    In the Hub's cache every file is one, to the blobs of the same repository.
    """
    target, home = path.resolve(), folder.resolve()
    if home.parent.name == "snapshots" and target.parent == home.parents[1] / "blobs":
        return False
    return not target.is_relative_to(home)


def _is_pickle(path: Path) -> bool:
    """Whether a file is named like a pickle, begins like one, or is an archive of torch.save."""
    with path.open("rb") as file:
        start = file.read(4)
    if path.suffix in _WEIGHTS:  # which begin with the length of their header, and are never unpickled
        return False
    if path.suffix in _PICKLE_SUFFIXES or (start[:1] == b"\x80" and start[1:2] in {b"\2", b"\3", b"\4", b"\5"}):
        return True
    if start != b"PK\3\4":
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith(".pkl") for name in archive.namelist())
    except zipfile.BadZipFile:  # nobody can load it either
        return False


def _tells(path: Path) -> bool:
    """Whether a token or a private key stands in a file."""
    token, before = (get_token() or "").encode(), b""
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            content = before + piece
            # Also as UTF-16, which editors on Windows write: every other byte of plain letters is 0.
            for text in (content, content.replace(b"\0", b"")) if b"\0" in content else (content,):
                if _SECRETS.search(text) or (len(token) >= 8 and token in text):
                    return True
            before = content[-_OVERLAP:]
    return False
