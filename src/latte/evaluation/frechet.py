# SPDX-License-Identifier: Apache-2.0
"""The Frechet distance between two feature banks, in float64 and without the square root of a matrix (FID, FVD).

With A and B the centred banks over sqrt(count - ddof), trace sqrt(S_a S_b) is the nuclear norm of A B^T, so

    d = |mean_a - mean_b|^2 + |A|^2 + |B|^2 - 2 |A B^T|_*          (squared Frobenius norms; Dowson and Landau 1982)

which is exact for rank-deficient banks, where every matrix square root is off by 1e-5 and more. A bank longer than wide is replaced by
the triangle of its QR decomposition, chunk by chunk, so memory does not grow with its length.
Axes: n rows, k features.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from latte.checks import InputError, require

CHUNK = 4096  # rows that are in float64 at one time


def check_bank(name: str, bank: Tensor, rows: int = 2) -> None:
    """InputError unless ``bank`` is (n k) of floating numbers with at least ``rows`` rows."""
    ok = bank.ndim == 2 and bank.is_floating_point() and bank.shape[1] > 0
    require(
        ok,
        f"the {name} bank",
        f"{bank.dtype} {tuple(bank.shape)}",
        "a feature bank is (n k) of floating numbers",
        "give (n k) features",
    )
    require(
        len(bank) >= rows,
        f"the {name} bank's length",
        len(bank),
        f"this needs at least {rows} rows",
        "evaluate more clips",
    )


def check_pair(real: Tensor, fake: Tensor, rows: int = 2) -> None:
    """InputError unless both are feature banks of at least ``rows`` rows with the same number of features."""
    check_bank("real", real, rows)
    check_bank("fake", fake, rows)
    widths = real.shape[1], fake.shape[1]
    require(
        widths[0] == widths[1],
        "the features (k)",
        widths,
        "both banks are of one detector and layer",
        "extract both sides alike",
    )


def float64_chunks(name: str, bank: Tensor, size: int = CHUNK) -> Iterator[Tensor]:
    """``bank`` (n k) as float64 pieces of ``size`` rows on the CPU; InputError at the first row that is not finite."""
    for start in range(0, len(bank), size):
        chunk = bank[start : start + size].to("cpu", torch.float64)
        finite = torch.isfinite(chunk).all(1)
        if not finite.all():
            row = start + int((~finite).nonzero()[0])
            raise InputError(
                f"the {name} bank has nan or inf in row {row}; find the clip of that plan line and extract it again"
            )
        yield chunk


@dataclass(frozen=True)
class Gaussian:
    """What the distance needs of a bank: ``num`` rows, ``mean`` (k,), and ``root`` (r k), r <= max(k, 1), with root^T root the scatter."""

    num: int
    mean: Tensor
    root: Tensor

    @property
    def scatter_trace(self) -> float:
        """Sum of squared deviations from the mean."""
        return float(self.root.square().sum())


def shrink(rows: Tensor) -> Tensor:
    """(n k) -> (r k), r <= k, with the same product rows^T rows."""
    return rows if rows.shape[0] <= rows.shape[1] else torch.linalg.qr(rows, mode="r").R


def merge(a: Gaussian, b: Gaussian) -> Gaussian:
    """The Gaussian of both banks together: their scatters and that of their two means."""
    num = a.num + b.num
    step = b.mean - a.mean
    between = step * math.sqrt(a.num * b.num / num)
    return Gaussian(num, a.mean + step * (b.num / num), shrink(torch.cat([a.root, b.root, between[None]])))


def gaussian(bank: Tensor, name: str = "feature") -> Gaussian:
    """Summary of ``bank`` (n k), any floating type, n >= 1; InputError for nan, inf or a wrong shape, naming the row."""
    check_bank(name, bank, rows=1)
    means = ((chunk, chunk.mean(0)) for chunk in float64_chunks(name, bank))
    whole = reduce(merge, (Gaussian(len(chunk), mean, chunk - mean) for chunk, mean in means))
    return Gaussian(whole.num, whole.mean, shrink(whole.root))


def frechet_of(a: Gaussian, b: Gaussian, ddof: int) -> float:
    """Frechet distance of two summaries of 2 rows or more; covariances divide by num - ``ddof`` (0 StyleGAN-V and cd-fvd, 1 elsewhere).

    Not clamped: for equal banks it is 0 within 1e-12 of the trace, on either side.
    """
    require(ddof in (0, 1), "ddof", ddof, "a covariance divides by n or n - 1", "give 0 or 1")
    count_a, count_b = a.num - ddof, b.num - ddof
    shared = float(torch.linalg.svdvals(a.root @ b.root.T).sum()) / math.sqrt(count_a * count_b)
    return (
        float((a.mean - b.mean).square().sum())
        + a.scatter_trace / count_a
        + b.scatter_trace / count_b
        - 2 * shared
    )


def frechet_distance(real: Tensor, fake: Tensor, ddof: int = 1) -> float:
    """Frechet distance of two banks (n k) and (m k): FVD on I3D logits, FID on Inception's pool3."""
    check_pair(real, fake)
    return frechet_of(gaussian(real, "real"), gaussian(fake, "fake"), ddof)


