# SPDX-License-Identifier: Apache-2.0
"""Encode a dataset once: every frame of every video, and of its mirror image, into safetensors shards.

Which videos make a shard is decided before anything is read, and each shard holds the digest of that plan. A
shard that exists and matches its plan is finished, so an interrupted encoding continues where it stopped and
a changed source is noticed. Axes: n frames of a video, t source frames, c channels, h height, w width.
"""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from latte.autoencoder.compression import Compression
from latte.checks import InputError, RunError, check, choose, printable
from latte.data.base import DataConfig
from latte.data.captions import PART, check_lengths, list_parts, store_captions, warn_of_sides
from latte.data.clips import centre_crop_resize, flip_horizontal, to_float
from latte.data.encode_sources import SOURCES, Progress, Source, Video
from latte.data.media import Unreadable
from latte.data.shards import (
    MIRROR,
    SOURCE,
    check_destination,
    finished,
    remove_leftovers,
    tensor_name,
    write_manifest,
    write_shard,
)
from latte.runtime import generator
from latte.text.encoders import TextEncoder

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
SHARD_BYTES = 256 << 20


class EncodingCodec(Protocol):
    """What encoding needs of a codec (``latte.autoencoder``)."""

    name: str
    compression: Compression
    stochastic: bool

    @property
    def fingerprint(self) -> str: ...

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]: ...

    def encode(self, frames: Tensor, generator: torch.Generator | None = None) -> Tensor: ...


AnyCodec = EncodingCodec | Callable[[], Any]


@dataclass(frozen=True)
class Shard:
    """A shard to make of ``videos``. ``refused`` lists those it could not hold, None as long as it is not
    finished.
    """

    path: Path
    plan: str
    videos: Sequence[Video]
    refused: list[dict[str, str]] | None


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
    scan_progress: Progress = None,
) -> dict[str, Any]:
    """Encode all frames of the dataset of ``config`` (mirrored too with ``config.flip``) into ``out``.

    Training chooses frames, interval and rule. A stochastic codec stores one sample of the posterior per
    frame, drawn from ``seed``. With a ``text`` encoder, the features of every distinct caption are stored
    first, ``caption_part`` to a file, and the encoder is freed. A ``codec`` that is a function builds one,
    before the captions for the settings and again after them: codec and text encoder are never in memory
    together. Everything that can be checked is checked before the first video is read.

    Returns out, videos, frames, classes, captions, new_captions, shards, new_shards, bytes and skipped. Run
    it again after an interruption. InputError when ``out`` holds latents of other settings, nothing can be
    encoded, captions are too long or missing; RunError when the disk is full or cannot be written.
    """
    out = Path(out)
    source = choose("data.kind", config.kind, SOURCES)(config, cache_dir, scan_progress)
    captions = captions_of(config, source, text)
    encoder = Encoder(config, built(codec), dtype, seed)
    settings = {**encoder.settings(), "source": source.fingerprint, "labels": config.labels}
    check_destination(out, settings)
    parts = plan_shards(source.videos, encoder.frame_bytes, shard_bytes)
    shards = [planned(out, number, videos, settings) for number, videos in enumerate(parts)]
    check_disk(out, shards, encoder.frame_bytes)
    begin = cache(lambda: write_manifest(out, settings, complete=False))
    new_captions = 0
    if text:
        del encoder
        new_captions = store_captions(out, text, captions, caption_part, begin, caption_progress)
        text.free()
        encoder = Encoder(config, built(codec), dtype, seed)
    manifest = write_shards(source, shards, encoder, begin, progress)
    check_videos(manifest, out)
    if parts_listed := list_parts(out):
        manifest["captions"] = parts_listed
    write_manifest(out, settings, True, **manifest)
    remove_leftovers(out, {shard.path for shard in shards})
    return {
        "out": str(out),
        "videos": len(manifest["videos"]),
        "frames": sum(entry["frames"] for entry in manifest["videos"]),
        "captions": len(captions),
        "new_captions": new_captions,
        "shards": len(shards),
        "new_shards": sum(shard.refused is None for shard in shards),
        "bytes": sum(shard["bytes"] for shard in manifest["shards"]),
        "classes": source.classes,
        "skipped": manifest["skipped"],
    }


def built(codec: AnyCodec) -> EncodingCodec:
    """Return the codec itself, or what the function builds."""
    if hasattr(codec, "encode"):
        return cast("EncodingCodec", codec)
    return cast("Callable[[], Any]", codec)()


def captions_of(config: DataConfig, source: Source, text: TextEncoder | None) -> list[str]:
    """Return the distinct captions of ``source``; InputError for one that is too long for ``text``, or none
    at all.

    With flips, captions that mention left or right are logged.
    """
    records = [video.record for video in source.videos if video.record.caption is not None]
    key_of = {str(record.caption): record.key for record in records}
    if text:
        check(
            bool(key_of),
            f"text.name is {text.name}, but the videos have no captions; give data.captions=auto, or "
            "text.name=null",
        )
        check_lengths(text, key_of, key_of)
    if config.flip:
        warn_of_sides(key_of)
    return sorted(key_of)


def plan_shards(videos: Sequence[Video], frame_bytes: int, shard_bytes: int) -> list[list[Video]]:
    """Group consecutive ``videos``, as many to a shard as fit into ``shard_bytes``, at least one."""
    check(shard_bytes > 0, f"shard_bytes must be positive, got {shard_bytes}")
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


