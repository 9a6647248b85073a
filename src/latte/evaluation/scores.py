# SPDX-License-Identifier: Apache-2.0
"""Banks -> figures: the protocol's metrics, how sure the first of them is, and the floor under which it says nothing.

One process, float64, rows in the plan's order.
Axes: n real rows, m fake rows, k features; t frames, h w c height width channels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from latte.checks import require
from latte.evaluation.detectors import build_detector
from latte.evaluation.frechet import bias_floor, float64_chunks, frechet_distance
from latte.evaluation.protocols import PROTOCOLS, Protocol
from latte.evaluation.statistics import (
    Extrapolation,
    Interval,
    extrapolate,
    half_sample_interval,
    inception_score,
    jedi_distance,
    kernel_distance,
    precision_recall,
    random_halves,
)

LEVEL, HALVES = 0.9, 20
ROOT = "nuclear norm of the product of the centred banks"
METHOD = f"{HALVES} half-subsamples without replacement"
Metric = Callable[[Tensor, Tensor, Protocol], float]
METRICS: dict[str, Metric] = {
    "fvd": lambda real, fake, protocol: frechet_distance(real, fake, protocol.ddof),
    "fid": lambda real, fake, protocol: frechet_distance(real, fake, protocol.ddof),
    "frechet": lambda real, fake, protocol: frechet_distance(real, fake, protocol.ddof),
    "kvd": lambda real, fake, protocol: kernel_distance(real, fake),
    "kid": lambda real, fake, protocol: kernel_distance(real, fake),
    "kernel": lambda real, fake, protocol: kernel_distance(real, fake),
    "jedi": lambda real, fake, protocol: jedi_distance(real, fake),
    "precision": lambda real, fake, protocol: precision_recall(real, fake)[0],
    "recall": lambda real, fake, protocol: precision_recall(real, fake)[1],
    "is": lambda real, fake, protocol: (
        inception_score(fake, min(protocol.splits, len(fake)), protocol.shuffle).mean
    ),
}
FRECHET = ("fvd", "fid", "frechet")
DISTANCES = (
    *FRECHET,
    "kvd",
    "kid",
    "kernel",
    "jedi",
)  # 0 for equal sides: only these have a floor and an extrapolation


@dataclass(frozen=True)
class Floor:
    """The distance to expect of a perfect model at these counts. ``halves``: one random half of the real side against the other;
    ``white``: D (D + 5) / (2 N), the law for features of unit covariance."""

    value: float
    method: str
    halves: float
    white: float


@dataclass(frozen=True)
class Scores:
    """``value`` is the headline ``metric``; ``values`` every metric of the protocol. None where the banks are too short for it."""

    metric: str
    value: float
    values: dict[str, float]
    interval: Interval | None
    infinity: Extrapolation | None
    floor: Floor | None
    num_real: int
    num_fake: int

    @property
    def is_noise(self) -> bool:
        """A distance below twice its floor says nothing about the model."""
        return self.floor is not None and self.value < 2 * self.floor.value


def score(real: Tensor, fake: Tensor, protocol: Protocol) -> Scores:
    """Every metric of ``protocol`` on banks (n k) and (m k)."""
    first = protocol.metrics[0]
    values = {name: METRICS[name](real, fake, protocol) for name in protocol.metrics}
    shorter = min(len(real), len(fake))

    def distance(a: Tensor, b: Tensor) -> float:
        return METRICS[first](a, b, protocol)

    interval = half_sample_interval(distance, real, fake, LEVEL, HALVES) if shorter >= 4 else None
    is_distance = first in DISTANCES
    infinity = extrapolate(distance, real, fake) if is_distance and shorter >= 16 else None
    floor = find_floor(distance, first, real, len(fake)) if is_distance and len(real) >= 8 else None
    return Scores(first, values[first], values, interval, infinity, floor, len(real), len(fake))


def find_floor(
    distance: Callable[[Tensor, Tensor], float], metric: str, real: Tensor, num_fake: int
) -> Floor:
    """The floor of a Frechet distance by the spectrum of the real bank where it has 1.3 rows per feature or more; elsewhere, and for
    the kernel distances, what one half of the real side scores against the other, halved because a half has twice the bias."""
    rows, width = real.shape
    halves = distance(*random_halves(real, 0, "floor"))
    harmonic = 2 / (1 / rows + 1 / num_fake)
    white = width * (width + 5) / (2 * harmonic)
    if metric in FRECHET and rows >= 1.3 * width:
        return Floor(bias_floor(real, rows, num_fake), "spectrum of the real side", halves, white)
    return Floor(halves / 2, "half of the real side against the other, halved", halves, white)


def distances_from_real(real: Tensor, fake: Tensor) -> Tensor:
    """(n k), (m k) -> (m,) float64: how far each fake row lies from the real mean, in standard deviations of the real side.

    The root mean square over the whitened features, so that a row of the real distribution lies at about 1. The
    covariance is shrunk towards a multiple of the identity (a tenth), so that it can be inverted when n < k.
    """
    rows = torch.cat(list(float64_chunks("real", real)))
    mean = rows.mean(0)
    centred = rows - mean
    covariance = centred.T @ centred / max(len(rows) - 1, 1)
    level = covariance.trace() / len(mean)
    if level == 0:
        return torch.zeros(len(fake), dtype=torch.float64)
    values, vectors = torch.linalg.eigh(
        0.9 * covariance + 0.1 * level * torch.eye(len(mean), dtype=torch.float64)
    )
    return torch.cat(
        [
            (((chunk - mean) @ vectors).square() / values).mean(1).sqrt()
            for chunk in float64_chunks("fake", fake)
        ]
    )


def builtin_score(real: Sequence[Tensor | np.ndarray], fake: Sequence[Tensor | np.ndarray]) -> float:
    """Frechet distance of the built-in detector's features of two lists of clips, each uint8 (t h w c); less is better.

    For comparing models with one another, on the CPU, no download. Its bias falls with the number of clips: only scores of equally many
    clips, of equally many frames, compare. InputError unless both lists hold two or more clips, all of them with the same number of frames.
    """
    shorter = min(len(real), len(fake))
    require(
        shorter >= 2, "the shorter list's length", shorter, "a covariance needs two clips", "generate more"
    )
    lengths = sorted({len(clip) for clip in (*real, *fake)})
    require(
        len(lengths) == 1,
        "the clips' numbers of frames",
        lengths,
        "both sides are measured alike",
        "cut all clips to one length",
    )
    detector = build_detector(PROTOCOLS["builtin"].detector)
    banks = {
        name: torch.cat([detector(torch.as_tensor(clip)[None]) for clip in side])
        for name, side in (("real", real), ("fake", fake))
    }
    return frechet_distance(banks["real"], banks["fake"], PROTOCOLS["builtin"].ddof)
