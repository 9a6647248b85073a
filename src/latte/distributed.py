# SPDX-License-Identifier: Apache-2.0
"""Data parallel training in several processes: each takes its share of the global batch, gradients are
summed once per step.

Plain torch.distributed, started by torchrun. Decisions (when to stop) and work that is done once (reading,
writing) use gloo groups on the CPU, so that no process waits for its GPU to agree.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from latte.checks import InputError, RunError
from latte.runtime import DEFAULT_TIMEOUT, rank, world_size

T = TypeVar("T")
STARTUP_TIMEOUT = timedelta(minutes=30)  # until all processes have read their data and meet
RANK0_TIMEOUT = timedelta(
    hours=2
)  # for checkpoints, samples and pretrained weights, which rank 0 handles while others wait
NCCL_GRACE = timedelta(
    seconds=60
)  # gloo times out first: NCCL's watchdog would end the process without naming the rank
REPORT_SECONDS = 5.0  # after a timeout, how long to wait for the other ranks to say that they are alive


class ProcessLost(RunError):
    """A collective operation failed: another process has stopped, died or lost its connection."""


@dataclass(frozen=True)
class Group:
    """The processes of this run. With one process, every method is a plain call."""

    rank: int = 0
    size: int = 1
    timeout: float = DEFAULT_TIMEOUT
    control: Any = None  # gloo group for decisions
    rank0_work: Any = None  # gloo group with RANK0_TIMEOUT
    store: Any = None

    def all_reduce(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over the processes."""
        if self.size > 1:
            with self.collective():
                for work in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
                    work.wait()  # pyright: ignore[reportOptionalMemberAccess]

    @torch.no_grad()
    def broadcast(self, tensors: Sequence[Tensor]) -> None:
        """Copy rank 0's values into every process."""
        if self.size > 1:
            with self.collective():
                for tensor in tensors:
                    dist.broadcast(tensor.detach(), 0)

    def max(self, number: int) -> int:
        """Return the largest of the processes' numbers."""
        if self.size == 1:
            return number
        shared = torch.tensor(number)
        with self.collective():
            dist.all_reduce(shared, dist.ReduceOp.MAX, group=self.control)
        return int(shared)

    def run_on_rank0(self, function: Callable[..., T], *arguments: Any) -> T:
        """Call ``function(*arguments)`` in rank 0 only; every process returns its result or raises its
        error.
        """
        if self.size == 1:
            return function(*arguments)
        outcome: list[Any] = [None]
        error: Exception | None = None
        if self.rank == 0:
            try:
                outcome = [function(*arguments)]
            except (InputError, RunError) as expected:
                outcome = [expected]
            except Exception as unexpected:  # the others must not wait for a result that never comes
                error = unexpected
                outcome = [RunError(f"rank 0 failed: {unexpected!r}; see its traceback")]
        with self.collective():
            dist.broadcast_object_list(outcome, 0, group=self.rank0_work)
        if error is not None:
            raise error
        if isinstance(outcome[0], Exception):
            raise outcome[0]
        return outcome[0]

    def together(self, function: Callable[..., T], *arguments: Any) -> T:
        """Call ``function(*arguments)`` in every process and return its result there; when one raises an
        InputError or RunError, all raise that of the first such rank, which is named.
        """
        if self.size == 1:
            return function(*arguments)
        result: Any = None
        error: Exception | None = None
        try:
            result = function(*arguments)
        except (InputError, RunError) as expected:
            error = expected
        errors: list[Any] = [None] * self.size
        with self.collective():
            dist.all_gather_object(errors, error, group=self.rank0_work)
        for number, found in enumerate(errors):
            if found is not None:
                raise type(found)(f"rank {number} of {self.size}: {found}") from error
        return result

    @contextmanager
    def collective(self) -> Iterator[None]:
        """Turn a failed collective operation into a RunError that names the ranks that did not answer."""
        try:
            yield
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise ProcessLost(self.failure(self.silent_ranks(), reason)) from error

    @contextmanager
    def computation(self) -> Iterator[None]:
        """``collective`` for computation that contains such operations: its other errors pass unchanged."""
        try:
            yield
        except RuntimeError as error:
            if not (isinstance(error, dist.DistError) or "gloo" in str(error)):
                raise
            with self.collective():
                raise

    def silent_ranks(self) -> list[int]:
        """Return the ranks that do not report within REPORT_SECONDS that the operation failed for them as
        well.
        """
        reported: set[int] = set()
        try:
            self.store.set_timeout(timedelta(seconds=REPORT_SECONDS))
            self.store.set(f"failed/{self.rank}", "1")
            deadline = time.monotonic() + REPORT_SECONDS
            while len(reported) < self.size and time.monotonic() < deadline:
                reported = {number for number in range(self.size) if self.store.check([f"failed/{number}"])}
                time.sleep(0.1)
        except RuntimeError:  # rank 0 may host the store
            return [0]
        return [number for number in range(self.size) if number not in reported]

    def failure(self, silent: Sequence[int], reason: str) -> str:
        """Return the message about a failed collective operation."""
        retry = "then run the same command again to resume from the last checkpoint"
        if not silent:
            return f"the processes lost their connection ({reason}); check the network, {retry}"
        names = ", ".join(map(str, silent))
        return (
            f"rank {names} of {self.size} did not answer within train.timeout={self.timeout:g} s: it has "
            "stopped, "
            "died or is far behind; check its log and its machine, raise train.timeout if it was only "
            f"slow, {retry}"
        )


def limit_on(device: torch.device, seconds: float) -> timedelta:
    """Return the time limit of an operation of ``device``: NCCL's is longer, see NCCL_GRACE."""
    limit = timedelta(seconds=seconds)
    if device.type == "cuda":
        limit += NCCL_GRACE
    return limit


@contextmanager
def process_group(device: torch.device, timeout: float = DEFAULT_TIMEOUT) -> Iterator[Group]:
    """The group of all processes that torchrun started, or of this one alone; ``timeout`` is in seconds.

    A store prefix per restart keeps a restarted run from connecting to the addresses of processes that died.
    RunError for processes that do not start within STARTUP_TIMEOUT.
    """
    if world_size() == 1:
        yield Group()
        return
    store, number, size = next(rendezvous("env://", timeout=STARTUP_TIMEOUT))
    store = PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    wait_for_all(store, number, size)
    limit = timedelta(seconds=timeout)
    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"  # offloaded tensors are on the CPU
    dist.init_process_group(
        backend, store=store, rank=number, world_size=size, timeout=limit_on(device, timeout)
    )
    control = dist.new_group(backend="gloo", timeout=limit)
    rank0_work = dist.new_group(backend="gloo", timeout=RANK0_TIMEOUT)
    try:
        yield Group(rank(), size, timeout, control, rank0_work, store)
    finally:
        dist.destroy_process_group()


def wait_for_all(store: Any, number: int, size: int) -> None:
    """Return when all ranks are here, so that what follows can have a short timeout. RunError naming those
    that are missing.
    """
    store.set(f"ready/{number}", "1")
    keys = {f"ready/{other}": other for other in range(size)}
    try:
        store.wait(list(keys), STARTUP_TIMEOUT)
    except RuntimeError as error:
        missing = [str(other) for key, other in keys.items() if not store.check([key])]
        minutes = STARTUP_TIMEOUT.total_seconds() / 60
        raise RunError(
            f"rank {', '.join(missing)} of {size} did not start within {minutes:g} minutes; check its log, "
            "then start again"
        ) from error
