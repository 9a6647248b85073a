# SPDX-License-Identifier: Apache-2.0
"""The metrics of feature tables: all in float64, all pure functions of the features. A new metric is one
entry of ``METRICS``.

Axes: n real rows, m fake rows, k features or classes.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from random import Random
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from latte.checks import check
from latte.evaluation.frechet import check_features, check_pair, float64_chunks, frechet_distance

if TYPE_CHECKING:
    from latte.evaluation.protocols import Protocol


@dataclass(frozen=True)
class Score:
    """A mean over splits or subsets, with the population standard deviation between them, as is usually
    reported.
    """

    mean: float
    std: float
    parts: tuple[float, ...]


def mean_and_std(parts: list[float]) -> Score:
    """Return mean and standard deviation of ``parts``."""
    mean = math.fsum(parts) / len(parts)
    return Score(mean, math.sqrt(math.fsum((part - mean) ** 2 for part in parts) / len(parts)), tuple(parts))


def numpy_permutation(seed: int, count: int) -> list[int]:
    """Return the order in which ``numpy.random.RandomState(seed).shuffle`` puts ``count`` rows: row i is row
    p[i] of the input.

    StyleGAN-V shuffles the probabilities of its video IS this way (seed 42). Python's generator is the same
    Mersenne Twister; only its seeding differs, so the state is filled by NumPy's rule.
    """
    words = [seed & 0xFFFFFFFF]
    for i in range(1, 624):
        words.append((1812433253 * (words[-1] ^ (words[-1] >> 30)) + i) & 0xFFFFFFFF)
    twister = Random()
    twister.setstate((3, (*words, 624), None))
    order = list(range(count))
    for i in range(count - 1, 0, -1):
        mask = (1 << i.bit_length()) - 1
        while (j := twister.getrandbits(32) & mask) > i:
            pass
        order[i], order[j] = order[j], order[i]
    return order


def inception_score(logits: Tensor, splits: int = 10, shuffle: int | None = None) -> Score:
    """Return exp(mean KL(p(y | x) | p(y))) of logits (n k) over ``splits`` consecutive parts, bounds floor(i
    n / splits) (Salimans 2016).

    ``shuffle`` None keeps the plan's order, as the official frame IS does; 42 is the order of StyleGAN-V's
    video IS. It is computed from logits, so that a probability of zero gives log p p = 0 instead of NaN.
    """
    check_features("logit", logits, rows=1)
    check(
        1 <= splits <= len(logits),
        f"splits must be between 1 and the {len(logits)} rows, got {splits}; use fewer splits or more clips",
    )
    log_p = torch.cat(list(float64_chunks("logit", logits))).log_softmax(1)
    if shuffle is not None:
        log_p = log_p[numpy_permutation(shuffle, len(log_p))]
    bounds = [i * len(log_p) // splits for i in range(splits + 1)]
    values = []
    for start, stop in pairwise(bounds):
        part = log_p[start:stop]
        marginal = part.logsumexp(0) - math.log(len(part))
        values.append(math.exp(float((part.exp() * (part - marginal)).sum(1).mean())))
    return mean_and_std(values)


def polynomial_mmd(
    real: Tensor,
    fake: Tensor,
    degree: int = 3,
    gamma: float | None = None,
    coef: float = 1.0,
    unbiased: bool = True,
) -> float:
    """Return the squared maximum mean discrepancy of (n k), (m k) under the kernel (gamma x.y + coef)^degree;
    ``gamma`` None: 1 / k.

    The unbiased estimate excludes the kernel of each row with itself (and may be negative); the biased one is
    the V-statistic.
    """
    check_pair(real, fake, rows=2 if unbiased else 1)
    factor = 1 / real.shape[1] if gamma is None else gamma

    def mean_kernel(a: Tensor, b: Tensor, names: tuple[str, str], same: bool) -> float:
        total = 0.0
        for x in float64_chunks(names[0], a, 2048):
            for y in float64_chunks(names[1], b, 2048):
                total += float(((x @ y.T) * factor + coef).pow(degree).sum())
        if not (same and unbiased):
            return total / (len(a) * len(b))
        norms = (x.square().sum(1) for x in float64_chunks(names[0], a))
        diagonal = sum(float((norm * factor + coef).pow(degree).sum()) for norm in norms)
        return (total - diagonal) / (len(a) * (len(a) - 1))

    within = mean_kernel(real, real, ("real", "real"), True) + mean_kernel(fake, fake, ("fake", "fake"), True)
    return within - 2 * mean_kernel(real, fake, ("real", "fake"), False)


def kernel_distance(real: Tensor, fake: Tensor) -> float:
    """Return KID or KVD over all rows: cubic kernel, unbiased (Binkowski et al. 2018; Unterthiner et al.
    2018).
    """
    return polynomial_mmd(real, fake)


def jedi_distance(real: Tensor, fake: Tensor) -> float:
    """Return JEDi's distance: 100 times the biased MMD under the kernel (x.y / k)^2 (Luo et al. 2024)."""
    return 100 * polynomial_mmd(real, fake, degree=2, coef=0.0, unbiased=False)


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """Return the squared distances (n m) of the rows of float64 (n k) and (m k)."""
    return (a.square().sum(1, keepdim=True) + b.square().sum(1) - 2 * a @ b.T).clamp(min=0)


