# SPDX-License-Identifier: Apache-2.0
"""Laws and closed forms of the Frechet distance, and its bias floor. The numbers are the fingerprint groups
of the evaluation reference.
"""

import math
import time

import pytest
import torch
from reference.statistics import frechet_1d, frechet_sqrtm, random_features
from support import noise

from latte.checks import InputError
from latte.evaluation.frechet import bias_floor, frechet_distance, frechet_of, gaussian, merge
from latte.evaluation.metrics import kernel_distance, precision_recall

SHAPES = [
    (300, 40),
    (41, 40),
    (40, 40),
    (17, 40),
    (2, 40),
    (5000, 3),
]  # longer, as long, shorter than wide; more than one chunk


def exact_features(n, mean, root, ddof, seed=0):
    """n rows whose sample mean is ``mean`` (k,) and whose sample covariance is root^T root, both exactly."""
    raw = noise(n, len(mean), seed=seed, dtype=torch.float64)
    white = torch.linalg.qr(raw - raw.mean(0)).Q * math.sqrt(n - ddof)
    return white @ root + mean


def trace(*tables):
    """Sum of the variances, the scale of every tolerance."""
    return sum(float(b.double().var(0).sum()) for b in tables)


# 1. A distance


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("ddof", [0, 1])
def test_frechet_is_zero_for_equal_features_and_symmetric(shape, ddof):
    x, y = random_features(*shape), random_features(*shape, seed=1, offset=0.1)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    tolerance = 1e-9 * trace(x, y)
    assert abs(frechet_distance(x, x, ddof)) < tolerance
    assert abs(frechet_distance(x, x[order], ddof)) < tolerance
    assert frechet_distance(x, y, ddof) == pytest.approx(frechet_distance(y, x, ddof), abs=tolerance)
    assert (
        frechet_distance(x, y, ddof) > float((x.mean(0) - y.mean(0)).square().sum()) > 0
    )  # spreads only add to the means' distance


# 2. and 3. Translation, rotation, scale, constants


@pytest.mark.parametrize("shape", SHAPES[:4])
def test_frechet_under_translation(shape):
    x, y = random_features(*shape), random_features(*shape, seed=1)
    d, shift = frechet_distance(x, y), noise(shape[1], dtype=torch.float64)
    assert frechet_distance(x + shift, y + shift) == pytest.approx(d, abs=1e-9 * trace(x, y))
    assert frechet_distance(x, x + shift) == pytest.approx(float(shift.square().sum()), abs=1e-9 * trace(x))
    far = [(side + 100).float() for side in (x, y)]  # features that lie far from zero, as logits do
    exact = frechet_distance(*(side.double() - 100 for side in far))
    assert frechet_distance(*far) == pytest.approx(exact, abs=1e-6 * trace(x, y))


@pytest.mark.parametrize("shape", SHAPES[:4])
def test_frechet_under_rotation_scale_and_constants(shape):
    x, y = random_features(*shape), random_features(*shape, seed=1)
    d, rotation = (
        frechet_distance(x, y),
        torch.linalg.qr(noise(shape[1], shape[1], seed=5, dtype=torch.float64)).Q,
    )
    tolerance = 1e-9 * trace(x, y)
    assert frechet_distance(x @ rotation, y @ rotation) == pytest.approx(d, abs=tolerance)
    assert frechet_distance(3 * x, 3 * y) == pytest.approx(9 * d, abs=9 * tolerance)
    constant = torch.full((shape[0], 4), 7.0, dtype=torch.float64)
    assert frechet_distance(torch.cat([x, constant], 1), torch.cat([y, constant], 1)) == pytest.approx(
        d, abs=tolerance
    )


# 4. Closed forms


def diagonal(k, power):
    """A diagonal root with falling entries."""
    return torch.diag(torch.arange(1, k + 1, dtype=torch.float64) ** power)


