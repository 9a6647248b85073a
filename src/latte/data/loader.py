# SPDX-License-Identifier: Apache-2.0
"""The global batch of step k as a pure function of (seed, k), whatever the number of processes, threads or restarts.

The items of all steps form one endless row: epoch after epoch, each a keyed permutation of the data set, cut into batches that
may straddle two epochs. The permutation is a small Feistel network, which needs no memory and no state: resuming at step k is
asking for step k. Each item's own draws (which frames, flipped or not) come from a generator keyed by (seed, step, position).
Axes: b batch, f frames, c channels, h height, w width.
"""

import hashlib
import math
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from latte.checks import RunError, require
from latte.runtime import generator

ROUNDS = 6
MASK = (1 << 64) - 1
PATIENCE = 600.0  # seconds without a batch before the loader gives up
PARTING = 5.0  # seconds that closing waits for a thread that is inside a read


@lru_cache(maxsize=64)
def _round_keys(seed: int, epoch: int) -> tuple[int, ...]:
    digest = hashlib.sha512(f"{seed}/epoch/{epoch}".encode()).digest()
    return tuple(int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(ROUNDS))


def _mix(value: int) -> int:
    """Scramble 64 bits (multiply, shift, exclusive or, twice)."""
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & MASK
    return value ^ (value >> 31)


def permuted(position: int, num_items: int, seed: int, epoch: int) -> int:
    """Where item ``position`` of an epoch lies in the data set: for each (seed, epoch) a permutation of range(num_items).

    A Feistel network on a rectangle of about sqrt(n) x sqrt(n); the few places beyond n are walked on until one falls inside."""
    rows = math.isqrt(num_items - 1) + 1
    columns = -(-num_items // rows)
    keys = _round_keys(seed, epoch)
    while True:
        left, right = divmod(position, columns)
        for i in range(0, ROUNDS, 2):
            left = (left + _mix(right + keys[i])) % rows
            right = (right + _mix(left + keys[i + 1])) % columns
        position = left * columns + right
        if position < num_items:
            return position


def items_of_step(seed: int, step: int, global_batch: int, num_items: int) -> list[int]:
    """Data set indices of the global batch of ``step`` (0, 1, ...), in order of position."""
    require(
        num_items > 0,
        "num_items",
        num_items,
        "a data set holds at least one clip",
        "choose another data.root",
    )
    require(
        global_batch > 0, "global_batch", global_batch, "a batch holds at least one clip", "give 1 or more"
    )
    places = (divmod(step * global_batch + position, num_items) for position in range(global_batch))
    return [permuted(offset, num_items, seed, epoch) for epoch, offset in places]


@dataclass(frozen=True)
class Batch:
    """Clips of one step: ``video`` (b f c H W) in [-1, 1] or latents (b f c h w), ``label`` (b,) int64 or None without labels."""

    video: Tensor
    label: Tensor | None
    captions: list[str | None]
    keys: list[str]
    step: int


def load_batch(dataset: Any, seed: int, step: int, global_batch: int, rank: int = 0, world: int = 1) -> Batch:
    """Rank ``rank``'s consecutive share of the global batch of ``step``. ``dataset`` needs len() and clip(index, generator) only.

    The shares of all ranks, one after the other, are the batch of a single process, bit for bit."""
    require(
        global_batch % world == 0,
        "train.global_batch",
        global_batch,
        f"it is shared evenly by {world} processes",
        f"give a multiple of {world}",
    )
    share = global_batch // world
    items = items_of_step(seed, step, global_batch, len(dataset))
    places = range(rank * share, (rank + 1) * share)
    clips = [dataset.clip(items[place], generator(seed, "clip", step, place)) for place in places]
    labels = [clip.label for clip in clips]
    label = None if any(value is None for value in labels) else torch.tensor(labels, dtype=torch.int64)
    return Batch(
        torch.stack([clip.video for clip in clips]),
        label,
        [clip.caption for clip in clips],
        [clip.key for clip in clips],
        step,
    )


class Loader:
    """Iterator over the batches of steps start, start + 1, ... (to ``stop``, if given), prepared ahead by ``workers`` threads.

    Order and content do not depend on the threads (0: everything happens in ``next``). An error raised while loading comes out
    of ``next`` at its own step. ``waited`` is the number of seconds that the consumer has spent in ``next`` so far. Use as a
    context manager, or call ``close``: it never blocks for long, and threads left over cannot keep the program alive.
    """

    def __init__(
        self,
        dataset: Any,
        seed: int,
        global_batch: int,
        start: int = 0,
        stop: int | None = None,
        rank: int = 0,
        world: int = 1,
        workers: int = 1,
        ahead: int = 2,
    ):
        require(
            workers >= 0 and ahead >= 1,
            "workers, ahead",
            (workers, ahead),
            "workers >= 0 and ahead >= 1",
            "give e.g. 1 and 2",
        )
        self.waited = 0.0
        self._load = lambda step: load_batch(dataset, seed, step, global_batch, rank, world)
        self._stop, self._wanted, self._taken = (
            stop,
            start,
            start,
        )  # the step that next() returns; the step that a thread takes
        self._ahead = max(ahead, workers)
        self._ready: dict[int, Batch | BaseException] = {}
        self._change = threading.Condition()
        self._closed = False
        self._threads = [
            threading.Thread(target=self._work, name=f"loader-{i}", daemon=True) for i in range(workers)
        ]
        for thread in self._threads:
            thread.start()

    def _work(self) -> None:
        while True:
            with self._change:
                self._change.wait_for(lambda: self._closed or self._taken < self._wanted + self._ahead)
                if self._closed or (self._stop is not None and self._taken >= self._stop):
                    return
                step = self._taken
                self._taken += 1
            try:
                result: Batch | BaseException = self._load(step)
            except BaseException as error:  # handed to the consumer, whatever it is
                result = error
            with self._change:
                self._ready[step] = result
                self._change.notify_all()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        step = self._wanted
        if self._closed or (self._stop is not None and step >= self._stop):
            raise StopIteration
        began = time.perf_counter()
        try:
            batch = self._fetch(step) if self._threads else self._load(step)
        except BaseException:
            self.close()
            raise
        finally:
            self.waited += time.perf_counter() - began
        self._wanted = step + 1
        return batch

    def _fetch(self, step: int) -> Batch:
        with self._change:
            if not self._change.wait_for(lambda: step in self._ready or self._closed, timeout=PATIENCE):
                raise RunError(
                    f"no batch for step {step} within {PATIENCE:.0f} s; is the disk of data.root still there?"
                )
            if self._closed:
                raise StopIteration
            result = self._ready.pop(step)
            self._wanted = step + 1
            self._change.notify_all()
        if isinstance(result, BaseException):
            raise result
        return result

    def close(self) -> None:
        """Stop the threads; one that is inside a read is waited for a few seconds at most, and then left to itself."""
        with self._change:
            self._closed = True
            self._ready.clear()
            self._change.notify_all()
        deadline = time.monotonic() + PARTING
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_: Sequence[object]) -> None:
        self.close()
