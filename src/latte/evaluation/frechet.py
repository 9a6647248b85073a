# SPDX-License-Identifier: Apache-2.0
"""The Frechet distance of two feature tables (FID, FVD), in float64 and without the square root of a matrix.

With A and B the centred features over sqrt(count - ddof), trace sqrt(S_a S_b) is the nuclear norm of A B^T,
so

    d = |mean_a - mean_b|^2 + |A|^2 + |B|^2 - 2 |A B^T|_*    (squared Frobenius norms; Dowson and Landau 1982)

which is exact for rank-deficient covariances, where every matrix square root has errors of 1e-5 and more. A
table longer than wide is replaced by the triangle of its QR decomposition, chunk by chunk, so memory does not
grow with its length.
Axes: n rows, k features.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from latte.checks import InputError, check

CHUNK = 4096  # rows converted to float64 at a time
SYMMETRY = 1e-4  # tolerated asymmetry of a covariance, relative to its largest entry (float32 statistics)


def check_features(name: str, features: Tensor, rows: int = 2) -> None:
    """InputError unless ``features`` is a floating-point (n k) with at least ``rows`` rows."""
    shape = tuple(features.shape)
    ok = features.ndim == 2 and features.is_floating_point() and features.shape[1] > 0
    check(ok, f"the {name} features must be floating-point (rows, features), got {features.dtype} {shape}")
    check(
        len(features) >= rows,
        f"the {name} features must have at least {rows} rows, got {len(features)}; evaluate more clips",
    )


def check_pair(real: Tensor, fake: Tensor, rows: int = 2) -> None:
    """InputError unless both are features of at least ``rows`` rows with the same width."""
    check_features("real", real, rows)
    check_features("fake", fake, rows)
    check_widths(real.shape[1], fake.shape[1])


def check_widths(real: int, fake: int) -> None:
    """InputError unless both sides have the same number of features."""
    check(
        real == fake,
        f"real has {real} features per row and fake {fake}; extract both by the same detector and layer",
    )


def float64_chunks(name: str, features: Tensor, size: int = CHUNK) -> Iterator[Tensor]:
    """Yield ``features`` (n k) as float64 chunks of ``size`` rows on the CPU; InputError at the first
    non-finite row.
    """
    for start in range(0, len(features), size):
        chunk = features[start : start + size].to("cpu", torch.float64)
        finite = torch.isfinite(chunk).all(1)
        if not finite.all():
            row = start + int((~finite).nonzero()[0])
            raise InputError(
                f"the {name} features have NaN or Inf in row {row}; extract the clip of that row again"
            )
        yield chunk


@dataclass(frozen=True)
class Gaussian:
    """The summary that the distance needs; root^T root is the sum of squared deviations."""

    num: int  # rows
    mean: Tensor  # (k,) float64
    root: Tensor  # (r k) float64, r <= max(k, 1)

    @property
    def scatter_trace(self) -> float:
        """Return the sum of squared deviations from the mean."""
        return float(self.root.square().sum())


def shrink(rows: Tensor) -> Tensor:
    """Return (r k), r <= k, with the same product rows^T rows as ``rows`` (n k)."""
    if rows.shape[0] <= rows.shape[1]:
        return rows
    return torch.linalg.qr(rows, mode="r").R


def merge(a: Gaussian, b: Gaussian) -> Gaussian:
    """Return the summary of both tables together: their scatters plus that of their two means."""
    num = a.num + b.num
    step = b.mean - a.mean
    between = step * math.sqrt(a.num * b.num / num)
    return Gaussian(num, a.mean + step * (b.num / num), shrink(torch.cat([a.root, b.root, between[None]])))


def gaussian(features: Tensor, name: str = "given") -> Gaussian:
    """Return the summary of ``features`` (n k), n >= 1; InputError for NaN, Inf (naming the row) or a wrong
    shape.
    """
    check_features(name, features, rows=1)
    means = ((chunk, chunk.mean(0)) for chunk in float64_chunks(name, features))
    total = reduce(merge, (Gaussian(len(chunk), mean, chunk - mean) for chunk, mean in means))
    return Gaussian(total.num, total.mean, shrink(total.root))


def gaussian_of_moments(mean: Tensor, covariance: Tensor, name: str, ddof: int) -> Gaussian:
    """Return the summary that has this mean (k,) and covariance (k k), for ``frechet_of`` with the same
    ``ddof``.

    InputError for other shapes, for NaN or Inf, and for a matrix that is not symmetric and positive
    semi-definite.
    """
    mean = mean.double().cpu()
    covariance = covariance.double().cpu()
    shapes = f"mu {tuple(mean.shape)} and sigma {tuple(covariance.shape)}"
    fits = mean.ndim == 1 and len(mean) > 0 and covariance.shape == (len(mean), len(mean))
    check(
        fits, f"{name} has {shapes}, expected (k,) and (k, k); write the mean and the covariance of one table"
    )
    finite = bool(torch.isfinite(mean).all() and torch.isfinite(covariance).all())
    check(finite, f"{name} has NaN or Inf in mu or sigma; compute the statistics again")
    asymmetry = float((covariance - covariance.T).abs().max())
    tolerance = SYMMETRY * float(covariance.abs().max())
    check(
        asymmetry <= tolerance,
        f"{name} has a sigma that is not symmetric (by {asymmetry:.3g}), so it is not a covariance; give "
        "(k, k) of np.cov",
    )
    values, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
    check(
        float(values[0]) >= -tolerance,
        f"{name} has a sigma with the eigenvalue {float(values[0]):.3g}, so it is not a covariance; compute "
        "it again",
    )
    root = values.clamp(min=0).sqrt()[:, None] * vectors.T  # (k k)
    return Gaussian(1 + ddof, mean, root)  # num - ddof = 1, so that root^T root is the covariance


def frechet_of(a: Gaussian, b: Gaussian, ddof: int) -> float:
    """Return the Frechet distance of two summaries; covariances divide by num - ``ddof`` (0 StyleGAN-V,
    cd-fvd; else 1).

    Not clamped: for equal tables it is 0 within 1e-12 of the trace, of either sign.
    """
    check(ddof in (0, 1), f"ddof must be 0 or 1, got {ddof}: a covariance divides by n or n - 1")
    count_a = a.num - ddof
    count_b = b.num - ddof
    product = a.root @ b.root.T
    check(bool(torch.isfinite(product).all()), "the features are too large for float64; check the detector")
    shared = float(torch.linalg.svdvals(product).sum()) / math.sqrt(count_a * count_b)
    return (
        float((a.mean - b.mean).square().sum())
        + a.scatter_trace / count_a
        + b.scatter_trace / count_b
        - 2 * shared
    )


def frechet_distance(real: Tensor, fake: Tensor, ddof: int = 1) -> float:
    """Return the Frechet distance of features (n k), (m k): FVD on I3D logits, FID on Inception's pool3."""
    check_pair(real, fake)
    return frechet_of(gaussian(real, "real"), gaussian(fake, "fake"), ddof)


