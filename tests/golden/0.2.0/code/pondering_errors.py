"""Input that cannot be used: the one error class of ponder_hf, and the versions of transformers that models run on."""

import difflib
import logging
import re
from collections.abc import Iterable

import transformers


class _UnusableInput(ValueError):
    """A parent that can be exchanged, as ValueError itself cannot: see `ponder_hf`, which makes its own the parent."""


class PonderingError(_UnusableInput):
    """Input that cannot be used. The message is one line: what is wrong and what to do about it."""


def did_you_mean(name: str, known: Iterable[str], others: str | None = None, cutoff: float = 0.6) -> str | None:
    """What to say behind an unknown name.

    Args:
        known: the names that there are.
        others: the words before all of them, where none is near.
        cutoff: how near one must be, 0 .. 1.

    Returns:
        A question that has the nearest one. Where none is near: all of them, or None without `others`.
    """
    known = [*known]
    near = difflib.get_close_matches(name, known, n=1, cutoff=cutoff)
    if near:
        return f"did you mean `{near[0]}`?"
    return None if others is None else f"{others} {', '.join(known)}"


# Minor versions with all their patch releases. The code was run on the oldest, the newest and some between them. An
# older one is refused; a newer one is warned of, and models check themselves on it (check_generation_once).
OLDEST, NEWEST = (4, 57), (5, 24)
TRANSFORMERS_RANGE = f">={OLDEST[0]}.{OLDEST[1]},<{NEWEST[0]}.{NEWEST[1] + 1}"
INSTALL_TESTED = f'pip install "transformers{TRANSFORMERS_RANGE}"'


def _minor_version(version):
    found = re.match(r"(\d+)\.(\d+)", version)
    return None if found is None else tuple(map(int, found.groups()))


def _imported_version():
    # transformers imports itself a second time where it first looks at processors, often while a model is loaded.
    # What was said of the first (a version that somebody pretends) is not known to the second.
    from transformers import __version__ as latest

    versions = (latest, getattr(transformers, "__version__", latest))
    return next((version for version in versions if not is_tested(version)), latest)


def is_supported(version: str) -> bool:
    """Whether a version such as "5.23.0" is not older than the oldest that works. A name without numbers is newer."""
    found = _minor_version(version)
    return found is None or found >= OLDEST


def is_tested(version: str) -> bool:
    """Whether a version is in the range that was tested. "5.24.0.dev0" counts as 5.24."""
    found = _minor_version(version)
    return found is not None and OLDEST <= found <= NEWEST


def is_older_than(*minor: int) -> bool:
    """Whether the transformers that is imported is older than such a minor version, as in is_older_than(5, 17)."""
    found = _minor_version(_imported_version())
    return found is not None and found < minor


def untested_version() -> str | None:
    """The version of the transformers that is imported, if it is newer than what was tested, else None."""
    version = _imported_version()
    return version if is_supported(version) and not is_tested(version) else None


def check_transformers(error: ImportError | None = None) -> None:
    """Raise if the transformers that is imported is too old; say once a process if it is newer than what was tested.

    Args:
        error: an ImportError, where transformers lacks something that is imported from it.

    Raises:
        PonderingError: it is too old, or newer and lacks something.
    """
    version = _imported_version()
    if not is_supported(version):
        raise PonderingError(
            f"transformers {version} is outside {TRANSFORMERS_RANGE}, the range that this code is tested with, and "
            f"too old for it: {INSTALL_TESTED}"
        )
    if is_tested(version):
        return
    if error is not None:
        raise PonderingError(
            f"transformers {version} is newer than {TRANSFORMERS_RANGE}, the range that this code is tested with, and "
            f"lacks what it needs ({error}): {INSTALL_TESTED}"
        ) from error
    # Each checkpoint brings a copy of this code, but a process has one logger of this name.
    logger = logging.getLogger("transformers.pondering")
    if not getattr(logger, "has_warned", False):
        setattr(logger, "has_warned", True)  # noqa: B010 - which type checkers would want to know
        logger.warning(
            f"transformers {version} is newer than {TRANSFORMERS_RANGE}, the range that pondering models are tested "
            "with. A model checks itself at its first `generate`; if anything is wrong: " + INSTALL_TESTED
        )
