# SPDX-License-Identifier: Apache-2.0
"""Memorisation: copies are found, fresh clips give the reference, and sizes of the sets do not decide."""

import math

import pytest
import torch
from torch import Tensor

from latte.checks import InputError
from latte.evaluation.memorisation import SMALLEST, clip_rows, memorisation, nearest
from latte.runtime import generator


def rows(name: str, count: int, width: int = 6) -> Tensor:
    """Rows (count width) of one distribution."""
    return torch.randn(count, width, generator=generator("memorisation test", name))


@pytest.mark.parametrize(("num_train", "num_held_out"), [(40, 40), (200, 20), (20, 200)])
def test_fresh_clips_give_the_reference_whatever_the_sizes(num_train, num_held_out):
    found = memorisation(rows("fresh", 200), rows("train", num_train), rows("held", num_held_out))
    assert found.relative.low < 1 < found.relative.high
    assert found.relative.value == pytest.approx(1, abs=0.12)
    assert "no sign" in found.verdict
    if num_train != num_held_out:
        assert (found.ratio.value < 1) == (num_train > num_held_out), "alone, the ratio follows the sizes"


def test_copies_give_a_ratio_near_zero():
    train = rows("train", 60)
    copies = train[torch.arange(50) % 60]
    found = memorisation(copies, train, rows("held", 30))
    assert found.ratio.value < 1e-4
    assert found.relative.high < 1e-3
    assert found.train == tuple(range(50))
    assert "repeats some" in found.verdict
    noisy = memorisation(copies + 0.05 * rows("noise", 50), train, rows("held", 30))
    assert noisy.relative.high < 0.2
    assert noisy.ratio.low < noisy.ratio.value < noisy.ratio.high


def test_a_few_copies_among_fresh_clips_are_noticed():
    train = rows("train", 60)
    mixed = torch.cat([rows("fresh", 160), train[:40]])
    found = memorisation(mixed, train, rows("held", 60))
    assert found.relative.high < 1
    worst = sorted(range(200), key=lambda index: found.ratios[index])[:40]
    assert set(worst) == set(range(160, 200))


def test_copies_of_held_out_clips_are_far_from_the_training_clips():
    held = rows("held", 60)
    found = memorisation(held[:40], rows("train", 60), held)
    assert found.relative.low > 1
    assert "farther" in found.verdict


def test_numbers_are_those_of_the_formula():
    train = torch.tensor([[0.0], [4.0]])
    held_out = torch.tensor([[1.0], [20.0]])
    fake = torch.tensor([[2.0], [10.0]])
    found = memorisation(fake, train, held_out)
    assert found.train == (0, 1)
    assert found.held_out == (0, 0)
    assert found.ratios == pytest.approx([2 / 1, 6 / 9])
    assert found.ratio.value == pytest.approx(math.sqrt(2 / 1 * 6 / 9))
    assert found.reference.value == pytest.approx(math.sqrt(1 * 16) / math.sqrt(1 * 3))
    assert found.relative.value == pytest.approx(found.ratio.value / found.reference.value)
    assert (found.num_train, found.num_held_out) == (2, 2)
    assert set(found.plain()) == {"ratio", "reference", "relative", "num_train", "num_held_out", "verdict"}


def test_equal_clips_count_as_very_near_and_stay_finite():
    train = torch.zeros(3, 2)
    found = memorisation(torch.zeros(2, 2), train, torch.ones(2, 2))
    assert found.ratio.value == pytest.approx(SMALLEST, rel=1e-6)
    assert found.reference.value == pytest.approx(1)
    same = memorisation(torch.zeros(2, 2), train, torch.zeros(2, 2))
    assert same.ratio.value == same.relative.value == 1


def test_frames_of_a_clip_are_averaged():
    assert clip_rows(torch.tensor([[1.0], [3.0], [5.0], [9.0]]), 2).tolist() == [[2], [7]]
    distances, indices = nearest(torch.tensor([[0.0]]), torch.tensor([[3.0], [1.0]]))
    assert (distances.tolist(), indices.tolist()) == ([1], [1])


def test_false_alarms_are_as_rare_as_the_level_says():
    alarms = 0
    for trial in range(80):
        sets = (rows(f"{name} {trial}", count) for name, count in (("f", 40), ("t", 20), ("h", 8)))
        alarms += memorisation(*sets).relative.high < 1
    assert alarms <= 8, "4 are expected at 5 % on this side"


def test_too_few_clips_are_refused():
    with pytest.raises(InputError, match="at least 2 held-out clips, got 1"):
        memorisation(rows("fake", 5), rows("train", 5), rows("held", 1))
