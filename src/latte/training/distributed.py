# SPDX-License-Identifier: Apache-2.0
"""Several processes train as one: each takes its share of the global batch, and gradients are added up once per step.

Plain torch.distributed, started by torchrun. What is decided (when to stop) or done once (reading, writing) goes through a group on
the CPU, so that no process waits for its GPU to agree.
"""

import os
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
from latte.runtime import rank, world_size

T = TypeVar("T")
TIMEOUT = timedelta(minutes=30)  # a checkpoint of a large model is written while the others wait


@dataclass(frozen=True)
class Group:
    """The processes of this run; alone, every method is a plain call."""

    rank: int = 0
    size: int = 1
    control: Any = None

    def all_reduce(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over the processes."""
        if self.size > 1:
            for work in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
                work.wait()  # pyright: ignore[reportOptionalMemberAccess]

    @torch.no_grad()
    def broadcast(self, tensors: Sequence[Tensor]) -> None:
        """Give every process the first one's values."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor.detach(), 0)

    def max(self, number: int) -> int:
        """The largest of the processes' numbers."""
        if self.size == 1:
            return number
        shared = torch.tensor(number)
        dist.all_reduce(shared, dist.ReduceOp.MAX, group=self.control)
        return int(shared)

    def run_on_rank0(self, act: Callable[..., T], *arguments: Any) -> T:
        """``act(*arguments)`` in the first process only; its result, or its error, is everyone's."""
        if self.size == 1:
            return act(*arguments)
        outcome: list[Any] = [None]
        if self.rank == 0:
            try:
                outcome = [act(*arguments)]
            except (InputError, RunError) as error:
                outcome = [error]
        dist.broadcast_object_list(outcome, 0, group=self.control)
        if isinstance(outcome[0], Exception):
            raise outcome[0]
        return outcome[0]


@contextmanager
def process_group(device: torch.device) -> Iterator[Group]:
    """The group of all processes that torchrun started, or of this one alone.

    A store prefix per restart keeps a restarted run from meeting the addresses of the processes that died.
    """
    if world_size() == 1:
        yield Group()
        return
    store, number, size = next(rendezvous("env://", timeout=TIMEOUT))
    store = PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "nccl"
    dist.init_process_group(backend, store=store, rank=number, world_size=size, timeout=TIMEOUT)
    try:
        yield Group(rank(), size, dist.new_group(backend="gloo", timeout=TIMEOUT))
    finally:
        dist.destroy_process_group()
