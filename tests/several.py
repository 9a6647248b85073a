# SPDX-License-Identifier: Apache-2.0
"""Several processes on this machine, as torchrun starts them, from the fork server that has imported torch.

The store through which they meet belongs to the test, as torchrun's does to its agent: groups may follow each
other in the same processes, and the process that is ahead never meets the store of the group before.
"""

import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from latte import distributed
from tiny_runs import FORKS

SECONDS = 240  # until a process that does not answer fails the test


def start(rank: int, count: int, port: int, target: Callable[..., Any], arguments: tuple, pipe: Any) -> None:
    """Send (True, what ``target(rank, *arguments)`` returned), or (False, its traceback)."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(count), "GLOO_SOCKET_IFNAME": "lo"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    distributed.STARTUP_TIMEOUT = timedelta(seconds=SECONDS)
    try:
        pipe.send((True, target(rank, *arguments)))
    except BaseException:
        pipe.send((False, traceback.format_exc()))


def next_group() -> None:
    """Call in every process before it opens another group."""
    attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"]) + 1
    os.environ["TORCHELASTIC_RESTART_COUNT"] = str(attempt)


@contextmanager
def started(count: int, target: Callable[..., Any], *arguments: Any) -> Iterator[tuple[list, list]]:
    """Start ``count`` processes; yield them and the pipes on which they answer, and end them afterwards."""
    store = dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
        "127.0.0.1", 0, is_master=True, wait_for_workers=False
    )
    children = []
    pipes = []
    for rank in range(count):
        here, there = FORKS.Pipe()
        given = (rank, count, store.port, target, arguments, there)
        children.append(FORKS.Process(target=start, args=given, daemon=True))
        children[-1].start()
        pipes.append(here)
    try:
        yield children, pipes
    finally:
        for child in children:
            child.kill()
            child.join(20)


def together(count: int, target: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Return what ``target(rank, *arguments)`` returns in each of ``count`` processes."""
    with started(count, target, *arguments) as (_, pipes):
        assert all(pipe.poll(SECONDS) for pipe in pipes), "a process does not answer"
        answers = [pipe.recv() for pipe in pipes]
    for good, answer in answers:
        assert good, answer
    return [answer for _, answer in answers]
