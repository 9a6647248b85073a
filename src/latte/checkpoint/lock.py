# SPDX-License-Identifier: Apache-2.0
"""One trainer per run folder.

The lock is the operating system's own on the file ``.lock``, which says who holds it. A killed trainer loses it by dying, so a
lock is never stale; the file itself stays.
"""

import fcntl
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from latte.checks import InputError


@contextmanager
def run_lock(run_dir: Path) -> Iterator[None]:
    """Hold ``run_dir`` (made if missing) for this process; InputError with the holder's pid when another one has it."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        file = open(run_dir / ".lock", "a+", encoding="utf-8")
    except OSError as error:
        raise InputError(
            f"run.dir is {str(run_dir)!r}, which cannot be written ({error.strerror}); give another run.dir"
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise InputError(
                f"run.dir is {str(run_dir)!r}, which {file.read().strip() or 'another process'} is training in; "
                "wait until it has ended, or give another run.dir"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}\n")
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)
