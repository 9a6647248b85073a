# SPDX-License-Identifier: Apache-2.0
"""The progress line of long commands: what is done, how fast, and the time left."""

import io
import sys

import pytest

from latte.cli import options


class Terminal(io.StringIO):
    """A stream that is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch):
    """The seconds, which the test sets."""
    now = [100.0]
    monkeypatch.setattr(options.time, "monotonic", lambda: now[0])
    return now


def test_elsewhere_than_on_a_terminal_a_line_comes_at_every_quarter_and_now_and_then(clock, capsys):
    progress = options.progress_line("encode", 0, 1)
    for done in range(1, 101):
        clock[0] = 100 + 2 * done
        progress(done, 100)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "encode 15%  0.5 clips/s  2 min 50 s left", "after 30 s"
    assert lines[1] == "encode 25%  0.5 clips/s  2 min 30 s left", "a quarter"
    assert lines[-1] == "encode 100%  0.5 clips/s  0 s left"
    assert len(lines) < 15


def test_parts_count_together_and_speed_is_that_of_the_clips(clock, capsys):
    progress = options.progress_line("sample", 1, 4, count=8)
    clock[0] = 110.0
    progress(10, 20)
    assert capsys.readouterr().err == ""
    clock[0] = 120.0
    progress(20, 20)
    assert capsys.readouterr().err == "sample 50%  0.4 clips/s  40 s left\n", "two parts of 20 s are left"


def test_a_terminal_has_one_line(clock, monkeypatch):
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    progress = options.progress_line("scan", 0, 1, "files")
    clock[0] = 101.0
    for done in (1, 2):
        progress(done, 2)
    shown = screen.getvalue()
    assert shown.count("\r") == 2
    assert shown.endswith("\n")
    assert "scan 50%  1 files/s  1 s left" in shown
