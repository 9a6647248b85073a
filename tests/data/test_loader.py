# SPDX-License-Identifier: Apache-2.0
"""The order of the data is a function of (seed, step) alone: the same for every number of ranks, threads and restarts."""

import math
import threading
import time
from collections import Counter
from itertools import pairwise

import pytest
import torch

from latte.checks import InputError, RunError
from latte.data import loader as sampler
from latte.data.datasets import Clip
from latte.data.loader import Loader, items_of_step, load_batch, permuted


class Numbers:
    """A data set whose clip shows its index and one number drawn for it; slow by turns, so that threads overtake each other."""

    def __init__(self, length: int = 37, fail_at: int | None = None, delay: float = 0.0, label: bool = True):
        self.length, self.fail_at, self.delay, self.label = length, fail_at, delay, label
        self.calls = 0

    def __len__(self):
        return self.length

    def clip(self, index, generator):
        self.calls += 1
        if self.delay:
            time.sleep(self.delay * (self.calls % 3))
        if index == self.fail_at:
            raise InputError(f"clip {index} is broken")
        video = torch.cat([torch.tensor([float(index)]), torch.rand(1, generator=generator)])
        return Clip(video, index % 5 if self.label else None, None, str(index))


@pytest.mark.parametrize("num_items", [1, 2, 3, 4, 7, 10, 37, 100, 997])
def test_each_epoch_is_a_permutation(num_items):
    for seed in (0, 5):
        for epoch in range(4):
            assert sorted(permuted(i, num_items, seed, epoch) for i in range(num_items)) == list(
                range(num_items)
            )


def test_epochs_and_seeds_differ_and_no_place_is_preferred():
    orders = [
        tuple(permuted(i, 50, seed, epoch) for i in range(50)) for seed in range(4) for epoch in range(4)
    ]
    assert len(set(orders)) == 16
    places = Counter(permuted(3, 10, 0, epoch) for epoch in range(5000))
    chi2 = sum((places[i] - 500) ** 2 / 500 for i in range(10))
    assert chi2 < 27.9, f"chi-squared {chi2:.1f} with 9 degrees of freedom (0.1 % level)"
    pairs = Counter((permuted(0, 6, 0, epoch), permuted(1, 6, 0, epoch)) for epoch in range(6000))
    chi2 = sum((pairs[i, j] - 200) ** 2 / 200 for i in range(6) for j in range(6) if i != j)
    assert chi2 < 58.3, f"neighbours depend on each other: chi-squared {chi2:.1f} with 29 degrees of freedom"


def test_fixed_points_of_shuffles_of_three_come_as_often_as_chance_has_them():
    orders = Counter(tuple(permuted(i, 3, 0, epoch) for i in range(3)) for epoch in range(3000))
    assert len(orders) == 6
    assert min(orders.values()) > 350, orders


