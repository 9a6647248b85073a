# SPDX-License-Identifier: Apache-2.0
"""The encoder of ``latte data encode``: videos into the tensors of a shard.

Axes: n latent frames of a video, t source frames, c channels, h height, w width.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from latte.autoencoder.compression import Compression
from latte.checks import InputError, RunError, check, choose, printable
from latte.data.base import DataConfig
from latte.data.clips import centre_crop_resize, flip_horizontal, to_float
from latte.data.encode_sources import Source, Video
from latte.data.media import Unreadable
from latte.data.selection import FrameRules
from latte.data.shards import MIRROR, SOURCE, Record, tensor_name, write_shard
from latte.data.windows import Windows, describe
from latte.runtime import generator

MAX_CROPS = 16
SMALLEST = 0.8  # of the largest box, that further crops take
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


class EncodingCodec(Protocol):
    """What encoding needs of a codec (``latte.autoencoder``)."""

    name: str
    compression: Compression
    stochastic: bool

    @property
    def fingerprint(self) -> str: ...

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]: ...

    def encode(self, frames: Tensor, generator: torch.Generator | None = None) -> Tensor: ...


class Encoder:
    """Turns videos into the tensors of a shard, with one codec, resolution and dtype.

    Of every video it encodes ``crops``: the centred one, and others of SMALLEST to all of its sides at random
    places, which depend on the seed and the video's key alone. InputError for a size, or for windows, that
    the codec does not take.
    """

    def __init__(
        self,
        config: DataConfig,
        codec: EncodingCodec,
        dtype: str,
        seed: int,
        stride: int | None = None,
        crops: int = 1,
    ):
        check(1 <= crops <= MAX_CROPS, f"--crops must be in [1, {MAX_CROPS}], got {crops}")
        self.crops = crops
        self.config = config
        self.codec = codec
        self.dtype = choose("dtype", dtype, DTYPES)
        self.seed = seed
        self.shape = codec.latent_shape(*config.size)
        self.frame_bytes = math.prod(self.shape) * self.dtype.itemsize * (1 + config.flip) * crops
        self.windows: Windows | None = None
        if codec.compression.temporal_factor > 1:
            self.windows = Windows(config.clip_rule, stride)
            self.window_latents = codec.compression.latent_frames(config.frames, "data.frames")
        check(
            stride is None or self.windows is not None,
            f"--stride is {stride}, but codec {codec.name!r} encodes every frame by itself, without windows; "
            "leave it out",
        )

    def settings(self) -> dict[str, Any]:
        """Return what decides the numbers in the shards, as plain data."""
        compression = self.codec.compression
        codec: dict[str, Any] = {
            "name": self.codec.name,
            "identity": self.codec.fingerprint,  # key of 0.1.0, part of the shards' digests
            "channels": compression.channels,
            "downscale": compression.spatial_factor,  # key of 0.1.0, part of the shards' digests
        }
        posterior = "deterministic"
        if self.codec.stochastic:
            posterior = f"one sample per frame, seed {self.seed}"
        settings = {
            "codec": codec,
            "resolution": list(self.config.size),
            "latent": list(self.shape),
            "dtype": str(self.dtype).removeprefix("torch."),
            "flip": self.config.flip,
            "posterior": posterior,
        }
        if self.crops > 1:
            settings["crops"] = self.crops
        if self.windows:
            for name in ("temporal_factor", "causal", "latent_step"):
                codec[name] = getattr(compression, name)
            settings["windows"] = self.windows.settings()
        return settings

    def cut(self, source: Source, rules: FrameRules) -> Source:
        """Return ``source`` with the windows of every video, and those too short or slow for one among the
        skipped.

        InputError when none is long enough. Without windows it is ``source`` itself.
        """
        if self.windows is None:
            return source
        videos = []
        skipped = list(source.skipped)
        for video in source.videos:
            record = video.record
            reason = rules.too_slow(record) or self.windows.rule.needs(record.frames, record.times)
            if reason:
                skipped.append({"path": record.key, "reason": reason})
                continue
            starts = self.windows.starts(record.frames, record.times)
            videos.append(replace(video, record=replace(record, starts=starts)))
        if not videos:
            first = skipped[0]
            raise InputError(
                f"no video is long enough for a window of {describe(self.windows.rule)}, first "
                f"{printable(first['path'])} ({first['reason']}); give a smaller data.frames or data.interval"
            )
        return replace(source, videos=videos, skipped=skipped)

    def num_latents(self, record: Record) -> int:
        """Return how many latent frames are stored of a video (as often again for its mirror image)."""
        if self.windows is None:
            return record.frames
        return len(record.starts) * self.window_latents

    def num_bytes(self, record: Record) -> int:
        """Return the bytes of a video's latents."""
        return self.num_latents(record) * self.frame_bytes

    def clips(self, video: Video) -> Iterator[tuple[int, Sequence[int]]]:
        """Yield (first frame, frame numbers) of each call of the codec: windows, or pieces of a video."""
        record = video.record
        if self.windows:
            for start in record.starts:
                yield start, self.windows.rule.frames_at(start, record.times)
            return
        for start in range(0, record.frames, video.piece):
            yield start, range(start, min(start + video.piece, record.frames))

    def places(self, key: str) -> list[tuple[float, float, float] | None]:
        """Return (share of the sides, of the free rows, of the free columns) of each crop, None: centred."""
        found: list[tuple[float, float, float] | None] = [None]
        for crop in range(1, self.crops):
            draws = torch.rand(3, generator=generator(self.seed, "crop", key, crop), dtype=torch.float64)
            side, row, column = (round(value, 6) for value in draws.tolist())
            found.append((round(SMALLEST + (1 - SMALLEST) * side, 6), row, column))
        return found

    def entry(self, record: Record) -> dict[str, Any]:
        """Return what the manifest lists of a video, with the places of its crops if there are several."""
        if self.crops == 1:
            return record.entry()
        return {**record.entry(), "crops": self.places(record.key)}

    def read(self, video: Video, numbers: Sequence[int]) -> list[Tensor]:
        """Return the frames (t 3 h w) of each crop of ``video``, resized and in [-1, 1]; ``video.piece`` are
        decoded at a time.
        """
        places = self.places(video.record.key)
        crops: list[list[Tensor]] = [[] for _ in places]
        for start in range(0, len(numbers), video.piece):
            pixels = video.read(numbers[start : start + video.piece])  # (t h w 3)
            for parts, place in zip(crops, places, strict=True):
                parts.append(to_float(centre_crop_resize(pixels, *self.config.size, place)))
        return [torch.cat(parts) for parts in crops]  # (t 3 h w) each

    def write(
        self, path: Path, videos: Sequence[Video], plan: str, tick: Callable[[int], None]
    ) -> list[dict[str, str]]:
        """Encode ``videos`` into the shard ``path``; return {"path", "reason"} of unreadable ones."""
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
        """Return the latents (n c h w) of all frames or windows of every crop by tensor name, and those of
        the mirror image with flips.
        """
        record = video.record
        kinds = (SOURCE, MIRROR)[: 1 + self.config.flip]
        names = [(kind, crop) for crop in range(self.crops) for kind in kinds]
        pieces: dict[str, list[Tensor]] = {tensor_name(kind, record.key, crop): [] for kind, crop in names}
        for start, numbers in self.clips(video):
            crops = self.read(video, numbers)  # (t 3 h w) each
            for kind, crop in names:
                stream = None
                if self.codec.stochastic:
                    stream = generator(
                        self.seed, "encode", record.key, kind, start, *([crop] if crop else [])
                    )
                clip = flip_horizontal(crops[crop]) if kind == MIRROR else crops[crop]
                latent = self.codec.encode(clip[None], stream)[0].to("cpu", self.dtype)
                pieces[tensor_name(kind, record.key, crop)].append(latent)
        latents = {name: torch.cat(parts) for name, parts in pieces.items()}  # (n c h w)
        if not all(latent.isfinite().all() for latent in latents.values()):
            raise RunError(
                f"the latents of {printable(record.key)} hold NaN/Inf or do not fit into {self.dtype}; "
                "encode with --shard-dtype float32"
            )
        return latents
