# SPDX-License-Identifier: Apache-2.0
"""Long videos -> a folder of clips of one shot each, with a manifest of where every clip comes from."""

import json
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from latte.checks import InputError, check, printable
from latte.data.frame_folder import Unreadable
from latte.data.pieces import Footage, pieces_of, write_piece
from latte.data.shots import find_shots
from latte.data.skipped import candidates, check_folder
from latte.files import commit_file, reported

MANIFEST = "split.json"
FORMAT = 1
SAVE_SECONDS = 2.0  # between two writes of the manifest
FORBIDDEN = re.compile(r'[<>:"\\|?*\x00-\x1f]')  # in file names of Windows
RESERVED = re.compile(r"(CON|PRN|AUX|NUL|COM\d|LPT\d)", re.IGNORECASE)  # names of devices there
MAX_NAME = 180  # bytes of a name before number and suffix; file systems allow 255


@dataclass(frozen=True)
class SplitConfig:
    """How videos are split. Lengths are in seconds."""

    min_seconds: float = 1.0  # shorter pieces are dropped
    max_seconds: float | None = None  # longer pieces are cut into even parts, at key frames where one is near
    threshold: float = 1.0  # multiplies the change that makes a cut: lower finds more cuts

    def __post_init__(self) -> None:
        check(self.min_seconds >= 0, f"--min-seconds must be at least 0, got {self.min_seconds:g}")
        check(self.threshold > 0, f"--threshold must be positive, got {self.threshold:g}")
        if self.max_seconds is not None:
            check(
                self.max_seconds >= max(2 * self.min_seconds, 0.1),
                f"--max-seconds must be at least twice --min-seconds ({self.min_seconds:g}) and 0.1, got "
                f"{self.max_seconds:g}",
            )