def test_the_row_of_items_is_cut_into_batches_that_straddle_epochs():
    row = [item for step in range(40) for item in items_of_step(9, step, 8, 37)]
    for epoch in range(len(row) // 37):
        assert sorted(row[37 * epoch : 37 * (epoch + 1)]) == list(range(37))
    assert row == [item for step in range(10) for item in items_of_step(9, step, 32, 37)], (
        "the order does not depend on the batch"
    )
    assert Counter(items_of_step(0, 0, 100, 7)).most_common()[-1][1] >= 14, "a batch may hold several epochs"


def test_a_huge_set_needs_no_memory():
    began = time.perf_counter()
    items = items_of_step(1, 10**9, 1000, 10**12)
    assert len(set(items)) == 1000
    assert max(items) < 10**12
    assert max(items) > 9e11
    assert (time.perf_counter() - began) / 1000 < 1e-3


def ids(world: int, workers: int, start: int, stop: int, dataset=None) -> list[tuple[str, float]]:
    """(index, its random number) of all samples of steps start ... stop - 1, as ``world`` processes see them."""
    data = dataset or Numbers(delay=0.0003 if workers > 1 else 0.0)
    loaders = [Loader(data, 4, 20, start, stop, rank, world, workers) for rank in range(world)]
    seen = []
    for batches in zip(*loaders, strict=True):
        for batch in batches:
            seen += list(zip(batch.keys, batch.video[:, 1].tolist(), strict=True))
    for loader in loaders:
        loader.close()
    return seen


def test_the_first_500_samples_are_the_same_for_every_rank_worker_and_resume():
    reference = ids(1, 0, 0, 25)
    assert len(reference) == 500
    assert len({number for _, number in reference}) > 480, "every sample has draws of its own"
    compared = 0
    for world in (1, 2, 4):
        for workers in (0, 1, 3):
            assert ids(world, workers, 0, 25) == reference, (world, workers)
            compared += 1
    for resume in (1, 2, 3, 7, 12, 19, 24):
        assert ids(2, 1, 0, resume) + ids(4, 3, resume, 25) == reference, resume
        compared += 1
    assert compared == 16


def test_a_batch_has_labels_only_when_all_clips_do():
    batch = load_batch(Numbers(), 0, 3, 6)
    assert batch.label.dtype == torch.int64
    assert batch.label.tolist() == [int(key) % 5 for key in batch.keys]
    assert (batch.step, batch.video.shape) == (3, (6, 2))
    assert load_batch(Numbers(label=False), 0, 3, 6).label is None
    with pytest.raises(InputError, match="shared evenly by 4 processes"):
        load_batch(Numbers(), 0, 0, 6, 0, 4)
    with pytest.raises(InputError, match="at least one clip"):
        load_batch(Numbers(0), 0, 0, 6)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_an_error_comes_out_at_its_own_step_and_ends_the_loader(workers):
    bad = items_of_step(0, 2, 4, 37)[1]
    assert bad not in [item for step in (0, 1) for item in items_of_step(0, step, 4, 37)]
    loader = Loader(Numbers(fail_at=bad), 0, 4, workers=workers, ahead=4)
    assert [next(loader).step, next(loader).step] == [0, 1]
    with pytest.raises(InputError, match=f"clip {bad} is broken"):
        next(loader)
    with pytest.raises(StopIteration):
        next(loader)
    assert threads() == 0


def threads() -> int:
    return sum(thread.name.startswith("loader-") for thread in threading.enumerate())


def test_the_loader_reads_ahead_but_no_further_and_always_stops():
    data = Numbers()
    with Loader(data, 0, 2, workers=2, ahead=3) as loader:
        next(loader)
        deadline = time.monotonic() + 5
        while data.calls < 8 and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(0.05)
        assert data.calls == 8, "the batch taken and three more"
    assert threads() == 0
    assert [batch.step for batch in Loader(data, 0, 2, start=5, stop=9)] == [5, 6, 7, 8]
    assert list(Loader(data, 0, 2, start=9, stop=9)) == []


def test_waiting_is_counted_and_prefetching_hides_it():
    with Loader(Numbers(delay=0.01), 0, 3, workers=0) as loader:
        next(loader)
        assert loader.waited >= 0.02
    with Loader(Numbers(delay=0.01), 0, 3, workers=1, stop=8) as loader:
        next(loader)
        before = loader.waited
        for _ in loader:
            time.sleep(0.06)  # a step of training; loading takes half as long
        assert loader.waited - before < 0.5 * 7 * 0.03


def test_a_reader_that_hangs_is_reported_and_does_not_keep_the_program(monkeypatch):
    monkeypatch.setattr(sampler, "PATIENCE", 0.1)
    monkeypatch.setattr(sampler, "PARTING", 0.1)
    release = threading.Event()

    class Hanging(Numbers):
        def clip(self, index, generator):
            release.wait(20)
            return super().clip(index, generator)

    loader = Loader(Hanging(), 0, 2)
    began = time.monotonic()
    with pytest.raises(RunError, match="no batch for step 0"):
        next(loader)
    assert time.monotonic() - began < 2
    assert all(thread.daemon for thread in threading.enumerate() if thread.name.startswith("loader-"))
    release.set()
    deadline = time.monotonic() + 5
    while threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threads() == 0


def test_the_number_of_rounds_mixes_both_halves():
    """With whole rows moved together neighbours would stay neighbours; about one pair in n should."""
    n = 10_000
    order = [permuted(i, n, 3, 0) for i in range(n)]
    close = sum(abs(a - b) == 1 for a, b in pairwise(order))
    assert close < 2 + 6 * math.sqrt(2), close
