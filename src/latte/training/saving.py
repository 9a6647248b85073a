# SPDX-License-Identifier: Apache-2.0
"""How a run writes its checkpoints: every process its own part, and on request while training goes on.

The first process opens the uncommitted folder, the others write their files into it and report names and
hashes through the store of the group; then the first one writes the manifest and commits. No tensor travels
between processes, no process holds the whole, and nothing is a collective operation, so that a thread may do
it: with ``train.async_save`` the thread first copies what is saved to main memory, while training computes
the next gradients; only the next update of the weights waits for that copy.
"""

import copy
import json
import threading
import time
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from latte.checkpoint.remote import Mirror
from latte.checkpoint.run import Files, Tensors, check_parts, save_checkpoint, write_parts
from latte.checks import InputError, RunError
from latte.distributed import RANK0_TIMEOUT, REPORT_SECONDS, Group, ProcessLost
from latte.files import reported
from latte.training.parallel import own_parts

POLL = 0.02  # seconds between looks for what another process reports
NOT_SHARED = (
    "rank {rank} of {size} and rank 0 do not see the same folder {folder}; give a run.dir on a file system "
    "that all machines share, or train.parallel=ddp"
)


class Saver:
    """Writes the checkpoints of ``run_dir``; the first ``writers`` processes hold everything once.

    At most one save is under way: the next one, ``finish()`` and the end of the block wait for it. Its error
    is raised by the first two, in every process.
    """

    def __init__(
        self,
        run_dir: Path,
        group: Group,
        writers: int = 1,
        asynchronous: bool = False,
        mirror: str | None = None,
    ):
        self.run_dir = run_dir
        self.mirror = Mirror(mirror if group.rank == 0 else None, run_dir)
        self.group = group
        self.writers = writers
        self.asynchronous = asynchronous
        self.buffers: dict[tuple[str, str], Tensor] = {}
        self.number = 0  # every process makes the same saves in the same order
        self.pending = False
        self.thread: threading.Thread | None = None
        self.given_up = threading.Event()
        self.copied = threading.Event()  # what is being saved may change again
        self.outcome: Path | Exception | None = None  # of the first process
        self.new: list[Path] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        """Let what is under way end, but do not wait long for processes that are gone."""
        limit = REPORT_SECONDS if kind is not None and issubclass(kind, ProcessLost) else None
        if self.thread is not None:
            self.thread.join(limit)
            self.given_up.set()
            self.thread.join(REPORT_SECONDS)
        self.mirror.wait(limit)

    def save(
        self,
        step: int,
        parts: Mapping[str, Mapping[str, Any]],
        about: Mapping[str, Any],
        keep: int | None = None,
        protected: Collection[int] = (),
    ) -> None:
        """Save ``parts``, what this process has of every tensor by group and name, with the plain data
        ``about``; the rest is as in ``save_checkpoint``. Every process calls it.
        """
        self.finish()
        self.number += 1
        self.pending = True
        if self.group.rank < self.writers:
            self.start(step, parts, about, keep, protected)
        if not self.asynchronous:
            self.finish()

    def start(
        self,
        step: int,
        parts: Mapping[str, Mapping[str, Any]],
        about: Mapping[str, Any],
        keep: int | None,
        protected: Collection[int],
    ) -> None:
        """Write this process's part, in a thread of its own if asynchronous."""
        rank = self.group.rank
        own = {group: own_parts(tensors, rank) for group, tensors in parts.items()}
        self.copied.clear()
        job: Callable[[], None] = partial(self.contribute, step, own)
        if rank == 0:
            settings = (copy.deepcopy(dict(about)), keep, tuple(protected))
            job = partial(self.write, step, own, *settings)
        if self.asynchronous:
            self.thread = threading.Thread(target=job, daemon=True, name=f"checkpoint of step {step}")
            self.thread.start()
        else:
            job()

    def settle(self) -> None:
        """Return when the weights may change: the save that is under way has its copy of them."""
        if self.thread is not None:
            self.copied.wait()

    def finish(self) -> None:
        """Wait for the save that is under way, and raise its error in every process."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        if self.pending:
            self.pending = False
            path = self.group.run_on_rank0(self.result)
            if self.group.rank > 0:
                self.new.append(path)

    def close(self) -> None:
        """Wait for the last save and for its copy in a remote store; RunError when there is none."""
        self.finish()
        self.group.run_on_rank0(self.mirror.flush)

    def committed(self) -> list[Path]:
        """Return the checkpoints that were committed since the last call; a process other than the first
        learns of them in ``finish()``.
        """
        found = list(self.new)
        del self.new[: len(found)]
        return found

    def result(self) -> Path:
        """Return the committed folder, or raise what went wrong."""
        if isinstance(self.outcome, Exception):
            raise self.outcome
        assert self.outcome is not None
        return self.outcome

    def staged(self, own: Tensors) -> Tensors:
        """Return a copy of ``own`` in main memory, which is kept from save to save (a new one costs more time
        than the copy); pinned for tensors of a GPU. Without a thread, ``own`` itself.
        """
        if not self.asynchronous:
            return own
        found: dict[str, dict[str, Tensor]] = {}
        gpus: set[torch.device] = set()
        for group, members in own.items():
            found[group] = {}
            for name, tensor in members.items():
                key = (group, name)
                buffer = self.buffers.get(key)
                if buffer is None or (buffer.shape, buffer.dtype) != (tensor.shape, tensor.dtype):
                    pinned = tensor.device.type == "cuda"
                    buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
                    self.buffers[key] = buffer
                found[group][name] = buffer.copy_(tensor.detach(), non_blocking=True)
                if tensor.device.type == "cuda":
                    gpus.add(tensor.device)
        for gpu in gpus:  # named: the current GPU of a new thread is the first one
            torch.cuda.synchronize(gpu)
        self.copied.set()
        return found

    def write(
        self, step: int, own: Tensors, state: dict, keep: int | None, protected: Collection[int]
    ) -> None:
        """Commit the checkpoint, in the first process."""
        others = self.announce if self.writers > 1 else None
        try:
            own = self.staged(own)
            self.outcome = save_checkpoint(
                self.run_dir, step, own, state, keep, protected, self.writers, others
            )
            self.new.append(self.outcome)
            self.mirror.push(self.outcome)
        except Exception as error:  # raised where training waits for the save
            self.outcome = error
            if others is not None:  # the others need not wait for a folder
                self.group.store.set(self.key("folder"), "")
        finally:
            self.copied.set()

    def announce(self, folder: Path) -> Callable[[], Files]:
        """Let the others write into ``folder``; return what waits for them and returns their files."""
        self.group.store.set(self.key("folder"), str(folder))
        return partial(self.collect, folder)

    def collect(self, folder: Path) -> Files:
        """Return the files that the other processes wrote into ``folder``; RunError with what stopped one."""
        files: Files = {}
        for rank in range(1, self.writers):
            answer = json.loads(
                self.received(str(rank), f"rank {rank} of {self.group.size} to write its part")
            )
            if isinstance(answer, str):
                raise RunError(f"rank {rank} of {self.group.size}: {answer}")
            for file in answer:
                if not (folder / file).is_file():
                    raise RunError(NOT_SHARED.format(rank=rank, size=self.group.size, folder=folder.parent))
            files |= answer
        return files

    def contribute(self, step: int, own: Tensors) -> None:
        """Write this process's part and report it, or why it is missing."""
        rank = self.group.rank
        size = self.group.size
        try:
            own = self.staged(own)
            place = self.received("folder", "rank 0 to open a checkpoint")
            if not place:
                return
            folder = Path(place)
            if not folder.is_dir():
                raise RunError(NOT_SHARED.format(rank=rank, size=size, folder=folder.parent))
            check_parts(own, step)
            needed = sum(tensor.nbytes for members in own.values() for tensor in members.values())
            with reported(f"its part of the checkpoint of step {step}", folder, needed):
                answer: Files | str = write_parts(folder, own, rank + 1, self.writers)
        except (InputError, RunError) as expected:
            answer = str(expected)
        except Exception as unexpected:  # the first process must not wait for a part that never comes
            answer = f"its part of the checkpoint of step {step} failed: {unexpected!r}"
        finally:
            self.copied.set()
        self.group.store.set(self.key(str(rank)), json.dumps(answer))

    def received(self, name: str, what: str) -> str:
        """Return what another process reports under ``name``; RunError when it does not, or when this process
        stops waiting.
        """
        store = self.group.store
        key = self.key(name)
        end = time.monotonic() + RANK0_TIMEOUT.total_seconds()
        while not store.check([key]):
            if self.given_up.wait(POLL) or time.monotonic() > end:
                raise RunError(f"the checkpoint was given up while waiting for {what}")
        return store.get(key).decode()

    def key(self, name: str) -> str:
        """Return the name of an entry of the current save in the store."""
        return f"save/{self.number}/{name}"
