# SPDX-License-Identifier: Apache-2.0
"""Data sets: a folder of videos, procedural clips, latents encoded before; to everyone else they are one thing, a ``Dataset``.

Axes: f frames, c channels, H height, W width.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from latte.checks import InputError, check, choose, require
from latte.data.caption_files import read_captions
from latte.data.clips import ClipRule, centre_crop_resize, choose_frames, flip_horizontal, to_float
from latte.data.layouts import LAYOUTS, check_layout
from latte.data.media import read_frames
from latte.data.procedural import (
    DIRECTIONS,
    caption_of,
    check_hold_out,
    draw_scene,
    render,
    split_combinations,
)
from latte.data.skipped import ScanResult, require_clips, scan, write_skipped

__all__ = [
    "DATASETS",
    "Clip",
    "DataConfig",
    "Dataset",
    "FolderDataset",
    "ProceduralDataset",
    "ScanResult",
    "build_dataset",
    "scan",
    "write_skipped",
]

ENDLESS = 1 << 40  # procedural clips without num_clips


@dataclass(frozen=True)
class Clip:
    """``video`` (f c H W) float in [-1, 1], or a latent; ``label`` a class number or None; ``key`` says where it came from."""

    video: Tensor
    label: int | None
    caption: str | None
    key: str


class Dataset(Protocol):
    """What the trainer and the sampler rely on. ``classes`` are names, [] without labels; ``latent``: is Clip.video a latent?

    ``captions`` are the distinct captions of all clips in a fixed order, [] when clips have none.
    """

    classes: list[str]
    latent: bool

    @property
    def skipped(self) -> Sequence[dict[str, str]]:
        """{"path", "reason"} of each candidate that was left out."""
        ...

    @property
    def captions(self) -> Sequence[str]: ...

    def __len__(self) -> int: ...

    def clip(self, index: int, generator: torch.Generator) -> Clip:
        """Clip ``index``; every random choice is drawn from ``generator``."""
        ...

    def still(self, index: int, generator: torch.Generator) -> Clip:
        """One frame of clip ``index``, any of them: video (1 c H W)."""
        ...

    def describe(self) -> dict[str, Any]:
        """A JSON object that changes whenever the data do."""
        ...


@dataclass(frozen=True)
class DataConfig:
    """Which clips, at which size. ``kind`` "folder": videos below ``root`` (labels from <root>/<class>/<clip> unless ``labels`` is off);
    "faceforensics", "skytimelapse", "ucf101", "taichi": the paper's sets in their own layouts (layouts.py);
    "procedural": drawn from ``seed``, ``num_clips`` of them (None: no end); "latents": shards made by ``latte data encode`` in ``root``.

    ``frames``, ``interval``, ``rule``, ``fps`` choose the frames (see clips.ClipRule); ``flip`` mirrors every second clip at random.
    ``captions`` says where those of a folder are (see captionfiles), ``hold_out`` which procedural ones are never drawn (one combination
    in so many; 0: none). A key that the kind does not read must be left out.
    """

    kind: str = "folder"
    root: str | None = None
    resolution: int | tuple[int, int] = 256
    frames: int = 16
    interval: int = 1
    rule: str = "strict"
    fps: float | None = None
    flip: bool = False
    labels: bool = True
    seed: int = 0
    num_clips: int | None = None
    hold_out: int = 0
    captions: str | None = None
    workers: int | None = None
    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        unread = choose("data.kind", self.kind, UNREAD)
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in unread and value != field.default:
                raise InputError(
                    f"data.{field.name} is {value!r}, but data.kind={self.kind} does not read it; leave it out ({unread[field.name]})"
                )
        require(
            min(self.size) > 0,
            "data.resolution",
            self.resolution,
            "sizes are positive",
            "give e.g. 256 or [256, 320] (height, width)",
        )
        require(
            self.num_clips is None or self.num_clips > 0,
            "data.num_clips",
            self.num_clips,
            "there is at least one clip",
            "give 1 or more, or null for no end",
        )
        check(self.workers is None or self.workers >= 0, f"data.workers must be at least 0, got {self.workers}")
        check_hold_out(self.hold_out)
        _ = self.clip_rule  # refuses impossible frames, interval, rule, fps

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)."""
        return (
            (self.resolution, self.resolution)
            if isinstance(self.resolution, int)
            else (self.resolution[0], self.resolution[1])
        )

    @property
    def clip_rule(self) -> ClipRule:
        """How the frames of a clip are chosen."""
        return ClipRule(self.frames, self.interval, self.rule, self.fps)


_FILES = dict.fromkeys(("seed", "num_clips", "hold_out"), "it belongs to procedural clips")
_DRAWN = {
    "root": "procedural clips need no files",
    "interval": "their speed does not depend on it",
    "rule": "all frames are drawn",
    "fps": "all frames are drawn",
    "flip": "a mirror would turn left into right",
    "captions": "they are drawn, too",
}
_LATENTS = {
    **_FILES,
    "captions": "they are in the latents' manifest, if the videos had any when they were encoded",
}
UNREAD = {"folder": _FILES, **dict.fromkeys(LAYOUTS, _FILES), "procedural": _DRAWN, "latents": _LATENTS}


