# SPDX-License-Identifier: Apache-2.0
"""Clips from latents that were encoded before: a folder of safetensors shards and their manifest.

The shards hold every frame of every video, so training can still choose any length, interval and rule. Those
of a codec that compresses time hold windows, see ``latte.data.windows``, whose beginnings are the clips.
Reading a clip does not touch the rest of its shard. ``latte.data.encode`` writes such folders. Axes: n latent
frames of a video, f' latent frames of a clip, c channels, h height, w width.
"""

import hashlib
import json
import os
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from latte.checkpoint.record import read_fingerprint
from latte.checks import InputError, check, printable
from latte.data.base import Clip, ClipReadError, DataConfig
from latte.data.clips import ClipRule, choose_frames
from latte.data.fingerprint import combined, fingerprints
from latte.data.joint import check_images
from latte.data.media import MediaInfo
from latte.data.selection import FrameRules, settle
from latte.data.shards import (
    AGAIN,
    MIRROR,
    SOURCE,
    Record,
    check_sizes,
    compression_of,
    read_manifest,
    tensor_name,
    tensor_offsets,
)
from latte.data.skipped import FoundClip, ScanResult, check_folder
from latte.data.windows import check_clips


class LatentDataset:
    """The clips of the shards in ``config.root``: ``Clip.video`` is a latent (f' c h w), float32.

    A clip's start frame, or window, and flip are drawn from the generator exactly as FolderDataset draws
    them. Videos too short for the rule are in ``skipped``. InputError when the folder is unfinished or
    damaged, or was made with another codec (``codec_fingerprint``; None: any), frame size or windows, or
    without the mirror images that ``config.flip`` needs.
    """

    latent = True

    def __init__(self, config: DataConfig, codec_fingerprint: str | None = None):
        self.root = Path(check_folder(config.root or ""))
        self.manifest = read_manifest(self.root)
        check_complete(self.root, self.manifest)
        self.settings = self.manifest["settings"]
        self.compression = compression_of(self.settings)
        self.rules = latent_rules(config, self.manifest)
        self.config = self.rules.settled(config)
        self._check(codec_fingerprint)
        self.num_latents = self.compression.latent_frames(config.frames, "data.frames")
        self.classes: list[str] = self.manifest["classes"] if config.labels else []
        self.videos: list[Record] = []
        self.shard_of: list[str] = []
        self.skipped: list[dict[str, str]] = []
        self._select_videos()
        self.captions = sorted({record.caption for record in self.videos if record.caption is not None})
        self._files: dict[str, Any] = {}
        self._tensors: dict[str, Tensor] = {}

    def _check(self, codec_fingerprint: str | None) -> None:
        """InputError unless all shards are there and fit the configuration."""
        root = printable(self.root)
        codec = self.settings["codec"]
        made_with = read_fingerprint(codec)
        check(
            codec_fingerprint in (None, made_with),
            f"the latents in {root} were made with codec {codec['name']} {made_with}, but this run's codec "
            "is "
            f"{codec_fingerprint}; give the codec they were made with, or {AGAIN}",
        )
        size = list(self.config.size)
        check(
            size == self.settings["resolution"],
            f"data.resolution is {size}, but the latents in {root} were made from frames of "
            f"{self.settings['resolution']}; use that, or {AGAIN}",
        )
        check(
            self.settings["flip"] or not self.config.flip,
            f"data.flip is True, but the latents in {root} hold no mirror images; leave it out, or {AGAIN} "
            "with data.flip=true",
        )
        check_rule(self.root, self.manifest, self.config.clip_rule)
        check_sizes(self.root, self.manifest["shards"])

    def _select_videos(self) -> None:
        """Sort the videos of the manifest into those that fit the rule and the skipped ones."""
        for entry in self.manifest["videos"]:
            record = Record.of(entry)
            reason = None
            if not record.starts:
                reason = self.rules.refusals(record)[self.config.frames]
            if reason:
                self.skipped.append({"path": record.key, "reason": reason})
            else:
                self.videos.append(record)
                self.shard_of.append(entry["shard"])
        if self.videos:
            return
        first = ""
        if self.skipped:
            first = f", first: {printable(self.skipped[0]['path'])} ({self.skipped[0]['reason']})"
        raise InputError(
            f"the latents in {printable(self.root)} hold no clip that fits: {len(self.skipped)} videos are "
            f"there{first}; "
            "take fewer frames or a smaller interval"
        )

    @property
    def codec_name(self) -> str:
        """Name and fingerprint of the codec that made the latents."""
        codec = self.settings["codec"]
        return f"{codec['name']} {read_fingerprint(codec)}"

    def __len__(self) -> int:
        return len(self.videos)

    def __getstate__(self) -> dict[str, Any]:
        """Open files cannot be pickled; a worker process opens its own."""
        return {**self.__dict__, "_files": {}, "_tensors": {}}

    @property
    def empty_classes(self) -> list[str]:
        """The classes without a usable clip."""
        used = {record.label for record in self.videos}
        return [name for label, name in enumerate(self.classes) if label not in used]

    @cached_property
    def files(self) -> dict[str, str]:
        """Key -> content fingerprint of each video's latents, whatever shard they are in."""
        offsets = {shard: tensor_offsets(self.root / shard) for shard in set(self.shard_of)}
        shards = dict(zip((record.key for record in self.videos), self.shard_of, strict=True))
        paths = {key: self.root / shard for key, shard in shards.items()}
        spans = {key: offsets[shard].get(tensor_name(SOURCE, key), (0, 0)) for key, shard in shards.items()}
        return fingerprints(paths, spans)

    def clip(self, index: int, generator: torch.Generator) -> Clip:
        """Return clip ``index`` with its start frame or window, then its flip, drawn from ``generator``."""
        record = self.videos[index]
        if record.starts:
            return self._read(index, self._window(record, generator, self.num_latents), generator)
        frames = choose_frames(record.frames, self.config.clip_rule, generator, record.times)
        return self._read(index, frames, generator)

    def image(self, index: int, generator: torch.Generator) -> Clip:
        """Return the latent of one frame of video ``index`` (1 c h w), then its flip, drawn from
        ``generator``.

        Of windows it is the first frame of a random one, since no other has a latent frame of its own.
        """
        record = self.videos[index]
        if record.starts:
            return self._read(index, self._window(record, generator, 1), generator)
        frame = int(torch.randint(record.frames, (), generator=generator))
        return self._read(index, [frame], generator)

    def check_images(self, num_images: int) -> None:
        """InputError when images are wanted, but ``image`` is not the latent that the codec makes of one."""
        codec = self.settings["codec"]["name"]
        check_images(num_images, self.compression, codec)
        check(
            num_images == 0 or self.manifest.get("exact_prefix", True),
            f"train.num_images is {num_images}, but the latents in {printable(self.root)} were made by codec "
            f"{codec!r}, whose first latent frame depends on later frames, so it is not that of an image; "
            "train from the videos, or set train.num_images=0",
        )

    def _window(self, record: Record, generator: torch.Generator, count: int) -> list[int]:
        """Return the first ``count`` latent frames of a window of ``record`` drawn from ``generator``."""
        size = self.compression.latent_frames(self.settings["windows"]["frames"])
        window = int(torch.randint(len(record.starts), (), generator=generator))
        return list(range(window * size, window * size + count))

    def _read(self, index: int, frames: list[int], generator: torch.Generator) -> Clip:
        """Return latent ``frames`` of a random crop of video ``index`` or, at random, of its mirror image."""
        record = self.videos[index]
        flipped = bool(torch.rand((), generator=generator) < 0.5)
        kind = SOURCE
        if flipped and self.config.flip:
            kind = MIRROR
        crops = self.settings.get("crops", 1)
        crop = int(torch.randint(crops, (), generator=generator)) if crops > 1 else 0
        latent = self._read_tensor(self.shard_of[index], tensor_name(kind, record.key, crop), frames)
        return Clip(latent, record.label if self.config.labels else None, record.caption, record.key)

    def _read_tensor(self, shard: str, name: str, frames: list[int]) -> Tensor:
        """Return ``frames`` of tensor ``name``, float32, by one copy out of the mapped file.

        The tensors kept here are views of the mapping; only what is copied is read.
        """
        tensor = self._tensors.get(name)
        if tensor is None:
            try:
                if shard not in self._files:
                    self._files[shard] = safe_open(self.root / shard, framework="pt")
                tensor = self._files[shard].get_tensor(name)
            except (OSError, SafetensorError) as error:
                advice = "run latte data encode again"
                raise ClipReadError(str(self.root / shard), f"{error}; {advice}") from error
            self._tensors[name] = tensor
        low = frames[0]
        step = frames[1] - low if len(frames) > 1 else 1
        if step > 0 and frames == list(range(low, frames[-1] + 1, step)):
            return tensor[low : frames[-1] + 1 : step].to(torch.float32, copy=True)
        return tensor[frames].float()

    def describe(self) -> dict[str, Any]:
        """Return what the clips are, without where they are stored or when they were encoded."""
        # Of a source file's stamp only the size counts: a copy has another time.
        videos = [{**record.entry(), "stamp": record.stamp[:1]} for record in self.videos]
        return {
            "kind": "latents",
            "clips": len(self),
            "classes": self.classes,
            "content": hashlib.sha256(json.dumps([self.settings, videos]).encode()).hexdigest(),
            "files": combined(self.files),
            "codec": read_fingerprint(self.settings["codec"]),
            **self.config.describe_clips(),
        }


