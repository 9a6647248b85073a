# SPDX-License-Identifier: Apache-2.0
"""Noise schedules (betas), and which of their timesteps a sampler visits: plain numbers, no model.

To add a schedule: a function num_steps -> betas, and one entry in SCHEDULES.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from latte.checks import InputError, check

if TYPE_CHECKING:  # the configuration reads this module
    from torch import Tensor


def any_number(num_steps: int) -> None:
    """Accept every number of timesteps."""


def check_linear(num_steps: int) -> None:
    """Raise InputError for a number of timesteps whose last beta of ``linear`` would reach 1."""
    check(
        num_steps > 20,
        f"diffusion.num_steps is {num_steps}, but the linear schedule ends at beta = 20 / num_steps, which "
        "must stay below 1; use 21 or more, or diffusion.schedule=squared_cosine",
    )


def linear(num_steps: int) -> "Tensor":
    """Return betas (num_steps,) float64 from 1e-4 to 0.02, both ends scaled by 1000 / num_steps.

    DDPM's schedule, and Latte's (Sec. 4.1).
    """
    import torch

    scale = 1000 / num_steps
    return torch.linspace(scale * 1e-4, scale * 0.02, num_steps, dtype=torch.float64)


def squared_cosine(num_steps: int) -> "Tensor":
    """Return betas (num_steps,) float64, at most 0.999, of a squared cosine (Nichol & Dhariwal, eq. 17)."""
    import torch

    u = torch.linspace(0, 1, num_steps + 1, dtype=torch.float64)
    alphas_cumprod = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - alphas_cumprod[1:] / alphas_cumprod[:-1]).clamp(max=0.999)


@dataclass(frozen=True)
class Schedule:
    """A schedule, called as ``schedule(num_steps)``."""

    betas: Callable[[int], "Tensor"]
    """num_steps -> betas (num_steps,) float64."""
    check: Callable[[int], None] = any_number
    """Raises InputError for a number of timesteps that it does not have."""

    def __call__(self, num_steps: int) -> "Tensor":
        """Return betas (num_steps,) float64; InputError for an impossible number."""
        self.check(num_steps)
        return self.betas(num_steps)


SCHEDULES = {"linear": Schedule(linear, check_linear), "squared_cosine": Schedule(squared_cosine)}


def spaced_timesteps(num_steps: int, sections: str) -> list[int]:
    """Return the timesteps of 0..num_steps-1 that a respacing keeps, ascending, as in the released code.

    "250" or "10,15,20": equal sections (the first ones take the remainder), each with its count at a
    fractional stride, rounded half to even. "ddim50": the smallest integer stride that gives 50. InputError
    for any other string, and for more timesteps than there are.
    """
    integer_stride = sections.startswith("ddim")
    digits = sections.removeprefix("ddim").split(",")
    valid = all(part.isdecimal() and len(part) < 10 and int(part) > 0 for part in digits)
    check(
        valid and not (integer_stride and len(digits) > 1),
        f"steps is {sections!r}, but a respacing must be a positive integer ('250'), comma-separated "
        "integers, one per section ('10,15,20'), or an integer stride ('ddim50')",
    )
    counts = [int(part) for part in digits]
    if integer_stride:
        for stride in range(1, num_steps + 1):
            if len(range(0, num_steps, stride)) == counts[0]:
                return list(range(0, num_steps, stride))
        raise InputError(
            f"steps is {sections!r}, but no integer stride over {num_steps} timesteps gives {counts[0]}; use "
            f"'{counts[0]}'"
        )
    kept: list[int] = []
    start = 0
    for index, count in enumerate(counts):
        size = num_steps // len(counts) + (index < num_steps % len(counts))
        check(
            count <= size,
            f"steps is {sections!r}, but section {index + 1} of {len(counts)} has only {size} of the "
            f"{num_steps} timesteps the model was trained with; use at most {size} there",
        )
        kept += [start + offset for offset in _fractional_stride(size, count)]
        start += size
    return kept


def _fractional_stride(size: int, count: int) -> list[int]:
    """Return ``count`` of 0..size-1, both ends included.

    Positions are summed as floats, as in the released code.
    """
    stride = (size - 1) / max(count - 1, 1)
    offsets = []
    position = 0.0
    for _ in range(count):
        offsets.append(round(position))
        position += stride
    return offsets


def trailing_timesteps(num_steps: int, count: str) -> list[int]:
    """Return ``count`` evenly spaced timesteps, ascending, that end with the last.

    "4" of 1000 -> 249, 499, 749, 999.
    """
    check(
        count.isdecimal() and len(count) < 10 and 1 <= int(count) <= num_steps,
        f"steps is {count!r}, but this sampler needs an integer from 1 to {num_steps}; only ddpm and ddim "
        "take respacing strings such as 'ddim50'",
    )
    return [round(num_steps * k / int(count)) - 1 for k in range(1, int(count) + 1)]
