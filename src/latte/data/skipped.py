# SPDX-License-Identifier: Apache-2.0
"""Which clips of a folder can be used: walk it, probe each candidate once, keep the good ones and state why
the rest is skipped.

A broken file never stops a scan. What is unusual about a usable file, and which files no reader exists for,
is reported too.
"""

import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from latte.checks import InputError, nearest, printable
from latte.data.clips import ClipRule
from latte.data.frame_folder import IMAGE_SUFFIXES, is_sequence
from latte.data.media import VIDEO_SUFFIXES, MediaInfo
from latte.data.probe_cache import ProbeCache
from latte.data.video_stream import is_video_name

LOG = logging.getLogger(__name__)
OLD_NAME = "quarantine.jsonl"  # what skipped.jsonl was called in 0.1.0; still read
NOT_MEDIA = {
    ".txt",
    ".csv",
    ".tsv",
    ".json",
    ".jsonl",
    ".md",
    ".srt",
    ".vtt",
    ".yaml",
    ".yml",
    ".html",
    ".pdf",
}


@dataclass(frozen=True)
class FoundClip:
    """A usable clip: ``key`` is its path relative to the root (with /), ``label`` its class or None."""

    key: str
    info: MediaInfo
    label: int | None


@dataclass(frozen=True)
class ScanResult:
    """What a scan of ``root`` found."""

    root: str
    clips: tuple[FoundClip, ...]  # in order of their keys
    classes: tuple[str, ...]  # by name; empty: no labels
    skipped: tuple[dict[str, str], ...]  # {"path", "reason"}; a reason is 'code: sentence', see Unreadable
    tried: int  # number of candidates
    ignored: dict[str, int] = field(
        default_factory=dict
    )  # suffix -> number of files that no reader exists for

    @property
    def notes(self) -> list[dict[str, str]]:
        """{"path", "note"} for everything unusual about usable clips; the first word of a note is its
        code.
        """
        return [{"path": clip.info.path, "note": note} for clip in self.clips for note in clip.info.notes]

    @property
    def damaged(self) -> list[dict[str, str]]:
        """{"path": key, "reason"} of the clips of which only a first part can be used."""
        return [{"path": clip.key, "reason": clip.info.damage} for clip in self.clips if clip.info.damage]


def scan(
    root: str | os.PathLike,
    rule: ClipRule | None = None,
    labels: bool = True,
    cache_dir: str | os.PathLike | None = None,
    progress: Callable[[int, int], None] | None = None,
    images: bool = False,
) -> ScanResult:
    """Probe every video and every folder of numbered images below ``root``; with a ``rule``, skip those too
    short for it.

    With ``images`` an image that is no frame of such a folder is a clip of one frame.

    ``cache_dir`` defaults to latte/ in the user's cache folder. ``progress(done, of)`` is called after each
    candidate. InputError when there is no such folder or, with ``labels``, when clips are at different
    depths, so that their classes are unclear.
    """
    base = os.path.abspath(check_folder(root))
    ignored: Counter[str] = Counter()
    paths = sorted(candidates(base, ignored, images))
    keys = [Path(path).relative_to(base).as_posix() for path in paths]
    classes = []
    if labels:
        classes = _classes([key for key in keys if is_utf8(key)])
    cache = ProbeCache(base, cache_dir)
    clips = []
    skipped = []
    for done, (path, key) in enumerate(zip(paths, keys, strict=True), start=1):
        found = (
            cache.probe(path, key) if is_utf8(key) else "unsupported: its name is not valid UTF-8; rename it"
        )
        reason = found if isinstance(found, str) else rule and rule.needs(found.frames, found.times)
        if isinstance(found, str) or reason:
            skipped.append({"path": path, "reason": reason or ""})
        else:
            clips.append(FoundClip(key, found, classes.index(key.split("/")[0]) if classes else None))
        if progress:
            progress(done, len(paths))
    cache.save()
    result = ScanResult(base, tuple(clips), tuple(classes), tuple(skipped), len(paths), dict(ignored))
    for line in remarks(result):
        LOG.info("%s", line)
    return result


def is_utf8(name: str) -> bool:
    """Return whether ``name`` can be written into manifests and captions, which are UTF-8."""
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def remarks(found: ScanResult) -> list[str]:
    """Return a line per kind of note, with its number of clips and the first example, and one for the ignored
    files.
    """
    lines = []
    notes = found.notes
    for code, count in Counter(note["note"].partition(":")[0] for note in notes).items():
        first = next(note for note in notes if note["note"].startswith(f"{code}:"))
        name = printable(os.path.relpath(first["path"], found.root))
        lines.append(f"{count} clips with note {code}, first {name}: {first['note'].partition(': ')[2]}")
    if found.ignored:
        kinds = ", ".join(
            f"{count} {suffix or 'without a suffix'}" for suffix, count in sorted(found.ignored.items())
        )
        lines.append(f"{sum(found.ignored.values())} files are not read, by suffix: {printable(kinds)}")
    return lines


