# SPDX-License-Identifier: Apache-2.0
"""Probe results on disk. Probing decodes every frame, so its results are kept for the next scan of the same
folder.

An entry holds as long as size and modification time of the file (number, sizes and times of the images of a
frame folder) and the version of the reader are unchanged.
"""

import hashlib
import json
import os
import time
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from latte.data.frame_folder import Unreadable, frame_files
from latte.data.media import READER, MediaInfo, probe
from latte.files import user_cache as user_cache

SAVE_EVERY = 30.0  # seconds between two savings of the cache during a long scan


class ProbeCache:
    """The probe results of one ``root``, read at the start and written back, as a whole, when anything was
    new.
    """

    def __init__(self, root: str, folder: str | os.PathLike | None):
        name = f"probes-{hashlib.sha256(os.fsencode(root)).hexdigest()[:16]}.json"
        self.file = Path(folder or user_cache()) / name
        self.reader = f"{READER} av {version('av')}"
        self.entries: dict[str, Any] = {}
        self.seen: dict[str, Any] = {}
        self.saved = time.monotonic()
        with suppress(OSError, ValueError, KeyError, TypeError):  # no cache, or a damaged one: probe again
            stored = json.loads(self.file.read_text(encoding="utf-8"))
            if stored["reader"] == self.reader:
                self.entries = dict(stored["entries"])

    def probe(self, path: str, key: str) -> MediaInfo | str:
        """Return what ``media.probe`` finds, or the reason why it refuses."""
        try:
            stamp = stamp_of(path)
        except Unreadable as error:
            return error.reason
        except OSError as error:
            return f"missing: it cannot be opened ({type(error).__name__})"
        entry = self.entries.get(key)
        if not isinstance(entry, dict) or entry.get("stamp") != stamp or restored(entry, path) is None:
            try:
                info = {name: value for name, value in asdict(probe(path)).items() if name != "path"}
                entry = {"stamp": stamp, "info": info}
            except Unreadable as error:
                entry = {"stamp": stamp, "reason": error.reason}
            self.entries[key] = entry
            if time.monotonic() - self.saved > SAVE_EVERY:
                self._write(self.entries)
        self.seen[key] = entry
        found = restored(entry, path)
        assert found is not None
        return found

    def save(self) -> None:
        """Keep what this scan has seen; entries of files that are gone are dropped."""
        self._write(self.seen)

    def _write(self, entries: dict[str, Any]) -> None:
        self.saved = time.monotonic()
        text = json.dumps({"reader": self.reader, "entries": entries})
        partial = self.file.with_suffix(f".{os.getpid()}.partial")
        try:
            if self.file.exists() and self.file.read_text(encoding="utf-8") == text:
                return
            self.file.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(text, encoding="utf-8")
            os.replace(partial, self.file)
        except OSError:  # a cache that cannot be written costs time, nothing else
            with suppress(OSError):
                partial.unlink()


def stamp_of(path: str) -> list[int]:
    """Return numbers that change with the content: size and modification time, summed up over a frame
    folder's images.
    """
    if not os.path.isdir(path):
        status = os.stat(path)
        return [status.st_size, status.st_mtime_ns]
    states = [os.stat(file) for _, file in frame_files(path)]
    return [len(states), sum(s.st_size for s in states), max((s.st_mtime_ns for s in states), default=0)]


def restored(entry: dict[str, Any], path: str) -> MediaInfo | str | None:
    """Return the value of a cache entry, or None when it is broken."""
    if isinstance(entry.get("reason"), str):
        return entry["reason"]
    try:
        kept = dict(entry["info"])
        kept["steps"] = tuple((int(step), int(count)) for step, count in kept["steps"])
        for name in ("time_base", "keys", "notes"):
            kept[name] = tuple(kept[name])
        return MediaInfo(path=path, **kept)
    except (KeyError, TypeError, ValueError):
        return None
