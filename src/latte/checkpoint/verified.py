# SPDX-License-Identifier: Apache-2.0
"""Which weight files were read through before, so that hashing gigabytes happens once and not at every load.

A file is known by its real path, device, inode, size and the times of its last change of content and of
state. The system sets the last one itself: a file that is replaced or written in place, even with its old
size and date, is verified again. A file that changed within the last seconds is not remembered, because
times have a finite resolution. ``XDG_CACHE_HOME=/dev/null`` turns this off.
"""

import os
import time
from contextlib import suppress
from pathlib import Path

from latte.files import keep_entry, kept_entries

FILE = "verified.json"
MAX_FILES = 256  # the newest ones stay
SETTLED = 2.0  # seconds since the last change of a file that is remembered


def stamp(path: Path) -> list[int]:
    """Return numbers that change whenever the file at ``path`` does."""
    status = os.stat(path)
    return [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def known_sha256(path: Path) -> str | None:
    """Return the hash of the tensors in the file ``path`` if it was verified and has not changed, else
    None.
    """
    entry = kept_entries(FILE).get(os.path.realpath(path))
    if not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[1], str):
        return None
    with suppress(OSError):
        if entry[0] == stamp(path):
            return entry[1]
    return None


def remember(path: Path, before: list[int], sha256: str) -> None:
    """Remember that the tensors of the file ``path``, whose ``stamp`` was ``before`` it was read, are finite
    and have the hash ``sha256``.
    """
    with suppress(OSError):
        if stamp(path) == before and time.time() - max(before[3:]) / 1e9 >= SETTLED:
            keep_entry(FILE, os.path.realpath(path), [before, sha256], MAX_FILES)
