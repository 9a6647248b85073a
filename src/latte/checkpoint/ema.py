# SPDX-License-Identifier: Apache-2.0
"""EMA weights of a chosen width: stored by training, or combined afterwards from those that are stored.

Karras et al. 2024 (EDM2, arXiv 2312.02696), Sec. 3 and App. C: an average after step t that weighs step s by
s^g. Its width is the standard deviation of that profile relative to t, so it means the same for short and
long runs, and the profile of any width is nearly a sum of stored ones.
"""

import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from torch import Tensor

from latte.checkpoint.run import list_checkpoints, load_checkpoint, read_manifest, step_of
from latte.checkpoint.split import groups_in
from latte.checks import InputError

GROUP = re.compile(r"ema-(0\.\d+)")
LARGEST_WIDTH = 0.28  # all steps equal, g = 0, have 1 / sqrt(12) = 0.2887
LARGEST_ERROR = 0.05  # of a combined profile, relative to its norm
BUFFERS = ("time_gate",)  # tensors of a model that are no weights

Snapshot = tuple[int, float]
"""(step, width) of stored EMA weights."""


@lru_cache(maxsize=256)
def exponent(width: float) -> float:
    """Return g > 0 of ``width`` in (0, 0.2887): (g + 1) / ((g + 2)^2 (g + 3)) = width^2."""
    inverse = width**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


def decay_at(step: int, width: float) -> float:
    """Return what step 1, 2, ... leaves of the average before it: (1 - 1 / step)^(g + 1)."""
    return (1 - 1 / step) ** (exponent(width) + 1)


def group_name(width: float) -> str:
    """Return the name of the group of tensors in a checkpoint."""
    return f"ema-{width}"


def overlaps(some: Sequence[Snapshot], others: Sequence[Snapshot]) -> np.ndarray:
    """Return the inner products (i j) float64 of the profiles of snapshots i and j (EDM2, App. C)."""
    steps, widths = np.array(some, dtype=np.float64).T[:, :, None]  # (i 1)
    other_steps, other_widths = np.array(others, dtype=np.float64).T[:, None]  # (1 j)
    g = np.vectorize(exponent)(widths)
    other_g = np.vectorize(exponent)(other_widths)
    power = np.where(steps < other_steps, other_g, -g)
    ratio = (steps / other_steps) ** power
    return (g + 1) * (other_g + 1) * ratio / ((g + other_g + 1) * np.maximum(steps, other_steps))


def combination(stored: Sequence[Snapshot], target: Snapshot) -> tuple[np.ndarray, float]:
    """Return the factors (i) of the stored profiles whose sum is nearest to the target's, and its error.

    The error is the norm of the difference relative to that of the target.
    """
    products = overlaps(stored, [target])[:, 0]  # (i)
    factors = np.linalg.lstsq(overlaps(stored, stored), products, rcond=1e-12)[0]  # (i)
    own = overlaps([target], [target])[0, 0]
    squared = own - 2 * factors @ products + factors @ overlaps(stored, stored) @ factors
    return factors, float(np.sqrt(max(squared, 0.0) / own))


def stored_widths(checkpoint: Path) -> list[float]:
    """Return the widths whose EMA weights ``checkpoint`` holds, ascending."""
    found = [GROUP.fullmatch(group) for group in groups_in(read_manifest(checkpoint))]
    return sorted(float(match[1]) for match in found if match)


def read_ema(checkpoint: Path, width: float) -> tuple[dict[str, Tensor], float]:
    """Return the EMA weights of ``width`` at the step of ``checkpoint``, and the error of their profile.

    The error is 0 for a stored width. Another is combined from all snapshots of the run up to that step;
    InputError when they cannot make it, and for a run that stores none.
    """
    widths = stored_widths(checkpoint)
    if not widths:
        raise InputError(
            f"--ema is {width:g}, but {checkpoint} holds no EMA weights by width; train with "
            "train.ema_widths=0.05,0.1, or leave --ema out"
        )
    if width in widths:
        name = group_name(width)
        return load_checkpoint(checkpoint, only={name}).tensors[name], 0.0
    known = ", ".join(map(str, widths))
    if not 0 < width <= LARGEST_WIDTH:
        raise InputError(
            f"--ema is {width:g}, but a width must be in (0, {LARGEST_WIDTH}]; stored are {known}"
        )
    last = step_of(checkpoint)
    places = {step_of(path): path for path in list_checkpoints(checkpoint.parents[1])}
    places = {step: path for step, path in places.items() if step <= last}
    stored = [(step, other) for step, path in places.items() for other in stored_widths(path)]
    factors, error = combination(stored, (last, width))
    if error > LARGEST_ERROR:
        raise InputError(
            f"--ema is {width:g}, which {len(stored)} stored EMA weights (widths {known}) make only to "
            f"{error:.0%} of its profile; give one of {known} or a width between, or keep more checkpoints "
            "(train.keep_last)"
        )
    return combined(places, stored, factors), error


def combined(places: dict[int, Path], stored: Sequence[Snapshot], factors: np.ndarray) -> dict[str, Tensor]:
    """Return the sum of the stored weights times their factors; buffers are those of the last one."""
    total: dict[str, Tensor] = {}
    for (step, width), factor in zip(stored, factors.tolist(), strict=True):
        name = group_name(width)
        for key, tensor in load_checkpoint(places[step], only={name}).tensors[name].items():
            total[key] = tensor if key in BUFFERS else total.get(key, 0) + factor * tensor.double()
    return {key: tensor if key in BUFFERS else tensor.float() for key, tensor in total.items()}
