# SPDX-License-Identifier: Apache-2.0
"""Which clips of a folder can be used: walk it, probe each candidate once, keep the good ones and say why not for the rest.

Probing decodes, so its results are kept in a cache: an entry holds as long as size and modification time of the file (number,
sizes and times of the images of a frame folder) and the reader's version are what they were. A broken file never stops a scan.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from latte.checks import InputError, nearest
from latte.data.clips import ClipRule
from latte.data.frame_folder import IMAGE_SUFFIXES, Unreadable, frame_files
from latte.data.media import READER, VIDEO_SUFFIXES, MediaInfo, probe

OLD_NAME = "quarantine.jsonl"  # what skipped.jsonl was called in 0.1.0; still read
SAVE_EVERY = 30.0  # seconds between two savings of the cache during a long scan


@dataclass(frozen=True)
class FoundClip:
    """A usable clip: ``key`` is its path relative to the root (with /), ``label`` its class or None."""

    key: str
    info: MediaInfo
    label: int | None


@dataclass(frozen=True)
class ScanResult:
    """``clips`` in order of their keys, ``classes`` by name (empty: no labels), ``skipped`` as {"path", "reason"}, and how many
    candidates were ``tried``. A reason is 'code: sentence' (codes: see media.Unreadable)."""

    root: str
    clips: tuple[FoundClip, ...]
    classes: tuple[str, ...]
    skipped: tuple[dict[str, str], ...]
    tried: int


def scan(
    root: str | os.PathLike,
    rule: ClipRule | None = None,
    labels: bool = True,
    cache_dir: str | os.PathLike | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ScanResult:
    """Probe every video and every folder of numbered images below ``root``; with a ``rule``, those too short for it are skipped.

    ``cache_dir`` defaults to latte/ in the user's cache folder. ``progress(done, of)`` is called after each candidate. InputError
    when there is no such folder or, with ``labels``, when clips lie at different depths, so that their classes are unclear.
    """
    base = os.path.abspath(check_folder(root))
    paths = sorted(_candidates(base))
    classes = _classes([os.path.relpath(path, base) for path in paths]) if labels else []
    cache = _ProbeCache(base, cache_dir)
    clips, skipped = [], []
    for done, path in enumerate(paths, start=1):
        key = Path(path).relative_to(base).as_posix()
        info = cache.probe(path, key)
        reason = info if isinstance(info, str) else rule.needs(info.frames, info.times) if rule else None
        if isinstance(info, str) or reason:
            skipped.append({"path": path, "reason": reason or ""})
        else:
            clips.append(FoundClip(key, info, classes.index(key.split("/")[0]) if classes else None))
        if progress:
            progress(done, len(paths))
    cache.save()
    return ScanResult(base, tuple(clips), tuple(classes), tuple(skipped), len(paths))


def check_folder(root: str | os.PathLike, field: str = "data.root") -> str:
    """``root`` when it is a folder, otherwise an InputError that proposes the neighbour with the nearest name."""
    path = Path(root)
    if path.is_dir():
        return os.fspath(root)
    if path.exists():
        raise InputError(f"{field} is {str(root)!r}, which is a file; give the folder that holds the videos")
    siblings = sorted(p.name for p in path.parent.iterdir() if p.is_dir()) if path.parent.is_dir() else []
    hint = (
        nearest(path.name, siblings)
        if siblings
        else ""
        if path.parent.is_dir()
        else f"; {str(path.parent)!r} does not exist either"
    )
    raise InputError(f"{field} is {str(root)!r}, but there is no such folder{hint}")


def require_clips(result: ScanResult) -> None:
    """InputError with the number of candidates and the first reasons unless at least one clip is usable."""
    if result.clips:
        return
    if not result.tried:
        kinds = ", ".join(VIDEO_SUFFIXES)
        raise InputError(
            f"data.root {result.root!r} holds no video ({kinds}) and no folder of numbered images; give another folder"
        )
    first = "; ".join(
        f"{os.path.relpath(bad['path'], result.root)} ({bad['reason']})" for bad in result.skipped[:3]
    )
    raise InputError(
        f"data.root {result.root!r} holds no usable video: {result.tried} tried, all refused, first: {first}"
    )


def write_skipped(path: str | os.PathLike, records: Iterable[dict[str, str]]) -> int:
    """Append {"path", "reason"} records to a skipped.jsonl, each once (also when a quarantine.jsonl of 0.1.0
    beside it lists it); returns how many were new."""
    path = Path(path)
    known = {
        line
        for file in (path, path.with_name(OLD_NAME))
        if file.exists()
        for line in file.read_text(encoding="utf-8").splitlines()
    }
    lines = [json.dumps({"path": record["path"], "reason": record["reason"]}) for record in records]
    new = [line for line in dict.fromkeys(lines) if line not in known]
    if new:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8") as file:
            file.write("\n".join(new) + "\n")
    return len(new)


def _candidates(folder: str, ancestors: frozenset[str] = frozenset()) -> Iterator[str]:
    """Video files, and folders that hold images and no clip otherwise. Hidden names are left out, links followed but never in a circle."""
    here = os.path.realpath(folder)
    if here in ancestors:
        return
    try:
        names = [name for name in sorted(os.listdir(folder)) if not name.startswith((".", "__MACOSX"))]
    except OSError:
        yield folder  # the probe will say why
        return
    paths = [os.path.join(folder, name) for name in names]
    folders = [path for path in paths if os.path.isdir(path)]
    files = [path for path in paths if path not in set(folders)]
    videos = [path for path in files if path.lower().endswith(VIDEO_SUFFIXES)]
    below = [found for path in folders for found in _candidates(path, ancestors | {here})]
    yield from videos + below
    if not videos and not below and any(path.lower().endswith(IMAGE_SUFFIXES) for path in files):
        yield folder


def _classes(keys: list[str]) -> list[str]:
    """Class names when every clip is <class>/<clip>; none for a flat folder or for clips that all lie deeper."""
    parts = [Path(key).parts for key in keys]
    depths = {len(part) for part in parts}
    if len(depths) > 1 and min(depths) <= 2:
        odd = [keys[[len(part) for part in parts].index(depth)] for depth in sorted(depths)[:2]]
        raise InputError(
            f"classes are the folders in <root>/<class>/<clip>, but {odd[0]!r} and {odd[1]!r} lie at different depths; "
            "move them or set data.labels=false"
        )
    return sorted({part[0] for part in parts}) if depths == {2} else []


class _ProbeCache:
    """Probe results of one root, read at the start and written back (whole, under a temporary name) when anything was new."""

    def __init__(self, root: str, folder: str | os.PathLike | None):
        self.file = (
            Path(folder) if folder else _user_cache()
        ) / f"probes-{hashlib.sha256(os.fsencode(root)).hexdigest()[:16]}.json"
        self.reader = f"{READER} av {version('av')}"
        self.entries: dict[str, Any] = {}
        self.seen: dict[str, Any] = {}
        self.saved = time.monotonic()
        try:
            stored = json.loads(self.file.read_text(encoding="utf-8"))
            if stored["reader"] == self.reader:
                self.entries = dict(stored["entries"])
        except (OSError, ValueError, KeyError, TypeError):
            pass  # no cache, or a damaged one: probe anew

    def probe(self, path: str, key: str) -> MediaInfo | str:
        """What ``media.probe`` finds, or the reason why it refuses."""
        try:
            stamp = _stamp(path)
        except (OSError, Unreadable) as error:
            return (
                error.reason
                if isinstance(error, Unreadable)
                else f"missing: it cannot be opened ({error.__class__.__name__})"
            )
        entry = self.entries.get(key)
        if not isinstance(entry, dict) or entry.get("stamp") != stamp or _restored(entry, path) is None:
            try:
                info = {name: value for name, value in asdict(probe(path)).items() if name != "path"}
                entry = {"stamp": stamp, "info": info}
            except Unreadable as error:
                entry = {"stamp": stamp, "reason": error.reason}
            self.entries[key] = entry
            if time.monotonic() - self.saved > SAVE_EVERY:
                self._write(self.entries)
        self.seen[key] = entry
        found = _restored(entry, path)
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
        except OSError:
            with suppress(OSError):  # a cache that cannot be written costs time, nothing else
                partial.unlink()


def _user_cache() -> Path:
    """latte/ in $XDG_CACHE_HOME or ~/.cache; a user without a home gets a path that cannot exist, and so no cache."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base if os.path.isabs(base) else os.devnull) / "latte"


def _stamp(path: str) -> list[int]:
    """Numbers that change whenever the content does: size and modification time, summed up over the images of a frame folder."""
    if not os.path.isdir(path):
        status = os.stat(path)
        return [status.st_size, status.st_mtime_ns]
    states = [os.stat(file) for _, file in frame_files(path)]
    return [len(states), sum(s.st_size for s in states), max((s.st_mtime_ns for s in states), default=0)]


def _restored(entry: dict[str, Any], path: str) -> MediaInfo | str | None:
    """The value of a cache entry, or None when it is not one."""
    if isinstance(entry.get("reason"), str):
        return entry["reason"]
    try:
        kept = dict(entry["info"])
        kept["steps"] = tuple((int(step), int(count)) for step, count in kept["steps"])
        kept["time_base"], kept["keys"] = tuple(kept["time_base"]), tuple(kept["keys"])
        return MediaInfo(path=path, **kept)
    except (KeyError, TypeError, ValueError):
        return None