def closed_forms():
    """Name -> (root of S1, root of S2, trace sqrt(S1 S2)): covariances for which the square root is known."""
    rotation = torch.linalg.qr(noise(6, 6, seed=3, dtype=torch.float64)).Q
    a, b = diagonal(6, -0.3) @ rotation, diagonal(6, 0.4) @ rotation
    two = [
        torch.tensor([[2.0, 1.0], [0.0, 0.5]], dtype=torch.float64),
        torch.tensor([[0.3, 0.0], [1.0, 1.5]], dtype=torch.float64),
    ]
    product = two[0].T @ two[0] @ two[1].T @ two[1]
    first, second = diagonal(8, -0.5).clone(), diagonal(8, -0.5).clone()
    first[:, 4:], second[:, :4] = 0, 0
    root = noise(5, 5, seed=4, dtype=torch.float64)
    one = torch.eye(1, dtype=torch.float64)
    return {
        "equal": (root, root, root.square().sum()),
        "scaled": (root, 3 * root, 3 * root.square().sum()),
        "commuting": (diagonal(6, -0.3), diagonal(6, 0.4), (diagonal(6, -0.3) @ diagonal(6, 0.4)).trace()),
        "commuting, rotated": (a, b, (diagonal(6, -0.3) @ diagonal(6, 0.4)).trace()),
        "one side without spread": (root, torch.zeros(5, 5, dtype=torch.float64), torch.tensor(0.0)),
        "one dimension": (2 * one, 5 * one, torch.tensor(10.0)),
        "two dimensions": (*two, torch.sqrt(product.trace() + 2 * torch.sqrt(torch.linalg.det(product)))),
        "no common direction": (first, second, torch.tensor(0.0)),
        "as wide as FVD": (
            diagonal(400, -0.5),
            diagonal(400, -0.25),
            (diagonal(400, -0.5) @ diagonal(400, -0.25)).trace(),
        ),
    }


@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("name", closed_forms())
def test_frechet_has_its_closed_form(name, ddof):
    a, b, shared = closed_forms()[name]
    k, means = (
        len(a),
        (noise(len(a), seed=7, dtype=torch.float64), noise(len(a), seed=8, dtype=torch.float64)),
    )
    x, y = exact_features(2 * k + 60, means[0], a, ddof), exact_features(k + 90, means[1], b, ddof, seed=1)
    expected = (means[0] - means[1]).square().sum() + a.square().sum() + b.square().sum() - 2 * shared
    assert frechet_distance(x, y, ddof) == pytest.approx(
        float(expected), abs=1e-9 * float(a.square().sum() + b.square().sum())
    )


@pytest.mark.parametrize("ddof", [0, 1])
def test_frechet_equals_the_textbook(ddof):
    x, y = random_features(400, 30), random_features(300, 30, seed=1, offset=0.2)
    assert frechet_distance(x, y, ddof) == pytest.approx(
        frechet_sqrtm(x.numpy(), y.numpy(), ddof), abs=1e-8 * trace(x, y)
    )
    one, other = random_features(50, 1), random_features(40, 1, seed=1, offset=3)
    assert frechet_distance(one, other, ddof) == pytest.approx(
        frechet_1d(one.numpy(), other.numpy(), ddof), rel=1e-9
    )


# 5. The bias law


@pytest.mark.parametrize(("k", "n"), [(100, 1000), (32, 128)])
def test_equal_distributions_score_the_bias_floor(k, n):
    draws = iter(range(1000))
    values = [
        frechet_distance(*(noise(n, k, seed=next(draws), dtype=torch.float64) for _ in range(2)))
        for _ in range(8)
    ]
    assert sum(values) / 8 == pytest.approx(k * (k + 5) / (2 * n), rel=0.05)


@pytest.mark.parametrize(("k", "n"), [(4, 4000), (32, 256), (100, 1000), (200, 1024), (100, 256)])
def test_printed_bias_floor_is_the_law(k, n):
    white = noise(n, k, dtype=torch.float64)
    assert bias_floor(white, n, n) == pytest.approx(k * (k + 5) / (2 * n), rel=0.05)
    assert bias_floor(white, n, 4 * n) == pytest.approx(0.625 * bias_floor(white, n, n))
    assert bias_floor(3 * white, n, n) == pytest.approx(9 * bias_floor(white, n, n))


def test_bias_floor_of_a_falling_spectrum():
    sides = [[random_features(300, 40, seed=2 * i + j) for j in range(2)] for i in range(20)]
    assert bias_floor(random_features(600, 40, seed=77), 300, 300) == pytest.approx(
        sum(frechet_distance(*pair) for pair in sides) / 20, rel=0.1
    )


