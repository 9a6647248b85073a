# SPDX-License-Identifier: Apache-2.0
"""Batches for training: the global batch of step k is a pure function of (seed, k).

It does not depend on the number of processes or workers, nor on where a run was resumed. Which clips it holds
is in ``latte.data.order``; the random choices within a clip (its start frame, its flip) come from a generator
keyed by (seed, step, position). Axes: b batch, f frames, c channels, h height, w width.
"""

import atexit
import multiprocessing
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import reduction
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info
from torch.utils.data import Dataset as MapDataset

from latte.checks import InputError, RunError, check
from latte.data.order import Order, order_of
from latte.runtime import generator, usable_cpus

BATCH_TIMEOUT = 600.0  # seconds that one batch may take in a worker process
ACCELERATOR_WORKERS = 4  # worker processes when training on a GPU, if data.workers is not set
START_METHOD = "spawn"  # forking a process that runs threads or holds a CUDA context can deadlock
# Sent by a terminal or a scheduler to the whole process group. The training process handles them; workers
# must not die of them.
STOP_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")


@dataclass(frozen=True)
class Batch:
    """The clips of one step.

    ``video`` is (b f c H W) in [-1, 1], or latents (b f c h w). ``label`` is (b,) int64, or None if a clip
    has no label. ``keys`` name the source of each clip. ``global_batch`` is the number of clips of the step
    in all processes, which differs between buckets.
    """

    video: Tensor
    label: Tensor | None
    captions: list[str | None]
    keys: list[str]
    step: int
    global_batch: int


def load_batch(
    dataset: Any,
    seed: int,
    step: int,
    global_batch: int,
    rank: int = 0,
    world: int = 1,
    order: Order | None = None,
) -> Batch:
    """Load the part of the global batch of ``step`` that belongs to process ``rank`` of ``world``.

    ``dataset`` needs only ``len()`` and ``clip(index, generator)``; ``order`` is its ``order_of``
    unless given.
    The parts of all ranks, concatenated, are bit for bit the batch of a single process.
    """
    items = (order or order_of(dataset, seed, global_batch, world)).items(step)
    positions = share_of(len(items), rank, world)
    clips = [dataset.clip(items[position], generator(seed, "clip", step, position)) for position in positions]
    labels = [clip.label for clip in clips]
    label = None
    if None not in labels:
        label = torch.tensor(labels, dtype=torch.int64)
    return Batch(
        video=torch.stack([clip.video for clip in clips]),  # (b f c H W)
        label=label,
        captions=[clip.caption for clip in clips],
        keys=[clip.key for clip in clips],
        step=step,
        global_batch=len(items),
    )


def share_of(global_batch: int, rank: int, world: int) -> range:
    """Return the positions in the global batch that belong to process ``rank`` of ``world``."""
    share = global_batch // world
    return range(rank * share, (rank + 1) * share)


