# SPDX-License-Identifier: Apache-2.0
"""Which clips each training step takes: a pure function of (seed, step).

The clips form a sequence without end: pass after pass, each a permutation of the dataset, cut into batches
that may span two passes. The permutation is a small Feistel network keyed by (seed, pass). It needs no memory
and no state, so resuming at step k means asking for step k.

Several sets with weights (``data.mix``) share that sequence: in every window of as many clips as the sum of
the whole-number weights each set has exactly its weight, at places permuted by the seed. After k windows the
clips that were taken of a set are the first k x weight of the order that it has by itself.

With buckets every bucket has such a sequence of its own, cut into batches of its own size. The steps are
grouped into rounds of about one pass over the data. A bucket of n clips in batches of B has taken
ceil(r n / B) batches after r rounds: its share of the clips is exact to within one batch, however long the
run, and after r rounds every clip has been used at least r times. A round's batches are permuted like clips.
"""

import hashlib
import itertools
import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any, Protocol

from latte.checks import check
from latte.data.buckets import check_world

ROUNDS = 6
MASK = (1 << 64) - 1


@lru_cache(maxsize=256)
def _round_keys(seed: int, name: str, epoch: int) -> tuple[int, ...]:
    digest = hashlib.sha512(f"{seed}/{name}/{epoch}".encode()).digest()
    return tuple(int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(ROUNDS))


def _mix(value: int) -> int:
    """Return a 64-bit hash of ``value`` (the finalizer of SplitMix64)."""
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & MASK
    return value ^ (value >> 31)


