# SPDX-License-Identifier: Apache-2.0
"""Parameters and operations.

The paper's Tables 3 and 4 to the last digit, and the true cost against a count by hand.
"""

import math

import pytest
import torch

from latte.model.latte import Latte, ModelConfig
from latte.profile.flops import count, table3

PARAMETERS = {"S": 32_480_672, "B": 129_547_040, "L": 456_815_648, "XL": 673_681_568}
PRINTED = {"S": 32.48, "B": 129.54, "L": 456.81, "XL": 673.68}  # Table 4, truncated


@pytest.mark.parametrize("size", PARAMETERS)
def test_table_4(size):
    cost = table3(ModelConfig(size=size))
    assert cost.parameters == PARAMETERS[size] == count(ModelConfig(size=size)).parameters
    assert math.floor(cost.parameters / 1e4) / 100 == PRINTED[size]


@pytest.mark.parametrize(
    ("changes", "parameters", "operations", "printed"),
    [
        ({"variant": 1}, 673_681_568, 5572.695048, (673.68, 5572.69)),
        ({"variant": 2}, 673_681_568, 5572.695048, (673.68, 5572.69)),
        ({"variant": 3, "learn_sigma": False}, 676_336_912, 6153.152643, (676.33, 6153.15)),
        ({"variant": 4, "learn_sigma": False, "patch_size": 4}, 676_447_552, 1545.157362, (676.44, 1545.15)),
        ({"variant": 3}, 676_355_360, 6153.379135, None),
        ({"variant": 4, "learn_sigma": False}, 676_336_912, 6152.501477, None),
        ({"patch_size": 4}, 673_847_552, 1397.795734, None),
        ({"patch_size": 8}, 674_511_488, 354.070905, None),
        ({"size": "S"}, 32_480_672, 265.728246, None),
        ({"size": "B"}, 129_547_040, 1061.987549, None),
        ({"size": "L"}, 456_815_648, 3774.399382, None),
    ],
)
def test_table_3(changes, parameters, operations, printed):
    cost = table3(ModelConfig(**changes))
    assert cost.parameters == parameters
    assert round(cost.operations_g, 6) == operations
    if printed:
        assert (math.floor(cost.parameters / 1e4) / 100, math.floor(cost.operations_g * 100) / 100) == printed


def test_classes_add_a_row_each_and_one_for_null():
    assert count(ModelConfig(num_classes=101)).parameters == PARAMETERS["XL"] + 102 * 1152
    assert table3(ModelConfig(num_classes=101)) == table3(ModelConfig())


def test_exact_operations_by_hand():
    depth, width, frames, positions = 12, 384, 16, 256
    tokens = frames * positions
    linear = 24 * depth * width**2 * tokens
    attention = 2 * depth * width * tokens * (positions + frames)
    patches = 2 * tokens * width * (16 + 32)
    condition = 2 * (6 * depth * width**2 + 256 * width + width**2 + 2 * width**2)
    assert count(ModelConfig(size="S")).operations == linear + attention + patches + condition


def test_the_count_is_of_the_model_that_is_built():
    config = ModelConfig(
        depth=2, width=16, heads=2, num_classes=3, patch="compression", num_frames=4, latent_size=8
    )
    assert count(config).parameters == sum(p.numel() for p in Latte(config).parameters())
    assert not any(isinstance(b, torch.Tensor) for b in Latte(config).buffers())
    assert table3(config).operations_g > 0