def default_workers(device: torch.device, world: int = 1) -> int:
    """Return how many worker processes to use on ``device`` when ``data.workers`` is not set.

    On the CPU training itself keeps every core busy, so reading ahead gains nothing and batches are loaded in
    the training process. Elsewhere ACCELERATOR_WORKERS, but no more than this process's share of the CPU
    cores.
    """
    if device.type == "cpu":
        return 0
    return max(min(ACCELERATOR_WORKERS, usable_cpus()[0] // world), 1)


class StepDataset(MapDataset):
    """A map-style dataset with one item per training step: the batch of that step, or the error raised while
    loading it.

    Errors are returned, not raised, because DataLoader rebuilds an exception from its formatted traceback,
    which loses both the one-line message and the attributes.
    """

    def __init__(self, dataset: Any, seed: int, global_batch: int, rank: int, world: int):
        self.dataset = dataset
        self.seed = seed
        self.global_batch = global_batch
        self.rank = rank
        self.world = world
        self.order = order_of(dataset, seed, global_batch, world)

    def __getitem__(self, step: int) -> Batch | Exception:
        try:
            return load_batch(
                self.dataset, self.seed, step, self.global_batch, self.rank, self.world, self.order
            )
        except Exception as error:
            if get_worker_info() is None:
                return error
            return picklable(error)


def picklable(error: Exception) -> Exception:
    """Return ``error`` with its traceback as a note, or a RunError with its message if it cannot be sent to
    another process.
    """
    error.add_note("while loading a batch:\n" + "".join(traceback.format_exception(error)))
    try:
        reduction.ForkingPickler.loads(reduction.ForkingPickler.dumps(error))
    except Exception:
        return RunError(f"loading a batch failed with {error.__class__.__name__}: {error}")
    return error


class Loader:
    """Iterator over the batches of steps ``start``, ``start + 1``, ... below ``stop`` (None: endless).

    A torch DataLoader over a ``StepDataset``. With ``workers`` processes each prepares up to ``ahead``
    batches in advance; with 0 every batch is loaded inside ``next``. Order and content do not depend on
    ``workers``. An error raised while loading comes out of ``next`` at its own step, whatever was loaded
    after it. ``waited`` is the time in seconds spent inside ``next`` so far. Use the loader as a context
    manager, or call ``close``.

    Raises InputError for counts out of range and for a dataset that cannot be sent to worker processes;
    RunError when a worker dies or a batch takes longer than BATCH_TIMEOUT.
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
        workers: int = 0,
        ahead: int = 2,
    ):
        check(workers >= 0, f"data.workers must be at least 0, got {workers}")
        check(ahead >= 1, f"a worker must prepare at least 1 batch in advance, got {ahead}")
        self.waited = 0.0
        if stop is None:
            stop = sys.maxsize
        steps = range(start, stop)
        self._steps = iter(steps)
        batches = StepDataset(dataset, seed, global_batch, rank, world)
        others = set(multiprocessing.active_children())
        self._batches: Iterator[Batch | Exception] | None = iterate(batches, steps, workers, ahead)
        self._workers = set(multiprocessing.active_children()) - others
        atexit.register(self.close)  # must run before multiprocessing waits for its processes

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        step = next(self._steps)
        if self._batches is None:
            raise StopIteration
        began = time.perf_counter()
        try:
            with worker_failures(step):
                batch = next(self._batches)
            if isinstance(batch, Exception):
                raise batch
        except BaseException:
            self.close()
            raise
        finally:
            self.waited += time.perf_counter() - began
        return batch

    def close(self) -> None:
        """Stop the worker processes; one that does not stop within a few seconds (a read hangs) is killed."""
        if self._batches is None:
            return
        atexit.unregister(self.close)
        # Deleting the iterator would stop the workers too, but a traceback may still hold a reference to it.
        shut_down = getattr(self._batches, "_shutdown_workers", None)
        self._batches = None
        if shut_down:
            with suppress(RuntimeError):  # a worker that died is reported by __next__ or __exit__
                shut_down()
        for worker in self._workers:
            worker.kill()
            worker.join(timeout=1.0)  # a process inside an uninterruptible read ends when the system lets it

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, kind: object, error: BaseException | None, *_: object) -> None:
        self.close()
        if isinstance(error, RuntimeError) and is_worker_failure(error):
            raise worker_error(error) from error  # torch's SIGCHLD handler raises wherever the main thread is


def iterate(dataset: StepDataset, steps: range, workers: int, ahead: int) -> Iterator[Batch | Exception]:
    """Return the items of ``steps`` in order, from a DataLoader whose worker processes are started here.

    Raises InputError for a dataset that cannot be sent to worker processes.
    """
    settings: dict[str, Any] = {"num_workers": workers}
    if workers:
        settings |= {
            "timeout": BATCH_TIMEOUT,
            "prefetch_factor": ahead,
            "multiprocessing_context": START_METHOD,
        }
    try:
        with stop_signals_blocked(), warnings.catch_warnings():
            # More workers than cores help when reading waits for a disk. Pickle errors are reported below.
            warnings.filterwarnings("ignore", "This DataLoader will create|Got pickle error", UserWarning)
            loader = DataLoader(
                dataset,
                sampler=steps,
                batch_size=None,
                collate_fn=as_loaded,  # type: ignore[arg-type]
                worker_init_fn=ignore_stop_signals,
                generator=torch.Generator(),  # without it, DataLoader would advance the global random state
                **settings,
            )
            return iter(loader)
    except (reduction.pickle.PicklingError, AttributeError, TypeError) as error:
        raise InputError(
            f"data.workers is {workers}, but this dataset cannot be pickled for worker processes ({error}); "
            "set data.workers=0, or make the dataset picklable"
        ) from error


def as_loaded(batch: Batch | Exception) -> Batch | Exception:
    """Return what the dataset returned: it is a batch already (the ``collate_fn`` of the DataLoader)."""
    return batch


def ignore_stop_signals(worker: int) -> None:
    """Ignore STOP_SIGNALS in a worker process (the ``worker_init_fn`` of the DataLoader).

    So Ctrl-C in a terminal stops the training process only, which saves a checkpoint and closes the loader.
    """
    for name in STOP_SIGNALS:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


@contextmanager
def stop_signals_blocked() -> Iterator[None]:
    """Block STOP_SIGNALS; processes that start meanwhile inherit the mask, also while they still import
    torch.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    from multiprocessing import resource_tracker

    resource_tracker.ensure_running()  # its start would unblock SIGINT and SIGTERM again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [getattr(signal, name) for name in STOP_SIGNALS])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def worker_failures(step: int) -> Iterator[None]:
    """Turn what DataLoader raises for a dead or hanging worker into a RunError that names the step."""
    try:
        yield
    except RuntimeError as error:
        if not is_worker_failure(error):
            raise
        raise worker_error(error, step) from error


def is_worker_failure(error: RuntimeError) -> bool:
    """Return whether DataLoader raised ``error`` because of a worker process."""
    return "DataLoader worker" in str(error) or "DataLoader timed out" in str(error)


def worker_error(error: RuntimeError, step: int | None = None) -> RunError:
    """Return a one-line RunError for a worker process that died or hung."""
    where = ""
    if step is not None:
        where = f" at step {step}"
    if "timed out" in str(error):
        return RunError(
            f"no batch arrived{where} within {BATCH_TIMEOUT:.0f} s; is the disk of data.root still there? "
            "If reading is just slow, use more data.workers"
        )
    cause: BaseException | None = error
    if "is killed by signal" in str(error.__cause__):
        cause = error.__cause__
    reason = str(cause).splitlines()[0].rstrip(". ")
    return RunError(
        f"a data worker died{where} ({reason}); if memory or /dev/shm ran out, use fewer data.workers; "
        "a script that trains needs `if __name__ == '__main__':` around its main part, or data.workers=0"
    )
