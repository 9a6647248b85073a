# SPDX-License-Identifier: Apache-2.0
"""What watches a training run: the callback interface, metrics.jsonl and the progress bar, which are built
on it.

The values of a line of metrics are means over the steps since the previous line. Their running sums are
part of every checkpoint, so that a resumed run writes exactly the lines that it would have written without
the stop.
"""

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TextIO

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from torch import Tensor, nn

from latte.checks import duration
from latte.files import commit_file, reported

METRICS = ("loss", "mse", "vlb", "grad_norm")
LINE_SECONDS = 10.0


class MetricsAccumulator:
    """Running sums of METRICS on the device, and wall and processor seconds over all starts of the run."""

    def __init__(self, device: torch.device, state: Mapping):
        """``state`` is what ``state()`` returned for the checkpoint, or empty for a fresh run."""
        zeros = [0.0] * len(METRICS)
        self.sums = torch.tensor(state.get("sums", zeros), dtype=torch.float32, device=device)  # (4)
        self.steps = state.get("steps", 0)
        self.loss = state.get("loss")
        self.wall_start = time.perf_counter() - state.get("seconds", 0.0)
        self.cpu_start = time.process_time() - state.get("cpu_seconds", 0.0)
        self.clips_per_second: float | None = None
        self.reset_clock()

    def reset_clock(self) -> None:
        """Measure speed from here on."""
        self.clips = 0
        self.waited = 0.0
        self.paused = 0.0
        self.since = time.perf_counter()

    def add(self, metrics: Tensor, clips: int, waited: float) -> None:
        """Add one step: its METRICS (4,), its number of clips, and the seconds it waited for data."""
        self.sums += metrics
        self.steps += 1
        self.clips += clips
        self.waited += waited

    def line(self) -> dict[str, float]:
        """Return means and speed since the last line, and times; reset the sums. On a GPU this waits for
        the device.
        """
        means = (self.sums / self.steps).tolist()
        spent = self.spent()
        self.loss = means[0]
        self.clips_per_second = self.clips / spent
        speed = {
            "clips_per_second": round(self.clips_per_second, 3),
            "data_wait_share": round(self.waited / spent, 4),
        }
        self.sums.zero_()
        self.steps = 0
        self.reset_clock()
        return {**dict(zip(METRICS, means, strict=True)), **speed, **self.seconds()}

    def spent(self) -> float:
        """Return the seconds of training since the last line, without pauses."""
        return max(time.perf_counter() - self.since - self.paused, 1e-9)

    def summary(self, loss: float | None) -> str:
        """Return ``loss`` and the clips/s of the latest line (before the first line: since the start) as
        text.
        """
        return f"loss {loss or 0:.4f}  {self.clips_per_second or self.clips / self.spent():.4g} clips/s"

    def seconds(self) -> dict[str, float]:
        """Return wall and processor seconds of the run so far."""
        return {
            "seconds": round(time.perf_counter() - self.wall_start, 3),
            "cpu_seconds": round(time.process_time() - self.cpu_start, 3),
        }

    def latest_loss(self) -> float | None:
        """Return the mean loss since the last line, or that line's loss if no step has followed it."""
        if not self.steps:
            return self.loss
        return self.sums[0].item() / self.steps

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Count the time inside for the run but not for its speed."""
        start = time.perf_counter()
        yield
        self.paused += time.perf_counter() - start

    def state(self) -> dict[str, object]:
        """Return plain data for the checkpoint; float32 sums survive JSON exactly."""
        return {"sums": self.sums.tolist(), "steps": self.steps, "loss": self.loss, **self.seconds()}


def saved_metrics(saved: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the running sums in the state of a checkpoint; 0.1.0 called them "tally"."""
    return saved.get("metrics") or saved.get("tally") or {}


@dataclass
class TrainEvent:
    """What a callback sees of the run. ``metrics`` is None at steps without a line in metrics.jsonl."""

    run_dir: Path
    step: int  # steps done so far
    total_steps: int
    model: nn.Module
    ema_model: nn.Module
    accumulator: MetricsAccumulator
    metrics: Mapping[str, Any] | None = None
    record: Mapping[str, Any] = field(default_factory=dict)  # the content of config.yaml


