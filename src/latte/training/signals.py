# SPDX-License-Identifier: Apache-2.0
"""Signals that stop a training run: the first one asks the loop to save and stop, the second one ends the
process at once.
"""

import os
import signal
import threading
from types import FrameType
from typing import Any, Self

# SIGHUP: the terminal was closed. SIGUSR1: SLURM's early warning before a time limit. Windows has neither.
STOP_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)
)


class StopRequest:
    """``with StopRequest() as stop``: ``stop.code`` is 0 until a signal arrives, then 128 + its number.

    That is the exit code: 130 (SIGINT), 143 (SIGTERM), 129 (SIGHUP), 138 (SIGUSR1). SIGHUP stays ignored
    where nohup ignores it. The previous handlers are restored on exit. Outside the main thread, where
    Python allows no handlers, ``stop.code`` stays 0.
    """

    def __init__(self) -> None:
        self.code = 0
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                if not ignored_by_nohup(number):
                    self.previous[number] = signal.signal(number, self.handle)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Record the first signal; exit at the second one without saving (committed checkpoints stay)."""
        if self.code:
            os._exit(128 + number)
        self.code = 128 + number


def ignored_by_nohup(number: int) -> bool:
    """Is ``number`` SIGHUP, ignored by the command that started this process, so that closing the terminal
    does not stop it?
    """
    return number == getattr(signal, "SIGHUP", None) and signal.getsignal(number) is signal.SIG_IGN