def planned(out: Path, number: int, videos: Sequence[Video], settings: dict[str, Any]) -> Shard:
    """Return shard ``number`` of ``out``, finished or to be made."""
    path = out / f"shard-{number:05d}.safetensors"
    content = json.dumps([settings, [asdict(video.record) for video in videos]])
    plan = hashlib.sha256(content.encode()).hexdigest()
    return Shard(path, plan, videos, finished(path, plan))


def check_disk(out: Path, shards: Sequence[Shard], frame_bytes: int) -> None:
    """RunError unless the shards that are not finished fit on the disk."""
    missing = [video for shard in shards if shard.refused is None for video in shard.videos]
    needed = sum(video.record.frames for video in missing) * frame_bytes
    folder = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise RunError(
            f"the latents take {needed:,} bytes more, but the disk of {printable(folder)} has {free:,} free; "
            "make room, or "
            "give another folder (--out)"
        )


def write_shards(
    source: Source, shards: Sequence[Shard], encoder: "Encoder", begin: Callable[[], None], progress: Progress
) -> dict[str, Any]:
    """Encode the shards that are not finished and return the content of the manifest."""
    skipped = list(source.skipped)
    videos: list[dict[str, Any]] = []
    done = 0

    def tick(count: int) -> None:
        nonlocal done
        done += count
        if progress:
            progress(done, len(source.videos))

    for shard in shards:
        refused = shard.refused
        if refused is None:
            begin()
            refused = encoder.write(shard, tick)
        else:
            tick(len(shard.videos))
        skipped += refused
        unreadable = {entry["path"] for entry in refused}
        records = [video.record for video in shard.videos if video.record.key not in unreadable]
        videos += [{**asdict(record), "shard": shard.path.name} for record in records]
    files = [{"file": shard.path.name, "bytes": shard.path.stat().st_size} for shard in shards]
    manifest: dict[str, Any] = {"classes": source.classes, "shards": files, "videos": videos}
    manifest["skipped"] = skipped
    if source.damaged:
        manifest["damaged"] = source.damaged
    return manifest


class Encoder:
    """Turns videos into the tensors of a shard, with one codec, resolution and dtype."""

    def __init__(self, config: DataConfig, codec: EncodingCodec, dtype: str, seed: int):
        self.config = config
        self.codec = codec
        self.dtype = choose("dtype", dtype, DTYPES)
        self.seed = seed
        self.shape = codec.latent_shape(*config.size)
        self.frame_bytes = math.prod(self.shape) * self.dtype.itemsize * (1 + config.flip)

    def settings(self) -> dict[str, Any]:
        """Return what decides the numbers in the shards, as plain data."""
        codec = self.codec
        posterior = f"one sample per frame, seed {self.seed}" if codec.stochastic else "deterministic"
        return {
            "codec": {
                "name": codec.name,
                "identity": codec.fingerprint,  # key of 0.1.0, part of the shards' digests
                "channels": codec.compression.channels,
                "downscale": codec.compression.spatial_factor,  # key of 0.1.0, part of the shards' digests
            },
            "resolution": list(self.config.size),
            "latent": list(self.shape),
            "dtype": str(self.dtype).removeprefix("torch."),
            "flip": self.config.flip,
            "posterior": posterior,
        }

    def write(self, shard: Shard, tick: Callable[[int], None]) -> list[dict[str, str]]:
        """Encode the videos of a shard and write it; return {"path", "reason"} of unreadable ones."""
        tensors: dict[str, Tensor] = {}
        refused = []
        for video in shard.videos:
            try:
                tensors |= self.encode(video)
            except Unreadable as error:
                refused.append({"path": video.record.key, "reason": error.reason})
            tick(1)
        write_shard(shard.path, tensors, shard.plan, refused)
        return refused

    def encode(self, video: Video) -> dict[str, Tensor]:
        """Return the latents (n c h w) of all frames by tensor name, and those of the mirror image with
        flips.
        """
        record = video.record
        kinds = (SOURCE, MIRROR)[: 1 + self.config.flip]
        pieces: dict[str, list[Tensor]] = {kind: [] for kind in kinds}
        for start in range(0, record.frames, video.piece):
            numbers = range(start, min(start + video.piece, record.frames))
            frames = to_float(centre_crop_resize(video.read(numbers), *self.config.size))  # (t c h w)
            for kind in kinds:
                stream = None
                if self.codec.stochastic:
                    stream = generator(self.seed, "encode", record.key, kind, start)
                clip = flip_horizontal(frames) if kind == MIRROR else frames
                pieces[kind].append(self.codec.encode(clip[None], stream)[0].to("cpu", self.dtype))
        latents = {
            tensor_name(kind, record.key): torch.cat(parts) for kind, parts in pieces.items()
        }  # (n c h w)
        if not all(latent.isfinite().all() for latent in latents.values()):
            raise RunError(
                f"the latents of {printable(record.key)} hold NaN/Inf or do not fit into {self.dtype}; "
                "encode with --shard-dtype float32"
            )
        return latents


def check_videos(manifest: dict[str, Any], out: Path) -> None:
    """InputError with the first reason when no video could be read."""
    if manifest["videos"]:
        return
    first = manifest["skipped"][0]
    raise InputError(
        f"nothing was encoded into {printable(out)}: no video can be read, first {printable(first['path'])} "
        f"({first['reason']})"
    )
