# SPDX-License-Identifier: Apache-2.0
"""Interleaved timing: every round times each task once and a large matrix product beside them.

A share of the matrix product's rate, or a ratio of two tasks, compares two numbers of the same seconds, so it
carries over between days and machines where seconds do not. A round counts only when the machine was ours: on
a CPU, when other processes used at most ``max_other_load`` of it; on a GPU, when the matrix product ran
within 15 % of its best. A GPU's times are those of its own events.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import TypeVar

import torch
from torch import nn

from latte.runtime import generator

FEWEST_ROUNDS = 3
GPU_SPREAD = 1.15  # of the matrix product's time in a clean round, over its best
Clock = Callable[[], float]
Network = TypeVar("Network", bound=nn.Module)
MATMUL = {"cpu": 2048, "cuda": 8192, "mps": 4096}


@dataclass(frozen=True)
class Task:
    """Something to time: ``run()`` does ``operations`` (2 per multiply-add), 0 if not of interest."""

    name: str
    run: Callable[[], object]
    operations: float = 0.0


@dataclass
class Times:
    """Seconds of one run of each task, one entry per clean round, and how many rounds were thrown away.

    ``loads`` are the shares of the CPU that other processes used in the clean rounds.
    """

    seconds: dict[str, list[float]] = field(default_factory=dict)
    rejected: int = 0
    loads: list[float] = field(default_factory=list)

    def median(self, name: str) -> float:
        """Median seconds of one run of task ``name``."""
        return median(self.seconds[name])

    def spread(self, name: str) -> float:
        """Interquartile range of the seconds of ``name`` over their median; 0 for a single round."""
        samples = self.seconds[name]
        if len(samples) < 2:
            return 0.0
        low, middle, high = quantiles(samples, n=4)
        return (high - low) / middle

    def ratio(self, above: str, below: str) -> float:
        """Median over rounds of seconds(above) / seconds(below)."""
        return median(a / b for a, b in zip(self.seconds[above], self.seconds[below], strict=True))


def make_busy(model: Network) -> Network:
    """Add N(0, 0.02) to all weights of ``model``: on zero layers processors clock higher; return it."""
    draw = generator(0, "benchmark")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draw), alpha=0.02)
    return model


def matmul(device: torch.device, dtype: torch.dtype, side: int = 0) -> Task:
    """A square matrix product: the rate that everything else is a share of."""
    side = side or MATMUL[device.type]
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return Task("matmul", lambda: a @ b, 2.0 * side**3)


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was asked."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def once(task: Task, device: torch.device, repeats: int, clock: Clock = time.perf_counter) -> float:
    """Seconds of one run, over ``repeats`` runs: between two events on a CUDA device, else by ``clock``."""
    synchronise(device)
    if device.type == "cuda":
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        for _ in range(repeats):
            task.run()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / 1000 / repeats
    start = clock()
    for _ in range(repeats):
        task.run()
    synchronise(device)
    return (clock() - start) / repeats


def processor_seconds() -> tuple[float, float]:
    """Return seconds that all cores were busy, and that this process used; zeros without /proc."""
    own = sum(os.times()[:4])
    try:
        line = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0]
    except OSError:
        return 0.0, 0.0
    fields = [int(number) for number in line.split()[1:9]]
    return (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK"), own


def other_load(before: tuple[float, float], after: tuple[float, float], wall: float) -> float:
    """Share of the machine that other processes used between two readings."""
    others = (after[0] - before[0]) - (after[1] - before[1])
    return max(0.0, others / (wall * (os.cpu_count() or 1)))


def interleave(
    tasks: list[Task],
    device: torch.device,
    rounds: int,
    seconds: float,
    max_other_load: float,
    progress: Callable[[int, int], None] | None = None,
    clock: Clock = time.perf_counter,
) -> Times:
    """Times of ``rounds`` clean rounds of all tasks in turn, from at most four times as many.

    Each task runs twice before, to warm up; a short one is repeated to fill ``seconds``. ``clock`` may be
    ``time.process_time`` on a CPU that others use, too.
    """
    repeats = {}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for task in tasks:
        once(task, device, 1)
        repeats[task.name] = max(1, round(seconds / max(once(task, device, 1, clock), 1e-6)))
    times = Times({task.name: [] for task in tasks})
    best = float("inf")
    for _ in range(4 * rounds):
        before = processor_seconds()
        start = time.perf_counter()
        row = {task.name: once(task, device, repeats[task.name], clock) for task in tasks}
        other = other_load(before, processor_seconds(), time.perf_counter() - start)
        best = min(best, row.get("matmul", best))
        clean = other <= max_other_load
        if device.type != "cpu":
            clean = row.get("matmul", best) <= GPU_SPREAD * best
        if not clean:
            times.rejected += 1
            continue
        times.loads.append(other)
        for name, value in row.items():
            times.seconds[name].append(value)
        if progress:
            progress(len(times.loads), rounds)
        if len(times.loads) >= rounds:
            break
    return times
