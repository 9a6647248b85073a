# SPDX-License-Identifier: Apache-2.0
"""Features to scores: the protocol's metrics, the uncertainty of the first one, and the floor below which it
says nothing.

The uncertainty comes from halves and subsets drawn without replacement. The bootstrap is not offered: its
duplicates alone doubled an FVD of 105 (202 as the bootstrap's mean). One process, float64, rows in the plan's
order.
Axes: n real rows, m fake rows, k features; t frames, h w c height width channels.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor

from latte.checks import InputError, check
from latte.evaluation.detectors import build_detector
from latte.evaluation.frechet import bias_floor, float64_chunks, frechet_distance
from latte.evaluation.metrics import METRICS, mean_and_std
from latte.evaluation.protocols import PROTOCOLS, Protocol
from latte.runtime import generator

LEVEL = 0.9  # confidence level of the interval
HALVES = 20  # half-subsamples for the interval
METHOD = f"{HALVES} half-subsamples without replacement"
MIN_INTERVAL, MIN_FLOOR, MIN_EXTRAPOLATION = 4, 8, 16  # rows of the shorter side
Distance = Callable[[Tensor, Tensor], float]  # of real (n k) and fake (m k)


@dataclass(frozen=True)
class Interval:
    """A confidence interval around ``value``."""

    value: float
    low: float
    high: float
    std: float  # estimated standard error of ``value``
    level: float
    halves: int


@dataclass(frozen=True)
class Extrapolation:
    """The value for infinitely many rows: where the line through ``points`` meets 1 / fraction = 0."""

    value: float
    slope: float
    points: tuple[tuple[float, float], ...]  # (fraction of the rows, distance)


@dataclass(frozen=True)
class Floor:
    """The distance to expect of a perfect model with this number of rows."""

    value: float
    method: str
    halves: float  # one random half of the real side against the other
    white: float  # D (D + 5) / (2 N), the law for features of unit covariance


@dataclass(frozen=True)
class Scores:
    """All results of one evaluation. Interval, extrapolation and floor are None if there are too few rows."""

    metric: str  # the headline: the protocol's first metric
    value: float
    values: dict[str, float]  # every metric of the protocol
    interval: Interval | None
    infinity: Extrapolation | None
    floor: Floor | None
    num_real: int | None  # None: scored from statistics
    num_fake: int | None
    warnings: tuple[str, ...] = ()

    @property
    def is_noise(self) -> bool:
        """Return whether the value is below twice its floor, and so says nothing about the model."""
        return self.floor is not None and self.value < 2 * self.floor.value


def score(real: Tensor, fake: Tensor, protocol: Protocol) -> Scores:
    """Compute every metric of ``protocol`` on features (n k) and (m k); InputError for a value that is not
    finite.
    """
    first = protocol.metrics[0]
    values = {name: METRICS[name].compute(real, fake, protocol) for name in protocol.metrics}
    refuse_nonfinite(values)
    shorter = min(len(real), len(fake))

    def distance(a: Tensor, b: Tensor) -> float:
        return METRICS[first].compute(a, b, protocol)

    is_distance = METRICS[first].is_distance
    interval = infinity = floor = None
    if shorter >= MIN_INTERVAL:
        interval = half_sample_interval(distance, real, fake, LEVEL, HALVES)
    if is_distance and shorter >= MIN_EXTRAPOLATION:
        infinity = extrapolate(distance, real, fake)
    if is_distance and len(real) >= MIN_FLOOR:
        floor = find_floor(distance, first, real, len(fake))
    warnings = few_rows(is_distance, len(real), len(fake), interval, floor)
    return Scores(first, values[first], values, interval, infinity, floor, len(real), len(fake), warnings)


def refuse_nonfinite(values: dict[str, float]) -> None:
    """InputError naming the metric whose value is NaN or Inf."""
    for name, value in values.items():
        check(
            math.isfinite(value),
            f"{name} is {value}: the features are too large for float64; check the detector",
        )


def few_rows(
    is_distance: bool, num_real: int, num_fake: int, interval: Interval | None, floor: Floor | None
) -> tuple[str, ...]:
    """Return a warning if the rows do not suffice to say how much the score means."""
    absent = []
    if interval is None:
        absent.append("an interval")
    if is_distance and floor is None:
        absent.append("a floor")
    if not absent:
        return ()
    rows = f"{num_real} real and {num_fake} fake rows"
    needed = MIN_FLOOR if is_distance else MIN_INTERVAL
    return (
        f"{rows} are too few for {' or '.join(absent)}: the value is mostly sampling noise; "
        f"use at least {needed} clips per side, or better the protocol's number",
    )


def find_floor(distance: Distance, metric: str, real: Tensor, num_fake: int) -> Floor:
    """Return the floor of ``metric``.

    A Frechet distance with at least 1.3 real rows per feature: from the spectrum of the real features. Else,
    and for kernel distances: the score of one real half against the other, halved because a half has twice
    the bias.
    """
    rows, width = real.shape
    halves = distance(*random_halves(real, 0, "floor"))
    harmonic = 2 / (1 / rows + 1 / num_fake)
    white = width * (width + 5) / (2 * harmonic)
    if METRICS[metric].is_frechet and rows >= 1.3 * width:
        return Floor(bias_floor(real, rows, num_fake), "spectrum of the real side", halves, white)
    return Floor(halves / 2, "half of the real side against the other, halved", halves, white)


def student_quantile(probability: float, freedom: int) -> float:
    """Return the quantile of Student's t by its expansion about the normal one (error below 1 % from 4
    degrees at 0.95).
    """
    z = NormalDist().inv_cdf(probability)
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def random_halves(features: Tensor, *key: int | str) -> tuple[Tensor, Tensor]:
    """Return two disjoint random halves of ``features``, in their order; of an odd number of rows one is left
    out.
    """
    order = torch.randperm(len(features), generator=generator(*key))
    half = len(features) // 2
    return features[order[:half].sort().values], features[order[-half:].sort().values]


def half_sample_interval(
    distance: Distance, real: Tensor, fake: Tensor, level: float = 0.9, halves: int = 20, seed: int = 0
) -> Interval:
    """Estimate how far ``distance`` at these sizes varies between samples, from random halves drawn without
    replacement.

    Both sides are halved ``halves`` / 2 times, giving pairs of values u, v. A half of N rows varies about the
    whole with variance s^2 / (N/2) (1 - (N/2)/N) = s^2 / N, so ((u - v) / 2)^2 is the squared standard error
    of a statistic that is linear in the data (the delete-half jackknife, Shao and Wu 1989). Quadratic
    terms enter twice, and the variance of (u + v) / 2 is exactly that surplus, so it is subtracted. The
    interval is around the value at this N, bias included; ``extrapolate`` estimates the value for infinite N.
    """
    check(0 < level < 1, f"level must be in (0, 1), got {level}; 0.9 and 0.95 are usual")
    check(halves >= 8 and halves % 2 == 0, f"halves must be an even number of at least 8, got {halves}")
    shorter = min(len(real), len(fake))
    check(shorter >= 4, f"an interval needs at least 4 rows per side, got {shorter}; evaluate more clips")
    differences = []
    means = []
    for i in range(halves // 2):
        reals = random_halves(real, seed, "half", "real", i)
        fakes = random_halves(fake, seed, "half", "fake", i)
        u, v = distance(reals[0], fakes[0]), distance(reals[1], fakes[1])
        differences.append((u - v) / 2)
        means.append((u + v) / 2)
    linear = math.fsum(d * d for d in differences) / len(differences)
    surplus = mean_and_std(means).std ** 2 * len(means) / (len(means) - 1)
    std = math.sqrt(max(linear - surplus, linear / 2))
    value = distance(real, fake)
    reach = student_quantile((1 + level) / 2, halves // 2) * std
    return Interval(value, value - reach, value + reach, std, level, halves)


def extrapolate(
    distance: Distance, real: Tensor, fake: Tensor, sizes: int = 15, seed: int = 0
) -> Extrapolation:
    """Return FVD-infinity or FID-infinity (Chong and Forsyth 2020): the intercept of a straight line in 1 /
    size.

    ``distance`` is computed at ``sizes`` sizes between a quarter and all of the rows, drawn without
    replacement. Both sides shrink together, so that the bias of both is on the line.
    """
    check(sizes >= 3, f"sizes must be at least 3 for a line with an error, got {sizes}")
    shorter = min(len(real), len(fake))
    check(
        shorter >= 16, f"an extrapolation needs at least 16 rows per side, got {shorter}; evaluate more clips"
    )

    def subset(side: str, features: Tensor, fraction: float) -> Tensor:
        order = torch.randperm(len(features), generator=generator(seed, "size", side, f"{fraction:.6f}"))
        return features[order[: round(fraction * len(features))].sort().values]

    fractions = [0.25 + 0.75 * i / (sizes - 1) for i in range(sizes)]
    values = [distance(subset("real", real, part), subset("fake", fake, part)) for part in fractions]
    x = torch.tensor([1 / fraction for fraction in fractions], dtype=torch.float64)
    y = torch.tensor(values, dtype=torch.float64)
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())
    points = tuple(zip(fractions, values, strict=True))
    return Extrapolation(float(y.mean()) - slope * float(x.mean()), slope, points)


def distances_from_real(real: Tensor, fake: Tensor) -> Tensor:
    """Return (m,) float64: the distance of each fake row (m k) from the mean of ``real`` (n k), in standard
    deviations.

    The root mean square over the whitened features, so that a row of the real distribution is at about 1. The
    covariance is shrunk towards a multiple of the identity (by a tenth), so that it can be inverted when n <
    k.
    """
    rows = torch.cat(list(float64_chunks("real", real)))
    mean = rows.mean(0)
    centred = rows - mean
    covariance = centred.T @ centred / max(len(rows) - 1, 1)
    level = covariance.trace() / len(mean)
    if level == 0:
        return torch.zeros(len(fake), dtype=torch.float64)
    identity = torch.eye(len(mean), dtype=torch.float64)
    values, vectors = torch.linalg.eigh(0.9 * covariance + 0.1 * level * identity)
    whitened = (((chunk - mean) @ vectors).square() / values for chunk in float64_chunks("fake", fake))
    return torch.cat([squares.mean(1).sqrt() for squares in whitened])


def builtin_score(real: Sequence[Tensor | np.ndarray], fake: Sequence[Tensor | np.ndarray]) -> float:
    """Return the Frechet distance of the built-in detector's features of two lists of clips, each uint8 (t h
    w c).

    For comparing models with one another, on the CPU, without a download. Its bias depends on the number of
    clips: only scores of equally many clips of equally many frames compare. InputError unless both lists hold
    two or more clips, all of one length.
    """
    shorter = min(len(real), len(fake))
    if shorter < 2:
        raise InputError(
            f"a score needs two clips per side, got {len(real)} real and {len(fake)} fake; generate more"
        )
    lengths = sorted({len(clip) for clip in (*real, *fake)})
    check(
        len(lengths) == 1,
        f"all clips must have the same number of frames, got {lengths}; cut them to one length",
    )
    protocol = PROTOCOLS["builtin"]
    detector = build_detector(protocol.detector)
    real_rows, fake_rows = (
        torch.cat([detector(torch.as_tensor(clip)[None]) for clip in side]) for side in (real, fake)
    )
    return frechet_distance(real_rows, fake_rows, protocol.ddof)
