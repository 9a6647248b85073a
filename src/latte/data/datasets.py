# SPDX-License-Identifier: Apache-2.0
"""Datasets of clips: a folder of videos, procedural clips, encoded latents, and the table that builds one
from DataConfig.

Axes: f frames, c channels, H height, W width.
"""

import hashlib
import json
import os
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch

from latte.checks import InputError, choose
from latte.data.base import UNREAD, Clip, ClipReadError, DataConfig, Dataset
from latte.data.caption_files import read_captions
from latte.data.clips import centre_crop_resize, choose_frames, flip_horizontal, to_float
from latte.data.fingerprint import combined, fingerprints
from latte.data.latents import LatentDataset
from latte.data.layouts import LAYOUTS, check_layout
from latte.data.media import Unreadable, read_frames
from latte.data.skipped import FoundClip, require_clips, scan

__all__ = [
    "DATASETS",
    "UNREAD",
    "Clip",
    "ClipReadError",
    "DataConfig",
    "Dataset",
    "FolderDataset",
    "LatentDataset",
    "ProceduralDataset",
    "build_dataset",
]

UNLIMITED = 1 << 40  # length of a procedural dataset without num_clips


class FolderDataset:
    """The usable videos and frame folders below ``config.root``, at any depth; ``skipped`` lists the others
    with reasons.

    InputError when the folder does not exist or holds no usable clip. ``clip`` raises ClipReadError when a
    file that was readable at the scan no longer is.
    """

    latent = False

    def __init__(self, config: DataConfig, cache_dir: str | os.PathLike | None = None):
        if config.root is None:
            raise InputError(
                "data.root is missing; give the folder of the videos, e.g. data.root=/path/to/videos"
            )
        layout = LAYOUTS.get(config.kind)
        labelled = config.labels and (layout is None or layout.num_classes is not None)
        found = scan(config.root, config.clip_rule, labelled, cache_dir)
        if layout:
            check_layout(config.kind, found)
        require_clips(found)
        self.config = config
        self.clips = found.clips
        self.skipped = found.skipped
        self.classes = list(found.classes)
        self.caption_of = read_captions(found, config.captions)
        self.captions = sorted(set(self.caption_of.values()))

    def __len__(self) -> int:
        return len(self.clips)

    @property
    def empty_classes(self) -> list[str]:
        """The classes without a usable clip."""
        used = {clip.label for clip in self.clips}
        return [name for label, name in enumerate(self.classes) if label not in used]

    @cached_property
    def files(self) -> dict[str, str]:
        """Key -> content fingerprint of each clip's file."""
        return fingerprints({clip.key: clip.info.path for clip in self.clips})

    def clip(self, index: int, generator: torch.Generator) -> Clip:
        """Return clip ``index`` with its start frame, then its flip, drawn from ``generator``."""
        found = self.clips[index]
        frames = choose_frames(found.info.frames, self.config.clip_rule, generator, found.info.times)
        return self._read(found, frames, generator)

    def image(self, index: int, generator: torch.Generator) -> Clip:
        """Return one frame of video ``index``, then its flip, drawn from ``generator``."""
        found = self.clips[index]
        frame = int(torch.randint(found.info.frames, (), generator=generator))
        return self._read(found, [frame], generator)

    def _read(self, found: FoundClip, frames: list[int], generator: torch.Generator) -> Clip:
        """Return the ``frames`` of a clip, cropped and resized, and flipped at random."""
        flipped = bool(torch.rand((), generator=generator) < 0.5)
        try:
            pixels = read_frames(found.info, frames)
        except Unreadable as error:
            raise ClipReadError(found.info.path, error.reason) from error
        video = to_float(centre_crop_resize(pixels, *self.config.size))  # (f 3 H W)
        if flipped and self.config.flip:
            video = flip_horizontal(video)
        return Clip(video, found.label, self.caption_of.get(found.key), found.key)

    def describe(self) -> dict[str, Any]:
        """Return what the clips are, without where they are stored: the same for a copy of the folder."""
        content = []
        for clip in self.clips:
            path = clip.info.path
            size = os.path.getsize(path) if os.path.isfile(path) else 0
            content.append((clip.key, clip.label, clip.info.frames, clip.info.height, clip.info.width, size))
        described: list[Any] = content
        if self.caption_of:
            described = [content, self.caption_of]
        return {
            "kind": "folder",
            "clips": len(self),
            "classes": self.classes,
            "content": hashlib.sha256(json.dumps(described).encode()).hexdigest(),
            "files": combined(self.files),
            **self.config.describe_clips(),
        }


class ProceduralDataset:
    """The clips of ``config.scenes``, each a function of (seed, index)."""

    latent = False

    def __init__(self, config: DataConfig):
        self.config = config
        self.scenes = config.scene_set
        self.classes = list(self.scenes.classes) if config.labels else []
        self.captions = self.scenes.captions
        self.num_clips = config.num_clips or UNLIMITED
        self.skipped: tuple[dict[str, str], ...] = ()

    def __len__(self) -> int:
        return self.num_clips

    def clip(self, index: int, generator: torch.Generator | None = None) -> Clip:
        """Return clip ``index``; nothing is drawn from ``generator``."""
        video = to_float(self.scenes.render_clip(index))  # (f 3 H W)
        label = self.scenes.label(index) if self.config.labels else None
        return Clip(video, label, self.scenes.caption(index), f"{self.config.seed}/{index}")

    def image(self, index: int, generator: torch.Generator) -> Clip:
        """Return one frame of clip ``index``, drawn from ``generator``."""
        clip = self.clip(index)
        frame = int(torch.randint(self.config.frames, (), generator=generator))
        return replace(clip, video=clip.video[frame : frame + 1])

    def describe(self) -> dict[str, Any]:
        """Return everything that the clips are a function of."""
        config = self.config
        described: dict[str, Any] = {
            "kind": "procedural",
            "clips": len(self),
            "classes": self.classes,
            "seed": config.seed,
            "resolution": list(config.size),
            "frames": config.frames,
            **self.scenes.describe(),
        }
        if config.hold_out:
            described["hold_out"] = config.hold_out
        return described


def _folder(
    config: DataConfig, cache_dir: str | os.PathLike | None, codec_fingerprint: str | None
) -> Dataset:
    return FolderDataset(config, cache_dir)


def _custom(
    config: DataConfig, cache_dir: str | os.PathLike | None, codec_fingerprint: str | None
) -> Dataset:
    raise InputError(
        "data.kind is 'custom': the run was trained from Python on a dataset that only Python can make; "
        "to resume it, call latte.train again with that dataset"
    )


DATASETS = {
    "folder": _folder,
    **dict.fromkeys(LAYOUTS, _folder),
    "procedural": lambda config, cache_dir, codec_fingerprint: ProceduralDataset(config),
    "latents": lambda config, cache_dir, codec_fingerprint: LatentDataset(config, codec_fingerprint),
    "custom": _custom,
}


def build_dataset(
    config: DataConfig, cache_dir: str | os.PathLike | None = None, codec_fingerprint: str | None = None
) -> Dataset:
    """Return the dataset of ``config``.

    ``cache_dir`` keeps what a scan found out about videos (default: the user's cache folder). Latents must
    have been encoded by the codec with ``codec_fingerprint``, if it is given.
    """
    return choose("data.kind", config.kind, DATASETS)(config, cache_dir, codec_fingerprint)