class Manifest:
    """The record of what was split, a JSON file in the folder of the clips."""

    def __init__(self, out: Path, settings: dict[str, Any]):
        self.path = out / MANIFEST
        self.saved = time.monotonic()
        self.record: dict[str, Any] = {"format": FORMAT, "settings": settings, "sources": {}, "skipped": {}}
        if self.path.is_file():
            self.record = self.read(settings)

    def read(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Return the stored record. InputError when it is damaged or of other settings."""
        shown = printable(self.path)
        try:
            record = json.loads(self.path.read_text("utf-8"))
            before = dict(record["settings"])
            dict(record["sources"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            raise InputError(f"{shown} is damaged; delete it with its clips, or give another --out") from None
        check(record["format"] == FORMAT, f"{shown} has format {record['format']}, not {FORMAT}")
        changed = [key for key in settings if before.get(key) != settings[key]]
        check(
            not changed,
            f"{shown} was made with "
            + ", ".join(f"{key} {before.get(key)}, not {settings[key]}" for key in changed)
            + "; give the same settings, or another --out",
        )
        return record

    def save(self, always: bool = False) -> None:
        """Write the file, unless that was done a moment ago."""
        if always or time.monotonic() - self.saved >= SAVE_SECONDS:
            with reported("the manifest", self.path):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                commit_file(self.path, json.dumps(self.record, indent=1, ensure_ascii=False) + "\n")
            self.saved = time.monotonic()


def split_footage(
    source: str | os.PathLike,
    out: str | os.PathLike,
    config: SplitConfig,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Split the video or all videos below the folder ``source`` into clips below ``out``; return the record
    of the manifest.

    Run it again after an interruption: finished clips stay. A video that cannot be read is in ``skipped``
    with its reason. InputError when there is no video, when ``out`` is inside the source, or holds clips of
    other settings; RunError when clips cannot be written.
    """
    root, keys = list_sources(source)
    folder = Path(out)
    inside = Path(os.path.realpath(out)).is_relative_to(os.path.realpath(root))
    check(
        not inside or not Path(source).is_dir(),
        f"--out {printable(folder)} is inside {printable(root)}, so clips would be split again; give a "
        "folder outside it",
    )
    manifest = Manifest(folder, asdict(config))
    names = clip_names(keys)
    try:
        for done, key in enumerate(keys, start=1):
            try:
                split_source(root / key, folder, key, names[key], config, manifest)
                manifest.record["skipped"].pop(key, None)
            except Unreadable as error:
                manifest.record["skipped"][key] = error.reason
            manifest.save()
            if progress:
                progress(done, len(keys))
    finally:
        manifest.save(always=True)
    return manifest.record


def list_sources(source: str | os.PathLike) -> tuple[Path, list[str]]:
    """Return (folder, the videos in it as paths with /). InputError when there is none."""
    if os.path.isfile(source):
        return Path(source).parent, [Path(source).name]
    root = Path(check_folder(source, "SOURCE"))
    found = (path for path in candidates(str(root), Counter()) if os.path.isfile(path))
    keys = sorted(Path(path).relative_to(root).as_posix() for path in found)
    check(bool(keys), f"{printable(root)} holds no video; give a video, or a folder with videos")
    return root, keys


def clip_names(keys: Sequence[str]) -> dict[str, str]:
    """Return for each video the path of its clips without their number and suffix.

    It is the video's without the suffix, which stays where two names would be one, also on file systems that
    ignore case.
    """
    stems = {key: str(PurePosixPath(key).with_suffix("")) for key in keys}
    counts = Counter(stem.casefold() for stem in stems.values())
    names = {key: stem if counts[stem.casefold()] == 1 else key for key, stem in stems.items()}
    safe = {key: allowed_name(name) for key, name in names.items()}
    taken: set[str] = set()
    for key in keys:
        while safe[key].casefold() in taken:
            safe[key] += "_"
        taken.add(safe[key].casefold())
    return safe


def allowed_name(name: str) -> str:
    """Return the path ``name`` with '_' for what Windows forbids in names, and its last part not too long."""
    *folders, last = FORBIDDEN.sub("_", name).split("/")
    if RESERVED.fullmatch(last.partition(".")[0]):
        last = f"_{last}"
    while len(os.fsencode(last)) > MAX_NAME:
        last = last[:-1]
    return "/".join([*folders, last])


def split_source(
    path: Path, folder: Path, key: str, name: str, config: SplitConfig, manifest: Manifest
) -> None:
    """Write the clips of one video and their entry in ``manifest``, unless they are there already."""
    status = os.stat(path)
    state = {"bytes": status.st_size, "modified_ns": status.st_mtime_ns}
    before = manifest.record["sources"].get(key)
    if before and {name: before.get(name) for name in state} != state:
        for clip in before["clips"]:
            (folder / clip["file"]).unlink(missing_ok=True)
        before = None
    finished = {}
    if before:
        finished = {clip["file"]: clip for clip in before["clips"] if (folder / clip["file"]).is_file()}
        if before["complete"] and len(finished) == len(before["clips"]):
            return
    footage = Footage.read(str(path))
    times = footage.times
    entry: dict[str, Any] = {
        **state,
        "complete": False,
        "frames": footage.info.frames,
        "fps": footage.info.fps,
        "seconds": round(times[-1], 3),
        "note": footage.info.damage,
        "clips": [],
        "dropped": [],
    }
    manifest.record["sources"][key] = entry
    shots = find_shots(footage.thumbnails, config.threshold)
    for piece in pieces_of(shots, footage, config.max_seconds):
        facts = {
            "start": round(times[piece.start], 3),
            "end": round(times[piece.end], 3),
            "first_frame": piece.start,
            "frames": piece.end - piece.start,
            "rule": piece.rule,
        }
        if times[piece.end] - times[piece.start] < config.min_seconds - 1e-6:
            entry["dropped"].append(facts)
            continue
        file = f"{name}-{len(entry['clips']):04d}.mp4"
        known = finished.get(file, {})
        written = known.get("written")
        if not written or known != {"file": file, **facts, "written": written}:
            written = write_piece(footage, piece, folder / file)
        entry["clips"].append({"file": file, **facts, "written": written})
        manifest.save()
    entry["complete"] = True