class Callback(Protocol):
    """What ``train`` calls in rank 0. Subclass it and override what you need; an error that you raise ends
    the run.

    Callbacks must not change the models, and draw random numbers from generators of their own.
    """

    def on_start(self, event: TrainEvent) -> None:
        """Before the first step; ``event.step`` is the step of the checkpoint that the run resumes from, or
        0.
        """

    def on_step(self, event: TrainEvent) -> None:
        """After each step."""

    def on_validation(self, event: TrainEvent, metrics: Mapping[str, float]) -> None:
        """After the held-out loss (validation/loss, ...) or a score (score/fvd, ...) was measured."""

    def on_samples(self, event: TrainEvent, paths: Sequence[Path]) -> None:
        """After samples of the EMA model were written to ``paths``."""

    def on_checkpoint(self, event: TrainEvent, path: Path) -> None:
        """After the checkpoint folder ``path`` was committed."""

    def on_end(self, event: TrainEvent) -> None:
        """After the last step, an interruption or an error."""


class MetricsFile(Callback):
    """Writes metrics.jsonl: one JSON object per line, steps ascending. RunError when it cannot be written.

    Opening drops lines after the step that the run resumes from, which will be written again, and
    incomplete last lines.
    """

    def __init__(self, path: Path):
        self.path = path
        self.file: TextIO | None = None

    def on_start(self, event: TrainEvent) -> None:
        """Open the file for appending."""
        with reported("the metrics", self.path):
            lines: list[str] = []
            if self.path.exists():
                lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
            kept = [line for line in lines if step_of(line) <= event.step]
            if kept != lines:
                commit_file(self.path, "".join(kept))
            self.file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115, on_end closes it

    def on_step(self, event: TrainEvent) -> None:
        """Append the step's metrics, if it has any; a process killed right afterwards does not lose them."""
        if event.metrics is not None:
            self.append(event.metrics)

    def append(self, values: Mapping[str, Any]) -> None:
        """Append a line."""
        if self.file:
            with reported("the metrics", self.path):
                self.file.write(json.dumps(values) + "\n")
                self.file.flush()

    def sync(self) -> None:
        """Flush the lines to the disk: before a checkpoint that counts on them."""
        if self.file:
            with reported("the metrics", self.path):
                os.fsync(self.file.fileno())

    def on_end(self, event: TrainEvent) -> None:
        """Close the file."""
        if self.file:
            with suppress(
                OSError
            ):  # the only data left to write is a line whose failure was already reported
                self.file.close()


class ValidationFile(MetricsFile):
    """Writes validation.jsonl: a line for each held-out loss and each score, with its step."""

    def on_step(self, event: TrainEvent) -> None:
        """Write nothing."""

    def on_validation(self, event: TrainEvent, metrics: Mapping[str, float]) -> None:
        """Append the values."""
        self.append({"step": event.step, **metrics})


def step_of(line: str) -> float:
    """Return the step of a line of metrics.jsonl; infinity for an incomplete line."""
    if not line.endswith("\n"):
        return float("inf")
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")


class ProgressBar(Callback):
    """Shows loss, clips/s and the time left on stderr: a bar on a terminal, elsewhere a line every
    LINE_SECONDS and at the end.

    A terminal that was closed does not end the run.
    """

    def __init__(self, console: Console | None = None):
        self.console = console or Console(file=sys.stderr, soft_wrap=True, highlight=False)
        self.bar: Bar | None = None

    def on_start(self, event: TrainEvent) -> None:
        """Show the bar, if this is a terminal."""
        self.first_step = event.step
        self.started = time.perf_counter()
        self.last_line = self.started
        if not self.console.is_terminal:
            return
        columns = (
            TextColumn("train"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[summary]}"),
            TimeRemainingColumn(),
        )
        self.bar = Bar(*columns, console=self.console)
        self.task = self.bar.add_task("train", total=event.total_steps, completed=event.step, summary="")
        with suppress(OSError):
            self.bar.start()

    def on_step(self, event: TrainEvent) -> None:
        """Update the bar, whose loss is that of the latest line of metrics, because it must not wait for a
        GPU.
        """
        with suppress(OSError):
            if self.bar:
                summary = event.accumulator.summary(event.accumulator.loss)
                self.bar.update(self.task, completed=event.step, summary=summary)
            elif time.perf_counter() - self.last_line >= LINE_SECONDS or event.step == event.total_steps:
                self.print_line(event)

    def print_line(self, event: TrainEvent) -> None:
        """Print a plain line with the step, the loss, the speed and the time left."""
        self.last_line = time.perf_counter()
        per_step = (self.last_line - self.started) / (event.step - self.first_step)
        left = duration(per_step * (event.total_steps - event.step))
        summary = event.accumulator.summary(event.accumulator.latest_loss())
        self.console.print(f"step {event.step}/{event.total_steps}  {summary}  {left} left", markup=False)

    def on_end(self, event: TrainEvent) -> None:
        """Leave the terminal as it was."""
        if self.bar:
            with suppress(OSError):
                self.bar.stop()
