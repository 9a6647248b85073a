# SPDX-License-Identifier: Apache-2.0
"""Following a run by its files: status and pace, a pause that reaches the process once, a resume."""

import json
import subprocess
import sys
import time

import pytest

from latte.checkpoint.lock import holder
from latte.checks import InputError
from latte.ui import runs

TRAINER = """
import signal, sys, time
from pathlib import Path
from latte.checkpoint.lock import run_lock
folder = Path(sys.argv[1])
def stop(number, frame):
    with open(folder / "signals", "a") as file:
        file.write("x")
signal.signal(signal.SIGTERM, stop)
with run_lock(folder):
    print("ready", flush=True)
    while not (folder / "signals").exists():
        time.sleep(0.01)
    time.sleep(float(sys.argv[2]))
"""


@pytest.fixture
def folder(tmp_path):
    run = tmp_path / "mine"
    run.mkdir()
    (run / "config.yaml").write_text("train:\n  steps: 100\n")
    lines = [{"step": n, "loss": 2.0 - n / 100, "lr": 0.1, "seconds": n * 0.5} for n in range(1, 41)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (run / "metrics.jsonl").write_text(text + '{"step": 41, "lo')  # being written
    return run


def train(folder, seconds: float) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", TRAINER, str(folder), str(seconds)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    return process


def test_a_run_that_is_being_written_is_read(folder):
    state = runs.read_run(folder)
    assert (state.history.step, state.steps, state.process) == (40, 100, None)
    assert state.pace == pytest.approx(0.5)
    assert state.status == "step 40 of 100; not training"
    page = runs.curves(state)
    assert page.count("<svg") >= 2
    assert str(folder) not in page


def test_a_run_without_metrics_and_one_of_another_kind(folder):
    (folder / "metrics.jsonl").unlink()
    assert "No metrics yet" in runs.curves(runs.read_run(folder))
    (folder / "config.yaml").write_text("model: {}\n")
    with pytest.raises(InputError, match="older version"):
        runs.read_run(folder)
    (folder / "config.yaml").write_text("{")
    with pytest.raises(InputError, match="no config"):
        runs.read_run(folder)


def test_pause_signals_the_trainer_once_and_the_run_is_free_afterwards(folder):
    process = train(folder, 0.5)
    try:
        state = runs.read_run(folder)
        assert state.process == process.pid
        assert "about 30 s left" in state.status
        with pytest.raises(InputError, match="being trained already"):
            runs.resume(folder)
        signalled: set[int] = set()
        for _ in range(3):  # a second signal would end a trainer without a checkpoint
            assert "saves a checkpoint" in runs.pause(folder, signalled)
        assert process.wait(timeout=20) == 0
        assert (folder / "signals").read_text() == "x"
    finally:
        process.kill()
        process.stdout.close()
    assert holder(folder) is None
    with pytest.raises(InputError, match="nothing to pause"):
        runs.pause(folder, signalled)


def test_a_killed_trainer_does_not_count(folder):
    process = train(folder, 60)
    process.kill()
    process.wait(timeout=20)
    process.stdout.close()
    assert (folder / ".lock").read_text().startswith(f"process {process.pid} on ")
    assert holder(folder) is None
    assert runs.read_run(folder).process is None


def test_a_trainer_on_another_machine_is_shown_and_left_alone(folder):
    (folder / ".lock").write_text("process 1 on elsewhere\n")
    assert holder(folder) == (1, "elsewhere")
    assert "trained on elsewhere" in runs.read_run(folder).status
    with pytest.raises(InputError, match="pause it there"):
        runs.pause(folder, set())
    with pytest.raises(InputError, match="being trained already"):
        runs.resume(folder)


def test_continue_runs_the_command_that_resumes_in_a_session_of_its_own(folder, monkeypatch):
    started = []
    monkeypatch.setattr(
        runs.subprocess, "Popen", lambda command, **options: started.append((command, options))
    )
    (folder / "command.txt").write_text("2026-01-01 latte train shapes --device cpu run.dir=x\n")
    assert "continues with latte train" in runs.resume(folder)
    ((command, options),) = started
    assert command == [sys.executable, "-m", "latte", "train", str(folder), "--device", "cpu"]
    assert options["start_new_session"] is True


def test_continue_is_refused_where_it_would_not_be_the_same_run(folder, monkeypatch):
    monkeypatch.setattr(runs.subprocess, "Popen", None)
    (folder / "env.json").write_text('{"processes": 2}')
    with pytest.raises(InputError, match="torchrun"):
        runs.resume(folder)
    (folder / "config.yaml").write_text("train:\n  steps: 40\n")
    with pytest.raises(InputError, match="complete"):
        runs.resume(folder)


def test_a_damaged_lock_is_no_trainer(folder):
    for text in ("", "process x on y", "\x00"):
        (folder / ".lock").write_text(text)
        assert holder(folder) is None
    began = time.monotonic()
    assert holder(folder / "nothing") is None
    assert time.monotonic() - began < 1
