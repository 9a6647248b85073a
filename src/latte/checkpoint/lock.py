# SPDX-License-Identifier: Apache-2.0
"""One trainer per run folder.

The lock is the operating system's own on the file ``.lock``, which names its holder. A killed process loses
it, so a lock is never stale; the file itself stays.
"""

import os
import platform
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from latte.checks import InputError

HOLDER = re.compile(r"process (\d+) on (.+)")
LOCKED_BYTE = 1 << 30  # on Windows a locked byte cannot be read, so the lock is far behind the holder's name


@contextmanager
def run_lock(run_dir: Path) -> Iterator[None]:
    """Hold ``run_dir`` (created if missing) for this process; InputError with the holder's pid when it is
    taken.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        file = (run_dir / ".lock").open("a+", encoding="utf-8")
    except OSError as error:
        raise InputError(
            f"run.dir is {str(run_dir)!r}, which cannot be written ({error.strerror}); choose another run.dir"
        ) from error
    with file:
        try:
            acquire(file)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise InputError(
                f"run.dir is {str(run_dir)!r}, where {holder} is training; wait until it ends, or choose "
                "another run.dir"
            ) from None
        except OSError as error:
            raise InputError(
                f"run.dir is {str(run_dir)!r}, on a file system that cannot lock files ({error.strerror}); "
                "choose a run.dir on another file system"
            ) from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}\n")
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Hold ``folder`` (created if missing), after other processes of this machine have released it."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a+", encoding="utf-8") as file:
        while True:
            try:
                acquire(file)
                break
            except BlockingIOError:
                time.sleep(0.1)
        yield


def holder(run_dir: Path) -> tuple[int, str] | None:
    """Return (process, machine) that train in ``run_dir``, None without any.

    A process of this machine that was killed does not count; of another machine that is not known.
    """
    try:
        file = (run_dir / ".lock").open("r+", encoding="utf-8")
    except OSError:
        return None
    with file:
        found = HOLDER.fullmatch(file.read().strip())
        if found is None:
            return None
        if found[2] == platform.node():
            try:
                acquire(file, shared=True)
            except OSError:
                pass
            else:
                return None
        return int(found[1]), found[2]


def acquire(file: IO[str], shared: bool = False) -> None:
    """Lock the open ``file`` until it is closed, ``shared`` with other such readers; BlockingIOError when
    another process holds the lock.
    """
    if sys.platform == "win32":
        import msvcrt

        file.seek(LOCKED_BYTE)
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except PermissionError as error:
            raise BlockingIOError from error
    else:
        import fcntl

        kinds = {True: fcntl.LOCK_SH, False: fcntl.LOCK_EX}
        fcntl.flock(file, kinds[shared] | fcntl.LOCK_NB)
