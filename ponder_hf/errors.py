"""Where third parties' errors about unusable input become PonderingError: one line, what is wrong and what to do.

Each context manager stands around one kind of work and translates only what bad input can raise there. Anything else
passes through: an error of ours must not look like the user's.
"""

import errno
import json
from contextlib import contextmanager

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
_HTTP_ERROR = HfHubHTTPError.__mro__[1]
_FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
_SHORT_FILE = "Consistency check failed: file should be of size"
_AGAIN = "try again, files that have arrived are not fetched twice"
_LONGEST_REASON = 300
# What transformers says in a RuntimeError about weights that do not fit; others are not the input's fault.
_MISFITS = ("size mismatch", "ignore_mismatched_sizes", "conversion of the weights")


class NotFinished(PonderingError):
    """Something that could not be finished although nothing seemed wrong with what was asked for."""


class TrainingStopped(NotFinished):
    """A training that cannot go on, although it began well. What it has written so far stays."""


class DownloadStopped(NotFinished):
    """A download that did not come to its end. Files that are whole stay in the cache."""


def first_line(error):
    """The first line of an exception's message that says something, cut to a readable length."""
    lines = (" ".join(line.split()) for line in str(error).splitlines())
    line = next((line for line in lines if line), type(error).__name__)
    return line if len(line) <= _LONGEST_REASON else line[: _LONGEST_REASON - 3] + "..."


def _reason(error):
    return error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)


def _is_full_disk(error):
    # The writer of safetensors reports the system's error only in its message.
    return getattr(error, "errno", None) in _FULL_DISK or any(f"os error {code})" in str(error) for code in _FULL_DISK)


def _not_downloaded(source, error):
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


@contextmanager
def reading(source):
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
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
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
def understanding(source, file="config.json"):
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
def fitting(source):
    """Translate what transformers raises where the weights in `source` do not fit the model of its config.json."""
    try:
        yield
    except RuntimeError as error:
        if not any(words in str(error) for words in _MISFITS):
            raise
        raise PonderingError(f"the weights of {source} do not fit its config.json: {first_line(error)}") from error


@contextmanager
def writing(destination):
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
