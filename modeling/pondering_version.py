"""The versions of transformers that pondering models run on."""

import re

from .pondering_errors import PonderingError


# Minor versions with all their patch releases. The code was run on the oldest, the newest and some between them.
OLDEST, NEWEST = (4, 57), (5, 24)
TRANSFORMERS_RANGE = f">={OLDEST[0]}.{OLDEST[1]},<{NEWEST[0]}.{NEWEST[1] + 1}"


def is_supported(version):
    """Whether a version such as "5.23.0" is in the range. "5.24.0.dev0" counts as 5.24."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return found is not None and OLDEST <= tuple(map(int, found.groups())) <= NEWEST


def check_transformers():
    """Raise unless the transformers that is imported is in the range.

    Raises:
        PonderingError: it is older or newer.
    """
    from transformers import __version__ as version

    if not is_supported(version):
        raise PonderingError(
            f"transformers {version} is outside {TRANSFORMERS_RANGE}, the range that this code is "
            f'tested with: pip install "transformers{TRANSFORMERS_RANGE}"'
        )
