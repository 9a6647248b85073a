# SPDX-License-Identifier: Apache-2.0
"""Atomic writes: a file or folder is complete on the disk or absent, whenever the process or the machine
stops.

A folder is written under a unique hidden name beside its destination, every file in it is flushed to the
disk, and a rename makes it visible. A writer removes only its own temporary files. What a killed writer
leaves behind is removed by ``sweep_checkpoints``, and only in the ``checkpoints`` folder of a run.
"""

import hashlib
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from latte.checks import InputError, RunError

TEMPORARY = ".tmp-"
REPLACED = ".old-"
# what killed writers leave in a checkpoints folder; version 0.1.0 wrote no process number
LEFTOVER = re.compile(r"\.(?:tmp|old)-(?:pruned-)?(?P<name>step-\d+)(?:-\d+-[0-9a-f]{8})?")

VERIFIED = "verified.json"
MAX_FILES = 256  # the newest ones stay
SETTLED = 2.0  # seconds since the last change of a file that is remembered


@contextmanager
def reported(what: str, path: Path, needed: int | None = None, kept: str = "") -> Iterator[None]:
    """Turn a failed write into one RunError with the path, the number of bytes needed and what is still
    good.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        in_the_way = next((parent for parent in path.absolute().parents if parent.is_file()), None)
        if in_the_way:
            raise RunError(
                f"could not write {what} to {path}: {in_the_way} is a file, where a folder is needed; "
                "choose another place"
            ) from error
        amount = ""
        if needed is not None:
            amount = f"; {needed:,} bytes are needed there"
        raise RunError(
            f"could not write {what} to {path}: {reason}{amount}{kept}; "
            "free disk space or choose a writable folder, then run the same command again"
        ) from error


def size_text(number: int) -> str:
    """Return a number of bytes in KiB, MiB or GiB."""
    if number < 2**20 / 10:
        return f"{number / 2**10:.1f} KiB"
    return f"{number / 2**30:.2f} GiB" if number >= 2**30 else f"{number / 2**20:.1f} MiB"


def sync(path: Path) -> None:
    """Flush a file, or the directory entries of a folder, to the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot open a folder
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def unique_name(path: Path, prefix: str) -> Path:
    """Return a hidden name beside ``path`` that no other writer uses."""
    return path.with_name(f"{prefix}{path.name}-{os.getpid()}-{secrets.token_hex(4)}")


def commit_folder(path: Path, write: Callable[[Path], None]) -> None:
    """Make the folder ``path`` hold exactly what ``write(folder)`` puts into an empty folder.

    An earlier folder of that name is replaced. Otherwise nothing changes and the error of ``write`` or the
    system is raised. Files and folders get the permissions of the umask, whatever their writer chose.
    Raises InputError when ``path`` is not a folder.
    """
    path = Path(os.path.realpath(path))
    if os.path.lexists(path) and not path.is_dir():
        raise InputError(f"{path} exists and is {kind_of(path)}, not a folder; choose a new folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = unique_name(path, TEMPORARY)
    replaced = unique_name(path, REPLACED)
    try:
        temporary.mkdir()
        write(temporary)
        mode = temporary.stat().st_mode
        for item in temporary.rglob("*"):
            os.chmod(item, mode & (0o777 if item.is_dir() else 0o666))
            sync(item)
        sync(temporary)
        if path.exists():
            os.rename(path, replaced)
        try:
            os.rename(temporary, path)
        except OSError:
            if replaced.exists():
                os.rename(replaced, path)
            raise
        sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if path.exists():
            shutil.rmtree(replaced, ignore_errors=True)


def commit_file(path: Path, content: str | Callable[[Path], None]) -> None:
    """Write a file atomically: readers see the old content or the new one.

    ``content`` is the text, or a function that writes the file whose name it gets. The file gets the
    permissions of the umask. Raises InputError when ``path`` exists and is not a regular file.
    """
    path = Path(os.path.realpath(path))
    if os.path.lexists(path) and not path.is_file():
        raise InputError(f"{path} exists and is {kind_of(path)}, not a regular file; choose a new file name")
    temporary = unique_name(path, TEMPORARY)
    try:
        temporary.touch()
        mode = temporary.stat().st_mode & 0o666
        if isinstance(content, str):
            temporary.write_text(content, encoding="utf-8")
        else:
            content(temporary)
        os.chmod(temporary, mode)  # safetensors replaces the file by a private one
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def kind_of(path: Path) -> str:
    """Name the kind of file at ``path``, with an article."""
    kinds = {
        "a folder": path.is_dir(),
        "a regular file": path.is_file(),
        "a named pipe": path.is_fifo(),
        "a socket": path.is_socket(),
        "a device": path.is_block_device() or path.is_char_device(),
    }
    return next((kind for kind, found in kinds.items() if found), "a broken link")


def check_replaceable(folder: Path, names: Collection[str]) -> None:
    """Raise InputError unless ``folder`` is absent or holds nothing but files and folders called
    ``names``.
    """
    if os.path.lexists(folder) and not folder.is_dir():
        raise InputError(f"{folder} exists and is {kind_of(folder)}, not a folder; choose a new folder")
    others = sorted(item.name for item in folder.glob("*") if item.name not in names)
    if others:
        raise InputError(f"folder {folder} holds other files ({', '.join(others[:3])}); choose a new folder")


def sweep_checkpoints(run_dir: Path) -> None:
    """Remove what killed writers left in the checkpoints folder of a run.

    A checkpoint that was set aside for a successor gets its name back when the successor is missing.
    Everything else in that folder is left alone. Call it with the lock of the run held.
    """
    for leftover in sorted((Path(run_dir) / "checkpoints").glob(".*")):
        match = LEFTOVER.fullmatch(leftover.name)
        if match is None:
            continue
        original = leftover.with_name(match["name"])
        if leftover.name.startswith(REPLACED) and not original.exists():
            os.rename(leftover, original)
        elif leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            with suppress(OSError):
                leftover.unlink()


def user_cache() -> Path:
    """Return latte/ in $XDG_CACHE_HOME or ~/.cache; without a home a path that cannot exist, and so no
    cache.
    """
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base if os.path.isabs(base) else os.devnull) / "latte"


