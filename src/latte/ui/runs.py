# SPDX-License-Identifier: Apache-2.0
"""Follow a training run by the files in its folder, pause it by the signal that saves a checkpoint, and
continue it by the command that resumes it exactly. What needs torch is imported at the first look at a run.
"""

import os
import platform
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from latte.checkpoint.lock import holder
from latte.checks import InputError, check, command_line
from latte.page import html

if TYPE_CHECKING:
    from latte.training.history import History

RECENT = 20  # lines of metrics that the pace is measured over
LOG_FILE = "ui.log"  # what a run that the page continued prints


@dataclass(frozen=True)
class RunState:
    """A run so far, how many steps it is to have, and what trains it now."""

    history: "History"
    steps: int
    process: int | None  # on this machine
    machine: str  # another one that trains it, or ''

    @property
    def is_training(self) -> bool:
        """Return whether a process holds the run."""
        return bool(self.process or self.machine)

    @property
    def pace(self) -> float | None:
        """Return the recent seconds of a step, None before there are two lines of metrics."""
        recent = [line for line in self.history.metrics[-RECENT:] if "seconds" in line]
        if len(recent) < 2 or recent[-1]["step"] <= recent[0]["step"]:
            return None
        spent = recent[-1]["seconds"] - recent[0]["seconds"]
        return max(spent, 0.0) / (recent[-1]["step"] - recent[0]["step"])

    @property
    def status(self) -> str:
        """Return a line: how far, whether it trains, and the time left."""
        from latte.training.callbacks import duration

        step = self.history.step
        done = f"step {step:,} of {self.steps:,}"
        if self.machine:
            return f"{done}; trained on {self.machine}, so it can be paused and continued only there"
        if self.process is None:
            return f"{done}; " + ("not training", "complete")[step >= self.steps]
        if self.pace is None:
            return f"{done}; training (process {self.process})"
        left = duration(self.pace * (self.steps - step))
        return f"{done}; training (process {self.process}), {self.pace:.2f} s a step, about {left} left"

    @property
    def samples(self) -> dict[int, Sequence[Path]]:
        """Return step -> clips, or the sheet without any; newest first."""
        return dict(sorted(self.history.samples.items(), reverse=True))


def read_run(folder: Path) -> RunState:
    """Read a run folder that may be written at this moment; InputError when it is none."""
    from latte.training.history import read_history

    history = read_history(folder)
    steps = (history.config.get("train") or {}).get("steps")
    check(
        isinstance(steps, int),
        f"run {folder.name} does not say how many steps it has; it may belong to an older version: resume it "
        "once with latte train",
    )
    process, machine = holder(folder) or (None, "")
    if machine == platform.node():
        machine = ""
    elif machine:
        process = None
    return RunState(history, int(steps or 0), process, machine)


def curves(state: RunState) -> html.Html:
    """Return the plots of a run: those of its report."""
    from latte.training.report import curves as plots

    if not state.history.metrics:
        return html.prose("No metrics yet: the first line comes after the first step.")
    return html.tag("div", {"class": "plots"}, *plots([state.history]))


def pause(folder: Path, signalled: set[int]) -> str:
    """Ask the process that trains a run to save a checkpoint and stop; return what happens now.

    ``signalled`` remembers the processes that were asked: a second signal would end one without saving.
    """
    state = read_run(folder)
    check(not state.machine, f"run {folder.name} is trained on {state.machine}; pause it there")
    if state.process is None:
        raise InputError(f"no process trains run {folder.name}; there is nothing to pause")
    if state.process not in signalled:
        signalled.add(state.process)
        os.kill(state.process, signal.SIGTERM)
    return (
        f"process {state.process} saves a checkpoint at the end of its step and stops; then try prompts on "
        "these weights, and continue when you like"
    )


def resume(folder: Path) -> str:
    """Start ``latte train`` on a run folder, which resumes it exactly; return what happens now."""
    from latte.training.history import read_json

    state = read_run(folder)
    check(not state.is_training, f"run {folder.name} is being trained already")
    check(
        state.history.step < state.steps, f"run {folder.name} is complete; raise train.steps to train longer"
    )
    command = ["train", str(folder), *device_of(folder)]
    processes = read_json(folder / "env.json").get("processes", 1)
    check(
        processes == 1,
        f"run {folder.name} was trained by {processes} processes; start them with torchrun as before, with "
        + command_line(*command),
    )
    with open(folder / LOG_FILE, "ab") as log:
        subprocess.Popen(
            [sys.executable, "-m", "latte", *command],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    return f"continues with {command_line(*command)}; it prints to {LOG_FILE} in the run folder"


def device_of(folder: Path) -> list[str]:
    """Return the option --device of the command that started the run last, [] without one."""
    try:
        words = shlex.split((folder / "command.txt").read_text("utf-8").splitlines()[-1])
    except (OSError, ValueError, IndexError):
        return []
    for word, value in zip(words, [*words[1:], ""], strict=True):
        if word == "--device":
            return ["--device", value]
        if word.startswith("--device="):
            return [word]
    return []
