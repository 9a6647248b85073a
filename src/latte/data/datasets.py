# SPDX-License-Identifier: Apache-2.0
"""Datasets of clips: a folder of videos, procedural clips, encoded latents, and the table that builds one
from DataConfig.

Axes: f frames, c channels, H height, W width.
"""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch

from latte.checkpoint.remote import local_copy
from latte.checks import InputError, check, choose, printable
from latte.data.base import UNREAD, Clip, ClipReadError, DataConfig, Dataset, SceneSet
from latte.data.buckets import Bucket, Buckets
from latte.data.caption_files import read_captions
from latte.data.clips import centre_crop_resize, choose_frames, flip_horizontal, to_float
from latte.data.fingerprint import combined, fingerprints
from latte.data.latents import LatentDataset
from latte.data.layouts import LAYOUTS, check_layout
from latte.data.media import Unreadable, read_frames
from latte.data.mix import MixDataset, MixedSet
from latte.data.selection import select
from latte.data.skipped import require_clips, scan

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

    def __init__(
        self, config: DataConfig, cache_dir: str | os.PathLike | None = None, buckets: Buckets | None = None
    ):
        if config.root is None:
            raise InputError(
                "data.root is missing; give the folder of the videos, e.g. data.root=/path/to/videos"
            )
        layout = LAYOUTS.get(config.kind)
        labelled = config.labels and (layout is None or layout.num_classes is not None)
        images = buckets is not None and buckets.has_images
        found = scan(config.root, None, labelled, cache_dir, images=images)
        if layout:
            check_layout(config.kind, found)
        self.selection = select(config, found, buckets)
        self.buckets = self.selection.buckets
        self.members = self.selection.members
        found = self.selection.found
        require_clips(found)
        self.config = self.selection.config
        self.clips = found.clips
        self.skipped = found.skipped
        self.classes = list(found.classes)
        self.caption_of = read_captions(found, config.captions)
        self.captions = sorted(set(self.caption_of.values()))

    def __len__(self) -> int:
        return len(self.clips)

    def bucket(self, index: int) -> Bucket:
        """Return the shape that clip ``index`` is cut to."""
        return self.selection.bucket(index)

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
        info = self.clips[index].info
        rule = self.config.clip_rule_of(self.bucket(index).frames)
        return self._read(index, choose_frames(info.frames, rule, generator, info.times), generator)

    def image(self, index: int, generator: torch.Generator) -> Clip:
        """Return one frame of video ``index``, then its flip, drawn from ``generator``."""
        frame = int(torch.randint(self.clips[index].info.frames, (), generator=generator))
        return self._read(index, [frame], generator)

    def _read(self, index: int, frames: list[int], generator: torch.Generator) -> Clip:
        """Return the ``frames`` of a clip, cropped and resized to its bucket, and flipped at random."""
        found = self.clips[index]
        flipped = bool(torch.rand((), generator=generator) < 0.5)
        try:
            pixels = read_frames(found.info, frames)
        except Unreadable as error:
            raise ClipReadError(found.info.path, error.reason) from error
        video = to_float(centre_crop_resize(pixels, *self.bucket(index).size))  # (f 3 H W)
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
            **described_buckets(self.buckets),
        }


def described_buckets(buckets: Buckets | None) -> dict[str, Any]:
    """Return what a dataset's description says about its buckets; {} without."""
    if buckets is None:
        return {}
    return {"buckets": buckets.describe()}


class ProceduralDataset:
    """The clips of ``config.scenes``, each a function of (seed, index); with buckets, rendered for each in
    turn.
    """

    latent = False

    def __init__(self, config: DataConfig, buckets: Buckets | None = None):
        self.config = config
        self.scenes = config.scene_set
        self.classes = list(self.scenes.classes) if config.labels else []
        self.captions = self.scenes.captions
        self.num_clips = config.num_clips or UNLIMITED
        self.skipped: tuple[dict[str, str], ...] = ()
        self.buckets = buckets
        shapes = buckets.shapes if buckets else ()
        self.scenes_of = [rendered_at(config, bucket) for bucket in shapes]
        self.members = tuple(range(i, self.num_clips, len(shapes)) for i in range(len(shapes)))
        if config.buckets is not None and len(self) < len(shapes):
            raise InputError(
                f"data.num_clips is {len(self)}, but there are {len(shapes)} buckets, which procedural clips "
                "fill in turn; give at least as many clips, or fewer buckets"
            )

    def __len__(self) -> int:
        return self.num_clips

    def bucket(self, index: int) -> Bucket:
        """Return the shape of clip ``index``."""
        if self.buckets is None:
            return Bucket(self.config.frames, *self.config.size)
        return self.buckets.shapes[index % len(self.buckets.shapes)]

    def shown(self, index: int) -> SceneSet:
        """Return the scenes at the shape of clip ``index``."""
        if not self.scenes_of:
            return self.scenes
        return self.scenes_of[index % len(self.scenes_of)]

    def clip(self, index: int, generator: torch.Generator | None = None) -> Clip:
        """Return clip ``index``; nothing is drawn from ``generator``."""
        video = to_float(self.shown(index).render_clip(index))  # (f 3 H W)
        label = self.scenes.label(index) if self.config.labels else None
        return Clip(video, label, self.scenes.caption(index), f"{self.config.seed}/{index}")

    def image(self, index: int, generator: torch.Generator) -> Clip:
        """Return one frame of clip ``index``, drawn from ``generator``."""
        clip = self.clip(index)
        frame = int(torch.randint(len(clip.video), (), generator=generator))
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
        if config.held_out_captions:
            described["hold_out"] = config.held_out_captions
        return {**described, **described_buckets(self.buckets)}


