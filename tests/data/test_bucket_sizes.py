# SPDX-License-Identifier: Apache-2.0
"""The sizes of auto buckets, against a search over all sizes."""

import itertools
import math

import pytest

from latte.data.bucket_settings import size_near


@pytest.mark.parametrize(
    ("aspect", "pixels", "unit", "size"),
    [
        (1, 256 * 256, 16, (256, 256)),
        (16 / 9, 256 * 256, 16, (192, 336)),
        (9 / 16, 256 * 256, 16, (336, 192)),
        (16 / 9, 96 * 96, 16, (64, 112)),  # not 64 x 144, of all pixels: its aspect is 2.25
        (4 / 3, 96 * 96, 16, (80, 112)),
        (1, 96 * 96, 64, (64, 64)),
        (16, 16 * 16, 16, (16, 16)),
    ],
)
def test_sizes_of_some_budgets(aspect, pixels, unit, size):
    assert size_near(aspect, pixels, unit) == size


def test_the_size_is_the_cheapest_of_all_that_fit():
    for aspect, side, unit in itertools.product((1, 1.3, 1.78, 3.1), (50, 96, 128, 200), (8, 16, 32)):
        pixels = side * side
        sides = range(unit, pixels // unit + 1, unit)
        sizes = [(h, w) for h in sides for w in sides if h <= w and h * w <= pixels]

        def cost(size):
            h, w = size
            return abs(math.log(w / h / aspect)) + (1 - h * w / pixels) / 2  # noqa: B023

        found = size_near(aspect, pixels, unit)
        assert cost(found) == min(map(cost, sizes)), (aspect, side, unit)
        assert size_near(1 / aspect, pixels, unit) == found[::-1]
