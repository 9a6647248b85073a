# SPDX-License-Identifier: Apache-2.0
"""The two sides of an evaluation as lists of videos with the hash of their content, and the frames of any of
them.

Content is hashed anew each time, whatever a file's size and date are, and what was probed of a folder's files
is cached under the hash of all of them: a file that was replaced in place is never mistaken for the old one.
Axes: t frames, h height, w width, c channels.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, runtime_checkable
from typing import Protocol as Interface

import numpy as np

from latte.checks import check
from latte.data.frame_folder import IMAGE_SUFFIXES, frame_files
from latte.data.media import VIDEO_SUFFIXES, MediaInfo, read_frames
from latte.data.shards import MANIFEST, SHARDS
from latte.data.skipped import check_folder, scan
from latte.data.video_stream import is_video_name
from latte.evaluation.detector_files import file_sha256
from latte.evaluation.latent_side import open_latents
from latte.evaluation.plan import Source

RECORDS = ("clips.json", "album.json")  # latte sample writes the first beside its clips, 0.1.0 the second
MOSAIC = "clips.gif"  # and this, which shows all clips and is not one of them
GENERATED_CODEC = "h264"  # of the files that latte writes
RECORDED = {  # field of the manifest's generation group: key of the record
    "checkpoint_sha256": "weights",
    "codec_sha256": "codec",
    "sampler": "sampler",
    "steps": "steps",
    "guidance": "guidance",
}
USUAL = {"eta": 0.0, "dtype": "torch.float32"}  # other keys of the record that go unnamed at these values
NOT_PIXELS = ("fps",)


class Side(Interface):
    """What planning and extraction need of a side. It is pickled for other processes."""

    @property
    def root(self) -> str:
        """The folder."""
        ...

    @property
    def sources(self) -> tuple[Source, ...]:
        """Its videos."""
        ...

    @property
    def broken(self) -> tuple[dict[str, str], ...]:
        """{"id", "reason"} of the videos that cannot be read."""
        ...

    def read(self, id: str, indices: Sequence[int]) -> np.ndarray:
        """Return frames ``indices`` of video ``id``, uint8 (t h w c)."""
        ...


@runtime_checkable
class ClipSource(Interface):
    """A model whose clips are the fake side: anything that can write video files of generated clips."""

    @property
    def name(self) -> str:
        """What a replay opens again: an absolute path, a hub id or a model of the package."""
        ...

    @property
    def seed(self) -> int:
        """Seed of the first clip."""
        ...

    @property
    def shape(self) -> tuple[int, int, int]:
        """Frames, height and width of a clip, known without generating any."""
        ...

    @property
    def interval(self) -> int | None:
        """How many video frames lie between two frames of its training clips; None: unknown."""
        ...

    def generate(
        self, folder: Path, count: int, fps: float | None, progress: Callable[[int, int], None]
    ) -> dict[str, Any]:
        """Write ``count`` clips to ``folder``, those that are missing only; return fields of the generation
        group.
        """
        ...


@dataclass(frozen=True)
class FolderSide:
    """The videos and frame folders below ``root``."""

    root: str
    sources: tuple[Source, ...]
    broken: tuple[dict[str, str], ...]
    infos: dict[str, MediaInfo]

    def read(self, id: str, indices: Sequence[int]) -> np.ndarray:
        """Return frames of a video; Unreadable (an InputError) if it can no longer be read."""
        return read_frames(self.infos[id], indices)


def open_side(
    name: str, path: str | Path, cache: Path, codec_path: str | None = None, device: str = "cpu"
) -> Side:
    """Return the videos of 'real' or 'fake'; ``cache`` keeps what was probed.

    InputError if there is no such folder, it holds no video, or the codec of its latents is not available.
    """
    root = Path(check_folder(path, name.upper()))
    latents = (root / MANIFEST).is_file() and any(root.glob(SHARDS))
    side = open_latents(root, codec_path, device) if latents else open_folder(root, cache)
    kinds = f"videos ({', '.join(VIDEO_SUFFIXES)}), folders of numbered images, latent shards or a model"
    check(
        bool(side.sources or side.broken),
        f"{name.upper()} is {str(path)!r}, but it holds no video; give a folder with {kinds}",
    )
    return side


def file_hashes(root: Path) -> dict[str, str]:
    """Return {path below ``root``, with /: SHA-256} of every video and image file; links are followed, cycles
    are not.
    """
    found = {}
    visited = set()
    for folder, folders, files in os.walk(root, followlinks=True):
        here = os.path.realpath(folder)
        folders[:] = [] if here in visited else sorted(name for name in folders if not name.startswith("."))
        visited.add(here)
        for name in files:
            path = Path(folder, name)
            read = name.lower().endswith(IMAGE_SUFFIXES) or is_video_name(str(path))
            if read and not name.startswith(".") and path.is_file():
                found[path.relative_to(root).as_posix()] = file_sha256(path)
    return found


def digest(value: object) -> str:
    """Return the SHA-256 of plain data."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def open_folder(root: Path, cache: Path) -> FolderSide:
    """Return the videos and frame folders below ``root``; ``cache`` keeps what was probed."""
    root = root.absolute()
    hashes = file_hashes(root)
    found = scan(root, labels=False, cache_dir=cache / digest(hashes)[:16])
    mosaic = MOSAIC if any((root / name).is_file() for name in RECORDS) else None
    sources = []
    for clip in found.clips:
        if clip.key == mosaic:
            continue
        if clip.key in hashes:
            sha256 = hashes[clip.key]
        else:  # a folder of frames
            names = [Path(path).relative_to(root).as_posix() for _, path in frame_files(root / clip.key)]
            sha256 = digest([hashes[name] for name in names])
        info = clip.info
        size = (info.height, info.width)
        sources.append(Source(clip.key, info.frames, sha256, info.fps, info.codec, *size, info.damage))
    broken = tuple(
        {"id": Path(bad["path"]).relative_to(root).as_posix(), "reason": bad["reason"]}
        for bad in found.skipped
    )
    return FolderSide(str(root), tuple(sources), broken, {clip.key: clip.info for clip in found.clips})


def read_generation(root: str | Path) -> dict[str, Any]:
    """Return what ``latte sample`` recorded of the clips in ``root`` as fields of the generation group; {}
    for other folders.
    """
    try:
        record = next((path for name in RECORDS if (path := Path(root) / name).is_file()), Path(root))
        facts = json.loads(record.read_text("utf-8"))["facts"]
        found = {field: facts[key] for field, key in RECORDED.items() if key in facts}
        named = {*RECORDED.values(), *NOT_PIXELS}
        other = {key: value for key, value in facts.items() if key not in named and value != USUAL.get(key)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
    if other:
        found["other"] = other
    return found
