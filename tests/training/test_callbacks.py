# SPDX-License-Identifier: Apache-2.0
"""Metrics, their file, and the progress bar."""

import io
import json
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console

from latte.checks import RunError
from latte.training import callbacks
from latte.training.callbacks import MetricsAccumulator, MetricsFile, ProgressBar, TrainEvent, duration

CPU = torch.device("cpu")


def test_lines_are_means_and_a_checkpoint_between_them_changes_nothing():
    numbers = torch.arange(24.0).view(6, 4) / 7
    accumulator, part = MetricsAccumulator(CPU, {}), MetricsAccumulator(CPU, {})
    for row in numbers:
        accumulator.add(row, 3, 0.0)
    for row in numbers[:2]:
        part.add(row, 3, 0.0)
    assert part.latest_loss() == pytest.approx(numbers[:2, 0].mean().item())
    rest = MetricsAccumulator(CPU, json.loads(json.dumps(part.state())))
    for row in numbers[2:]:
        rest.add(row, 3, 0.0)
    line, other = accumulator.line(), rest.line()
    assert line["loss"] == pytest.approx(numbers[:, 0].mean().item())
    assert line["grad_norm"] == pytest.approx(numbers[:, 3].mean().item())
    assert [line[name] for name in callbacks.METRICS] == [other[name] for name in callbacks.METRICS]
    assert accumulator.latest_loss() == line["loss"]


def test_time_goes_on_over_restarts_and_pauses_do_not_count_for_the_rate():
    accumulator = MetricsAccumulator(CPU, {"seconds": 100.0, "cpu_seconds": 50.0})
    with accumulator.pause():
        time.sleep(0.2)
    accumulator.add(torch.zeros(4), 10, 0.0)
    line = accumulator.line()
    assert 100.2 <= line["seconds"] < 101
    assert 50 <= line["cpu_seconds"] < 51
    assert line["clips_per_second"] > 100


def event_at(step: int, total: int = 10, metrics=None) -> TrainEvent:
    model = torch.nn.Linear(1, 1)
    return TrainEvent(Path("run"), step, total, model, model, MetricsAccumulator(CPU, {}), metrics)


def test_opening_the_file_drops_what_will_be_written_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\nnonsense\n{"step": 4}\n{"step": 3}\n{"ste')
    metrics = MetricsFile(path)
    metrics.on_start(event_at(3))
    metrics.on_step(event_at(4))
    metrics.on_step(event_at(5, metrics={"step": 5, "loss": 0.1}))
    metrics.sync()
    metrics.on_end(event_at(5))
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 5, "loss": 0.1}\n'


def test_a_file_that_cannot_be_written_is_one_line(tmp_path):
    with pytest.raises(RunError, match="could not write the metrics"):
        MetricsFile(tmp_path / "missing" / "metrics.jsonl").on_start(event_at(0))


def show_steps(bar: ProgressBar, total: int) -> None:
    event = event_at(0, total)
    bar.on_start(event)
    for step in range(1, total + 1):
        event.step = step
        event.accumulator.add(torch.tensor([0.25, 0.0, 0.0, 1.0]), 2, 0.0)
        if step == 1:
            event.accumulator.line()
        bar.on_step(event)
    bar.on_end(event)


def test_a_terminal_gets_a_bar_with_loss_speed_and_count():
    screen = io.StringIO()
    show_steps(ProgressBar(Console(file=screen, force_terminal=True, width=120)), 5)
    shown = screen.getvalue()
    for part in ("5/5", "loss 0.2500", "clips/s", "0:00:0"):
        assert part in shown


def test_a_log_gets_a_plain_line_now_and_then_and_one_at_the_end(monkeypatch, capsys):
    show_steps(ProgressBar(), 50)
    assert [line.split()[1] for line in capsys.readouterr().err.splitlines()] == ["50/50"]
    monkeypatch.setattr(callbacks, "LINE_SECONDS", 0.0)
    show_steps(ProgressBar(), 3)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in lines] == ["1/3", "2/3", "3/3"]
    assert all("loss 0.2500" in line and "clips/s" in line and line.endswith("left") for line in lines)


class ClosedTerminal(io.StringIO):
    """A terminal whose other end is gone: every write fails."""

    failures = 0

    def write(self, text):
        self.failures += 1
        raise OSError(5, "Input/output error")


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_terminal_that_was_closed_does_not_end_the_run(monkeypatch, is_terminal):
    monkeypatch.setattr(callbacks, "LINE_SECONDS", 0.0)
    screen = ClosedTerminal()
    show_steps(ProgressBar(Console(file=screen, force_terminal=is_terminal, width=120)), 3)
    assert screen.failures > 0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (59, "59 s"),
        (185, "3 min 05 s"),
        (7620, "2 h 07 min"),
        (3 * 86400 + 4 * 3600, "3 d 04 h"),
    ],
)
def test_durations_are_for_people(seconds, text):
    assert duration(seconds) == text
