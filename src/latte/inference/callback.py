# SPDX-License-Identifier: Apache-2.0
"""The callback of a pipeline's call: which step is done, and at which timestep."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Callback = Callable[[Any, int, int, dict[str, Any]], Any]
"""(pipeline, step, timestep, {}) -> ignored."""


@contextmanager
def step_progress(pipe: Any, callback: Callback | None) -> Iterator[Callable[[int, int], None] | None]:
    """Provide a progress function that calls ``callback`` with the timestep that the model of ``pipe`` last
    computed, or None without one.
    """
    if callback is None:
        yield None
        return
    latest: list[int] = []
    handle = pipe.model.register_forward_pre_hook(
        lambda _, inputs: latest.append(int(inputs[1].flatten()[0]))
    )

    def progress(done: int, of: int) -> None:
        callback(pipe, done - 1, latest[-1], {})
        latest.clear()

    try:
        yield progress
    finally:
        handle.remove()
