# SPDX-License-Identifier: Apache-2.0
"""Buckets: the shapes that a run's clips are cut to, and which of them a clip of any size and length goes to.

A bucket is frames x height x width. All clips of a batch are of one bucket, and a batch of smaller clips has
more of them, by the number of tokens. Axes: h height, w width.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from latte.autoencoder.compression import Compression
from latte.checks import InputError, check
from latte.data.clip_rule import crop_box

if TYPE_CHECKING:
    from latte.data.config import DataConfig

AUTO = "auto"
AUTO_KEYS = ("bucket_pixels", "bucket_aspects", "bucket_lengths")
ASPECTS = (9 / 16, 16 / 9, 5)  # of auto buckets, width / height: 9:16, 3:4, 1:1, 4:3 and 16:9
LENGTH_SHARES = (1, 2, 4)  # auto buckets have data.frames, about half and about a quarter of it
MAX_BUCKETS = 128
MAX_ASPECTS = 32
ASPECT_RANGE = (1 / 16, 16.0)
EQUAL = 0.02  # shares of lost pixels that differ by less count as equal
MAX_LOST = 0.5  # a clip that loses more in every bucket is skipped
BUDGET_SLACK = 1.1  # a batch may exceed the token budget by a tenth, so that 16:9 has the batch of a square
BUCKET = re.compile(r"\s*(\d{1,6})\s*[x×]\s*(\d{1,6})\s*[x×]\s*(\d{1,6})\s*")


@dataclass(frozen=True)
class Bucket:
    """The shape of a batch's clips. ``latent`` is (f', h, w) of one clip, ``tokens`` its number of tokens."""

    frames: int
    height: int
    width: int
    latent: tuple[int, int, int] = (0, 0, 0)
    tokens: int = 0

    def __str__(self) -> str:
        return f"{self.frames}x{self.height}x{self.width}"

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)."""
        return self.height, self.width


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
        length = self.nearest_length(frames)
        sides = [max(round(side / self.unit), 1) * self.unit for side in (height, width)]
        nearest = Bucket(length, sides[0], sides[1])
        given = Bucket(frames, height, width)
        check(
            frames == length,
            f"{field}: {given} has {frames} frames, but {self._time_rule()}; the nearest is {nearest}",
        )
        check(
            [height, width] == sides,
            f"{field}: {given} must have a height and a width that are multiples of {self.unit} (codec "
            f"{self.codec!r} reduces {self.compression.spatial_factor} times, model.patch_size is "
            f"{self.patch_size}); the nearest is {nearest}",
        )
        latent = self.compression.latent_frames(frames)
        rows, columns = self.compression.latent_size(height, width, self.codec)
        tokens = latent // self.tube * (height // self.unit) * (width // self.unit)
        return Bucket(frames, height, width, (latent, rows, columns), tokens)

    def nearest_length(self, frames: int) -> int:
        """Return the valid number of frames nearest to ``frames``, the smaller of two."""
        above = self.compression.frames(self.tube) + frames + self.compression.temporal_factor * self.tube
        return min(self.lengths(above), key=lambda length: abs(length - frames))

    def _time_rule(self) -> str:
        lead = self.compression.frames(self.tube)
        step = self.compression.temporal_factor * self.tube
        patches = f" and tubes of {self.tube} latent frames take" if self.tube > 1 else " takes"
        return f"codec {self.codec!r}{patches} clips of {lead} + {step} k frames"


