# SPDX-License-Identifier: Apache-2.0
"""With buckets, too, the batch of a step is a function of (seed, step), and every clip has its turn."""

import time
from collections import Counter

import pytest
import torch

from latte.checks import InputError
from latte.data.base import Clip
from latte.data.buckets import Bucket, Buckets
from latte.data.loader import Loader, load_batch, share_of
from latte.data.order import BucketOrder, PlainOrder, order_of

WIDE = Bucket(4, 2, 6, (4, 2, 6), 48)
SQUARE = Bucket(4, 4, 4, (4, 4, 4), 64)
SHORT = Bucket(1, 4, 4, (1, 4, 4), 16)
LARGE = Bucket(8, 4, 4, (8, 4, 4), 128)
SHAPES = (WIDE, SQUARE, SHORT, LARGE)
COUNTS = (13, 50, 3, 20)  # clips of each bucket; SHORT has fewer than one batch takes


class Mixed:
    """Clips of several shapes: a clip holds random numbers, its key is its index."""

    def __init__(self, shapes=SHAPES, counts=COUNTS):
        self.buckets = Buckets(SQUARE, shapes)
        self.bucket_of = [i for i, count in enumerate(counts) for _ in range(count)]
        self.bucket_of.sort(key=lambda i: (7 * i) % 5)  # members of a bucket are not in one row
        self.members = tuple(
            tuple(index for index, bucket in enumerate(self.bucket_of) if bucket == i)
            for i in range(len(shapes))
        )

    def __len__(self):
        return len(self.bucket_of)

    def clip(self, index, generator):
        bucket = self.buckets.shapes[self.bucket_of[index]]
        video = torch.rand(bucket.frames, 1, bucket.height, bucket.width, generator=generator)
        return Clip(video, 0, None, str(index))


def batches(world: int, workers: int, start: int, stop: int) -> list[tuple]:
    """(keys, videos) of the global batch of every step, loaded by ``world`` processes."""
    loaders = [Loader(Mixed(), 3, 8, start, stop, rank, world, workers) for rank in range(world)]
    found = []
    for parts in zip(*loaders, strict=True):
        assert {part.global_batch for part in parts} == {sum(len(part.keys) for part in parts)}
        found.append(
            ([key for part in parts for key in part.keys], torch.cat([part.video for part in parts]))
        )
    for loader in loaders:
        loader.close()
    return found


STARTS = (0, 1, 5, 11, 17)
STOP = 20
OFTEN = {(1, 0), (1, 17), (2, 1), (2, 11), (4, 5)}  # (processes, start) with workers; the others are nightly


@pytest.fixture(scope="module")
def expected() -> list[tuple]:
    return batches(1, 0, 0, STOP)


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("world", [1, 2, 4])
def test_processes_and_restarts_change_nothing(expected, world, start):
    assert len({video.shape for _, video in expected}) == len(SHAPES), "the steps show every bucket"
    assert_same(batches(world, 0, start, STOP), expected[start:])


@pytest.mark.usefixtures("quick_start")
@pytest.mark.parametrize(
    ("world", "start"),
    [
        pytest.param(world, start, marks=() if (world, start) in OFTEN else pytest.mark.nightly)
        for world in (1, 2, 4)
        for start in STARTS
    ],
)
def test_workers_change_nothing(expected, world, start):
    """Those of the last process: starting workers for all of them takes a second each."""
    rank = world - 1
    steps = slice(start, min(start + 6, STOP))
    with Loader(Mixed(), 3, 8, start, steps.stop, rank, world, workers=2) as loader:
        found = [(batch.keys, batch.video) for batch in loader]
    shares = [share_of(len(keys), rank, world) for keys, _ in expected[steps]]
    own = [
        (keys[share.start : share.stop], video[share.start : share.stop])
        for share, (keys, video) in zip(shares, expected[steps], strict=True)
    ]
    assert_same(found, own)


def assert_same(found: list[tuple], expected: list[tuple]) -> None:
    assert [keys for keys, _ in found] == [keys for keys, _ in expected]
    for (_, video), (_, other) in zip(found, expected, strict=True):
        assert video.shape == other.shape
        assert torch.equal(video, other)


