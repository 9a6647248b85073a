# SPDX-License-Identifier: Apache-2.0
"""Content fingerprints of the files of a dataset, so that a resumed run notices data that were replaced in
place.

A fingerprint covers the size of a file and samples of its content, not its name or time: a copy of the data
has the same fingerprints. Reading a few kilobytes per file is cheap enough for every start of a run. The
fingerprints are kept in the run folder, to name the files that changed.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from latte.data.frame_folder import Unreadable, frame_files
from latte.files import commit_file, reported

SAMPLE = 16 << 10  # bytes read at the start, in the middle and at the end of a file
IMAGES = 8  # images of a frame folder whose content is read; the sizes of all others count
READERS = 16  # threads, because reading small pieces waits for the disk
LISTING = "data.json"  # in the run folder
UNREADABLE = "unreadable"


def fingerprint(path: str | os.PathLike, start: int = 0, stop: int | None = None) -> str:
    """Return 16 hex digits for the content of a file or of a folder of numbered images.

    Of a file only bytes ``start`` to ``stop`` count (None: to the end). One that cannot be read gives
    UNREADABLE.
    """
    digest = hashlib.sha256()
    try:
        files = [path]
        if os.path.isdir(path):
            files = [file for _, file in frame_files(path)]
            sizes = [(os.path.basename(file), os.path.getsize(file)) for file in files]
            digest.update(json.dumps(sizes).encode())
            step = max((len(files) - 1) / (IMAGES - 1), 1)
            files = [files[round(step * i)] for i in range(min(IMAGES, len(files)))]
        for file in files:
            digest.update(_samples(file, start, stop))
    except (OSError, Unreadable):
        return UNREADABLE
    return digest.hexdigest()[:16]


def _samples(path: str | os.PathLike, start: int, stop: int | None) -> bytes:
    """Return the length of a span of a file and the bytes at its start, middle and end."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        stop = size if stop is None else min(stop, size)
        pieces = [str(stop - start).encode()]
        for position in (start, (start + stop - SAMPLE) // 2, stop - SAMPLE):
            file.seek(max(position, start))
            pieces.append(file.read(min(SAMPLE, stop - start)))
    return b"\0".join(pieces)


def fingerprints(
    paths: Mapping[str, str | os.PathLike], spans: Mapping[str, tuple[int, int]] | None = None
) -> dict[str, str]:
    """Return name -> fingerprint for ``paths`` (name -> path), each within its (start, stop) of ``spans`` if
    given.
    """
    with ThreadPoolExecutor(READERS) as readers:
        found = readers.map(lambda name: fingerprint(paths[name], *(spans or {}).get(name, ())), paths)
        return dict(zip(paths, found, strict=True))


def combined(files: Mapping[str, str]) -> str:
    """Return one digest for all fingerprints and names."""
    return hashlib.sha256(json.dumps(sorted(files.items())).encode()).hexdigest()


def changed_files(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    """Return 'missing: NAME', 'changed: NAME' or 'new: NAME' for every file that differs, in order of the
    names.
    """
    lines = []
    for name in sorted({**old, **new}):
        if name not in new:
            lines.append(f"missing: {name}")
        elif name not in old:
            lines.append(f"new: {name}")
        elif old[name] != new[name]:
            lines.append(f"changed: {name}")
    return lines


def write_listing(run_dir: Path, files: Mapping[str, str]) -> None:
    """Keep the fingerprints in ``run_dir``; RunError when it cannot be written."""
    with reported("the listing of the data", run_dir):
        commit_file(run_dir / LISTING, json.dumps(files, indent=0))


def read_listing(run_dir: Path) -> dict[str, str]:
    """Return the fingerprints kept in ``run_dir``; {} if there are none or they are damaged."""
    try:
        found = json.loads((run_dir / LISTING).read_text(encoding="utf-8"))
        return {str(name): str(value) for name, value in found.items()}
    except (OSError, ValueError, AttributeError):
        return {}