def rendered_at(config: DataConfig, bucket: Bucket) -> SceneSet:
    """Return the procedural scenes of ``config`` at the shape of a bucket."""
    return replace(config.without_buckets(), frames=bucket.frames, resolution=bucket.size).scene_set


def _folder(
    config: DataConfig,
    cache_dir: str | os.PathLike | None,
    codec_fingerprint: str | None,
    buckets: Buckets | None,
) -> Dataset:
    return FolderDataset(config, cache_dir, buckets)


def _procedural(
    config: DataConfig, cache_dir: Any, codec_fingerprint: Any, buckets: Buckets | None
) -> Dataset:
    return ProceduralDataset(config, buckets)


def _latents(config: DataConfig, cache_dir: Any, codec_fingerprint: str | None, buckets: Any) -> Dataset:
    return LatentDataset(config, codec_fingerprint)


def _custom(config: DataConfig, cache_dir: Any, codec_fingerprint: Any, buckets: Any) -> Dataset:
    raise InputError(
        "data.kind is 'custom': the run was trained from Python on a dataset that only Python can make; "
        "to resume it, call latte.train again with that dataset"
    )


# Kind -> a function of (config, cache_dir, codec_fingerprint, buckets).
DATASETS: dict[str, Callable[..., Dataset]] = {
    "folder": _folder,
    **dict.fromkeys(LAYOUTS, _folder),
    "procedural": _procedural,
    "latents": _latents,
    "custom": _custom,
}


def build_dataset(
    config: DataConfig,
    cache_dir: str | os.PathLike | None = None,
    codec_fingerprint: str | None = None,
    buckets: Buckets | None = None,
) -> Dataset:
    """Return the dataset of ``config``.

    ``cache_dir`` keeps what a scan found out about videos (default: the user's cache folder). Latents must
    have been encoded by the codec with ``codec_fingerprint``, if it is given. ``buckets`` are those of
    ``config.buckets``, see ``RunConfig.buckets``.
    """
    check(
        config.buckets is None or buckets is not None,
        "data.buckets needs the codec and the model, which decide what fits; take the dataset from "
        "latte.build.build, or pass RunConfig.buckets here",
    )
    if config.mix is not None:
        return mixed(config, cache_dir, codec_fingerprint)
    if config.kind == "latents" and config.root and "://" in config.root:
        config = replace(config, root=str(local_copy(config.root)))
    return choose("data.kind", config.kind, DATASETS)(config, cache_dir, codec_fingerprint, buckets)


def mixed(
    config: DataConfig, cache_dir: str | os.PathLike | None = None, codec_fingerprint: str | None = None
) -> MixDataset:
    """Return the sets of ``config.mix`` as one dataset.

    InputError naming the set that cannot be used, and for latents of different codecs.
    """
    sets: dict[bool, list[MixedSet]] = {False: [], True: []}
    codecs: dict[str, str] = {}  # codec -> the first set of its latents
    for name, (part, own) in config.sets.items():
        buckets = None
        if part.images and own.kind not in ("latents", "procedural"):
            frame = Bucket(1, *own.size, latent=(1, 1, 1), tokens=1)
            buckets = Buckets(frame, (frame,))  # takes image files, too
        try:
            dataset = build_dataset(own, cache_dir, codec_fingerprint, buckets)
        except InputError as error:
            raise InputError(f"data.mix, set {printable(name)}: {error}") from error
        sets[part.images].append(MixedSet(name, part.weight, dataset))
        if isinstance(dataset, LatentDataset):
            codecs.setdefault(dataset.codec_name, name)
    if len(codecs) > 1:
        (one, first), (other, second), *_ = codecs.items()
        raise InputError(
            f"data.mix: the latents of set {printable(first)} were made with codec {one} and those of set "
            f"{printable(second)} with {other}; encode one of them again with the other's codec"
        )
    return MixDataset(sets[False], sets[True])
