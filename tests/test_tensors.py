# SPDX-License-Identifier: Apache-2.0
"""Networks without memory have the names and shapes of real ones, and only their own random numbers are
skipped.
"""

import torch
from torch import nn

from latte.tensors import without_memory


def shapes(network: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def make() -> nn.Module:
    return nn.Sequential(nn.Embedding(3, 4), nn.Linear(4, 5), nn.Conv2d(1, 2, 3), nn.LayerNorm(5))


def test_a_network_without_memory_has_names_and_shapes():
    before = torch.random.get_rng_state()
    with without_memory():
        network = make()
    assert all(tensor.is_meta for tensor in network.state_dict().values())
    assert shapes(network) == shapes(make())
    with torch.random.fork_rng():
        torch.random.set_rng_state(before)
        expected = torch.rand(3)
    torch.random.set_rng_state(before)
    with without_memory():
        make()
    assert torch.equal(torch.rand(3), expected), "building without memory has drawn random numbers"


def test_tensors_with_memory_are_filled_as_usual():
    with without_memory():
        filled = [
            torch.zeros(50, device="cpu").normal_(),
            torch.zeros(50, device="cpu").uniform_(),
            nn.init.normal_(torch.zeros(50, device="cpu")),
            nn.init.kaiming_uniform_(torch.zeros(5, 5, device="cpu")),
        ]
    assert [tensor.unique().numel() > 1 for tensor in filled] == [True] * 4
