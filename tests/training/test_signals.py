# SPDX-License-Identifier: Apache-2.0
"""A stop signal: a checkpoint at the end of the step and its exit code; a second signal ends the process at
once.
"""

import json
import os
import pty
import select
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from latte.checkpoint.run import latest_checkpoint
from latte.runtime import STOP_SIGNALS, StopRequest
from tiny import WORDS
from tiny_runs import FORKS, SHORT, curve, run

LONG = replace(SHORT, steps=100_000, checkpoint_every=100_000, log_every=1)


def endless(folder: str) -> None:
    """A run that only a signal ends; leaves with what the command line would leave with."""
    torch.set_num_threads(1)
    slowly = replace(LONG, sample_every=1)
    raise SystemExit(run(Path(folder), slowly, sample=lambda model, step: time.sleep(0.05))["interrupted"])


def deaf(pipe) -> None:
    """A step that never ends."""
    with StopRequest():
        pipe.send("ready")
        while True:
            time.sleep(0.01)


def wait_for_steps(run_dir: Path, steps: int) -> None:
    deadline = time.monotonic() + 60
    metrics = run_dir / "metrics.jsonl"
    while time.monotonic() < deadline and not (
        metrics.exists() and metrics.read_bytes().count(b"\n") >= steps
    ):
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGUSR1, 138)],
)
def test_the_first_signal_saves_at_the_end_of_the_step_and_leaves(tmp_path, number, code):
    child = FORKS.Process(target=endless, args=(str(tmp_path),), daemon=True)
    child.start()
    wait_for_steps(tmp_path, 3)
    began = time.monotonic()
    os.kill(child.pid, number)
    child.join(30)
    took = time.monotonic() - began
    child.kill()
    assert child.exitcode == code
    assert took < 10
    step = int(latest_checkpoint(tmp_path).name.removeprefix("step-"))
    assert step >= 3
    assert [line["step"] for line in curve(tmp_path)] == list(range(1, step + 1))
    straight = run(tmp_path / "straight", replace(LONG, steps=step + 2))
    again = run(tmp_path, replace(LONG, steps=step + 2))
    assert again["weights_sha256"] == straight["weights_sha256"]
    assert curve(tmp_path) == curve(tmp_path / "straight")


def test_the_second_signal_leaves_at_once():
    here, there = FORKS.Pipe()
    child = FORKS.Process(target=deaf, args=(there,), daemon=True)
    child.start()
    assert here.poll(60)
    os.kill(child.pid, signal.SIGTERM)
    time.sleep(0.2)
    assert child.is_alive()
    began = time.monotonic()
    os.kill(child.pid, signal.SIGINT)
    child.join(20)
    took = time.monotonic() - began
    child.kill()  # of no effect on one that has left
    assert child.exitcode == 130
    assert took < 5


def test_handlers_are_put_back_and_another_thread_sets_none():
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    with StopRequest() as stop:
        assert [signal.getsignal(number) for number in STOP_SIGNALS] == [stop.handle] * 4
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.code == 130
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before
    seen = []

    def elsewhere() -> None:
        with StopRequest() as stop:
            seen.append((stop.code, [signal.getsignal(number) for number in STOP_SIGNALS] == before))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join(10)
    assert seen == [(0, True)]


def test_nohup_keeps_its_effect():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.code == 0
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_terminal_that_is_closed_saves_a_checkpoint(tmp_path):
    """The whole command on a terminal of its own: closing it sends SIGHUP, and every later write to it
    fails.
    """
    command = [
        sys.executable,
        "-m",
        "latte",
        "train",
        "shapes",
        *WORDS,
        "train.steps=100000",
        "--out",
        str(tmp_path),
    ]
    child, terminal = pty.fork()
    if child == 0:
        os.execvp(command[0], command)
    deadline = time.monotonic() + 60
    while len(lines_of(tmp_path)) < 2 and time.monotonic() < deadline:
        if select.select([terminal], [], [], 0.05)[0]:
            os.read(terminal, 4096)
    lines_before = len(lines_of(tmp_path))
    os.close(terminal)
    deadline = time.monotonic() + 60
    status: int | None = None
    while status is None and time.monotonic() < deadline:
        ended, found = os.waitpid(child, os.WNOHANG)
        status = found if ended else None
        time.sleep(0.05)
    if status is None:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert lines_before >= 2
    assert status is not None
    assert os.waitstatus_to_exitcode(status) == 129
    step = int(latest_checkpoint(tmp_path).name.removeprefix("step-"))
    assert step >= json.loads(lines_of(tmp_path)[-1])["step"]


def lines_of(run_dir: Path) -> list[str]:
    metrics = run_dir / "metrics.jsonl"
    return metrics.read_text().splitlines() if metrics.exists() else []
