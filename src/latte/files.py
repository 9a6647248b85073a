# SPDX-License-Identifier: Apache-2.0
"""Files and folders that are wholly there or not there at all, whenever the process or the machine stops.

A folder is written under a temporary name beside its place, every file of it is flushed to the disk, and one rename makes it
visible. What a killed writer leaves behind starts with a dot and is put right by ``sweep``.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from latte.checks import RunError

TEMPORARY = ".tmp-"
REPLACED = ".old-"


@contextmanager
def reported(what: str, path: Path, needed: int | None = None, kept: str = "") -> Iterator[None]:
    """Turn what the system says about a failed write into one RunError with the path, the bytes needed and what is still good."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        amount = f"; {needed:,} bytes are needed there" if needed is not None else ""
        raise RunError(
            f"could not write {what} to {path}: {reason}{amount}{kept}; "
            "make room or give a folder that can be written, then run the same command again"
        ) from error


def sync(path: Path) -> None:
    """Flush a file, or the list of names of a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def commit_folder(path: Path, write: Callable[[Path], None]) -> None:
    """Make the folder ``path`` hold exactly what ``write(folder)`` puts into an empty one; an older one of that name is replaced.

    Either all of it is there afterwards, on the disk, or nothing has changed and the error of ``write`` or the system comes out.
    """
    temporary, replaced = path.with_name(TEMPORARY + path.name), path.with_name(REPLACED + path.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path.parent)
    try:
        temporary.mkdir()
        write(temporary)
        for file in temporary.rglob("*"):
            sync(file)
        sync(temporary)
        if path.exists():
            os.rename(path, replaced)
        os.rename(temporary, path)
        sync(path.parent)
    finally:
        sweep(path.parent)


def commit_file(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` in one piece: the old content or the new one, never a part."""
    temporary = path.with_name(TEMPORARY + path.name)
    try:
        temporary.write_text(text, encoding="utf-8")
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sweep(folder: Path) -> None:
    """Remove what killed writers left in ``folder``. A folder set aside for a successor that never came gets its name back.

    Only for a folder with one writer at a time (a run's lock sees to that).
    """
    for leftover in [*folder.glob(f"{TEMPORARY}*"), *folder.glob(f"{REPLACED}*")]:
        place = leftover.with_name(leftover.name.removeprefix(REPLACED))
        if leftover.name.startswith(REPLACED) and not place.exists():
            os.rename(leftover, place)
        elif leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)
