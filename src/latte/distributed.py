# SPDX-License-Identifier: Apache-2.0
"""The processes of a command, as torchrun starts them: which one this is, what one does for all, who takes
which piece of work, and who failed.

Plain torch.distributed. Training sums gradients over the processes once per step. Other commands share pieces
of work (batches of clips, shards, runs), each written by one process; a process that waits for the others
watches their signs of life, however long a piece takes. Decisions (when to stop) and work that is done once
(reading, writing) use gloo groups on the CPU, so that no process waits for its GPU to agree.
"""

import itertools
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from latte.checks import InputError, RunError, check
from latte.runtime import DEFAULT_TIMEOUT, rank, world_size

T = TypeVar("T")
STARTUP_TIMEOUT = timedelta(minutes=30)  # until all processes have read their data and meet
RANK0_TIMEOUT = timedelta(
    hours=2
)  # for checkpoints, samples and pretrained weights, which rank 0 handles while others wait
NCCL_GRACE = timedelta(
    seconds=60
)  # gloo times out first: NCCL's watchdog would end the process without naming the rank
BEAT_SECONDS = 2.0  # between two signs of life of a process
POLL_SECONDS = 0.2  # between two looks at what the others have done
FAILURE = "failure"  # key of the store: the first failure of any process
RESUME = "then run the same command again: what is finished is kept"
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
    watched: bool = False  # whether processes show signs of life, see ``command_group``
    phases: Iterator[int] = field(default_factory=itertools.count)  # numbers of what all do together

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
        if self.watched:
            self.announce_and_wait(f"rank 0, phase {next(self.phases)}", [0])
        with self.collective():
            dist.broadcast_object_list(outcome, 0, group=self.rank0_work)
        if error is not None:
            raise error
        if isinstance(outcome[0], Exception):
            outcome[0].of_rank0 = self.rank > 0  # pyright: ignore[reportAttributeAccessIssue]
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

    def after_rank0(self, function: Callable[..., T], *arguments: Any) -> T:
        """Call ``function(*arguments)`` in rank 0, then in the others, for which it has filled a cache; every
        process returns its own result, or raises the error of rank 0.
        """
        found: list[T] = []
        self.run_on_rank0(lambda: found.append(function(*arguments)))
        return found[0] if found else function(*arguments)

    def share(self, count: int, team: "Team | None" = None) -> Iterator[int]:
        """Yield numbers below ``count`` until all are taken, each in one process, or in one ``team`` of
        processes; end when the work on all is done. RunError for a process that failed or stopped.
        """
        if self.size == 1:
            yield from range(count)
            return
        phase = next(self.phases)
        while (number := self.take(f"next, phase {phase}", team)) < count:
            yield number
        self.announce_and_wait(f"done, phase {phase}", range(self.size))

    def take(self, key: str, team: "Team | None") -> int:
        """Return the next number of the counter ``key``, the same in all processes of ``team``."""
        self.check_failures()
        number = torch.zeros((), dtype=torch.int64)
        if team is None or team.rank == 0:
            number += self.store.add(key, 1) - 1
        if team is not None:
            with self.collective():
                dist.broadcast(number, team.first, group=team.control)
        return int(number)

    def gather(self, value: T) -> list[T]:
        """Return the ``value`` of every process, by rank."""
        if self.size == 1:
            return [value]
        self.announce_and_wait(f"gather, phase {next(self.phases)}", range(self.size))
        values: list[Any] = [None] * self.size
        with self.collective():
            dist.all_gather_object(values, value, group=self.control)
        return values

    def announce_and_wait(self, what: str, ranks: Iterable[int]) -> None:
        """Announce that this process is done with ``what``, and return when all ``ranks`` are.

        RunError when a process failed, or shows no sign of life for ``timeout`` seconds.
        """
        self.store.set(f"{what}: {self.rank}", "1")
        missing = set(ranks)
        beats: dict[int, tuple[int, float]] = {}
        while True:
            missing -= {number for number in missing if self.store.check([f"{what}: {number}"])}
            if not missing:
                return
            self.check_failures()
            now = time.monotonic()
            for number in missing:
                beat = self.store.add(f"beat {number}", 0)
                if number not in beats or beats[number][0] != beat:
                    beats[number] = (beat, now)
            silent = [number for number in sorted(missing) if now - beats[number][1] > self.timeout]
            if silent:
                self.report_failure(self.failure(silent, ""))
                self.check_failures()
            time.sleep(POLL_SECONDS)

    def report_failure(self, reason: str) -> None:
        """Make ``reason`` the failure of all processes, unless there is one."""
        if not self.store.check([FAILURE]):
            self.store.set(FAILURE, reason)

    def check_failures(self) -> None:
        """RunError with the reason when another process has failed."""
        if self.store.check([FAILURE]):
            raise RunError(self.store.get(FAILURE).decode())

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Show the other processes signs of life inside, and the reason when this one fails."""
        over = threading.Event()
        own = self.store.clone()  # a connection waits for its answer: the thread has its own

        def show() -> None:
            with suppress(RuntimeError):  # the process that hosts the store has ended
                while not over.wait(BEAT_SECONDS):
                    own.add(f"beat {self.rank}", 1)

        thread = threading.Thread(target=show, daemon=True)
        thread.start()
        try:
            yield
        except Exception as error:
            with suppress(RuntimeError):
                self.report_failure(f"rank {self.rank} of {self.size} failed: {error}")
            raise
        finally:
            over.set()
            thread.join()

    def teams(self, size: int) -> "Team | None":
        """Return this process's team of ``size`` neighbours that share each clip, None for ``size`` 1.

        Every process must call it. InputError when the processes cannot be divided into such teams.
        """
        if size == 1:
            return None
        check(
            self.size % size == 0,
            f"{size} processes are to share each clip, but there {_are(self.size)}; start a multiple of "
            f"{size}, e.g. torchrun --nproc-per-node {size}",
        )
        found = None
        limit = timedelta(seconds=self.timeout)
        for first in range(0, self.size, size):
            ranks = list(range(first, first + size))
            data = dist.new_group(ranks, timeout=limit)
            control = dist.new_group(ranks, backend="gloo", timeout=limit)
            if self.rank in ranks:
                found = Team(self.rank - first, size, first, data, control)
        return found

    @contextmanager
    def collective(self) -> Iterator[None]:
        """Turn a failed collective operation into a RunError: what another process reported, else the ranks
        that did not answer.
        """
        try:
            yield
        except RuntimeError as error:
            if self.watched:
                with suppress(dist.DistError):  # the store may have ended
                    self.check_failures()
            reason = str(error).splitlines()[0]
            raise ProcessLost(self.failure(self.silent_ranks(), reason)) from error

    @contextmanager
    def computation(self) -> Iterator[None]:
        """``collective`` for computation that contains such operations: its other errors pass unchanged."""
        try:
            yield
        except RunError:  # says already what happened
            raise
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
        limit = f"train.timeout={self.timeout:g} s"
        slow = ", raise train.timeout if it was only slow"
        retry = "then run the same command again to resume from the last checkpoint"
        if self.watched:
            limit = f"{self.timeout:g} s"
            slow = ""
            retry = RESUME
        if not silent:
            return f"the processes lost their connection ({reason}); check the network, {retry}"
        names = ", ".join(map(str, silent))
        return (
            f"rank {names} of {self.size} did not answer within {limit}: it has stopped, died or is far "
            f"behind; check its log and its machine{slow}, {retry}"
        )


ALONE = Group()


@dataclass(frozen=True)
class Team:
    """Neighbouring processes that work on the same clips: this one is ``rank`` of ``size``, and ``first`` is
    the number of the first among all. ``data`` moves tensors, ``control`` numbers on the CPU.
    """

    rank: int
    size: int
    first: int
    data: Any
    control: Any


def _are(count: int) -> str:
    return "is one" if count == 1 else f"are {count}"


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


@contextmanager
def command_group(device: torch.device, timeout: float = DEFAULT_TIMEOUT) -> Iterator[Group]:
    """The group of a command other than training: nothing in it has a time limit but a process that shows no
    sign of life for ``timeout`` seconds.
    """
    with process_group(device, timeout) as group:
        if group.size == 1:
            yield group
            return
        group = replace(group, watched=True)
        with group.watching():
            yield group


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
