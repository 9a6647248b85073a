# SPDX-License-Identifier: Apache-2.0
"""The diffusion section of a run's configuration, and the process it describes."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from latte.checks import check, choose
from latte.diffusion.loss import OBJECTIVES
from latte.diffusion.process import Flow, Process
from latte.diffusion.schedules import SCHEDULES

MAX_STEPS = 1_000_000  # tables of a process hold that many float64 numbers each


@dataclass(frozen=True)
class DiffusionConfig:
    """How data are noised and what the model learns to predict.

    InputError on construction for an impossible combination.
    """

    schedule: str = "linear"  # key of SCHEDULES; rectified_flow has its own straight path and takes no other
    num_steps: int = 1000  # timesteps in training
    objective: str = "paper"  # key of OBJECTIVES

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        build_process(self)


def build_process(config: DiffusionConfig) -> Process | Flow:
    """Return the Process of ``config``, or the Flow for rectified flow.

    InputError for an impossible combination.
    """
    schedule = choose("diffusion.schedule", config.schedule, SCHEDULES)
    objective = choose("diffusion.objective", config.objective, OBJECTIVES)
    num_steps = config.num_steps
    check(
        type(num_steps) is int and 1 <= num_steps <= MAX_STEPS,
        f"diffusion.num_steps must be an integer from 1 to {MAX_STEPS}, got {num_steps!r}; the paper uses "
        "1000",
    )
    if not objective.straight_path:
        return Process(schedule(num_steps), prediction=objective.prediction)
    check(
        config.schedule == "linear",
        f"diffusion.schedule is {config.schedule}, but diffusion.objective={config.objective} has its own "
        "straight path; leave diffusion.schedule at linear",
    )
    return Flow(torch.arange(1, num_steps + 1, dtype=torch.float64) / num_steps)