def latent_rules(config: DataConfig, manifest: dict[str, Any]) -> FrameRules:
    """Return how frames are chosen: an open ``data.rule`` is that of the windows, or settled by the rates."""
    windows = manifest["settings"].get("windows")
    if windows and config.rule is None and config.fps is None:
        config = replace(config, rule=windows["rule"], fps=windows["fps"])
    return settle(config, map(Record.of, manifest["videos"] if not windows else ()))


def check_complete(root: Path, manifest: dict[str, Any]) -> None:
    """InputError unless the encoding into ``root`` has finished."""
    check(
        manifest["complete"],
        f"the latents in {printable(root)} are not finished; run the same latte data encode again, it "
        "continues where it stopped",
    )


def check_rule(root: Path, manifest: dict[str, Any], rule: ClipRule) -> None:
    """InputError unless clips of ``rule`` can be taken from the windows of ``manifest``, if it has any."""
    windows = manifest["settings"].get("windows")
    if windows:
        check_clips(printable(root), windows, manifest["exact_prefix"], rule)


def scan_latents(root: str | os.PathLike, rule: ClipRule | None = None) -> ScanResult:
    """Return the videos in a folder of latents as ``skipped.scan`` does for a folder of videos; sizes are
    those encoded.
    """
    manifest = read_manifest(Path(root))
    check_complete(Path(root), manifest)
    if rule:
        check_rule(Path(root), manifest, rule)
    height, width = manifest["settings"]["resolution"]
    clips = []
    skipped = list(manifest["skipped"])
    for record in map(Record.of, manifest["videos"]):
        reason = None
        if rule and not record.starts:
            reason = rule.needs(record.frames, record.times)
        if reason:
            skipped.append({"path": record.key, "reason": reason})
        else:
            info = MediaInfo(record.key, record.frames, record.fps, height, width, "latents")
            clips.append(FoundClip(record.key, info, record.label))
    tried = len(clips) + len(skipped)
    return ScanResult(os.fspath(root), tuple(clips), tuple(manifest["classes"]), tuple(skipped), tried)


def latent_captions(root: str | os.PathLike) -> dict[str, str]:
    """Return the captions that were encoded with the videos, by key."""
    records = map(Record.of, read_manifest(Path(root))["videos"])
    return {record.key: record.caption for record in records if record.caption is not None}


def count_latents(root: str | os.PathLike) -> dict[str, Any]:
    """Return what a complete folder of latents holds: codec, frames of video, windows, latent frames, and the
    settings of a window (None when every frame is encoded by itself).
    """
    manifest = read_manifest(Path(root))
    settings = manifest["settings"]
    records = [Record.of(entry) for entry in manifest["videos"]]
    frames = sum(record.frames for record in records)
    windows = sum(len(record.starts) for record in records)
    window = settings.get("windows")
    latent_frames = frames
    if window:
        latent_frames = windows * compression_of(settings).latent_frames(window["frames"])
    return {
        "codec": settings["codec"]["name"],
        "frames": frames,
        "windows": windows,
        "latent_frames": latent_frames,
        "window": window,
    }
