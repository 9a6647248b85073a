# SPDX-License-Identifier: Apache-2.0
"""Features to score, and the scores written out: SciPy's matrix square root and loops over pairs, in float64.

Shares nothing with latte.evaluation.
"""

import math

import numpy as np
import scipy.linalg
import torch


def random_features(n: int, k: int, seed: int = 0, offset: float = 0.0) -> torch.Tensor:
    """Correlated features (n k) whose spectrum falls off; the correlation is the same for every ``seed``."""
    mix = torch.randn(k, k, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    rows = torch.randn(n, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return rows @ (mix * torch.arange(1, k + 1, dtype=torch.float64) ** -0.5) + offset


def frechet_sqrtm(x: np.ndarray, y: np.ndarray, ddof: int) -> float:
    """The textbook formula with a matrix square root: to 1e-9 of the trace where both sets have full rank."""
    product = np.cov(x, rowvar=False, ddof=ddof) @ np.cov(y, rowvar=False, ddof=ddof)
    traces = np.trace(np.cov(x, rowvar=False, ddof=ddof)) + np.trace(np.cov(y, rowvar=False, ddof=ddof))
    return float(
        ((x.mean(0) - y.mean(0)) ** 2).sum() + traces - 2 * np.trace(scipy.linalg.sqrtm(product)).real
    )


def frechet_1d(x: np.ndarray, y: np.ndarray, ddof: int) -> float:
    """(difference of means)^2 + (difference of deviations)^2 of two columns of numbers."""
    return float((x.mean() - y.mean()) ** 2 + (x.std(ddof=ddof) - y.std(ddof=ddof)) ** 2)


def inception_score_loops(logits: np.ndarray, splits: int) -> list[float]:
    """One score per split, row by row and class by class, from probabilities that are all above 0."""
    n, k = logits.shape
    probabilities = []
    for row in logits:
        top = max(row)
        weights = [math.exp(v - top) for v in row]
        probabilities.append([w / sum(weights) for w in weights])
    scores = []
    for i in range(splits):
        part = probabilities[i * n // splits : (i + 1) * n // splits]
        marginal = [sum(p[j] for p in part) / len(part) for j in range(k)]
        divergence = sum(p[j] * math.log(p[j] / marginal[j]) for p in part for j in range(k)) / len(part)
        scores.append(math.exp(divergence))
    return scores


def mmd_loops(x: np.ndarray, y: np.ndarray, degree: int, coef: float, unbiased: bool) -> float:
    """Squared MMD under (a.b / k + coef)^degree, pair by pair."""

    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        return (sum(u * v for u, v in zip(a, b, strict=True)) / len(a) + coef) ** degree

    def within(z: np.ndarray) -> float:
        pairs = [
            kernel(z[i], z[j]) for i in range(len(z)) for j in range(len(z)) if not (unbiased and i == j)
        ]
        return sum(pairs) / len(pairs)

    across = [kernel(a, b) for a in x for b in y]
    return within(x) + within(y) - 2 * sum(across) / len(across)


def coverage_loops(points: np.ndarray, manifold: np.ndarray, neighbours: int) -> float:
    """Share of ``points`` within the ball of some row of ``manifold`` to its ``neighbours``-th neighbour."""
    radii = []
    for i, row in enumerate(manifold):
        others = sorted(math.dist(row, other) for j, other in enumerate(manifold) if j != i)
        radii.append(others[neighbours - 1])
    inside = [
        any(math.dist(point, row) <= radius for row, radius in zip(manifold, radii, strict=True))
        for point in points
    ]
    return sum(inside) / len(inside)


def resize_loops(image: np.ndarray, height: int, width: int, rule: str) -> np.ndarray:
    """Bilinear (h w c) -> (height width c), pixel by pixel, under 'half-pixel', 'tf1' or 'align-corners'."""

    def place(i: int, old: int, new: int) -> float:
        if rule == "half-pixel":
            return max((i + 0.5) * old / new - 0.5, 0.0)
        return i * old / new if rule == "tf1" else i * (old - 1) / (new - 1)

    h, w, c = image.shape
    out = np.zeros((height, width, c))
    for i in range(height):
        for j in range(width):
            y, x = place(i, h, height), place(j, w, width)
            top, left = min(int(y), h - 1), min(int(x), w - 1)
            bottom, right = min(top + 1, h - 1), min(left + 1, w - 1)
            a, b = y - top, x - left
            upper = (1 - b) * image[top, left] + b * image[top, right]
            lower = (1 - b) * image[bottom, left] + b * image[bottom, right]
            out[i, j] = (1 - a) * upper + a * lower
    return out
