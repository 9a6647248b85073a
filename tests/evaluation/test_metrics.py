# SPDX-License-Identifier: Apache-2.0
"""Inception Score, kernel distances, precision and recall against loops and closed forms; intervals and
extrapolation against the truth.

The numbers are the fingerprint groups of the evaluation reference.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from reference.statistics import coverage_loops, inception_score_loops, mmd_loops, random_features
from support import noise

from latte.checks import InputError
from latte.evaluation.external import Statistics, score_statistics
from latte.evaluation.frechet import frechet_distance
from latte.evaluation.metrics import (
    METRICS,
    Metric,
    inception_score,
    jedi_distance,
    kernel_distance,
    numpy_permutation,
    polynomial_mmd,
    precision_recall,
)
from latte.evaluation.protocols import PROTOCOLS
from latte.evaluation.report import headline
from latte.evaluation.scores import extrapolate, half_sample_interval, random_halves, score

# 9. Inception Score


def test_inception_score_of_constant_and_of_balanced_predictions():
    assert inception_score(torch.zeros(40, 7), splits=4).mean == pytest.approx(1)
    one_hot = torch.eye(20).repeat(5, 1) * 400 - 200  # probabilities that are zero to the last bit
    assert inception_score(one_hot, splits=5).mean == pytest.approx(20, rel=1e-12)
    assert inception_score(one_hot.double(), splits=1).std == 0


@pytest.mark.parametrize("splits", [1, 3, 10])
def test_inception_score_equals_the_loops(splits):
    logits = 3 * noise(47, 6, dtype=torch.float64)
    expected = inception_score_loops(logits.numpy(), splits)
    found = inception_score(logits, splits)
    np.testing.assert_allclose(found.parts, expected, rtol=1e-12)
    assert (found.mean, found.std) == (pytest.approx(np.mean(expected)), pytest.approx(np.std(expected)))


def test_inception_score_and_the_order_of_rows():
    logits = torch.cat(
        [4 * torch.eye(10)[i].expand(20, 10) + noise(20, 10, seed=i) for i in range(10)]
    )  # sorted by class
    shuffled = logits[torch.randperm(200, generator=torch.Generator().manual_seed(1))]
    assert inception_score(logits, 1).mean == pytest.approx(inception_score(shuffled, 1).mean, rel=1e-12)
    assert (
        inception_score(logits, 10).mean < 0.7 * inception_score(shuffled, 10).mean
    )  # 7.25 against 11.05 in the official code
    assert inception_score(logits, 10, shuffle=42).mean == pytest.approx(
        inception_score(shuffled, 10).mean, rel=0.1
    )
    order = np.arange(200)
    np.random.RandomState(42).shuffle(order)
    assert inception_score(logits, 10, shuffle=42) == inception_score(logits[torch.from_numpy(order)], 10)


@pytest.mark.parametrize("count", [1, 2, 3, 64, 65, 2048])
@pytest.mark.parametrize("seed", [0, 42])
def test_the_published_shuffle_is_numpys(count, seed):
    expected = np.arange(2 * count).reshape(count, 2)
    np.random.RandomState(seed).shuffle(expected)
    assert numpy_permutation(seed, count) == (expected[:, 0] // 2).tolist()


def test_inception_score_refuses_more_splits_than_rows():
    with pytest.raises(InputError, match=r"splits must be between 1 and the . rows, got 6"):
        inception_score(torch.zeros(5, 3), splits=6)
    with pytest.raises(InputError, match="row 2"):
        inception_score(torch.tensor([[0.0], [0.0], [math.nan]]), splits=1)


# 10. Kernel distances


JEDI_A = torch.arange(1, 10, dtype=torch.float64).reshape(3, 3)
JEDI_B = torch.tensor([[7, 6, 5], [4, 3, 2], [1, 1, 8], [0, 2, 5]], dtype=torch.float64)


def test_the_published_example_of_jedi():
    assert jedi_distance(JEDI_A, JEDI_B) == pytest.approx(100 * 270.7222, rel=1e-6)
    assert polynomial_mmd(JEDI_A, JEDI_B, unbiased=False) == pytest.approx(23088.0833, rel=1e-8)


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize(("degree", "coef"), [(3, 1.0), (2, 0.0)])
def test_kernel_distances_equal_the_loops(degree, coef, unbiased):
    x, y = random_features(13, 4), random_features(9, 4, seed=1, offset=1)
    found = polynomial_mmd(x, y, degree=degree, coef=coef, unbiased=unbiased)
    assert found == pytest.approx(mmd_loops(x.numpy(), y.numpy(), degree, coef, unbiased), rel=1e-10)


def test_kernel_distance_over_several_chunks():
    x, y = random_features(2500, 3), random_features(2100, 3, seed=1, offset=0.5)
    whole = [((z @ z.T / 3 + 1) ** 3).sum() - ((z.square().sum(1) / 3 + 1) ** 3).sum() for z in (x, y)]
    across = ((x @ y.T / 3 + 1) ** 3).mean()
    expected = whole[0] / (2500 * 2499) + whole[1] / (2100 * 2099) - 2 * across
    assert kernel_distance(x, y) == pytest.approx(float(expected), rel=1e-10)


def test_unbiased_kernel_distance_lies_around_zero_for_equal_distributions():
    values = [kernel_distance(noise(60, 8, seed=2 * i), noise(60, 8, seed=2 * i + 1)) for i in range(30)]
    assert min(values) < 0 < max(values)
    assert abs(np.mean(values)) < 3 * np.std(values) / math.sqrt(30)
    assert all(jedi_distance(noise(60, 8, seed=2 * i), noise(60, 8, seed=2 * i + 1)) > 0 for i in range(5))


# Precision and recall


@pytest.mark.parametrize("neighbours", [1, 3])
def test_precision_and_recall_equal_the_loops(neighbours):
    x, y = noise(40, 3, dtype=torch.float64), 0.6 * noise(35, 3, seed=1, dtype=torch.float64) + 0.5
    precision, recall = precision_recall(x + 1000, y + 1000, neighbours)
    assert precision == pytest.approx(coverage_loops(y.numpy(), x.numpy(), neighbours))
    assert recall == pytest.approx(coverage_loops(x.numpy(), y.numpy(), neighbours))
    assert 0 < recall < precision <= 1


def test_precision_and_recall_at_the_extremes():
    x = noise(50, 4)
    assert precision_recall(x, x) == (1, 1)
    assert precision_recall(x, x + 100) == (0, 0)
    assert (
        precision_recall(x, x[:1].repeat(20, 1))[1] < 0.1
    )  # one clip over and over: precise, without variety
    with pytest.raises(InputError, match=r"neighbours must be .* got 9"):
        precision_recall(x, x[:9], neighbours=9)


# Uncertainty


def pair_of_tables(seed, shift, scale, n=256, k=32):
    """Real and fake features of one experiment."""
    return noise(n, k, seed=2 * seed, dtype=torch.float64), scale * noise(
        n, k, seed=2 * seed + 1, dtype=torch.float64
    ) + shift


@pytest.mark.parametrize(
    ("shift", "scale"), [pytest.param(0.0, 1.0, marks=pytest.mark.nightly), (0.3, 1.5)]
)
def test_intervals_cover_the_truth_about_nine_times_in_ten(shift, scale):
    truth = np.mean([frechet_distance(*pair_of_tables(1000 + i, shift, scale)) for i in range(200)])
    intervals = [
        half_sample_interval(frechet_distance, *pair_of_tables(i, shift, scale), seed=i) for i in range(100)
    ]
    covered = sum(interval.low <= truth <= interval.high for interval in intervals)
    assert 80 <= covered <= 98
    spread = np.std([interval.value for interval in intervals])
    assert np.mean([interval.std for interval in intervals]) == pytest.approx(spread, rel=0.25)


def test_interval_holds_for_other_distances_and_levels():
    tables = pair_of_tables(0, 0.5, 1.0)
    narrow, wide = (half_sample_interval(kernel_distance, *tables, level=level) for level in (0.5, 0.99))
    assert narrow.value == wide.value == kernel_distance(*tables)
    assert wide.low < narrow.low < narrow.value < narrow.high < wide.high
    assert half_sample_interval(kernel_distance, *tables, seed=1) != narrow
    for wrong in ({"level": 1.0}, {"halves": 9}, {"halves": 6}):
        with pytest.raises(InputError):
            half_sample_interval(kernel_distance, *tables, **wrong)


@pytest.mark.parametrize("rows", [10, 11])
def test_halves_share_no_row(rows):
    x = torch.arange(rows, dtype=torch.float64)[:, None]
    a, b = random_halves(x, 0, "test")
    assert len(a) == len(b) == rows // 2
    assert not set(a.flatten().tolist()) & set(b.flatten().tolist())


@pytest.mark.parametrize(
    ("shift", "scale", "population"), [(0.0, 1.0, 0.0), (0.3, 1.5, 2.88 + 8.0), (1.0, 1.0, 32.0)]
)
def test_extrapolation_takes_the_bias_off(shift, scale, population):
    found = [extrapolate(frechet_distance, *pair_of_tables(i, shift, scale), seed=i).value for i in range(20)]
    plain = [frechet_distance(*pair_of_tables(i, shift, scale)) for i in range(20)]
    error = np.std(found) / math.sqrt(20)
    assert np.mean(found) == pytest.approx(population, abs=4 * error)
    assert np.mean(plain) > population + 8 * np.std(plain) / math.sqrt(20)


def test_extrapolation_of_a_straight_line_is_exact():
    def distance(real, fake):
        return 5 + 100 / len(real)

    found = extrapolate(distance, random_features(160, 2), random_features(160, 2), sizes=5)
    assert found.value == pytest.approx(5, abs=1e-9)
    assert [share for share, _ in found.points] == [0.25, 0.4375, 0.625, 0.8125, 1.0]
    with pytest.raises(InputError, match=r"sizes must be at least 3 .* got 2"):
        extrapolate(distance, random_features(160, 2), random_features(160, 2), sizes=2)


# The table

ROWS = {"real": random_features(40, 5), "fake": random_features(30, 5, seed=1, offset=3.0)}


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_of_the_table_is_scored_named_and_described(name):
    metric = METRICS[name]
    found = score(ROWS["real"], ROWS["fake"], replace(PROTOCOLS["clean"], metrics=(name,)))
    assert (found.metric, list(found.values)) == (name, [name])
    assert math.isfinite(found.value)
    assert metric.summary
    assert (found.floor is not None, found.infinity is not None) == (metric.is_distance, metric.is_distance)
    if metric.is_distance:
        assert metric.compute(ROWS["real"], ROWS["real"], PROTOCOLS["clean"]) < found.value
    if metric.is_frechet:
        moments = Statistics(ROWS["fake"].mean(0), torch.cov(ROWS["fake"].T))
        one = score_statistics(ROWS["real"], moments, replace(PROTOCOLS["clean"], metrics=(name,)))
        assert one.value == pytest.approx(found.value, rel=1e-9)


def test_one_entry_makes_a_metric(monkeypatch):
    """Protocols, scores, report and their errors read the table."""
    with pytest.raises(InputError, match="metrics is 'gap'"):
        replace(PROTOCOLS["clean"], metrics=("gap",))
    gap = Metric(lambda real, fake, protocol: float((real.mean() - fake.mean()).abs()), "difference of means")
    monkeypatch.setitem(METRICS, "gap", gap)
    scores = score(ROWS["real"], ROWS["fake"], replace(PROTOCOLS["clean"], metrics=("gap", "fvd")))
    assert (scores.metric, list(scores.values)) == ("gap", ["gap", "fvd"])
    assert scores.floor is not None
    assert "difference of means" in "".join(headline(scores, "mine"))
    with pytest.raises(InputError, match=r"fvd, .*, gap"):
        replace(PROTOCOLS["clean"], metrics=("xyz",))


def test_a_value_that_is_not_finite_is_refused_by_metric():
    huge = random_features(20, 3) * 1e200
    for name in ("fvd", "kvd", "jedi"):
        with pytest.raises(InputError, match="too large for float64"):
            score(huge, 2 * huge, replace(PROTOCOLS["clean"], metrics=(name,)))
