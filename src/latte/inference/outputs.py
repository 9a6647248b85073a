# SPDX-License-Identifier: Apache-2.0
"""A folder of generated clips: one mp4 per seed, a gif of all of them, a contact sheet, and a record of what they are.

The record (album.json) holds what the clips are a function of, their prompts if they have any, and the hash of each finished file. A
second run into the same folder draws only what is missing, in the same batches, so that a killed job ends with the files of one that was
never killed.
Axes: t frames, h height, w width, c channels.
"""

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from latte.checks import InputError
from latte.data.media import contact_sheet, probe, read_frames, write_gif, write_mp4
from latte.files import commit_file, reported

FORMAT = 1
RECORD = "album.json"
MOST_SHOWN = 16  # clips on the sheet and in the gif


@dataclass(frozen=True)
class SampleRequest:
    """One clip to be drawn: its seed, its label (a number or None) and what to call the label; or its prompt."""

    seed: int
    label: int | None = None
    word: str | None = None
    prompt: str | None = None

    @property
    def file(self) -> str:
        """'seed-0007-2-left.mp4'; whatever the class or the prompt is called, this names a file in the folder and nothing else.

        Behind a prompt's first letters comes its hash, because two prompts can begin alike.
        """
        word = re.sub(r"[^A-Za-z0-9_-]+", "-", self.word or self.prompt or "").strip("-")[:40].strip("-")
        number = "" if self.label is None or self.label < 0 else str(self.label)
        apart = "" if self.prompt is None else hashlib.sha256(self.prompt.encode()).hexdigest()[:6]
        parts = ["seed", f"{self.seed:04d}", number, word, apart]
        return "-".join(part for part in parts if part) + ".mp4"


Draw = Callable[[int, Sequence[SampleRequest]], Iterable[tuple[int, np.ndarray]]]


def write_album(
    folder: Path,
    requests: Sequence[SampleRequest],
    draw: Draw,
    facts: Mapping[str, Any],
    batch: int,
    fps: float,
) -> tuple[Path, Path]:
    """Make ``folder`` hold a file per wish -> (contact sheet, gif). ``draw(number of the batch, its requests)``
    gives (seed, uint8 (t h w c)) for each.

    ``facts`` (plain data) is everything but the requests that decides the pixels. InputError when the folder's clips were made with
    other facts, RunError when it cannot be written.
    """
    folder = Path(folder)
    with reported("clips", folder):
        folder.mkdir(parents=True, exist_ok=True)
    record = _read_record(folder, json.loads(json.dumps(facts)))
    for start in range(0, len(requests), batch):
        part = requests[start : start + batch]
        missing = {wish.file for wish in part if not _finished(folder, wish, record)}
        if not missing:
            continue
        for wish, (_, clip) in zip(part, draw(start // batch, part), strict=True):
            if wish.file in missing:
                write_mp4(folder / wish.file, clip, fps)
                record["files"][wish.file] = _hash(folder / wish.file)
                if wish.prompt is not None:
                    record.setdefault("prompts", {})[wish.file] = wish.prompt
                with reported(RECORD, folder):
                    commit_file(folder / RECORD, json.dumps(record, indent=1, sort_keys=True) + "\n")
    return _show(folder, requests[:MOST_SHOWN], fps)


def _read_record(folder: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """The folder's record, or a fresh one; InputError when it cannot be read or belongs to other facts."""
    path = folder / RECORD
    if not path.exists():
        return {"format": FORMAT, "facts": facts, "files": {}}
    try:
        record = json.loads(path.read_text("utf-8"))
        before, files, prompts = record["facts"], dict(record["files"]), dict(record.get("prompts", {}))
        differing = {
            key: (before.get(key), facts.get(key))
            for key in [*before, *facts]
            if before.get(key) != facts.get(key)
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise InputError(f"{path} is damaged; delete {folder}, or give another --out") from None
    if differing:
        what = ", ".join(f"{key} ({old} there, {new} now)" for key, (old, new) in differing.items())
        raise InputError(f"--out {folder} holds clips of other settings: {what}; give another --out")
    return {**record, "files": files, **({"prompts": prompts} if prompts else {})}


def _finished(folder: Path, wish: SampleRequest, record: Mapping[str, Any]) -> bool:
    """Is the file there, as it was written, and of the same prompt? Names are cut, so two prompts can share one."""
    name, files = wish.file, record["files"]
    same = record.get("prompts", {}).get(name) == wish.prompt
    return same and name in files and (folder / name).is_file() and _hash(folder / name) == files[name]


def _hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _show(folder: Path, requests: Sequence[SampleRequest], fps: float) -> tuple[Path, Path]:
    """Sheet and gif, from the files themselves."""
    clips = []
    for wish in requests:
        info = probe(folder / wish.file)
        clips.append(read_frames(info, range(info.frames)))
    names = [wish.prompt if wish.label is None else wish.word or str(wish.label) for wish in requests]
    captions = [
        f"seed {wish.seed}" + (f", {name}" if name else "")
        for wish, name in zip(requests, names, strict=True)
    ]
    sheet, gif = folder / "sheet.png", folder / "clips.gif"
    with reported("the contact sheet", sheet):
        contact_sheet(clips, captions=captions).save(sheet)
    write_gif(gif, mosaic(clips), fps)
    return sheet, gif


def mosaic(clips: Sequence[np.ndarray], gap: int = 2) -> np.ndarray:
    """Clips of one shape, uint8 (t h w c), side by side in a square of rows and columns -> uint8 (t H W c), white between them."""
    columns = math.ceil(math.sqrt(len(clips)))
    rows = math.ceil(len(clips) / columns)
    t, h, w, c = clips[0].shape
    board = np.full((t, rows * (h + gap) - gap, columns * (w + gap) - gap, c), 255, np.uint8)
    for index, clip in enumerate(clips):
        y, x = index // columns * (h + gap), index % columns * (w + gap)
        board[:, y : y + h, x : x + w] = clip
    return board
