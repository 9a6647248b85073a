# SPDX-License-Identifier: Apache-2.0
"""The callback of a pipeline's call: which step is done, at which timestep, and how the clips look so far."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from latte.checks import check
from latte.inference.preview import preview_of

Callback = Callable[[Any, int, int, dict[str, Any]], Any]
"""(pipeline, step, timestep, {} or {"preview": uint8 (b f H W 3)}) -> ignored."""


@contextmanager
def step_options(pipe: Any, callback: Callback | None, preview: bool) -> Iterator[dict[str, Any]]:
    """Provide the options of ``generate`` by which ``callback`` is called after each step, {} without one.

    It gets the timestep that the model last computed and, with ``preview``, the z_0 that the last output
    implies, as the linear preview of the codec shows it. InputError for a preview without a callback.
    """
    check(
        callback is not None or not preview,
        "preview=True, but there is no callback_on_step_end to show it; pass one, or leave preview out",
    )
    if callback is None:
        yield {}
        return
    timesteps: list[int] = []
    estimates: list[Tensor] = []
    show = preview_of(pipe.codec) if preview else None
    handle = pipe.model.register_forward_pre_hook(
        lambda _, inputs: timesteps.append(int(inputs[1].flatten()[0]))
    )

    def progress(done: int, of: int) -> None:
        shown = {"preview": show(estimates[-1])} if show else {}
        callback(pipe, done - 1, timesteps[-1], shown)
        timesteps.clear()
        estimates.clear()

    options: dict[str, Any] = {"progress": progress}
    if show:
        options["estimates"] = estimates.append
    try:
        yield options
    finally:
        handle.remove()
