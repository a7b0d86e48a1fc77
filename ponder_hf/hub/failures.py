"""What goes wrong while something is pushed, in one line: what it was, and what to do."""

import re
from contextlib import contextmanager

from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from ponder_hf import PonderingError
from ponder_hf.errors import _HTTP_ERROR, NotFinished, first_line


class PushStopped(NotFinished):
    """A push that did not come to its end although nothing was wrong with it. The repository is as it was."""


_AGAIN = "nothing of it can be seen there; push again, what has arrived is not sent twice"


@contextmanager
def pushing(repository):
    """Translate what goes wrong while `repository` is written."""
    try:
        yield
    except OfflineModeIsEnabled as error:
        raise PonderingError(f"{repository} cannot be pushed offline: unset HF_HUB_OFFLINE") from error
    except HfHubHTTPError as error:
        raise _translated(repository, error) from error
    except _HTTP_ERROR as error:
        raise PushStopped(f"the connection to {repository} broke ({first_line(error)}): {_AGAIN}") from error
    except RuntimeError as error:  # huggingface_hub wraps what happened to an LFS file
        cause = error.__cause__
        if isinstance(cause, HfHubHTTPError):
            raise _translated(repository, cause) from error
        if isinstance(cause, _HTTP_ERROR):
            raise PushStopped(f"the connection to {repository} broke ({first_line(cause)}): {_AGAIN}") from error
        raise
    except OSError as error:
        if error.errno is not None:  # the system's own, about a file here
            raise
        raise _translated_xet(repository, error) from error


def _translated_xet(repository, error):
    """hf_xet, which sends large files where it is installed, raises Python's own OSErrors, without a number."""
    reason = first_line(error)
    if "404" in reason and "xet-write-token" in reason:
        return PonderingError(f"this Hub has no Xet storage for {repository}: set HF_HUB_DISABLE_XET=1 and push again")
    if isinstance(error, PermissionError) or re.search("40[13] ", reason):
        return PonderingError(f"the Hub's storage does not accept the token: use one that may write to {repository}")
    return PushStopped(f"the connection to {repository} broke ({reason}): {_AGAIN}")


def _translated(repository, error):
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
        return PushStopped(f"the Hub takes no more requests for now: {_AGAIN}")
    reason = error.server_message or first_line(error)
    return PushStopped(f"the Hub did not take {repository} ({first_line(reason)}): {_AGAIN}")