def test_a_step_has_clips_of_one_bucket_and_the_batch_of_its_tokens():
    data = Mixed()
    order = order_of(data, 0, 8)
    assert isinstance(order, BucketOrder)
    assert order.sizes == (8, 8, 32, 4)
    seen = set()
    for step in range(60):
        items = order.items(step)
        buckets = {data.bucket_of[item] for item in items}
        assert len(buckets) == 1
        assert len(items) == order.sizes[min(buckets)]
        seen |= buckets
    assert seen == {0, 1, 2, 3}


@pytest.mark.parametrize("seed", [0, 9])
@pytest.mark.parametrize("counts", [COUNTS, (1, 300, 1, 2), (40, 41, 0, 43), (9, 8, 35, 4)])
def test_every_clip_is_used_equally_often(seed, counts):
    """Over 20 rounds: at the end of each, within a bucket to within 1, and no bucket is ahead by a batch."""
    shapes = tuple(shape for shape, count in zip(SHAPES, counts, strict=True) if count)
    counts = tuple(filter(None, counts))
    data = Mixed(shapes, counts)
    order = order_of(data, seed, 8)
    seen = Counter(dict.fromkeys(range(len(data)), 0))
    clips = 0
    for number in range(20):
        for step in range(order.first_step(number), order.first_step(number + 1)):
            assert order.round_of(step) == number
            assert order.clips_before(step) == clips
            items = order.items(step)
            clips += len(items)
            seen.update(items)
        for members, size in zip(data.members, order.sizes, strict=True):
            used = [seen[index] for index in members]
            assert max(used) - min(used) <= 1
            assert min(used) >= number + 1, "a clip was left out of a round"
            assert sum(used) < (number + 1) * len(members) + size, "a bucket is ahead by a batch"
    filled = all(len(members) >= size for members, size in zip(data.members, order.sizes, strict=True))
    if filled:
        assert max(seen.values()) - min(seen.values()) <= 1


def test_the_order_of_buckets_is_mixed_and_differs_between_rounds_and_seeds():
    data = Mixed()
    rounds = {}
    for seed in range(3):
        order = order_of(data, seed, 8)
        for number in range(4):
            steps = range(order.first_step(number), order.first_step(number) + 12)
            rounds[seed, number] = tuple(order.batch(step)[0] for step in steps)
    assert len(set(rounds.values())) > 8
    even = order_of(Mixed((WIDE, SQUARE), (80, 80)), 0, 8)  # every round has the same batches
    places = {tuple(even.batch(20 * number + i)[0] for i in range(20)) for number in range(6)}
    assert len(places) == 6, "each round has an order of its own"
    first = order_of(data, 0, 8)
    sequences = [first.items(step) for step in range(40)]
    assert len({tuple(items) for items in sequences}) == 40


def test_any_step_is_found_at_once():
    shapes = (WIDE, SQUARE)
    members = (range(0, 10**9, 2), range(1, 10**9, 2))
    order = BucketOrder(0, members, (8, 8), tuple(map(str, shapes)))
    began = time.process_time()
    items = [order.items(step) for step in range(10**8, 10**8 + 100)]
    assert time.process_time() - began < 1
    assert {item % 2 for batch in items for item in batch} == {0, 1}
    assert all(len({item % 2 for item in batch}) == 1 for batch in items)


def test_a_dataset_without_buckets_keeps_its_order():
    data = Mixed()
    data.buckets = None
    order = order_of(data, 0, 8)
    assert order == PlainOrder(0, 8, len(data))
    assert order.clips_before(7) == 56
    with pytest.raises(
        InputError, match=r"^train.global_batch is 8, which 3 processes .*; give a multiple of 3"
    ):
        order_of(data, 0, 8, 3)


def test_batches_that_processes_cannot_share_are_refused_with_the_nearest_that_fits():
    with pytest.raises(
        InputError,
        match=r"which gives bucket 8x4x4 batches of 2 clips .* 4 processes .*the nearest that fits is "
        r"train.global_batch=8$",
    ):
        order_of(Mixed(), 0, 4, 4)
    assert order_of(Mixed(), 0, 8, 4)
    batch = load_batch(Mixed(), 0, 0, 8, 1, 4)
    assert len(batch.keys) == batch.global_batch // 4
    assert list(share_of(32, 3, 4)) == list(range(24, 32))
