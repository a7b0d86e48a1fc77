"""Where third parties' errors about unusable input become PonderingError: one line, what is wrong and what to do.

Each context manager stands around one kind of work and translates only what bad input can raise there. Anything else
passes through: an error of ours must not look like the user's.
"""

import errno
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    StrictDataclassError,
)
from safetensors import SafetensorError

from .modeling import PonderingError


# Any failure of the Hub client's transport, from a refused connection to a status code (httpx.HTTPError).
_HTTP_ERROR: Any = HfHubHTTPError.__mro__[1]
_FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
_SHORT_FILE = "Consistency check failed: file should be of size"
_AGAIN = "try again, files that have arrived are not fetched twice"
_PUSH_AGAIN = "nothing of it can be seen there; push again, what has arrived is not sent twice"
_LONGEST_REASON = 300
# What transformers says in a RuntimeError about weights that do not fit; others are not the input's fault.
_MISFITS = ("size mismatch", "ignore_mismatched_sizes", "conversion of the weights")


class NotFinished(PonderingError):
    """Something that could not be finished although nothing seemed wrong with what was asked for."""


class TrainingStopped(NotFinished):
    """A training that cannot go on, although it began well. What it has written so far stays."""


class DownloadStopped(NotFinished):
    """A download that did not come to its end. Files that are whole stay in the cache."""


class PushStopped(NotFinished):
    """A push that did not come to its end although nothing was wrong with it. The repository is as it was."""


def first_line(error: object) -> str:
    """The first line of an exception's message that says something, cut to a readable length."""
    lines = (" ".join(line.split()) for line in str(error).splitlines())
    line = next((line for line in lines if line), type(error).__name__)
    return line if len(line) <= _LONGEST_REASON else line[: _LONGEST_REASON - 3] + "..."


def _reason(error: BaseException) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)


def _is_full_disk(error: BaseException) -> bool:
    # The writer of safetensors reports the system's error only in its message.
    return getattr(error, "errno", None) in _FULL_DISK or any(f"os error {code})" in str(error) for code in _FULL_DISK)


def _not_downloaded(source: str | os.PathLike, error: Exception) -> PonderingError:
    """What to say of a failed request for a file: the Hub's answer, or that there was none."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 401:
        return PonderingError(f"the Hub does not accept the token for {source}: set HF_TOKEN to a valid one")
    if status == 403:
        return PonderingError(f"the token may not read {source}: set HF_TOKEN to one that may")
    if status == 429:
        return DownloadStopped(f"the Hub takes no more requests for {source} for now: {_AGAIN}")
    if status is not None:
        return DownloadStopped(f"the Hub does not give {source}, it answered {status}: {_AGAIN}")
    return DownloadStopped(f"the connection broke while {source} was downloaded ({first_line(error)}): {_AGAIN}")


def walk(folder: str | os.PathLike) -> Iterator[tuple[str, list[str], list[str]]]:
    """As os.walk, which passes without a word over a folder that may not be read.

    Raises:
        OSError: there is such a folder.
    """

    def fail(error: OSError) -> None:
        raise error

    return os.walk(folder, onerror=fail)


@contextmanager
def reading(source: str | os.PathLike) -> Iterator[None]:
    """Translate what goes wrong while `source`, a folder or a Hub id, is found, downloaded or read."""
    try:
        yield
    except GatedRepoError as error:
        raise PonderingError(
            f"{source} is gated: ask for access on its page, then set HF_TOKEN to a token of that account"
        ) from error
    except RepositoryNotFoundError as error:
        raise PonderingError(
            f"there is no folder {source} and no such model on the Hub: check the name; a private one needs HF_TOKEN"
        ) from error
    except RevisionNotFoundError as error:
        raise PonderingError(f"{source} has no such revision: give a branch, a tag or a commit that exists") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise PonderingError(
            f"there is no folder {source}; as a Hub id it is not in the cache, and the Hub cannot be reached: check "
            "the name and the network"
        ) from error
    except HFValidationError as error:
        raise PonderingError(f"there is no folder {source}, and it is not a Hub id: check the path") from error
    except _HTTP_ERROR as error:
        raise _not_downloaded(source, error) from error
    except (ConnectionError, TimeoutError) as error:  # hf_xet's
        raise _not_downloaded(source, error) from error
    except SafetensorError as error:
        raise PonderingError(f"{source} has a broken safetensors file ({first_line(error)}): get it again") from error
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise PonderingError(f"{source} has a broken JSON file ({first_line(error)}): get it again") from error
    except OSError as error:
        if _is_full_disk(error):
            raise PonderingError(f"cannot download {source}: no space left in the Hugging Face cache") from error
        if _SHORT_FILE in str(error):
            raise DownloadStopped(f"a file of {source} arrived incomplete: {_AGAIN}") from error
        raise PonderingError(f"cannot read {error.filename or source}: {_reason(error)}") from error


# transformers checks few fields of a configuration, so a wrong one surfaces as whatever the arithmetic on it raises.
_MISUNDERSTANDINGS = (
    StrictDataclassError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RuntimeError,
)


@contextmanager
def understanding(source: str | os.PathLike, file: str = "config.json") -> Iterator[None]:
    """Translate what goes wrong while an object is built from what a file of `source` says: an empty model, say."""
    try:
        yield
    except PonderingError:
        raise
    except Exception as error:
        # The tokenizers library raises bare Exceptions.
        if not isinstance(error, _MISUNDERSTANDINGS) and type(error) is not Exception:
            raise
        lines = [line for line in str(error).splitlines() if line.strip()]
        # The validator of configurations names the field in the first line and says what is wrong in the last.
        reason = first_line(lines[-1]) if isinstance(error, StrictDataclassError) else first_line(error)
        if isinstance(error, LookupError):
            reason = f"{reason} is not known"
        raise PonderingError(f"{file} of {source} cannot be used: {reason}") from error


@contextmanager
def fitting(source: str | os.PathLike) -> Iterator[None]:
    """Translate what transformers raises where the weights in `source` do not fit the model of its config.json."""
    try:
        yield
    except RuntimeError as error:
        if not any(words in str(error) for words in _MISFITS):
            raise
        raise PonderingError(f"the weights of {source} do not fit its config.json: {first_line(error)}") from error


@contextmanager
def writing(destination: str | os.PathLike) -> Iterator[None]:
    """Translate what goes wrong while `destination` is written."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if _is_full_disk(error):
            raise PonderingError(
                f"no space left for {destination}: free some, or choose a destination on another disk"
            ) from error
        where = getattr(error, "filename", None) or destination
        raise PonderingError(f"cannot write {where}: {_reason(error)}") from error


