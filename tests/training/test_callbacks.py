# SPDX-License-Identifier: Apache-2.0
"""The curve, its file, and what is shown of it."""

import io
import json
import time

import pytest
import torch
from rich.console import Console

from latte.checks import RunError
from latte.training import callbacks as monitor
from latte.training.callbacks import MetricsAccumulator, MetricsFile, Progress, duration

CPU = torch.device("cpu")


def test_lines_are_means_and_a_checkpoint_between_them_changes_nothing():
    numbers = torch.arange(24.0).view(6, 4) / 7
    tally, part = MetricsAccumulator(CPU, {}), MetricsAccumulator(CPU, {})
    for row in numbers:
        tally.add(row, 3, 0.0)
    for row in numbers[:2]:
        part.add(row, 3, 0.0)
    assert part.latest_loss() == pytest.approx(numbers[:2, 0].mean().item())
    rest = MetricsAccumulator(CPU, json.loads(json.dumps(part.state())))
    for row in numbers[2:]:
        rest.add(row, 3, 0.0)
    line, other = tally.line(), rest.line()
    assert line["loss"] == pytest.approx(numbers[:, 0].mean().item())
    assert line["grad_norm"] == pytest.approx(numbers[:, 3].mean().item())
    assert [line[name] for name in monitor.NUMBERS] == [other[name] for name in monitor.NUMBERS]
    assert tally.latest_loss() == line["loss"]


def test_time_goes_on_over_restarts_and_pauses_do_not_count_for_the_rate():
    tally = MetricsAccumulator(CPU, {"seconds": 100.0, "cpu_seconds": 50.0})
    with tally.pause():
        time.sleep(0.2)
    tally.add(torch.zeros(4), 10, 0.0)
    line = tally.line()
    assert 100.2 <= line["seconds"] < 101
    assert 50 <= line["cpu_seconds"] < 51
    assert line["clips_per_second"] > 100


def test_opening_the_file_drops_what_will_be_written_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\nnonsense\n{"step": 4}\n{"step": 3}\n{"ste')
    with MetricsFile(path, 3) as metrics:
        metrics.write({"step": 5, "loss": 0.1})
        metrics.sync()
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 5, "loss": 0.1}\n'
    with MetricsFile(path, 3, active=False) as metrics:
        metrics.write({"step": 6})
    assert len(path.read_text().splitlines()) == 4


def test_a_file_that_cannot_be_written_is_one_line(tmp_path):
    with (
        pytest.raises(RunError, match="could not write the metrics"),
        MetricsFile(tmp_path / "missing" / "metrics.jsonl", 0),
    ):
        pass


def steps(progress: Progress, total: int) -> None:
    tally = MetricsAccumulator(CPU, {})
    with progress:
        for step in range(1, total + 1):
            tally.add(torch.tensor([0.25, 0.0, 0.0, 1.0]), 2, 0.0)
            if step == 1:
                tally.line()
            progress.update(step, tally)


def test_a_terminal_gets_a_bar_with_loss_rate_and_count():
    screen = io.StringIO()
    steps(Progress(0, 5, console=Console(file=screen, force_terminal=True, width=120)), 5)
    shown = screen.getvalue()
    for part in ("5/5", "loss 0.2500", "clips/s", "0:00:0"):
        assert part in shown


def test_a_log_gets_a_plain_line_now_and_then_and_one_at_the_end(monkeypatch, capsys):
    steps(Progress(0, 50), 50)
    assert [line.split()[1] for line in capsys.readouterr().err.splitlines()] == ["50/50"]
    monkeypatch.setattr(monitor, "LINE_SECONDS", 0.0)
    steps(Progress(0, 3), 3)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in lines] == ["1/3", "2/3", "3/3"]
    assert all("loss 0.2500" in line and "clips/s" in line and line.endswith("left") for line in lines)
    steps(Progress(0, 3, active=False), 3)
    assert capsys.readouterr().err == ""


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
