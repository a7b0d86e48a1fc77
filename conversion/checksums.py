"""Files in the Hub's cache, held against the hash that the Hub gave with them.

The client looks at a file's size only. In its cache a snapshot's file is a link to a blob, which is named by the hash:
SHA-256 of a large file, git's own of any other.
"""

import re

from huggingface_hub.utils.sha import git_hash, sha_fileobj

from ponder_hf.errors import DownloadStopped, reading


_SHA256, _GIT = re.compile("[0-9a-f]{64}"), re.compile("[0-9a-f]{40}")


def check_files(source, paths):
    """Raise for the first of these files that is not what the Hub has, and take it out of the cache.

    Args:
        source: the Hub id, for the message.
        paths: of files in a snapshot. Where a cache has no links (Windows without the right to make them) nothing is
            known of their hash, and they pass.

    Raises:
        DownloadStopped: a file arrived damaged. The next download fetches it again.
    """
    for path in paths:
        with reading(source):
            if not path.is_symlink() or _is_whole(path, path.readlink().name):
                continue
            (path.parent / path.readlink()).unlink(missing_ok=True)
            path.unlink()
        raise DownloadStopped(
            f"{path.name} of {source} arrived damaged (its hash is another): it is removed, try again"
        )


def _is_whole(path, expected):
    if _SHA256.fullmatch(expected):
        with path.open("rb") as file:
            return sha_fileobj(file).hex() == expected
    return not _GIT.fullmatch(expected) or git_hash(path.read_bytes()) == expected
