# SPDX-License-Identifier: Apache-2.0
"""From the settings of a run to its buckets: a list, or all lengths at all aspect ratios of ``auto``.

Which shapes there are follows from the settings, the codec and the model, never from the clips.
"""

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from latte.autoencoder.compression import Compression
from latte.checks import InputError, check
from latte.data.buckets import Bucket, Buckets

if TYPE_CHECKING:
    from latte.data.config import DataConfig

AUTO = "auto"
AUTO_KEYS = ("bucket_pixels", "bucket_aspects", "bucket_lengths")
ASPECTS = (9 / 16, 16 / 9, 5)  # of auto buckets, width / height: 9:16, 3:4, 1:1, 4:3 and 16:9
LENGTH_SHARES = (1, 2, 4)  # auto buckets have data.frames, about half and about a quarter of it
MAX_BUCKETS = 128
MAX_ASPECTS = 32
ASPECT_RANGE = (1 / 16, 16.0)
BUCKET = re.compile(r"\s*(\d{1,6})\s*[x×]\s*(\d{1,6})\s*[x×]\s*(\d{1,6})\s*")


def parse(text: str) -> Bucket:
    """Return the bucket written as frames x height x width; InputError for anything else."""
    found = BUCKET.fullmatch(text)
    numbers = [int(number) for number in found.groups()] if found else [0]
    if min(numbers) < 1:
        raise InputError(
            f"data.buckets holds {text[:40]!r}, but a bucket is frames x height x width, such as 16x256x256; "
            "give a list of those, or auto"
        )
    frames, height, width = numbers
    return Bucket(frames, height, width)


def check_settings(data: "DataConfig") -> None:
    """InputError for settings of buckets that cannot be right whatever the codec and the model are."""
    given = [key for key in AUTO_KEYS if getattr(data, key) is not None]
    if data.buckets is None or AUTO not in data.buckets:
        check(
            not given,
            f"data.{given[0] if given else ''} is given, but data.buckets is not auto; leave it out, or set "
            "data.buckets=auto",
        )
    if data.buckets is None:
        return
    if AUTO in data.buckets:
        check(
            len(data.buckets) == 1,
            "data.buckets mixes auto with other buckets; give auto alone, or a list such as "
            "[16x256x256, 16x192x336]",
        )
        _check_auto(data)
        return
    listed = [parse(text) for text in data.buckets]
    check(len(listed) > 0, "data.buckets is an empty list; give buckets such as 16x256x256, auto, or null")
    check(len(listed) <= MAX_BUCKETS, f"data.buckets lists {len(listed)} buckets; the limit is {MAX_BUCKETS}")
    twice = [bucket for bucket in listed if listed.count(bucket) > 1]
    check(not twice, f"data.buckets lists {twice[0] if twice else ''} twice; list every bucket once")
    reference = Bucket(data.frames, *data.size)
    largest = max(listed, key=lambda bucket: bucket.frames * bucket.height * bucket.width)
    check(
        reference in listed,
        f"data.buckets does not list {reference}, which data.frames and data.resolution give; "
        "train.global_batch is the batch of that bucket, and samples have its shape: list it too, or set "
        f"data.frames={largest.frames} data.resolution=[{largest.height},{largest.width}]",
    )


def _check_auto(data: "DataConfig") -> None:
    pixels = data.bucket_pixels
    check(
        pixels is None or pixels > 0,
        f"data.bucket_pixels is {pixels}, but it must be positive: height x width of a frame, e.g. 65536",
    )
    lengths = data.bucket_lengths
    if lengths is not None:
        check(
            len(lengths) > 0 and len(set(lengths)) == len(lengths),
            f"data.bucket_lengths is {list(lengths)}, but it must list different numbers of "
            "frames, e.g. [16, 8]",
        )
        check(
            data.frames in lengths and max(lengths) == data.frames,
            f"data.bucket_lengths is {list(lengths)}, but its longest must be data.frames, which is "
            f"{data.frames}; change one of the two",
        )
    low, high, count = data.bucket_aspects or ASPECTS
    check(
        ASPECT_RANGE[0] <= low <= high <= ASPECT_RANGE[1] and 1 <= count <= MAX_ASPECTS,
        f"data.bucket_aspects is {[low, high, count]}, but it must be [smallest width / height, largest, "
        f"number] from 1/16 to 16 and of at most {MAX_ASPECTS}, e.g. [0.5, 2, 5]",
    )