def kept_entries(name: str) -> dict[str, Any]:
    """Return what ``keep_entry`` has put into the file ``name`` of the user's cache; {} for a damaged one."""
    try:
        entries = json.loads((user_cache() / name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return entries if isinstance(entries, dict) else {}


def keep_entry(name: str, key: str, value: Any, most: int = 256) -> None:
    """Put ``value``, plain data, under ``key`` into the file ``name`` of the user's cache, where the ``most``
    newest stay; without a cache that can be written do nothing.
    """
    entries = kept_entries(name)
    entries.pop(key, None)
    entries = dict([*entries.items(), (key, value)][-most:])
    with suppress(OSError, InputError):
        user_cache().mkdir(parents=True, exist_ok=True)
        commit_file(user_cache() / name, json.dumps(entries))


def stamp(path: Path) -> list[int]:
    """Return numbers that change whenever the file at ``path`` does; [] without a file."""
    try:
        status = os.stat(path)
    except OSError:
        return []
    return [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def known(path: Path, what: str = "") -> str | None:
    """Return what is remembered of the file ``path`` under ``what``, if it has not changed since; else None.

    A file is known by its real path, device, inode, size and the times of its last change of content and of
    state. The system sets the last one itself: a file that is replaced or written in place, even with its
    old size and date, is not known. ``XDG_CACHE_HOME=/dev/null`` turns this off.
    """
    entry = kept_entries(VERIFIED).get(what + os.path.realpath(path))
    if not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[1], str):
        return None
    if entry[0] and entry[0] == stamp(path):
        return entry[1]
    return None


def remember(path: Path, before: list[int], value: str, what: str = "") -> None:
    """Remember ``value`` of the file ``path``, whose ``stamp`` was ``before`` it was read.

    A file that changed within the last seconds is not remembered, because times have a finite resolution.
    """
    with suppress(OSError):
        if before and stamp(path) == before and time.time() - max(before[3:]) / 1e9 >= SETTLED:
            keep_entry(VERIFIED, what + os.path.realpath(path), [before, value], MAX_FILES)


@cache
def source_sha256() -> str:
    """Return the SHA-256 of this package's source: what is kept between runs must not outlive the code that
    made it.
    """
    digest = hashlib.sha256()
    folder = Path(__file__).parent
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"{path.relative_to(folder).as_posix()} {path.stat().st_size} ".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def keep_newest(folder: Path, pattern: str, count: int) -> None:
    """Delete the files of ``folder`` that match ``pattern``, except for the ``count`` newest."""
    with suppress(OSError):
        files = sorted(folder.glob(pattern), key=lambda path: path.stat().st_mtime, reverse=True)
        for path in files[count:]:
            path.unlink()
