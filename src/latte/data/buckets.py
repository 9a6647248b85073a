# SPDX-License-Identifier: Apache-2.0
"""Buckets: the shapes that a run's clips are cut to, and which of them a clip of any size and length goes to.

A bucket is frames x height x width. All clips of a batch are of one bucket, and a batch of smaller clips has
more of them, by the number of tokens. ``latte.data.bucket_settings`` makes them from a run's settings.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from latte.checks import InputError, check
from latte.data.clip_rule import crop_box

EQUAL = 0.02  # shares of lost pixels that differ by less count as equal
MAX_LOST = 0.5  # a clip that loses more in every bucket is skipped
SLACK = 10  # percent by which a batch may exceed the token budget, so that 16:9 has the batch of a square


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
        """Return the clips of a step of each bucket, at least 1: the tokens of ``global_batch`` clips of the
        reference.

        It is a multiple of ``global_batch``, or for a larger bucket the largest of its divisors that fits.
        The number of processes does not enter: processes that can share ``global_batch`` can share a
        multiple.
        """
        return tuple(self._batch_size(bucket, global_batch) for bucket in self.shapes)

    def _batch_size(self, bucket: Bucket, global_batch: int) -> int:
        room = self.budget(global_batch) // bucket.tokens
        if room >= global_batch:
            return room // global_batch * global_batch
        return max(size for size in range(1, max(room, 1) + 1) if global_batch % size == 0)

    def budget(self, global_batch: int) -> int:
        """Return the most tokens of a step."""
        return global_batch * self.reference.tokens * (100 + SLACK) // 100

    def check_budget(self, global_batch: int) -> None:
        """InputError, with the least global batch that fits, if one clip of a bucket exceeds the budget."""
        largest = max(self.shapes, key=lambda bucket: bucket.tokens)
        least = -(-largest.tokens * 100 // (self.reference.tokens * (100 + SLACK)))
        check(
            largest.tokens <= self.budget(global_batch),
            f"train.global_batch is {global_batch} clips of {self.reference}, a budget of "
            f"{self.budget(global_batch):,} tokens a step, but one clip of bucket {largest} has "
            f"{largest.tokens:,}; give train.global_batch={least}, or leave that bucket out",
        )

    def used(self, counts: Sequence[int]) -> "Buckets":
        """Return the buckets that have clips, by the number of each."""
        pairs = zip(self.shapes, counts, strict=True)
        return Buckets(self.reference, tuple(bucket for bucket, count in pairs if count))

    def place(self, height: int, width: int, refused: Mapping[int, str | None]) -> int | str:
        """Return which bucket (its number) takes a clip of frames of height x width, or why none does.

        ``refused`` has the lengths that the clip may have: why it does not fit, None if it does. It is the
        bucket that crops least. Shares that differ by less than EQUAL count as equal, and of these it is the
        longest, then one that needs no upscaling, then the largest (with upscaling: the smallest).
        """
        fitting = [i for i, bucket in enumerate(self.shapes) if refused.get(bucket.frames, "") is None]
        if not fitting:
            return refused[min(refused)] or ""
        lost = {i: lost_share(height, width, self.shapes[i]) for i in fitting}
        least = min(lost.values())
        if least > MAX_LOST:
            nearest = self.shapes[min(lost, key=lambda i: lost[i])]
            return (
                f"size: its frames of {width}x{height} would lose {least:.0%} of their pixels in the nearest "
                f"bucket, {nearest}; at most {MAX_LOST:.0%} is cropped"
            )

        def rank(i: int) -> tuple[float, ...]:
            bucket = self.shapes[i]
            pixels = bucket.height * bucket.width
            if upscaled(height, width, bucket):
                return -bucket.frames, 1, pixels, lost[i]
            return -bucket.frames, 0, -pixels, lost[i]

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


def check_world(global_batch: int, world: int, buckets: Buckets | None = None) -> None:
    """InputError, with the nearest that fits, unless ``world`` processes can share the global batch, and that
    of every bucket, evenly.
    """
    check(
        global_batch % world == 0,
        f"train.global_batch is {global_batch}, which {world} processes cannot share evenly; "
        f"give a multiple of {world}",
    )
    if buckets is None:
        return
    buckets.check_budget(global_batch)
    pairs = zip(buckets.shapes, buckets.batch_sizes(global_batch), strict=True)
    uneven = [(bucket, size) for bucket, size in pairs if size % world]
    if not uneven:
        return
    bucket, size = uneven[0]
    candidates = range(world, 64 * global_batch + 1, world)
    even = [number for number in candidates if not any(n % world for n in buckets.batch_sizes(number))]
    hint = "give fewer processes"
    if even:
        best = min(even, key=lambda number: abs(number - global_batch))
        hint = f"the nearest that fits is train.global_batch={best}"
    raise InputError(
        f"train.global_batch is {global_batch}, which gives bucket {bucket} batches of {size} clips by its "
        f"tokens, and {world} processes cannot share those evenly; {hint}"
    )