def permuted(position: int, num_items: int, seed: int, epoch: int, name: str = "epoch") -> int:
    """Return the item at ``position`` of an epoch; over all positions it is a permutation of
    range(num_items).

    Sequences of another ``name`` are independent. A Feistel network on a grid of about sqrt(n) x sqrt(n)
    cells. A result beyond n is permuted again until it is below n (cycle walking), which keeps the mapping
    one to one.
    """
    rows = math.isqrt(num_items - 1) + 1
    columns = -(-num_items // rows)
    keys = _round_keys(seed, name, epoch)
    while True:
        left, right = divmod(position, columns)
        for i in range(0, ROUNDS, 2):
            left = (left + _mix(right + keys[i])) % rows
            right = (right + _mix(left + keys[i + 1])) % columns
        position = left * columns + right
        if position < num_items:
            return position


def items_of_step(seed: int, step: int, global_batch: int, num_items: int, name: str = "epoch") -> list[int]:
    """Return the dataset indices of the global batch of ``step`` (0, 1, ...), in order of position."""
    check(num_items > 0, "the dataset is empty; data.root must hold at least one usable clip")
    check(global_batch > 0, f"the batch size must be at least 1, got {global_batch}")
    places = (divmod(step * global_batch + position, num_items) for position in range(global_batch))
    return [permuted(offset, num_items, seed, epoch, name) for epoch, offset in places]


class Order(Protocol):
    """The clips of every step."""

    def items(self, step: int) -> list[int]:
        """Return the dataset indices of the global batch of ``step`` (0, 1, ...), in order of position."""
        ...

    def clips_before(self, step: int) -> int:
        """Return how many clips the steps before ``step`` take together."""
        ...


@dataclass(frozen=True)
class PlainOrder:
    """The order of ``num_items`` clips of one shape, ``global_batch`` a step."""

    seed: int
    global_batch: int
    num_items: int

    def items(self, step: int) -> list[int]:
        """Return the dataset indices of ``step``."""
        return items_of_step(self.seed, step, self.global_batch, self.num_items)

    def clips_before(self, step: int) -> int:
        """Return how many clips the steps before ``step`` take together."""
        return step * self.global_batch


@dataclass(frozen=True)
class Shares:
    """The sets of a mix: their names, which key the permutations, whole-number weights and sizes."""

    names: tuple[str, ...]
    weights: tuple[int, ...]
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class MixOrder:
    """The order of clips of several sets, whose indices follow each other, ``global_batch`` a step."""

    seed: int
    global_batch: int
    shares: Shares

    def place(self, position: int) -> tuple[int, int]:
        """Return (set, place in the order of its clips) for ``position`` of the sequence without end."""
        weights = self.shares.weights
        ends = list(accumulate(weights))
        window, offset = divmod(position, ends[-1])
        slot = permuted(offset, ends[-1], self.seed, window, "mix")
        number = bisect_right(ends, slot)
        return number, window * weights[number] + slot - (ends[number] - weights[number])

    def item(self, position: int) -> int:
        """Return the dataset index of the clip at ``position``."""
        number, turn = self.place(position)
        size = self.shares.sizes[number]
        epoch, offset = divmod(turn, size)
        start = sum(self.shares.sizes[:number])
        return start + permuted(offset, size, self.seed, epoch, f"set {self.shares.names[number]}")

    def items(self, step: int) -> list[int]:
        """Return the dataset indices of ``step``."""
        first = step * self.global_batch
        return [self.item(position) for position in range(first, first + self.global_batch)]

    def clips_before(self, step: int) -> int:
        """Return how many clips the steps before ``step`` take together."""
        return step * self.global_batch

    def counts_before(self, step: int) -> list[int]:
        """Return how many clips of each set the steps before ``step`` take; counts through one window."""
        window = sum(self.shares.weights)
        whole, rest = divmod(self.clips_before(step), window)
        counts = [whole * weight for weight in self.shares.weights]
        for position in range(whole * window, whole * window + rest):
            counts[self.place(position)[0]] += 1
        return counts


@dataclass(frozen=True)
class BucketOrder:
    """The order of clips in buckets: ``members`` are the dataset indices of each, ``sizes`` its batch size,
    ``names`` key its permutations. No bucket may be empty.
    """

    seed: int
    members: tuple[Sequence[int], ...]
    sizes: tuple[int, ...]
    names: tuple[str, ...]

    def batches_before(self, round_number: int) -> list[int]:
        """Return how many batches each bucket takes before a round."""
        pairs = zip(self.members, self.sizes, strict=True)
        return [-(-round_number * len(members) // size) for members, size in pairs]

    def first_step(self, round_number: int) -> int:
        """Return the first step of a round."""
        return sum(self.batches_before(round_number))

    def round_of(self, step: int) -> int:
        """Return the round of ``step``, by bisection: ``first_step`` never falls."""
        most = step * max(self.sizes) // sum(map(len, self.members)) + 1
        return bisect_right(range(most + 1), step, key=self.first_step) - 1

    def places(self, number: int, places: range) -> Iterator[tuple[int, int]]:
        """Yield (bucket, number of the batch within the bucket) of some places in round ``number``."""
        before = self.batches_before(number)
        counts = [after - start for after, start in zip(self.batches_before(number + 1), before, strict=True)]
        ends = list(accumulate(counts))
        for place in places:
            batch = permuted(place, ends[-1], self.seed, number, "round")
            bucket = bisect_right(ends, batch)
            yield bucket, before[bucket] + batch - (ends[bucket] - counts[bucket])

    def batch(self, step: int) -> tuple[int, int]:
        """Return (bucket, number of the batch within the bucket) of ``step``."""
        number = self.round_of(step)
        place = step - self.first_step(number)
        return next(self.places(number, range(place, place + 1)))

    def items(self, step: int) -> list[int]:
        """Return the dataset indices of ``step``, all of one bucket."""
        bucket, number = self.batch(step)
        members = self.members[bucket]
        name = f"bucket {self.names[bucket]}"
        found = items_of_step(self.seed, number, self.sizes[bucket], len(members), name)
        return [members[index] for index in found]

    def clips_before(self, step: int) -> int:
        """Return how many clips the steps before ``step`` take together; counts through one round."""
        if len(set(self.sizes)) == 1:
            return step * self.sizes[0]
        number = self.round_of(step)
        whole = zip(self.batches_before(number), self.sizes, strict=True)
        places = self.places(number, range(step - self.first_step(number)))
        return sum(count * size for count, size in whole) + sum(self.sizes[bucket] for bucket, _ in places)


def order_of(dataset: Any, seed: int, global_batch: int, world: int = 1) -> Order:
    """Return the order of a dataset's clips, by buckets if it has any (``dataset.buckets`` and ``members``),
    by weights if it is a mix (``dataset.shares``).

    InputError unless ``world`` processes can share every batch evenly.
    """
    buckets = getattr(dataset, "buckets", None)
    check_world(global_batch, world, buckets)
    if shares := getattr(dataset, "shares", None):
        return MixOrder(seed, global_batch, shares)
    if buckets is None:
        return PlainOrder(seed, global_batch, len(dataset))
    names = tuple(map(str, buckets.shapes))
    return BucketOrder(seed, tuple(dataset.members), buckets.batch_sizes(global_batch), names)


def random_items(dataset: Any, seed: int, count: int) -> list[int]:
    """Return at most ``count`` different clips at random, of a mix by the weights of its sets; with buckets
    they are from each in turn.
    """
    if shares := getattr(dataset, "shares", None):
        return mixed_items(MixOrder(seed, 1, shares), min(count, len(dataset)))
    buckets = getattr(dataset, "buckets", None)
    if buckets is None:
        return items_of_step(seed, 0, min(count, len(dataset)), len(dataset))
    parts = []
    for bucket, members in zip(buckets.shapes, dataset.members, strict=True):
        size = min(count, len(members))
        parts.append([members[i] for i in items_of_step(seed, 0, size, len(members), f"bucket {bucket}")])
    turns = (part[turn : turn + 1] for turn in range(count) for part in parts)
    return [item for found in turns for item in found][:count]


def mixed_items(order: MixOrder, count: int) -> list[int]:
    """Return the first ``count`` different clips of a mix."""
    found: dict[int, None] = {}
    for position in itertools.count():
        if len(found) >= count:
            break
        found.setdefault(order.item(position))
    return list(found)


def first_items(dataset: Any, count: int) -> Sequence[int]:
    """Return the first ``count`` clips; of a mix, the first by the weights of its sets."""
    if shares := getattr(dataset, "shares", None):
        return mixed_items(MixOrder(0, 1, shares), min(count, len(dataset)))
    return range(count)
