# SPDX-License-Identifier: Apache-2.0
"""Whether a training step fits into the memory at hand, by how much, and if not, a setting that does."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from latte.checks import InputError
from latte.files import size_text

if TYPE_CHECKING:
    from latte.profile.plan import Batch, Memory
    from latte.training.config import TrainConfig

ROOM = 0.9  # share of the memory that a step may take; the codec and the buffers of kernels need the rest
MAX_PROCESSES = 1024
HALVED = 0.6  # about what bf16 leaves of the activations of fp32; only decides what is counted exactly

Counted = Callable[["TrainConfig", int, int], "Memory"]
"""(settings, clips per pass, processes that split the states) -> memory of a step on each device."""


@dataclass(frozen=True)
class Verdict:
    """Whether a step fits. Bytes are those of one device."""

    device: str
    memory: int | None  # of the device; None: unknown
    needed: int
    fits: bool | None  # None: the memory is unknown
    settings: tuple[str, ...] = ()  # KEY=VALUE with which a step fits, where it does not as it is
    processes: int | None = None  # devices that these settings need; None: as many as before
    needed_with: int | None = None  # with these settings


def judge(
    train: "TrainConfig",
    batch: "Batch",
    held: "Memory",
    parts: int,
    device: torch.device,
    available: int | None,
    count: Counted,
) -> Verdict:
    """Return the verdict about a step that takes ``held`` on ``device`` with ``available`` bytes, with states
    that ``parts`` processes split.

    Where it does not fit, the first of these settings that does: fewer clips per pass (the same result),
    gradient checkpointing, bf16 on a GPU, and weights and states split over more processes. ``count`` counts
    a candidate exactly.
    """
    known = Verdict(device.type, available, held.total, None)
    if available is None:
        return known
    room = ROOM * available
    if held.total <= room:
        return replace(known, fits=True)
    for changes, processes in candidates(train, batch, held, device):
        changed = {"micro_batch": batch.micro_batch, **changes}
        devices = processes * train.sequence_parallel
        split_by = devices if "parallel" in changes else parts
        if estimate(held, batch, changed, split_by / parts) > room:
            continue
        try:
            tried = replace(train, **changed)
        except InputError:  # of settings that exclude each other
            continue
        with_it = count(tried, changed["micro_batch"], split_by).total
        if with_it <= room:
            words = tuple(f"train.{key}={str(value).lower()}" for key, value in changes.items())
            more = None if processes == batch.processes else devices
            return replace(known, fits=False, settings=words, processes=more, needed_with=with_it)
    return replace(known, fits=False)


def candidates(
    train: "TrainConfig", batch: "Batch", held: "Memory", device: torch.device
) -> Iterator[tuple[dict[str, Any], int]]:
    """Yield (changed settings of ``train``, processes), the cheapest in time first."""
    steps: list[dict[str, Any]] = [{}]
    if not train.gradient_checkpointing:
        steps.append({"gradient_checkpointing": True})
    if held.dtype == "float32" and device.type == "cuda":
        steps.append({**steps[-1], "dtype": "bf16"})
    for changes in steps:
        for clips in halves(batch.micro_batch):
            fewer = {} if clips == batch.micro_batch else {"micro_batch": clips}
            if changes or fewer:
                yield {**changes, **fewer}, batch.processes
    processes = 2
    while processes <= min(MAX_PROCESSES, batch.global_batch):
        if batch.global_batch % processes == 0 and processes >= batch.processes:
            for clips in halves(min(batch.micro_batch, batch.global_batch // processes)):
                fewer = {} if clips == batch.micro_batch else {"micro_batch": clips}
                yield {"parallel": "fsdp", **steps[-1], **fewer}, processes
        processes *= 2


def halves(number: int) -> Iterator[int]:
    """Yield ``number``, its half, ... down to 1."""
    while number > 1:
        yield number
        number //= 2
    yield 1


def estimate(held: "Memory", batch: "Batch", changed: dict[str, Any], finer: float) -> float:
    """Return about what a step takes with the settings ``changed`` and states in ``finer`` times as many
    parts, without counting.
    """
    saved = held.activations
    if changed.get("gradient_checkpointing"):
        saved = held.with_checkpointing
    if "dtype" in changed:
        saved *= HALVED
    return (held.total - held.activations) / finer + saved * changed["micro_batch"] / batch.micro_batch


def verdict_text(found: Verdict) -> str:
    """Return the verdict for people."""
    needed = f"a step needs {size_text(found.needed)} on each device"
    if found.memory is None:
        return f"unknown: {needed}, and no {found.device} is here; give its memory in GiB, e.g. --memory 80"
    place = "this machine" if found.device == "cpu" else "the GPU"
    there = f"{needed}, {place} has {size_text(found.memory)}"
    spare = found.memory - found.needed
    if found.fits:
        return f"fits: {there}, {size_text(spare)} to spare"
    short = f"{size_text(-spare)} too little" if spare < 0 else f"less than {1 - ROOM:.0%} to spare"
    reason = f"does not fit: {there}, {short}"
    if not found.settings:
        return f"{reason}; no setting fits: take a smaller model.size, data.frames or data.resolution"
    on_more = f" on {found.processes} devices" if found.processes else ""
    words = " ".join(found.settings)
    return f"{reason}; fits with {words}{on_more}: {size_text(found.needed_with or 0)}"