def file_lines(found: ScanResult) -> list[str]:
    """Return a line per clip (frames, size, rate, notes) and per skipped file, for people."""
    lines = []
    for clip in found.clips:
        info = clip.info
        notes = "".join(f"; {note}" for note in info.notes)
        size = f"{info.frames} frames of {info.width}x{info.height}, {info.fps:g} fps"
        lines.append(f"{printable(info.path)}  {size}{notes}")
    return lines + [f"{printable(bad['path'])}  skipped: {bad['reason']}" for bad in found.skipped]


def check_folder(root: str | os.PathLike, field: str = "data.root") -> str:
    """Return ``root`` when it is a folder; otherwise raise an InputError that proposes the neighbour with the
    nearest name.
    """
    path = Path(root)
    if path.is_dir():
        return os.fspath(root)
    if path.exists():
        raise InputError(f"{field} is {str(root)!r}, which is a file; give the folder that holds the videos")
    hint = f"; {str(path.parent)!r} does not exist either"
    if path.parent.is_dir():
        hint = nearest(path.name, sorted(p.name for p in path.parent.iterdir() if p.is_dir()))
    raise InputError(f"{field} is {str(root)!r}, but there is no such folder{hint}")


def require_clips(result: ScanResult) -> None:
    """InputError with the number of candidates and the first reasons unless at least one clip is usable."""
    if result.clips:
        return
    if not result.tried:
        others = "".join(f"; {line}" for line in remarks(result))
        raise InputError(
            f"data.root {result.root!r} holds no video ({', '.join(VIDEO_SUFFIXES)}) and no folder of "
            f"numbered images{others}; give another folder"
        )
    first = "; ".join(
        f"{printable(os.path.relpath(bad['path'], result.root))} ({bad['reason']})"
        for bad in result.skipped[:3]
    )
    raise InputError(
        f"data.root {result.root!r} holds no usable video: {result.tried} tried, all skipped, first: {first}"
    )


def reasons(records: Iterable[dict[str, str]]) -> str:
    """Return the number of skipped files by the code of their reason: '3 too-short, 1 damaged'."""
    codes = Counter(record["reason"].partition(":")[0] for record in records)
    return ", ".join(f"{count} {code}" for code, count in codes.most_common())


def write_skipped(path: str | os.PathLike, records: Iterable[dict[str, str]]) -> int:
    """Append {"path", "reason"} records to a skipped.jsonl and return how many were new.

    A record is written once, also when a quarantine.jsonl of 0.1.0 beside the file lists it.
    """
    path = Path(path)
    known: set[str] = set()
    for file in (path, path.with_name(OLD_NAME)):
        if file.is_file():  # reading a device such as /dev/full would not end
            known.update(file.read_text(encoding="utf-8").splitlines())
    lines = [json.dumps({"path": record["path"], "reason": record["reason"]}) for record in records]
    new = [line for line in dict.fromkeys(lines) if line not in known]
    if new:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8") as file:
            file.write("\n".join(new) + "\n")
    return len(new)


def candidates(
    folder: str, ignored: Counter[str], singles: bool = False, ancestors: frozenset[str] = frozenset()
) -> Iterator[str]:
    """Yield video files, and folders that hold images and no clip otherwise; count in ``ignored`` what no
    reader exists for.

    With ``singles``, images that are no sequence of frames are yielded one by one. Hidden names are left
    out. Links are followed, but never in a circle.
    """
    here = os.path.realpath(folder)
    if here in ancestors:
        return
    try:
        names = [name for name in sorted(os.listdir(folder)) if not name.startswith((".", "__MACOSX"))]
    except OSError:
        yield folder  # the probe states why
        return
    paths = [os.path.join(folder, name) for name in names]
    folders = [path for path in paths if os.path.isdir(path)]
    files = [path for path in paths if path not in set(folders)]
    videos = [path for path in files if is_video_name(path)]
    below = [found for path in folders for found in candidates(path, ignored, singles, ancestors | {here})]
    yield from videos + below
    images = [path for path in files if path.lower().endswith(IMAGE_SUFFIXES)]
    used = set(videos)
    if images and not videos and not below and not (singles and not is_sequence(folder)):
        yield folder
        used = set(images)
    elif singles:
        yield from images
        used |= set(images)
    suffixes = [os.path.splitext(path)[1].lower() for path in files if path not in used]
    ignored.update(suffix for suffix in suffixes if suffix not in NOT_MEDIA)


def _classes(keys: list[str]) -> list[str]:
    """Return the class names when every clip is <class>/<clip>; none for a flat folder or for clips that are
    all deeper.
    """
    parts = [Path(key).parts for key in keys]
    depths = {len(part) for part in parts}
    if len(depths) > 1 and min(depths) <= 2:
        examples = [keys[[len(part) for part in parts].index(depth)] for depth in sorted(depths)[:2]]
        raise InputError(
            f"classes are the folders in <root>/<class>/<clip>, but {examples[0]!r} and {examples[1]!r} "
            "are at different depths; move them or set data.labels=false"
        )
    if depths != {2}:
        return []
    return sorted({part[0] for part in parts})
