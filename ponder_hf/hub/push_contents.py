"""Which files of a checkpoint's folder belong on the Hub, which are left out, and which must not get there."""

import re
import zipfile
from collections.abc import Collection
from pathlib import Path

from huggingface_hub import get_token

from ponder_hf.errors import reading
from ponder_hf.modeling import PonderingError


PICKLES, SECRETS, OPTIMISER_STATES = "pickles", "secrets", "optimiser-states"
KINDS = {
    PICKLES: "a pickle, which runs code when it is loaded",
    SECRETS: "holds an access token or a private key",
    OPTIMISER_STATES: "the state of an optimiser, which only the run needs that wrote it",
}

_LEFT_OUT = re.compile(r"\..*|_.*|checkpoint-\d+|runs|trainer_state\.json|ponder_training\.json")
_PICKLE_SUFFIXES = {".pkl", ".pickle", ".pt", ".pth", ".ckpt", ".bin", ".joblib", ".dill"}
_STATE = re.compile(r"(optimizer|optimiser|scheduler|scaler|rng_state)([_.\-].*)?|global_step\d+|.*\.distcp")
_SECRET_NAMES = {"token", "stored_tokens", "credentials", "netrc", "id_rsa", "id_ed25519"}
_SECRETS = re.compile(
    rb"\bhf_[A-Za-z0-9]{30,}|\bgh[pousr]_[A-Za-z0-9]{36,}|\bgithub_pat_\w{40,}|\bsk-[A-Za-z0-9_-]{32,}"
    rb"|\bAKIA[A-Z0-9]{16}\b|\bxox[abp]-[A-Za-z0-9-]{20,}|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)
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
        for path in sorted(folder.rglob("*")):
            if not path.is_file():
                continue
            name = path.relative_to(folder).as_posix()
            kind = kind_of(path, name)
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
    if path.stem in _SECRET_NAMES or path.suffix in (".pem", ".key") or (path.suffix not in _WEIGHTS and _tells(path)):
        return SECRETS
    return None


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
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith(".pkl") for name in archive.namelist())


def _tells(path: Path) -> bool:
    """Whether a token or a private key stands in a file."""
    content = path.read_bytes()
    token = get_token() or ""
    return bool(_SECRETS.search(content)) or (len(token) >= 8 and token.encode() in content)