@dataclass(frozen=True)
class Grid:
    """What decides which shapes a run can have: the codec's compression, and the patches of its model."""

    codec: str
    compression: Compression
    patch_size: int
    tube: int = 1  # latent frames of a token

    @property
    def unit(self) -> int:
        """Pixels of a token's side: every height and width must be a multiple of it."""
        return self.compression.spatial_factor * self.patch_size

    def lengths(self, most: int) -> list[int]:
        """Return the numbers of frames up to ``most`` that codec and patches take, ascending."""
        found = []
        latent = self.tube
        while (frames := self.compression.frames(latent)) <= most:
            found.append(frames)
            latent += self.tube
        return found

    def bucket(self, frames: int, height: int, width: int, field: str = "data.buckets") -> Bucket:
        """Return the bucket with its tokens; InputError, with the nearest, for one that does not fit."""
        given = Bucket(frames, height, width)
        nearest = Bucket(self.nearest_length(frames), self.nearest_side(height), self.nearest_side(width))
        check(
            frames == nearest.frames,
            f"{field}: {given} has {frames} frames, but {self._time_rule()}; the nearest is {nearest}",
        )
        check(
            given.size == nearest.size,
            f"{field}: {given} must have a height and a width that are multiples of {self.unit} (codec "
            f"{self.codec!r} reduces {self.compression.spatial_factor} times, model.patch_size is "
            f"{self.patch_size}); the nearest is {nearest}",
        )
        latent = self.compression.latent_frames(frames)
        rows, columns = self.compression.latent_size(height, width, self.codec)
        tokens = latent // self.tube * (height // self.unit) * (width // self.unit)
        return Bucket(frames, height, width, (latent, rows, columns), tokens)

    def nearest_side(self, pixels: int) -> int:
        """Return the valid height or width nearest to ``pixels``."""
        return max(round(pixels / self.unit), 1) * self.unit

    def nearest_length(self, frames: int) -> int:
        """Return the valid number of frames nearest to ``frames``, the smaller of two."""
        above = self.compression.frames(self.tube) + frames + self.compression.temporal_factor * self.tube
        return min(self.lengths(above), key=lambda length: abs(length - frames))

    def _time_rule(self) -> str:
        lead = self.compression.frames(self.tube)
        step = self.compression.temporal_factor * self.tube
        patches = f" and tubes of {self.tube} latent frames take" if self.tube > 1 else " takes"
        return f"codec {self.codec!r}{patches} clips of {lead} + {step} k frames"


def buckets_of(data: "DataConfig", grid: Grid) -> Buckets | None:
    """Return the buckets of ``data.buckets``, None without; InputError for one that does not fit the grid."""
    if data.buckets is None:
        return None
    reference = grid.bucket(data.frames, *data.size, "data.frames and data.resolution")
    if AUTO in data.buckets:
        return Buckets(reference, auto_shapes(data, grid, reference))
    listed = [parse(text) for text in data.buckets]
    return Buckets(reference, tuple(grid.bucket(bucket.frames, *bucket.size) for bucket in listed))


def auto_shapes(data: "DataConfig", grid: Grid, reference: Bucket) -> tuple[Bucket, ...]:
    """Return every length at every size of ``auto``, the longest first and from portrait to landscape."""
    pixels = data.bucket_pixels or reference.height * reference.width
    check(
        pixels >= grid.unit**2,
        f"data.bucket_pixels is {pixels}, but the smallest frame that codec {grid.codec!r} and "
        f"model.patch_size={grid.patch_size} allow has {grid.unit} x {grid.unit} = {grid.unit**2} pixels; "
        "give more",
    )
    sizes = {reference.size, *(size_near(aspect, pixels, grid.unit) for aspect in aspects_of(data))}
    ordered = sorted(sizes, key=lambda size: (size[1] / size[0], size))
    shapes = [
        grid.bucket(length, *size, "data.bucket_lengths")
        for length in lengths_of(data, grid)
        for size in ordered
    ]
    check(
        len(shapes) <= MAX_BUCKETS,
        f"data.bucket_lengths and data.bucket_aspects give {len(shapes)} buckets; the limit is {MAX_BUCKETS}",
    )
    return tuple(shapes)


def aspects_of(data: "DataConfig") -> list[float]:
    """Return the width / height of auto buckets: a geometric series."""
    low, high, count = data.bucket_aspects or ASPECTS
    return [low * (high / low) ** (i / max(count - 1, 1)) for i in range(count)]


def lengths_of(data: "DataConfig", grid: Grid) -> list[int]:
    """Return the frames of auto buckets, the longest first.

    Without ``bucket_lengths`` they are the valid ones nearest to ``data.frames``, half and a quarter of it; 1
    is left out.
    """
    if data.bucket_lengths is not None:
        return sorted(data.bucket_lengths, reverse=True)
    valid = [length for length in grid.lengths(data.frames) if length > 1] or [data.frames]
    ideal = [data.frames / share for share in LENGTH_SHARES]
    nearest = {min(valid, key=lambda length: abs(length - frames)) for frames in ideal}
    return sorted(nearest, reverse=True)


def size_near(aspect: float, pixels: int, unit: int) -> tuple[int, int]:
    """Return (height, width) in multiples of ``unit`` with at most ``pixels`` pixels and width / height near
    ``aspect``.

    It is the size with the least distance of the aspects, of their logarithms, plus half the share of
    ``pixels`` that it leaves unused. Portrait sizes are landscape ones on their side.
    """
    if aspect < 1:
        width, height = size_near(1 / aspect, pixels, unit)
        return height, width

    def cost(size: tuple[int, int]) -> float:
        height, width = size
        return abs(math.log(width / height / aspect)) + (1 - height * width / pixels) / 2

    sizes = []
    for height in range(unit, math.isqrt(pixels) + 1, unit):
        below = max(int(height * aspect) // unit * unit, height)  # beyond the next, the cost only grows
        sizes += [(height, width) for width in (below, below + unit, pixels // height // unit * unit)]
    return min((size for size in sizes if math.prod(size) <= pixels), key=cost)