class FolderDataset:
    """The usable videos and frame folders below ``config.root``, at any depth; the rest is in ``skipped`` with reasons.

    InputError when no such folder exists or nothing in it is usable. ``clip`` raises media.Unreadable (an InputError that names
    the file) when a file that was good at the scan no longer is.
    """

    latent = False

    def __init__(self, config: DataConfig, cache_dir: str | os.PathLike | None = None):
        if config.root is None:
            raise InputError(
                "data.root is missing; give the folder that holds the videos, e.g. data.root=/path/to/videos"
            )
        layout = LAYOUTS.get(config.kind)
        labelled = config.labels and (layout is None or layout.num_classes is not None)
        found = scan(config.root, config.clip_rule, labelled, cache_dir)
        if layout:
            check_layout(config.kind, found)
        require_clips(found)
        self.config, self.clips, self.skipped = config, found.clips, found.skipped
        self.classes = list(found.classes)
        self.caption_of = read_captions(found, config.captions)
        self.captions = sorted(set(self.caption_of.values()))

    def __len__(self) -> int:
        return len(self.clips)

    def clip(self, index: int, generator: torch.Generator) -> Clip:
        """Clip ``index`` with its start, then its flip, drawn from ``generator``."""
        found, config = self.clips[index], self.config
        start = choose_frames(
            found.info.frames, config.clip_rule, generator, found.info.times if config.rule == "time" else ()
        )
        mirrored = bool(torch.rand((), generator=generator) < 0.5)
        video = to_float(centre_crop_resize(read_frames(found.info, start), *config.size))
        return Clip(
            flip_horizontal(video) if mirrored and config.flip else video,
            found.label,
            self.caption_of.get(found.key),
            found.key,
        )

    def still(self, index: int, generator: torch.Generator) -> Clip:
        """One frame of video ``index``, then its flip, drawn from ``generator``."""
        found, config = self.clips[index], self.config
        frame = int(torch.randint(found.info.frames, (), generator=generator))
        mirrored = bool(torch.rand((), generator=generator) < 0.5)
        video = to_float(centre_crop_resize(read_frames(found.info, [frame]), *config.size))
        return Clip(
            flip_horizontal(video) if mirrored and config.flip else video,
            found.label,
            self.caption_of.get(found.key),
            found.key,
        )

    def describe(self) -> dict[str, Any]:
        """What the clips are, without where they lie: the same for a copy of the folder."""
        config = self.config
        sizes = [os.path.getsize(c.info.path) if os.path.isfile(c.info.path) else 0 for c in self.clips]
        content = [
            (c.key, c.label, c.info.frames, c.info.height, c.info.width, size)
            for c, size in zip(self.clips, sizes, strict=True)
        ]
        digest = hashlib.sha256(
            json.dumps([content, self.caption_of] if self.caption_of else content).encode()
        ).hexdigest()
        chosen = {
            "frames": config.frames,
            "interval": config.interval,
            "rule": config.rule,
            "fps": config.fps,
            "flip": config.flip,
        }
        return {
            "kind": "folder",
            "clips": len(self),
            "classes": self.classes,
            "content": digest,
            "resolution": list(config.size),
            **chosen,
        }


class ProceduralDataset:
    """Moving shapes drawn from (seed, index): labels are the directions, captions say what is to be seen."""

    latent = False

    def __init__(self, config: DataConfig):
        self.config = config
        self.classes = list(DIRECTIONS) if config.labels else []
        self.captions = sorted(
            caption_of(*combination) for combination in split_combinations(config.hold_out)[0]
        )
        self.num_clips = config.num_clips or ENDLESS
        self.skipped: tuple[dict[str, str], ...] = ()

    def __len__(self) -> int:
        return self.num_clips

    def clip(self, index: int, generator: torch.Generator | None = None) -> Clip:
        """Clip ``index``; nothing is left to draw from ``generator``."""
        config = self.config
        scene = draw_scene(config.seed, index, config.frames, config.hold_out)
        video = to_float(render(scene, config.frames, *config.size))
        return Clip(video, scene.label if config.labels else None, scene.caption, f"{config.seed}/{index}")

    def still(self, index: int, generator: torch.Generator) -> Clip:
        """One frame of clip ``index``, drawn from ``generator``."""
        clip = self.clip(index)
        frame = int(torch.randint(self.config.frames, (), generator=generator))
        return replace(clip, video=clip.video[frame : frame + 1])

    def describe(self) -> dict[str, Any]:
        """Everything that the clips are a function of."""
        config = self.config
        held = {"hold_out": config.hold_out} if config.hold_out else {}
        return {
            "kind": "procedural",
            "clips": len(self),
            "classes": self.classes,
            "seed": config.seed,
            "resolution": list(config.size),
            "frames": config.frames,
            **held,
        }


def _latents(config: DataConfig, codec_fingerprint: str | None) -> Dataset:
    from latte.data.latents import LatentDataset

    return LatentDataset(config, codec_fingerprint)


def _videos(
    config: DataConfig, cache_dir: str | os.PathLike | None, codec_fingerprint: str | None
) -> Dataset:
    return FolderDataset(config, cache_dir)


DATASETS = {
    "folder": _videos,
    **dict.fromkeys(LAYOUTS, _videos),
    "procedural": lambda config, cache_dir, codec_fingerprint: ProceduralDataset(config),
    "latents": lambda config, cache_dir, codec_fingerprint: _latents(config, codec_fingerprint),
}


def build_dataset(
    config: DataConfig, cache_dir: str | os.PathLike | None = None, codec_fingerprint: str | None = None
) -> Dataset:
    """The data set of ``config``. ``cache_dir`` keeps probe results of a folder (default: the user's cache folder);
    ``codec_fingerprint`` is what latents must have been encoded with."""
    return choose("data.kind", config.kind, DATASETS)(config, cache_dir, codec_fingerprint)