def precision_recall(real: Tensor, fake: Tensor, neighbours: int = 3) -> tuple[float, float]:
    """Return (precision, recall) of Kynkaanniemi et al. 2019: the fraction of rows inside the other side's
    manifold.

    A side's manifold is a ball around each of its rows that reaches its ``neighbours``-th nearest neighbour
    on that side.
    """
    check_pair(real, fake)
    shortest = min(len(real), len(fake))
    check(
        1 <= neighbours < shortest,
        f"neighbours must be at least 1 and below the {shortest} rows of the shorter side, got {neighbours}",
    )
    # centred, because small distances lose digits next to large norms
    centre = sum(chunk.sum(0) for chunk in float64_chunks("real", real)) / len(real)
    reals = [chunk - centre for chunk in float64_chunks("real", real)]
    fakes = [chunk - centre for chunk in float64_chunks("fake", fake)]

    def covered(points: list[Tensor], manifold: list[Tensor]) -> float:
        rows = torch.cat(manifold)
        kth = [squared_distances(chunk, rows).kthvalue(neighbours + 1).values for chunk in manifold]
        radii = torch.cat(kth)
        inside = [(squared_distances(chunk, rows) <= radii).any(1) for chunk in points]
        return float(torch.cat(inside).double().mean())

    return covered(fakes, reals), covered(reals, fakes)


@dataclass(frozen=True)
class Metric:
    """An entry of ``METRICS``."""

    compute: Callable[[Tensor, Tensor, "Protocol"], float]  # (real (n k), fake (m k), protocol) -> value
    summary: str  # what it is, for help and report
    is_distance: bool = True  # 0 for equal distributions: has a floor and an extrapolation
    is_frechet: bool = False  # depends on means and covariances alone: statistics files can be scored


def _frechet(summary: str) -> Metric:
    def compute(real: Tensor, fake: Tensor, protocol: "Protocol") -> float:
        return frechet_distance(real, fake, protocol.ddof)

    return Metric(compute, f"Frechet distance of {summary}", is_frechet=True)


def _kernel(summary: str) -> Metric:
    return Metric(
        lambda real, fake, _: kernel_distance(real, fake), f"kernel distance (unbiased MMD) of {summary}"
    )


def _inception_score(_: Tensor, fake: Tensor, protocol: "Protocol") -> float:
    return inception_score(fake, min(protocol.splits, len(fake)), protocol.shuffle).mean


METRICS: dict[str, Metric] = {
    "fvd": _frechet("clip features"),
    "fid": _frechet("frame features"),
    "frechet": _frechet("external features"),
    "kvd": _kernel("clip features"),
    "kid": _kernel("frame features"),
    "kernel": _kernel("external features"),
    "jedi": Metric(
        lambda real, fake, _: jedi_distance(real, fake), "100 times the biased MMD of JEDi's kernel"
    ),
    "precision": Metric(
        lambda real, fake, _: precision_recall(real, fake)[0],
        "fraction of fake rows inside the real manifold",
        is_distance=False,
    ),
    "recall": Metric(
        lambda real, fake, _: precision_recall(real, fake)[1],
        "fraction of real rows inside the fake manifold",
        is_distance=False,
    ),
    "is": Metric(_inception_score, "Inception Score of the fake side", is_distance=False),
}