@dataclass(frozen=True)
class Buckets:
    """The buckets of a run. ``reference`` is data.frames at data.resolution, whose batch is
    train.global_batch.
    """

    reference: Bucket
    shapes: tuple[Bucket, ...]

    @property
    def extent(self) -> tuple[int, int, int]:
        """The most latent frames, rows and columns of a clip."""
        frames, rows, columns = zip(*(b.latent for b in (self.reference, *self.shapes)), strict=True)
        return max(frames), max(rows), max(columns)

    @property
    def has_images(self) -> bool:
        """Whether a bucket is of one frame, so that images are clips."""
        return any(bucket.frames == 1 for bucket in self.shapes)

    def batch_sizes(self, global_batch: int) -> tuple[int, ...]:
        """Return the clips of a step of each bucket: the tokens of ``global_batch`` clips of the reference.

        A multiple of ``global_batch``, or for a larger bucket the largest of its divisors that fits: so any
        number of processes that can share the one can share a multiple, and no clip depends on their number.
        At least 1, even if one clip has more tokens.
        """
        return tuple(self._batch_size(bucket, global_batch) for bucket in self.shapes)

    def _batch_size(self, bucket: Bucket, global_batch: int) -> int:
        budget = global_batch * self.reference.tokens * BUDGET_SLACK
        room = int(budget / bucket.tokens)
        if room >= global_batch:
            return room // global_batch * global_batch
        return next(size for size in range(max(room, 1), 0, -1) if global_batch % size == 0)

    def used(self, counts: Sequence[int]) -> "Buckets":
        """Return the buckets that have clips, by the number of each."""
        pairs = zip(self.shapes, counts, strict=True)
        return Buckets(self.reference, tuple(bucket for bucket, count in pairs if count))

    def place(self, height: int, width: int, refused: Mapping[int, str | None]) -> int | str:
        """Return which bucket (its number) takes a clip of frames of height x width, or why none does.

        ``refused`` holds for lengths of buckets why the clip does not fit, None if it does. It is the bucket
        that crops least; shares that differ by less than EQUAL count as equal, and of these it is
        the longest, then one that needs no upscaling, then the largest (with upscaling: the smallest).
        """
        fitting = [i for i, bucket in enumerate(self.shapes) if refused.get(bucket.frames, "") is None]
        if not fitting:
            return refused[min(refused)] or ""
        lost = {i: lost_share(height, width, self.shapes[i]) for i in fitting}
        least = min(lost.values())
        if least > MAX_LOST:
            best = self.shapes[min(lost, key=lambda i: lost[i])]
            return (
                f"size: its frames of {width}x{height} would lose {least:.0%} of their pixels in the nearest "
                f"bucket, {best}; at most {MAX_LOST:.0%} is cropped"
            )

        def rank(i: int) -> tuple[float, ...]:
            bucket = self.shapes[i]
            pixels = bucket.height * bucket.width
            grows = upscaled(height, width, bucket)
            return (-bucket.frames, grows, pixels if grows else -pixels, lost[i], i)

        return min((i for i in fitting if lost[i] <= least + EQUAL), key=rank)

    def describe(self) -> list[list[int]]:
        """Return the shapes as plain data, the reference first."""
        return [[bucket.frames, *bucket.size] for bucket in (self.reference, *self.shapes)]


def lost_share(height: int, width: int, bucket: Bucket) -> float:
    """Return the share of a frame's pixels that its centre crop to a bucket's aspect loses, in [0, 1)."""
    box_h, box_w = crop_box(height, width, *bucket.size)
    return 1 - box_h * box_w / (height * width)


def upscaled(height: int, width: int, bucket: Bucket) -> bool:
    """Return whether the centre crop of a frame has fewer pixels each way than the bucket."""
    return crop_box(height, width, *bucket.size)[0] < bucket.height


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
    """Return every length at every size: a function of the settings and the grid, not of the clips."""
    pixels = data.bucket_pixels or reference.height * reference.width
    check(
        pixels >= grid.unit**2,
        f"data.bucket_pixels is {pixels}, but the smallest frame that codec {grid.codec!r} and "
        f"model.patch_size={grid.patch_size} allow has {grid.unit} x {grid.unit} = {grid.unit**2} pixels; "
        "give more",
    )
    low, high, count = data.bucket_aspects or ASPECTS
    steps = max(count - 1, 1)
    aspects = [low * (high / low) ** (i / steps) for i in range(count)]
    sizes = dict.fromkeys([*(size_near(aspect, pixels, grid.unit) for aspect in aspects), reference.size])
    if data.bucket_lengths is None:
        valid = [length for length in grid.lengths(data.frames) if length > 1] or [data.frames]
        halves = [data.frames / share for share in LENGTH_SHARES]
        lengths = dict.fromkeys(min(valid, key=lambda length: abs(length - half)) for half in halves)
    else:
        lengths = dict.fromkeys(sorted(data.bucket_lengths, reverse=True))
    shapes = [
        grid.bucket(length, *size, "data.bucket_lengths")
        for length in lengths
        for size in sorted(sizes, key=lambda size: size[1] / size[0])
    ]
    check(
        len(shapes) <= MAX_BUCKETS,
        f"data.bucket_lengths and data.bucket_aspects give {len(shapes)} buckets; the limit is {MAX_BUCKETS}",
    )
    return tuple(shapes)


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


def check_world(global_batch: int, world: int, buckets: Buckets | None = None) -> None:
    """InputError, with the nearest global batch, unless ``world`` processes can share every batch evenly."""

    def shared(number: int) -> bool:
        sizes = buckets.batch_sizes(number) if buckets else ()
        return all(size % world == 0 for size in (number, *sizes))

    if shared(global_batch):
        return
    check(
        global_batch % world == 0,
        f"train.global_batch is {global_batch}, which {world} processes cannot share evenly; "
        f"give a multiple of {world}",
    )
    assert buckets is not None
    pairs = zip(buckets.shapes, buckets.batch_sizes(global_batch), strict=True)
    bucket, size = next((bucket, size) for bucket, size in pairs if size % world)
    near = [number for number in range(world, 64 * global_batch + 1, world) if shared(number)]
    hint = "give fewer processes"
    if near:
        best = min(near, key=lambda number: abs(number - global_batch))
        hint = f"the nearest that fits is train.global_batch={best}"
    raise InputError(
        f"train.global_batch is {global_batch}, which gives bucket {bucket} batches of {size} clips by its "
        f"tokens, and {world} processes cannot share those evenly; {hint}"
    )
