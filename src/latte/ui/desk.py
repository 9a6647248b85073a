# SPDX-License-Identifier: Apache-2.0
"""One generation at a time, a few more that wait, and everything else refused at once. No torch."""

import logging
import re
import secrets
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from latte.checks import InputError, RunError

LOG = logging.getLogger(__name__)
MAX_WAITING = 8
QUOTED = re.compile(r"(?<=['\"])(?:[A-Za-z]:)?[/\\](?:[^'\"/\\]+[/\\])*([^'\"/\\]*)(?=['\"])")
FOLDERS = re.compile(r"(?<![\w.<])(?:[A-Za-z]:)?[/\\](?:[^\s'\",;:()/\\]+[/\\])+")


class CancelledJob(Exception):
    """Raised inside a job that was cancelled."""


@dataclass(eq=False)
class Job:
    """A piece of work: ``work(job)`` returns its result, and calls ``report`` as it goes."""

    work: Callable[["Job"], Any]
    owner: str = ""  # of whom all jobs can be cancelled
    state: str = "waiting"  # waiting, running, done, failed, cancelled
    step: int = 0
    steps: int = 0
    shown: Any = None  # a preview of the result
    result: Any = None
    error: str = ""
    stopped: bool = False
    finished: threading.Event = field(default_factory=threading.Event)
    id: str = field(default_factory=lambda: secrets.token_hex(8))

    def report(self, step: int, steps: int, shown: Any = None) -> None:
        """Record progress and a preview; CancelledJob when the job was cancelled."""
        if self.stopped:
            raise CancelledJob
        self.step = step
        self.steps = steps
        if shown is not None:
            self.shown = shown


class Desk:
    """A thread that runs jobs in the order in which they were submitted."""

    def __init__(self, max_waiting: int = MAX_WAITING):
        self.max_waiting = max_waiting
        self.waiting: deque[Job] = deque()
        self.running: Job | None = None
        self.closed = False
        self.changed = threading.Condition()
        self.thread = threading.Thread(target=self._serve, name="generation", daemon=True)
        self.thread.start()

    def submit(self, work: Callable[[Job], Any], owner: str = "") -> Job:
        """Add a job at the end; RunError, at once, when as many wait as may."""
        job = Job(work, owner)
        with self.changed:
            before = len(self.waiting) + (self.running is not None)
            if before > self.max_waiting:
                raise RunError(
                    f"the queue is full: 1 generation is running and {self.max_waiting} are waiting; "
                    "try again when one of them is done"
                )
            self.waiting.append(job)
            self.changed.notify_all()
        return job

    def position(self, job: Job) -> int:
        """Return how many jobs come before ``job``."""
        with self.changed:
            if job not in self.waiting:
                return 0
            return self.waiting.index(job) + (self.running is not None)

    def cancel(self, job: Job) -> None:
        """Free the slot of a waiting job now, of a running one at its next step; nothing for others."""
        with self.changed:
            job.stopped = True
            if job in self.waiting:
                self.waiting.remove(job)
                job.state = "cancelled"
                job.finished.set()

    def cancel_all(self, owner: str) -> int:
        """Cancel every job of ``owner`` and return their number."""
        with self.changed:
            jobs = [job for job in (*self.waiting, self.running) if job and job.owner == owner]
        for job in jobs:
            self.cancel(job)
        return len(jobs)

    def close(self) -> None:
        """Cancel everything and end the thread."""
        with self.changed:
            self.closed = True
            jobs = [*self.waiting, *filter(None, [self.running])]
            self.changed.notify_all()
        for job in jobs:
            self.cancel(job)
        self.thread.join(timeout=60)

    def _serve(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.waiting or self.closed)
                if self.closed:
                    return
                job = self.running = self.waiting.popleft()
                job.state = "running"
            run(job)
            with self.changed:
                self.running = None
            job.finished.set()


def run(job: Job) -> None:
    """Run ``job`` and record its result, or why there is none."""
    try:
        job.result = job.work(job)
        job.state = "done"
    except CancelledJob:
        job.state = "cancelled"
    except Exception as error:
        job.state = "failed"
        job.error = explain(error)


def without_folders(text: str) -> str:
    """Return ``text`` with the last part alone of every absolute path, quoted or without spaces."""
    return FOLDERS.sub("", QUOTED.sub(r"\1", text))


def explain(error: Exception) -> str:
    """Return the line about ``error`` that a visitor of the page may read: no folder of this machine.

    What is a fault of ours goes to the log, with its traceback.
    """
    if isinstance(error, InputError | RunError):
        return without_folders(str(error))
    if isinstance(error, OSError):
        LOG.warning("%s", error)
        return f"a file of the server could not be used ({error.strerror}); its log says which"
    if "memory" in str(error).lower():
        return "the server has not enough memory for this; ask for fewer or smaller clips"
    LOG.error("a request failed", exc_info=error)
    return f"the server failed ({type(error).__name__}); its log says where"
