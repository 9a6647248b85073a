# SPDX-License-Identifier: Apache-2.0
"""Encode a data set once: every frame of every video, and of its mirror image, into safetensors shards.

Which videos make a shard is decided before anything is read, and each shard carries the digest of that
decision: one that is there and matches is finished and never made again, so an interrupted encoding goes on
where it stopped, and a changed source is noticed. Axes: n frames of a video, t source frames, c channels, h
height, w width.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor

from latte.checks import InputError, RunError, choose, require
from latte.data.base import DataConfig
from latte.data.caption_files import read_captions
from latte.data.captions import PART, check_lengths, list_parts, store_captions, warn_of_sides
from latte.data.clips import centre_crop_resize, flip_horizontal, to_float
from latte.data.media import Unreadable, read_frames
from latte.data.procedural import DIRECTIONS, draw_scene, render
from latte.data.shards import (
    MANIFEST,
    MIRROR,
    SHARDS,
    SOURCE,
    Record,
    finished,
    read_manifest,
    write_manifest,
    write_shard,
)
from latte.data.skipped import FoundClip, check_folder, require_clips, scan
from latte.runtime import generator
from latte.text.encoders import TextEncoder

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
Progress = Callable[[int, int], None] | None
SHARD_BYTES = 256 << 20
READ_BYTES = 256 << 20  # source frames held at a time


class FrameCodec(Protocol):
    """What encoding asks of a codec (latte.autoencoder.codec.Codec has it)."""

    name: str
    channels: int
    downscale: int
    stochastic: bool

    @property
    def fingerprint(self) -> str: ...

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]: ...

    def encode(self, frames: Tensor, generator: torch.Generator | None = None) -> Tensor: ...


AnyCodec = FrameCodec | Callable[[], FrameCodec]


@dataclass(frozen=True)
class Video:
    """A source video: its record, and ``read(frame numbers) -> uint8 (t h w c)``, ``piece`` frames of it at a
    time.
    """

    record: Record
    read: Callable[[Sequence[int]], np.ndarray]
    piece: int


@dataclass(frozen=True)
class Source:
    """All videos to encode. ``fingerprint`` says what they are apart from their records."""

    fingerprint: dict[str, Any]
    videos: list[Video]
    classes: list[str]
    skipped: list[dict[str, str]]
    damaged: list[dict[str, str]] = field(default_factory=list)  # encoded, but only their first part decodes


def _folder(config: DataConfig, cache_dir: str | os.PathLike | None) -> Source:
    """Every readable video below ``config.root``, also those too short for the rule: another rule may fit
    them.
    """
    found = scan(check_folder(config.root or ""), None, config.labels, cache_dir)
    require_clips(found)
    captions = read_captions(found, config.captions)
    videos = [_folder_video(clip, captions.get(clip.key)) for clip in found.clips]
    return Source(
        {"kind": "folder", **({"captions": True} if captions else {})},
        videos,
        list(found.classes),
        list(found.skipped),
        found.damaged,
    )


def _folder_video(clip: FoundClip, caption: str | None) -> Video:
    info, path = clip.info, Path(clip.info.path)
    states = [file.stat() for file in (path.iterdir() if path.is_dir() else [path]) if file.exists()]
    stamp = (sum(state.st_size for state in states), max((state.st_mtime_ns for state in states), default=0))
    record = Record(
        clip.key, clip.label, caption, info.frames, info.fps, info.start, info.steps, info.time_base, stamp
    )
    return Video(
        record,
        lambda frames: read_frames(info, frames),
        max(READ_BYTES // (info.height * info.width * 3), 16),
    )


def _procedural(config: DataConfig, cache_dir: str | os.PathLike | None) -> Source:
    """``config.num_clips`` procedural clips."""
    require(
        config.num_clips is not None,
        "data.num_clips",
        None,
        "an endless set cannot be encoded",
        "give a number of clips",
    )
    videos = [_procedural_video(config, index) for index in range(config.num_clips or 0)]
    fingerprint = {"kind": "procedural", "seed": config.seed, "frames": config.frames}
    if config.hold_out:
        fingerprint["hold_out"] = config.hold_out
    return Source(fingerprint, videos, list(DIRECTIONS) if config.labels else [], [])


def _procedural_video(config: DataConfig, index: int) -> Video:
    scene = draw_scene(config.seed, index, config.frames, config.hold_out)
    record = Record(
        f"{config.seed}/{index}", scene.label if config.labels else None, scene.caption, config.frames
    )
    return Video(
        record, lambda frames: render(scene, config.frames, *config.size)[list(frames)], config.frames
    )


SOURCES = {"folder": _folder, "procedural": _procedural}


def encode_dataset(
    config: DataConfig,
    codec: AnyCodec,
    out: str | os.PathLike,
    dtype: str = "float16",
    seed: int = 0,
    shard_bytes: int = SHARD_BYTES,
    cache_dir: str | os.PathLike | None = None,
    progress: Progress = None,
    text: TextEncoder | None = None,
    caption_part: int = PART,
    caption_progress: Progress = None,
) -> dict[str, Any]:
    """Encode all frames of the data set of ``config`` at its resolution (mirrored too with ``config.flip``)
    into the folder ``out``.

    Frames, interval and rule are left to the training that reads it. A stochastic codec stores one sample of
    the posterior per frame, drawn from ``seed``. ``progress(done, of)`` counts videos. With a ``text``
    encoder the features of every distinct caption are stored first, ``caption_part`` to a file, and it is
    freed. A ``codec`` that is a function builds one; it is asked before the captions, for the settings, and
    again after them, so that the two never share the memory. Returns out, videos, frames, classes, captions,
    new_captions, shards, new_shards, bytes and skipped. Run it again after an interruption. InputError when
    ``out`` holds latents of other settings or nothing can be encoded, for captions too long (before anything
    is encoded), and for a ``text`` encoder without captions; RunError when it cannot be written.
    """
    out, source = Path(out), choose("data.kind", config.kind, SOURCES)(config, cache_dir)
    captions = captions_of(config, source, text)
    encoder = Encoder(config, made(codec), dtype, seed)
    settings = {**encoder.settings(), "source": source.fingerprint, "labels": config.labels}
    refuse_other(out, settings)
    parts = plan_shards(source.videos, encoder.frame_bytes, shard_bytes)
    begin, new_captions = cache(lambda: write_manifest(out, settings, complete=False)), 0
    if text:
        del encoder
        new_captions = store_captions(out, text, captions, caption_part, begin, caption_progress)
        text.free()
        encoder = Encoder(config, made(codec), dtype, seed)
    manifest, new = write_shards(out, source, parts, encoder, settings, begin, progress)
    require_videos(manifest, out)
    if told := list_parts(out):
        manifest["captions"] = told
    write_manifest(out, settings, True, **manifest)
    kept = {out / shard["file"] for shard in manifest["shards"]}
    for left in {*out.glob(SHARDS), *out.glob(".*.partial")} - kept:
        left.unlink()
    counts = {
        "videos": len(manifest["videos"]),
        "frames": sum(entry["frames"] for entry in manifest["videos"]),
        "captions": len(captions),
        "new_captions": new_captions,
        "shards": len(kept),
        "new_shards": new,
    }
    size = sum(shard["bytes"] for shard in manifest["shards"])
    return {
        "out": str(out),
        **counts,
        "bytes": size,
        "classes": source.classes,
        "skipped": manifest["skipped"],
    }


def made(codec: AnyCodec) -> FrameCodec:
    """The codec itself, or what the function makes."""
    return (
        cast("FrameCodec", codec) if hasattr(codec, "encode") else cast("Callable[[], FrameCodec]", codec)()
    )


def captions_of(config: DataConfig, source: Source, text: TextEncoder | None) -> list[str]:
    """The distinct captions of ``source``, none of them too long for ``text``; a line is logged for those
    that a mirror makes wrong.
    """
    whose = {
        video.record.caption: video.record.key for video in source.videos if video.record.caption is not None
    }
    if text:
        if not whose:
            raise InputError(
                f"text.name is {text.name}, but the videos have no captions; give data.captions=auto, or "
                "text.name=null"
            )
        check_lengths(text, whose, whose)
    if config.flip:
        warn_of_sides(whose)
    return sorted(whose)


def write_shards(
    out: Path,
    source: Source,
    parts: Sequence[Sequence[Video]],
    encoder: "Encoder",
    settings: dict[str, Any],
    begin: Callable[[], None],
    progress: Progress,
) -> tuple[dict[str, Any], int]:
    """Encode those ``parts`` of the videos that are not there yet -> the manifest's content, and how many
    shards are new.
    """
    manifest: dict[str, Any] = {
        "classes": source.classes,
        "shards": [],
        "videos": [],
        "skipped": list(source.skipped),
        **({"damaged": source.damaged} if source.damaged else {}),
    }
    done, new = 0, 0

    def tick(count: int) -> None:
        nonlocal done
        done += count
        if progress:
            progress(done, len(source.videos))

    for number, videos in enumerate(parts):
        path = out / f"shard-{number:05d}.safetensors"
        plan = hashlib.sha256(
            json.dumps([settings, [asdict(video.record) for video in videos]]).encode()
        ).hexdigest()
        refused = finished(path, plan)
        if refused is None:
            begin()
            refused = encoder.write(path, plan, videos, tick)
            new += 1
        else:
            tick(len(videos))
        bad = {one["path"] for one in refused}
        manifest["videos"] += [
            {**asdict(video.record), "shard": path.name} for video in videos if video.record.key not in bad
        ]
        manifest["shards"].append({"file": path.name, "bytes": path.stat().st_size})
        manifest["skipped"] += refused
    return manifest, new


class Encoder:
    """Turns videos into the tensors of a shard, with one codec, resolution and dtype."""

    def __init__(self, config: DataConfig, codec: FrameCodec, dtype: str, seed: int):
        self.config, self.codec, self.dtype, self.seed = config, codec, choose("dtype", dtype, DTYPES), seed
        self.shape = codec.latent_shape(*config.size)
        self.frame_bytes = math.prod(self.shape) * self.dtype.itemsize * (1 + config.flip)

    def settings(self) -> dict[str, Any]:
        """What decides the numbers in the shards."""
        codec = self.codec
        posterior = f"one sample per frame, seed {self.seed}" if codec.stochastic else "deterministic"
        return {
            "codec": {
                "name": codec.name,
                "identity": codec.fingerprint,
                "channels": codec.channels,
                "downscale": codec.downscale,
            },
            "resolution": list(self.config.size),
            "latent": list(self.shape),
            "dtype": str(self.dtype).removeprefix("torch."),
            "flip": self.config.flip,
            "posterior": posterior,
        }

    def write(
        self, path: Path, plan: str, videos: Sequence[Video], tick: Callable[[int], None]
    ) -> list[dict[str, str]]:
        """Encode ``videos`` into the shard ``path``, there in whole or not at all; {"path", "reason"} of
        those no longer readable.
        """
        tensors: dict[str, Tensor] = {}
        refused = []
        for video in videos:
            try:
                tensors |= self.encode(video)
            except Unreadable as error:
                refused.append({"path": video.record.key, "reason": error.reason})
            tick(1)
        write_shard(path, tensors, plan, refused)
        return refused

    def encode(self, video: Video) -> dict[str, Tensor]:
        """The latents (n c h w) of all frames by tensor name: as they are, and mirrored when asked."""
        record, pieces = video.record, {name: [] for name in (SOURCE, MIRROR)[: 1 + self.config.flip]}
        for start in range(0, record.frames, video.piece):
            numbers = range(start, min(start + video.piece, record.frames))
            frames = to_float(centre_crop_resize(video.read(numbers), *self.config.size))
            for name, found in pieces.items():
                stream = (
                    generator(self.seed, "encode", record.key, name, start) if self.codec.stochastic else None
                )
                clip = flip_horizontal(frames) if name == MIRROR else frames
                found.append(self.codec.encode(clip[None], stream)[0].to("cpu", self.dtype))
        latents = {f"{name}:{record.key}": torch.cat(found) for name, found in pieces.items()}
        if not all(latent.isfinite().all() for latent in latents.values()):
            raise RunError(
                f"latents of {record.key} do not fit into {self.dtype} or are not numbers; encode with dtype "
                "float32"
            )
        return latents


def plan_shards(videos: Sequence[Video], frame_bytes: int, shard_bytes: int) -> list[list[Video]]:
    """Consecutive ``videos``, as many to a shard as fit into ``shard_bytes``, at least one."""
    require(shard_bytes > 0, "shard_bytes", shard_bytes, "a shard holds something", "give e.g. 268435456")
    parts: list[list[Video]] = []
    room = 0
    for video in videos:
        need = video.record.frames * frame_bytes
        if not parts or need > room:
            parts.append([])
            room = shard_bytes
        parts[-1].append(video)
        room -= need
    return parts


def require_videos(manifest: dict[str, Any], out: Path) -> None:
    """InputError with the first reason when every video was refused."""
    if not manifest["videos"]:
        first = manifest["skipped"][0]
        raise InputError(
            f"nothing was encoded into {str(out)!r}: no video can be read, first {first['path']} "
            f"({first['reason']})"
        )


def refuse_other(out: Path, settings: dict[str, Any]) -> None:
    """InputError when the folder ``out`` holds latents of other ``settings``, or other files."""
    if out.is_dir() and any(file.name[0] != "." for file in out.iterdir()) and not (out / MANIFEST).is_file():
        raise InputError(f"{str(out)!r} holds files, but none is a {MANIFEST} of latents; give a new folder")
    if not (out / MANIFEST).is_file():
        return
    there = read_manifest(out)["settings"]
    other = [
        f"{name} {there.get(name)} instead of {value}"
        for name, value in settings.items()
        if there.get(name) != value
    ]
    if other:
        raise InputError(
            f"{str(out)!r} holds latents of other settings ({'; '.join(other)}); give another folder, or "
            "remove this one"
        )