# 6. and 7. Duplicates and shards


def test_duplicated_rows_change_only_what_n_minus_1_changes():
    x, y = random_features(60, 20), random_features(60, 20, seed=1, offset=0.3)
    twice = [torch.cat([side, side]) for side in (x, y)]
    assert frechet_distance(*twice, ddof=0) == pytest.approx(frechet_distance(x, y, ddof=0), rel=1e-10)
    means = float((x.mean(0) - y.mean(0)).square().sum())
    expected = means + (frechet_distance(x, y, ddof=1) - means) * 2 * 59 / 119
    assert frechet_distance(*twice, ddof=1) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("shape", [(301, 40), (30, 40)])
@pytest.mark.parametrize("shards", [1, 2, 3, 4, 7])
def test_shards_make_the_whole(shape, shards):
    x, other = random_features(*shape, offset=5), gaussian(random_features(200, 40, seed=1))
    parts = [gaussian(part) for part in x.tensor_split(shards)]
    merged = parts[0]
    for part in parts[1:]:
        merged = merge(merged, part)
    whole = gaussian(x)
    assert merged.num == whole.num
    torch.testing.assert_close(merged.mean, whole.mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(merged.root.T @ merged.root, whole.root.T @ whole.root, rtol=1e-12, atol=1e-11)
    assert frechet_of(merged, other, 1) == pytest.approx(frechet_of(whole, other, 1), rel=1e-12)


def test_same_features_same_bits():
    x, y = random_features(500, 40), random_features(500, 40, seed=1)
    assert len({frechet_distance(x, y) for _ in range(3)}) == 1
    assert frechet_distance(x.float(), y.float()) == frechet_distance(x.float().double(), y.float().double())


def test_covariances_of_features_longer_than_a_chunk():
    x = random_features(9000, 3, offset=2)
    summary = gaussian(x)
    assert summary.root.shape == (3, 3)
    torch.testing.assert_close(summary.root.T @ summary.root / 8999, torch.cov(x.T), rtol=1e-11, atol=1e-11)


# 8. What cannot be scored


@pytest.mark.parametrize("function", [frechet_distance, kernel_distance, precision_recall])
def test_single_rows_and_other_widths_are_refused(function):
    with pytest.raises(InputError, match="rows"):
        function(random_features(1, 4), random_features(9, 4))
    with pytest.raises(InputError, match=r"real has . features per row and fake"):
        function(random_features(9, 4), random_features(9, 5))
    with pytest.raises(InputError, match="floating-point"):
        function(random_features(9, 4), torch.ones(9, 4, dtype=torch.long))
    with pytest.raises(InputError, match="floating-point"):
        function(random_features(9, 4)[0], random_features(9, 4))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("function", [frechet_distance, kernel_distance, precision_recall])
def test_rows_that_are_not_finite_are_named(function, value):
    broken = random_features(5000, 3)
    broken[4321, 1] = value
    with pytest.raises(InputError, match="the fake features have NaN or Inf in row 4321"):
        function(random_features(9, 3), broken)


def test_two_rows_are_enough():
    x, y = random_features(2, 5), random_features(2, 5, seed=1)
    a, b = x[0] - x[1], y[0] - y[1]  # rank one on both sides: trace sqrt(S1 S2) = |a.b| / 2
    expected = (
        (x.mean(0) - y.mean(0)).square().sum() + a.square().sum() / 2 + b.square().sum() / 2 - (a @ b).abs()
    )
    assert frechet_distance(x, y, ddof=1) == pytest.approx(float(expected), rel=1e-12)


def test_other_ddofs_are_refused():
    with pytest.raises(InputError, match="ddof must be 0 or 1, got 2"):
        frechet_distance(random_features(9, 3), random_features(9, 3), ddof=2)


# Speed (benchmarks/frechet.py measures it at full size)


def test_fvd_sized_features_take_under_a_second():
    x, y = random_features(2048, 400), random_features(2048, 400, seed=1)
    seconds = []
    for _ in range(3):
        start = time.process_time()
        frechet_distance(x, y)
        seconds.append(time.process_time() - start)
    assert min(seconds) < 1
