# SPDX-License-Identifier: Apache-2.0
"""SIGINT and SIGTERM while training: the first one is a wish to stop that the loop hears, the second ends the process at once."""

import os
import signal
import threading
from types import FrameType
from typing import Any

STOPPING = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """``with StopRequest() as stop``: ``stop.code`` is 0 until a signal arrives, then its exit code (130 or 143).

    Outside the main thread no handler can be set, and ``stop.code`` stays 0. The handlers found are put back at the end.
    """

    def __init__(self) -> None:
        self.code = 0
        self.found: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            self.found = {number: signal.signal(number, self.hear) for number in STOPPING}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.found.items():
            signal.signal(number, handler)

    def hear(self, number: int, frame: FrameType | None) -> None:
        """The handler: note the first signal; at the second leave without saving (what is committed stays committed)."""
        if self.code:
            os._exit(128 + number)
        self.code = 128 + number