def bias_floor(features: Tensor, num_real: int, num_fake: int) -> float:
    """Return the expected distance between ``num_real`` and ``num_fake`` samples of one Gaussian with the
    spectrum of ``features``.

    To second order in the sampling error, with l the eigenvalues of the covariance,

        (1 / num_real + 1 / num_fake) (sum_i l_i + 1/2 sum_ij l_i l_j (1 + [i = j]) / (l_i + l_j)),

    which is D (D + 5) / (2 N) for l = 1 and N on both sides. The eigenvalues of a sample are too spread out,
    which makes the double sum too small; its values on all rows (n k), the halves and the quarters are
    extrapolated to infinitely many rows (within 3 % for n >= 1.3 k, too small for n < k; measured). A score
    near the floor contains no information.
    """
    check(min(num_real, num_fake) > 0, f"the row counts must be positive, got {num_real} and {num_fake}")
    check_features("real", features, rows=8)
    quarters = [moments(features[i::4]) for i in range(4)]
    halves = [merge_moments(quarters[0], quarters[2]), merge_moments(quarters[1], quarters[3])]
    total = merge_moments(*halves)
    sums = [sum(pair_sum(part) for part in parts) / len(parts) for parts in ([total], halves, quarters)]
    extrapolated = (8 * sums[0] - 6 * sums[1] + sums[2]) / 3
    trace = float(total[2].trace()) / (total[0] - 1)
    return (1 / num_real + 1 / num_fake) * (trace + extrapolated)


Moments = tuple[int, Tensor, Tensor]  # rows, mean (k,), scatter (k k)


def moments(features: Tensor) -> Moments:
    """Return rows, mean and scatter of ``features`` (n k)."""
    means = ((chunk, chunk.mean(0)) for chunk in float64_chunks("real", features))
    parts = ((len(chunk), mean, (chunk - mean).T @ (chunk - mean)) for chunk, mean in means)
    return reduce(merge_moments, parts)


def merge_moments(a: Moments, b: Moments) -> Moments:
    """Return the moments of both tables together."""
    num = a[0] + b[0]
    step = b[1] - a[1]
    return num, a[1] + step * (b[0] / num), a[2] + b[2] + torch.outer(step, step) * (a[0] * b[0] / num)


def pair_sum(part: Moments) -> float:
    """Return 1/2 sum_ij l_i l_j (1 + [i = j]) / (l_i + l_j) over the eigenvalues of the covariance."""
    values = torch.linalg.eigvalsh(part[2] / (part[0] - 1))
    values = values[values > values[-1] * 1e-12]
    pairs = values[:, None] * values / (values[:, None] + values)
    return 0.5 * float(pairs.sum() + pairs.diagonal().sum())
