# SPDX-License-Identifier: Apache-2.0
"""What a program and a person see of a training run: metrics.jsonl, and a bar or lines on stderr.

The curve's numbers are means over the steps since the line before. Their running sums are part of every checkpoint, so that a
resumed run writes the very lines it would have written without the stop.
"""

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from torch import Tensor

from latte.files import commit_file, reported

NUMBERS = ("loss", "mse", "vlb", "grad_norm")
LINE_SECONDS = 10.0


class MetricsAccumulator:
    """Running sums of NUMBERS on the device, and wall and processor seconds over all the starts of the run."""

    def __init__(self, device: torch.device, state: Mapping):
        """``state`` is what ``state()`` gave for the checkpoint, or empty for a fresh run."""
        self.sums = torch.tensor(state.get("sums", [0.0] * len(NUMBERS)), dtype=torch.float32, device=device)
        self.steps, self.loss = state.get("steps", 0), state.get("loss")
        self.wall_start = time.perf_counter() - state.get("seconds", 0.0)
        self.cpu_start = time.process_time() - state.get("cpu_seconds", 0.0)
        self.speed: float | None = None
        self.reset_clock()

    def reset_clock(self) -> None:
        """Rates count from here."""
        self.clips, self.waited, self.paused, self.since = 0, 0.0, 0.0, time.perf_counter()

    def add(self, numbers: Tensor, clips: int, waited: float) -> None:
        """One step's NUMBERS (4,), its clips, and the seconds it waited for them."""
        self.sums += numbers
        self.steps += 1
        self.clips += clips
        self.waited += waited

    def line(self) -> dict[str, float]:
        """Means, rates since the last line, and times; the sums start over. On a GPU this waits for the device."""
        means = (self.sums / self.steps).tolist()
        spent = self.spent()
        self.loss, self.speed = means[0], self.clips / spent
        rates = {"clips_per_second": round(self.speed, 3), "data_wait_share": round(self.waited / spent, 4)}
        self.sums.zero_()
        self.steps = 0
        self.reset_clock()
        return {**dict(zip(NUMBERS, means, strict=True)), **rates, **self.seconds()}

    def spent(self) -> float:
        """Seconds of training since rates began to count."""
        return max(time.perf_counter() - self.since - self.paused, 1e-9)

    def facts(self, loss: float | None) -> str:
        """``loss`` and clips/s of the latest line (before the first one, since the start) for people to read."""
        return f"loss {loss or 0:.4f}  {self.speed or self.clips / self.spent():.4g} clips/s"

    def seconds(self) -> dict[str, float]:
        """Wall and processor time of the run so far."""
        return {
            "seconds": round(time.perf_counter() - self.wall_start, 3),
            "cpu_seconds": round(time.process_time() - self.cpu_start, 3),
        }

    def latest_loss(self) -> float | None:
        """Mean loss since the last line, or that line's when no step has followed it."""
        return self.sums[0].item() / self.steps if self.steps else self.loss

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Time in here counts for the run but not for its rates."""
        began = time.perf_counter()
        yield
        self.paused += time.perf_counter() - began

    def state(self) -> dict[str, object]:
        """For the checkpoint, as plain data; float32 sums survive JSON exactly."""
        return {"sums": self.sums.tolist(), "steps": self.steps, "loss": self.loss, **self.seconds()}


class MetricsFile:
    """metrics.jsonl, open for appending: one JSON object a line, steps ascending. RunError when it cannot be written.

    Lines after ``step``, which are going to be written again, are dropped on opening, and so is half a line of a killed process.
    Nothing happens at all unless ``active`` (in the first process).
    """

    def __init__(self, path: Path, step: int, active: bool = True):
        self.path, self.file = path, None
        if not active:
            return
        with reported("the metrics", path):
            lines = (
                path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
                if path.exists()
                else []
            )
            kept = [line for line in lines if step_of(line) <= step]
            if kept != lines:
                commit_file(path, "".join(kept))
            self.file = open(path, "a", encoding="utf-8")

    def write(self, line: Mapping[str, object]) -> None:
        """Append one line; a process killed right afterwards does not lose it."""
        if self.file:
            with reported("the metrics", self.path):
                self.file.write(json.dumps(line) + "\n")
                self.file.flush()

    def sync(self) -> None:
        """Bring the lines to the disk."""
        if self.file:
            with reported("the metrics", self.path):
                os.fsync(self.file.fileno())

    def __enter__(self) -> "MetricsFile":
        return self

    def __exit__(self, *error: object) -> None:
        if self.file:
            with suppress(
                OSError
            ):  # only a line that ``write`` has failed on, and reported, can be left to write
                self.file.close()


def step_of(line: str) -> float:
    """The step of a line of metrics.jsonl; infinity for one that is not whole."""
    try:
        return json.loads(line)["step"] if line.endswith("\n") else float("inf")
    except (ValueError, KeyError, TypeError):
        return float("inf")


class Progress:
    """A bar with loss, clips/s and the time left on a terminal; elsewhere a plain line every LINE_SECONDS and at the end.

    Both on stderr, and nothing at all unless ``active`` (in the first process).
    """

    def __init__(self, start: int, total: int, active: bool = True, console: Console | None = None):
        self.start, self.total, self.active = start, total, active
        self.console = console or Console(file=sys.stderr, soft_wrap=True, highlight=False)
        self.began = self.last = time.perf_counter()
        columns = (
            TextColumn("train"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}"),
            TimeRemainingColumn(),
        )
        self.bar = Bar(*columns, console=self.console) if active and self.console.is_terminal else None

    def __enter__(self) -> "Progress":
        if self.bar:
            self.task = self.bar.add_task("train", total=self.total, completed=self.start, facts="")
            self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar:
            self.bar.stop()

    def update(self, step: int, tally: MetricsAccumulator) -> None:
        """Show ``step`` with loss and rate. The bar shows the loss of the latest line of metrics, because it must not wait for a GPU."""
        if self.bar:
            self.bar.update(self.task, completed=step, facts=tally.facts(tally.loss))
        elif self.active and (time.perf_counter() - self.last >= LINE_SECONDS or step == self.total):
            self.last = time.perf_counter()
            left = (self.last - self.began) / (step - self.start) * (self.total - step)
            facts = tally.facts(tally.latest_loss())
            self.console.print(f"step {step}/{self.total}  {facts}  {duration(left)} left", markup=False)


def duration(seconds: float) -> str:
    """'45 s', '3 min 05 s', '2 h 07 min', '3 d 04 h'."""
    for unit, name, smaller, part in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if seconds >= unit:
            return f"{int(seconds // unit)} {name} {int(seconds % unit // smaller):02d} {part}"
    return f"{seconds:.0f} s"
