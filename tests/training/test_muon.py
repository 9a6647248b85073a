# SPDX-License-Identifier: Apache-2.0
"""Muon against a Newton-Schulz iteration in float64, AdamW for the other parameters, and which are which."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from support import noise
from torch import nn

from latte.checks import InputError
from latte.model.latte import Latte
from latte.model.text import LatteText, TextConfig
from latte.training.muon import is_block_matrix, is_branch_matrix
from latte.training.optim import build_optimizer
from tiny_runs import TINY


def two_parts() -> Any:
    """A model with a matrix inside a block and one outside."""
    model: Any = nn.Module()
    model.blocks = nn.ModuleList([nn.Linear(6, 16)])
    model.head = nn.Linear(6, 4)
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.copy_(noise(*parameter.shape, seed=number))
    return model


def give_gradients(model: nn.Module, step: int) -> None:
    for number, parameter in enumerate(model.parameters()):
        parameter.grad = noise(*parameter.shape, seed=100 * step + number)


def newton_schulz(matrix: torch.Tensor) -> torch.Tensor:
    """Five steps of x <- a x + b (x x') x + c (x x')^2 x, in float64 (Jordan et al. 2024)."""
    x = matrix.double() / matrix.double().norm()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x - 4.7750 * gram @ x + 2.0315 * gram @ gram @ x
    return x


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_a_block_matrix_takes_orthogonal_steps_of_adamws_size(weight_decay):
    model = two_parts()
    optimizer = build_optimizer(model, 1e-2, weight_decay, "muon")
    weight = model.blocks[0].weight.detach().double()
    momentum = torch.zeros(16, 6, dtype=torch.float64)
    for step in range(1, 5):
        give_gradients(model, step)
        gradient = model.blocks[0].weight.grad.double()
        optimizer.step()
        momentum = 0.95 * momentum + 0.05 * gradient
        direction = newton_schulz(0.05 * gradient + 0.95 * momentum)
        weight = weight * (1 - 1e-2 * weight_decay) - 1e-2 * 0.2 * 16**0.5 * direction
    # 4 steps of 0.008 x a matrix with entries of about 0.3, each known to bfloat16's 1 %
    torch.testing.assert_close(model.blocks[0].weight.double(), weight, rtol=0, atol=4e-4)


def test_everything_else_is_adamws_bit_for_bit():
    model = two_parts()
    other = two_parts()
    pair = build_optimizer(model, 1e-2, 0.1, "muon"), build_optimizer(other, 1e-2, 0.1, "adamw")
    for step in range(4):
        for network, optimizer in zip((model, other), pair, strict=True):
            give_gradients(network, step)
            for settings in optimizer.param_groups:
                settings["lr"] = 1e-2 / (1 + step)
            optimizer.step()
    same = {
        name: torch.equal(parameter, dict(other.named_parameters())[name])
        for name, parameter in model.named_parameters()
    }
    assert same == {"blocks.0.weight": False, "blocks.0.bias": True, "head.weight": True, "head.bias": True}


def test_the_matrices_of_a_class_model_are_those_of_its_blocks():
    model = Latte(replace(TINY, num_classes=3))
    chosen = {name for name, part in model.named_parameters() if is_block_matrix(name, part.shape)}
    linear = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith("blocks.")
    }
    assert chosen == linear
    assert len(chosen) == 5 * TINY.dimensions[0]
    branches = {name for name, part in model.named_parameters() if is_branch_matrix(name, part.shape)}
    assert chosen - branches == {name for name in chosen if name.endswith("modulation.linear.weight")}
    assert len(branches) == 4 * TINY.dimensions[0]


def test_without_adaln_the_modulation_takes_adamws_steps():
    steps = {}
    for name in ("muon", "muon_no_adaln", "adamw"):
        torch.manual_seed(0)
        model = Latte(replace(TINY, num_classes=3))
        give_gradients(model, 1)
        build_optimizer(model, 1e-2, 0.0, name).step()
        steps[name] = model.state_dict()
    modulations = 0
    for name, weight in steps["muon_no_adaln"].items():
        of_modulation = name.startswith("blocks.") and name.endswith("modulation.linear.weight")
        modulations += of_modulation
        expected = steps["adamw" if of_modulation else "muon"][name]
        assert torch.equal(weight, expected), name
        assert torch.equal(weight, steps["muon"][name]) != of_modulation, name
    assert modulations == TINY.dimensions[0]


def test_the_tables_of_a_text_models_blocks_are_no_matrices():
    with torch.device("meta"):
        model = LatteText(TextConfig(depth=1, width=32, heads=2, caption_channels=8))
    chosen = {name for name, part in model.named_parameters() if is_block_matrix(name, part.shape)}
    assert len(chosen) == 4 + 4 + 2 + 4 + 2  # attention, cross-attention and MLP; attention and MLP
    assert all(".table" not in name for name in chosen)


def test_a_model_without_blocks_is_refused():
    with pytest.raises(InputError, match=r"no trainable parameter is a matrix of a block; give train\.optim"):
        build_optimizer(nn.Linear(4, 3), 1e-3, 0.0, "muon")
