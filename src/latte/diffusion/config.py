# SPDX-License-Identifier: Apache-2.0
"""The diffusion section of a run's configuration, the process it describes, and the tables and checks that
settings of sampling share. No torch here.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from latte.checks import check, check_name, choose
from latte.diffusion.schedules import SCHEDULES
from latte.tables import Later, Table

if TYPE_CHECKING:
    from torch import Tensor

    from latte.diffusion.loss import Objective
    from latte.diffusion.process import Flow, Process
    from latte.diffusion.samplers import Sampler

MAX_STEPS = 1_000_000  # tables of a process hold that many float64 numbers each
MAX_GUIDANCE = 100.0  # above this scale a sample saturates at once: such a value is a mistake
MAX_THRESHOLD = 1.0  # the outputs may be 100 % wrong: such a value is a mistake
MIN_STEPS = 4  # of a step cache: two evaluations give the first k, and the last step is evaluated

OBJECTIVES: Table[str, "Objective"] = Table(
    {
        "paper": Later(
            "latte.diffusion.loss:PAPER", "noise and its variance, as in the paper", straight_path=False
        ),
        "v": Later("latte.diffusion.loss:V", "velocity v between noise and data", straight_path=False),
        "rectified_flow": Later(
            "latte.diffusion.loss:RECTIFIED_FLOW",
            "velocity of the straight path from noise to data",
            straight_path=True,
        ),
        "min_snr": Later(
            "latte.diffusion.loss:MIN_SNR", "noise, weighted by min(SNR, 5)", straight_path=False
        ),
        "v_min_snr": Later(
            "latte.diffusion.loss:V_MIN_SNR", "velocity v, weighted by min(SNR, 5)", straight_path=False
        ),
        "z0": Later("latte.diffusion.loss:Z0", "the clean latent z_0", straight_path=False),
    }
)
TIMES: Table[str, Callable[..., "Tensor"]] = Table(
    {
        "uniform": Later("latte.diffusion.loss:uniform_times", "every noise level equally often"),
        "logit_normal": Later(
            "latte.diffusion.loss:logit_normal_times", "middle noise levels more often (logit-normal)"
        ),
    }
)
"""Distributions of the noise level in training, as fractions of the path: 0 is clean, 1 is noise."""
SAMPLERS: Table[str, "Sampler"] = Table(
    {
        "ddpm": Later(
            "latte.diffusion.samplers:DDPM", "random steps, as in the paper (250 of them)", orders=()
        ),
        "ddim": Later(
            "latte.diffusion.samplers:DDIM", "deterministic steps; sample.eta adds noise to them", orders=()
        ),
        "flow": Later(
            "latte.diffusion.samplers:FLOW", "Euler steps of a rectified flow, no other model", orders=()
        ),
        "dpmpp": Later(
            "latte.diffusion.samplers:DPMPP", "DPM-Solver++ of several steps, for 10 to 30", orders=(2, 1, 3)
        ),
        "unipc": Later(
            "latte.diffusion.samplers:UNIPC",
            "UniPC, a predictor and a corrector, for 10 to 20",
            orders=(2, 1, 3),
        ),
        "euler": Later("latte.diffusion.samplers:EULER", "DPM-Solver++ of first order", orders=()),
        "heun": Later("latte.diffusion.samplers:HEUN", "second order, two evaluations a step", orders=()),
    }
)
LONG_VIDEO_METHODS: Table[str, Callable[..., "Tensor"]] = Table(
    {
        "freenoise": Later(
            "latte.diffusion.long_video:freenoise", "FreeNoise: all windows denoised together"
        ),
        "chained": Later("latte.diffusion.long_video:chained", "each window continues the one before it"),
    }
)


@dataclass(frozen=True)
class DiffusionConfig:
    """How data are noised and what the model learns to predict.

    InputError on construction for an impossible combination.
    """

    schedule: str = "linear"  # of noise: linear or squared_cosine; rectified_flow needs linear
    num_steps: int = 1000  # timesteps in training
    objective: str = "paper"  # what the model learns to predict, see latte config list objectives

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        schedule = choose("diffusion.schedule", self.schedule, SCHEDULES)
        check_name("diffusion.objective", self.objective, OBJECTIVES)
        num_steps = self.num_steps
        check(
            type(num_steps) is int and 1 <= num_steps <= MAX_STEPS,
            f"diffusion.num_steps must be an integer from 1 to {MAX_STEPS}, got {num_steps!r}; the "
            "paper uses 1000",
        )
        if not OBJECTIVES.fact(self.objective, "straight_path"):
            schedule.check(num_steps)
            return
        check(
            self.schedule == "linear",
            f"diffusion.schedule is {self.schedule}, but diffusion.objective={self.objective} has its own "
            "straight path; leave diffusion.schedule at linear",
        )


def build_process(config: DiffusionConfig) -> "Process | Flow":
    """Return the Process of ``config``, or the Flow for rectified flow."""
    import torch

    from latte.diffusion.process import Flow, Process

    objective = OBJECTIVES[config.objective]
    num_steps = config.num_steps
    if not objective.straight_path:
        return Process(SCHEDULES[config.schedule](num_steps), prediction=objective.prediction)
    return Flow(torch.arange(1, num_steps + 1, dtype=torch.float64) / num_steps)


def check_order(name: str, order: int | None, field: str = "order") -> None:
    """Raise InputError for an ``order`` that the sampler ``name`` does not have."""
    orders = SAMPLERS.fact(name, "orders")
    others = ", ".join(other for other in SAMPLERS if SAMPLERS.fact(other, "orders"))
    check(
        order is None or bool(orders),
        f"{field} is {order}, but sampler {name} has no choice of orders; leave it out, or use {others}",
    )
    check(
        order is None or order in orders,
        f"{field} is {order}, but sampler {name} has the orders {', '.join(map(str, sorted(orders)))}",
    )


def check_interval(interval: Sequence[float] | None, field: str = "guidance_interval") -> None:
    """Raise InputError unless ``interval`` is None or (low, high) with 0 <= low < high, both finite."""
    if interval is None:
        return
    finite = len(interval) == 2 and all(map(math.isfinite, interval))
    check(
        finite and 0 <= interval[0] < interval[1],
        f"{field} is {list(interval)}, but must be [low, high], noise levels with 0 <= low < high, such as "
        "[0.3, 5]",
    )


def check_guidance(scale: float, window: tuple[int, int] | None = None, field: str = "guidance") -> None:
    """Raise InputError for a scale outside 0..MAX_GUIDANCE and for a reversed window."""
    check(
        math.isfinite(scale) and 0 <= scale <= MAX_GUIDANCE,
        f"{field} must be between 0 and {MAX_GUIDANCE:g}, got {scale}; 1 samples without guidance, 4 is "
        "strong",
    )
    if window is not None:
        check(
            window[0] <= window[1],
            f"guidance window is {window}, but must be (first, last) guided timestep with first <= last; "
            "swap them",
        )


def check_cache(threshold: float | None, num_steps: int = MIN_STEPS, field: str = "cache") -> None:
    """Raise InputError for a threshold outside (0, MAX_THRESHOLD] and for fewer than MIN_STEPS steps; None is
    no cache.
    """
    check(
        threshold is None or (math.isfinite(threshold) and 0 < threshold <= MAX_THRESHOLD),
        f"{field} is {threshold}, but must be above 0 and at most {MAX_THRESHOLD:g}, the relative change of "
        "the model's output that is skipped; 0.05 is usual, null evaluates every step",
    )
    check(
        threshold is None or num_steps >= MIN_STEPS,
        f"{field} needs at least {MIN_STEPS} steps, because the first two and the last are always evaluated, "
        f"but there are {num_steps}; leave it out, or take more steps",
    )
