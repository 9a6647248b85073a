# SPDX-License-Identifier: Apache-2.0
"""Every other score of a feature bank, and how sure a score is. All in float64, all pure functions of the banks and a seed.

Inception Score, kernel distances (KID, KVD, JEDi's), precision and recall; the half-sample interval and the extrapolation to endless
banks, which take any of these distances. The bootstrap is not offered: drawing with replacement makes duplicates, and duplicates alone
doubled an FVD of 105 (202 by the bootstrap's mean).
Axes: n real rows, m fake rows, k features or classes.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from random import Random
from statistics import NormalDist

import torch
from torch import Tensor

from latte.checks import require
from latte.evaluation.frechet import check_bank, check_pair, float64_chunks
from latte.runtime import generator

Distance = Callable[[Tensor, Tensor], float]  # of a real bank (n k) and a fake bank (m k)


@dataclass(frozen=True)
class Score:
    """A mean over splits or subsets, with the standard deviation between them (of the population, as everybody reports it)."""

    mean: float
    std: float
    parts: tuple[float, ...]


def score(parts: list[float]) -> Score:
    """Mean and deviation of ``parts``."""
    mean = math.fsum(parts) / len(parts)
    return Score(mean, math.sqrt(math.fsum((part - mean) ** 2 for part in parts) / len(parts)), tuple(parts))


def numpy_permutation(seed: int, count: int) -> list[int]:
    """Where ``numpy.random.RandomState(seed).shuffle`` puts ``count`` rows: row i of the result is row p[i] of the input.

    StyleGAN-V shuffles the probabilities of its video IS this way (seed 42). Python's generator is the same Mersenne Twister; only its
    seeding differs, so the state is filled by NumPy's rule and the swaps follow.
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
    """exp(mean KL(p(y | x) | p(y))) of logits (n k), over ``splits`` consecutive parts with bounds floor(i n / splits) (Salimans 2016).

    ``shuffle`` None keeps the plan's order, as the official frame IS does; 42 is the order of StyleGAN-V's video IS. From logits, so that
    a probability of zero costs nothing (log p p = 0) instead of giving nan.
    """
    check_bank("logit", logits, rows=1)
    rule = f"each split needs a row of the {len(logits)}"
    require(1 <= splits <= len(logits), "splits", splits, rule, "give fewer splits or more clips")
    log_p = torch.cat(list(float64_chunks("logit", logits))).log_softmax(1)
    if shuffle is not None:
        log_p = log_p[numpy_permutation(shuffle, len(log_p))]
    bounds = [i * len(log_p) // splits for i in range(splits + 1)]
    values = []
    for start, stop in pairwise(bounds):
        part = log_p[start:stop]
        marginal = part.logsumexp(0) - math.log(len(part))
        values.append(math.exp(float((part.exp() * (part - marginal)).sum(1).mean())))
    return score(values)


def polynomial_mmd(
    real: Tensor,
    fake: Tensor,
    degree: int = 3,
    gamma: float | None = None,
    coef: float = 1.0,
    unbiased: bool = True,
) -> float:
    """Squared maximum mean discrepancy of banks (n k), (m k) under the kernel (gamma x.y + coef)^degree; ``gamma`` None is 1 / k.

    Unbiased leaves each row's kernel with itself out (and may be negative); biased is the V-statistic with all pairs.
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
        own = sum(
            float((x.square().sum(1) * factor + coef).pow(degree).sum()) for x in float64_chunks(names[0], a)
        )
        return (total - own) / (len(a) * (len(a) - 1))

    within = mean_kernel(real, real, ("real", "real"), True) + mean_kernel(fake, fake, ("fake", "fake"), True)
    return within - 2 * mean_kernel(real, fake, ("real", "fake"), False)


def kernel_distance(real: Tensor, fake: Tensor) -> float:
    """KID or KVD over the whole banks: cubic kernel, unbiased (Binkowski et al. 2018; Unterthiner et al. 2018)."""
    return polynomial_mmd(real, fake)


def kernel_distance_subsets(
    real: Tensor, fake: Tensor, num_subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> Score:
    """KID as torch-fidelity and StyleGAN report it: the mean over random subsets of ``subset_size`` rows of each side."""
    longest = min(len(real), len(fake))
    require(
        2 <= subset_size <= longest,
        "subset_size",
        subset_size,
        f"the shorter bank has {longest} rows",
        "give between 2 and that",
    )

    def draw(side: str, bank: Tensor, i: int) -> Tensor:
        return bank[torch.randperm(len(bank), generator=generator(seed, "kid", side, i))[:subset_size]]

    return score([polynomial_mmd(draw("real", real, i), draw("fake", fake, i)) for i in range(num_subsets)])


def jedi_distance(real: Tensor, fake: Tensor) -> float:
    """JEDi's distance on any bank: 100 times the biased MMD under (x.y / k)^2 (Luo et al. 2024)."""
    return 100 * polynomial_mmd(real, fake, degree=2, coef=0.0, unbiased=False)


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """(n k), (m k) float64 -> (n m)."""
    return (a.square().sum(1, keepdim=True) + b.square().sum(1) - 2 * a @ b.T).clamp(min=0)


def precision_recall(real: Tensor, fake: Tensor, neighbours: int = 3) -> tuple[float, float]:
    """(precision, recall) of Kynkaanniemi et al. 2019: the share of rows that lie within the other side's manifold.

    A side's manifold is a ball around each of its rows that reaches its ``neighbours``-th nearest neighbour on that side.
    """
    check_pair(real, fake)
    shortest = min(len(real), len(fake))
    require(
        1 <= neighbours < shortest,
        "neighbours",
        neighbours,
        f"the shorter bank has {shortest} rows",
        "give fewer than that",
    )
    centre = sum(chunk.sum(0) for chunk in float64_chunks("real", real)) / len(
        real
    )  # or small distances drown in large norms
    sides = [
        [chunk - centre for chunk in float64_chunks(name, bank)]
        for name, bank in (("real", real), ("fake", fake))
    ]

    def covered(points: list[Tensor], manifold: list[Tensor]) -> float:
        rows = torch.cat(manifold)
        radii = torch.cat(
            [squared_distances(chunk, rows).kthvalue(neighbours + 1).values for chunk in manifold]
        )
        inside = [(squared_distances(chunk, rows) <= radii).any(1) for chunk in points]
        return float(torch.cat(inside).double().mean())

    return covered(sides[1], sides[0]), covered(sides[0], sides[1])


@dataclass(frozen=True)
class Interval:
    """``low`` to ``high`` around ``value`` at confidence ``level``; ``std`` is the estimated standard error of ``value``."""

    value: float
    low: float
    high: float
    std: float
    level: float
    halves: int


def student_quantile(probability: float, freedom: int) -> float:
    """Quantile of Student's t by its expansion about the normal one (within 1 % of it from 4 degrees of freedom at 0.95)."""
    z = NormalDist().inv_cdf(probability)
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def random_halves(bank: Tensor, *key: int | str) -> tuple[Tensor, Tensor]:
    """Two halves of ``bank`` without a common row, in bank order; of an odd number of rows one stays out."""
    order, half = torch.randperm(len(bank), generator=generator(*key)), len(bank) // 2
    return bank[order[:half].sort().values], bank[order[-half:].sort().values]


def half_sample_interval(
    distance: Distance, real: Tensor, fake: Tensor, level: float = 0.9, halves: int = 20, seed: int = 0
) -> Interval:
    """How far ``distance`` at these bank sizes would move with other samples, from random halves drawn without replacement.

    Both banks are cut in two ``halves`` / 2 times, giving pairs of values u, v. A half of N rows scatters about the whole with variance
    s^2 / (N/2) (1 - (N/2)/N) = s^2 / N, so ((u - v) / 2)^2 is the squared standard error of whatever is linear in the data (the delete-half
    jackknife, Shao and Wu 1989). It counts what is quadratic twice, and the variance of (u + v) / 2 is exactly that surplus, so it is
    taken off. The interval lies around the value at this N, bias included; ``extrapolate`` estimates the value for endless banks.
    """
    require(0 < level < 1, "level", level, "a confidence level lies between 0 and 1", "give 0.9 or 0.95")
    require(
        halves >= 8 and halves % 2 == 0,
        "halves",
        halves,
        "halves come in pairs, at least 4 of them",
        "give an even number from 8",
    )
    shorter = min(len(real), len(fake))
    require(shorter >= 4, "the shorter bank's length", shorter, "a half needs 2 rows", "evaluate more clips")
    differences, means = [], []
    for i in range(halves // 2):
        pair = zip(
            random_halves(real, seed, "half", "real", i),
            random_halves(fake, seed, "half", "fake", i),
            strict=True,
        )
        u, v = (distance(*banks) for banks in pair)
        differences.append((u - v) / 2)
        means.append((u + v) / 2)
    linear = math.fsum(d * d for d in differences) / len(differences)
    surplus = score(means).std ** 2 * len(means) / (len(means) - 1)
    std = math.sqrt(max(linear - surplus, linear / 2))
    value, reach = distance(real, fake), student_quantile((1 + level) / 2, halves // 2) * std
    return Interval(value, value - reach, value + reach, std, level, halves)


@dataclass(frozen=True)
class Extrapolation:
    """``value`` for endless banks: where the line through ``points`` (share of the banks, distance) meets 1 / share = 0."""

    value: float
    slope: float
    points: tuple[tuple[float, float], ...]


def extrapolate(
    distance: Distance, real: Tensor, fake: Tensor, sizes: int = 15, seed: int = 0
) -> Extrapolation:
    """FVD-infinity, FID-infinity (Chong and Forsyth 2020): the intercept of a straight line in 1 / size.

    ``distance`` is taken at ``sizes`` sizes between a quarter and all of the banks, rows drawn without replacement. Both sides shrink
    together, so that the bias of both is on the line.
    """
    require(sizes >= 3, "sizes", sizes, "a line with an error needs 3 points", "give 3 or more")
    shorter = min(len(real), len(fake))
    require(
        shorter >= 16,
        "the shorter bank's length",
        shorter,
        "a quarter of it needs 4 rows",
        "evaluate more clips",
    )

    def draw(side: str, bank: Tensor, share: float) -> Tensor:
        order = torch.randperm(len(bank), generator=generator(seed, "size", side, f"{share:.6f}"))
        return bank[order[: round(share * len(bank))].sort().values]

    shares = [0.25 + 0.75 * i / (sizes - 1) for i in range(sizes)]
    points = tuple(
        (share, distance(draw("real", real, share), draw("fake", fake, share))) for share in shares
    )
    x = torch.tensor([1 / share for share, _ in points], dtype=torch.float64)
    y = torch.tensor([value for _, value in points], dtype=torch.float64)
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())
    return Extrapolation(float(y.mean()) - slope * float(x.mean()), slope, points)