def bias_floor(bank: Tensor, num_real: int, num_fake: int) -> float:
    """The distance to expect between ``num_real`` and ``num_fake`` samples of one Gaussian that has the spectrum of ``bank`` (n k).

    To second order in the sampling error, with l the eigenvalues of the covariance,

        (1 / num_real + 1 / num_fake) (sum_i l_i + 1/2 sum_ij l_i l_j (1 + [i = j]) / (l_i + l_j)),

    which is D (D + 5) / (2 N) for l = 1 and N on both sides. The eigenvalues of a sample spread too widely, which makes the double sum too
    small; its values on the whole bank, its halves and its quarters are extrapolated to an endless bank (within 3 % for n >= 1.3 k, too
    small for n < k; measured). A score that is not well above the floor says nothing.
    """
    require(
        min(num_real, num_fake) > 0,
        "the counts",
        (num_real, num_fake),
        "a floor needs samples on both sides",
        "give counts above 0",
    )
    check_bank("floor's", bank, rows=8)
    quarters = [moments(bank[i::4]) for i in range(4)]
    halves = [merge_moments(quarters[0], quarters[2]), merge_moments(quarters[1], quarters[3])]
    whole = merge_moments(*halves)
    one, two, four = (
        sum(pair_sum(part) for part in parts) / len(parts) for parts in ([whole], halves, quarters)
    )
    trace = float(whole[2].trace()) / (whole[0] - 1)
    return (1 / num_real + 1 / num_fake) * (trace + (8 * one - 6 * two + four) / 3)


Moments = tuple[int, Tensor, Tensor]  # rows, mean (k,), scatter (k k)


def moments(bank: Tensor) -> Moments:
    """Rows, mean and scatter of ``bank`` (n k)."""
    means = ((chunk, chunk.mean(0)) for chunk in float64_chunks("floor's", bank))
    return reduce(
        merge_moments, ((len(chunk), mean, (chunk - mean).T @ (chunk - mean)) for chunk, mean in means)
    )


def merge_moments(a: Moments, b: Moments) -> Moments:
    """The moments of both banks together."""
    num, step = a[0] + b[0], b[1] - a[1]
    return num, a[1] + step * (b[0] / num), a[2] + b[2] + torch.outer(step, step) * (a[0] * b[0] / num)


def pair_sum(part: Moments) -> float:
    """1/2 sum_ij l_i l_j (1 + [i = j]) / (l_i + l_j) over the eigenvalues of the covariance."""
    values = torch.linalg.eigvalsh(part[2] / (part[0] - 1))
    values = values[values > values[-1] * 1e-12]
    pairs = values[:, None] * values / (values[:, None] + values)
    return 0.5 * float(pairs.sum() + pairs.diagonal().sum())