@contextmanager
def pushing(repository: str) -> Iterator[None]:
    """Translate what goes wrong while `repository` is written."""
    try:
        yield
    except OfflineModeIsEnabled as error:
        raise PonderingError(f"{repository} cannot be pushed offline: unset HF_HUB_OFFLINE") from error
    except HfHubHTTPError as error:
        raise _not_pushed(repository, error) from error
    except _HTTP_ERROR as error:
        raise PushStopped(f"the connection to {repository} broke ({first_line(error)}): {_PUSH_AGAIN}") from error
    except RuntimeError as error:  # huggingface_hub wraps what happened to an LFS file
        cause = error.__cause__
        if isinstance(cause, HfHubHTTPError):
            raise _not_pushed(repository, cause) from error
        if isinstance(cause, _HTTP_ERROR):
            raise PushStopped(f"the connection to {repository} broke ({first_line(cause)}): {_PUSH_AGAIN}") from error
        raise
    except OSError as error:
        if error.errno is not None:  # the system's own, about a file here
            raise
        raise _not_pushed_by_xet(repository, error) from error


def _not_pushed_by_xet(repository: str, error: OSError) -> PonderingError:
    """hf_xet, which sends large files where it is installed, raises Python's own OSErrors, without a number."""
    reason = first_line(error)
    if "404" in reason and "xet-write-token" in reason:
        return PonderingError(f"this Hub has no Xet storage for {repository}: set HF_HUB_DISABLE_XET=1 and push again")
    if isinstance(error, PermissionError) or re.search("40[13] ", reason):
        return PonderingError(f"the Hub's storage does not accept the token: use one that may write to {repository}")
    return PushStopped(f"the connection to {repository} broke ({reason}): {_PUSH_AGAIN}")


def _not_pushed(repository: str, error: HfHubHTTPError) -> PonderingError:
    status = error.response.status_code
    if status == 401:
        return PonderingError(f"the Hub does not accept the token: set HF_TOKEN to one that may write to {repository}")
    if status == 403:
        return PonderingError(f"this token may not write to {repository}: use one with write access, or another name")
    if status == 404:
        return PonderingError(f"there is no {repository} that this token may see: check the name and the token")
    if status == 412:
        return PushStopped(f"somebody else changed {repository} meanwhile, and nothing was pushed: push again")
    if status == 429:
        return PushStopped(f"the Hub takes no more requests for now: {_PUSH_AGAIN}")
    reason = error.server_message or first_line(error)
    return PushStopped(f"the Hub did not take {repository} ({first_line(reason)}): {_PUSH_AGAIN}")
