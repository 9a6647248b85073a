# SPDX-License-Identifier: Apache-2.0
"""What ``latte data encode`` reads: every video of a folder, or a number of procedural clips.

Axes: t frames, h height, w width, c channels.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from latte.checks import check
from latte.data.base import DataConfig, SceneSet
from latte.data.caption_files import read_captions
from latte.data.media import read_frames
from latte.data.shards import Record
from latte.data.skipped import FoundClip, check_folder, require_clips, scan

Progress = Callable[[int, int], None] | None
READ_BYTES = 256 << 20  # source frames in memory at a time
MAX_PROCEDURAL = 1_000_000  # clips; more are better generated while training


@dataclass(frozen=True)
class Video:
    """A source video. ``read(frame numbers)`` returns uint8 (t h w c); ``piece`` is how many frames to read
    at a time.
    """

    record: Record
    read: Callable[[Sequence[int]], np.ndarray]
    piece: int


@dataclass(frozen=True)
class Source:
    """All videos to encode. ``fingerprint`` identifies the dataset apart from its records."""

    fingerprint: dict[str, Any]
    videos: list[Video]
    classes: list[str]
    skipped: list[dict[str, str]]
    damaged: list[dict[str, str]] = field(default_factory=list)  # encoded, but only their first part decodes


def _folder(config: DataConfig, cache_dir: str | os.PathLike | None, progress: Progress) -> Source:
    """Return every readable video below ``config.root``, also those too short for the rule: another rule may
    fit.
    """
    found = scan(check_folder(config.root or ""), None, config.labels, cache_dir, progress)
    require_clips(found)
    captions = read_captions(found, config.captions)
    fingerprint: dict[str, Any] = {"kind": "folder"}
    if captions:
        fingerprint["captions"] = True
    videos = [_folder_video(clip, captions.get(clip.key)) for clip in found.clips]
    return Source(fingerprint, videos, list(found.classes), list(found.skipped), found.damaged)


def _folder_video(clip: FoundClip, caption: str | None) -> Video:
    info = clip.info
    path = Path(info.path)
    files = [path]
    if path.is_dir():
        files = list(path.iterdir())
    states = [file.stat() for file in files if file.exists()]
    record = Record(
        key=clip.key,
        label=clip.label,
        caption=caption,
        frames=info.frames,
        fps=info.fps,
        start=info.start,
        steps=info.steps,
        time_base=info.time_base,
        stamp=(
            sum(state.st_size for state in states),
            max((state.st_mtime_ns for state in states), default=0),
        ),
    )
    piece = max(READ_BYTES // (info.height * info.width * 3), 16)
    return Video(record, lambda frames: read_frames(info, frames), piece)


def _procedural(config: DataConfig, cache_dir: str | os.PathLike | None, progress: Progress) -> Source:
    """Return ``config.num_clips`` procedural clips."""
    check(
        config.num_clips is not None and config.num_clips <= MAX_PROCEDURAL,
        f"data.num_clips is {config.num_clips}, but up to {MAX_PROCEDURAL:,} procedural clips can be "
        "encoded; give a number, "
        "or train with data.kind=procedural, which stores nothing",
    )
    scenes = config.scene_set
    videos = [_procedural_video(config, scenes, index) for index in range(config.num_clips or 0)]
    fingerprint: dict[str, Any] = {"kind": "procedural", "seed": config.seed, "frames": config.frames}
    fingerprint |= scenes.describe()
    if config.held_out_captions:
        fingerprint["hold_out"] = config.held_out_captions
    return Source(fingerprint, videos, list(scenes.classes) if config.labels else [], [])


def _procedural_video(config: DataConfig, scenes: SceneSet, index: int) -> Video:
    label = scenes.label(index) if config.labels else None
    record = Record(f"{config.seed}/{index}", label, scenes.caption(index), config.frames)
    return Video(record, lambda frames: scenes.render_clip(index)[list(frames)], config.frames)


SOURCES = {"folder": _folder, "procedural": _procedural}
