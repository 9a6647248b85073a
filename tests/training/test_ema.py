# SPDX-License-Identifier: Apache-2.0
"""Laws of the average of the weights."""

import pytest
import torch
from support import noise
from torch import nn

from latte.training.optim import EMA


def layer() -> nn.Module:
    model = nn.Linear(3, 2)
    model.register_buffer("table", torch.arange(3.0))
    model.bias.requires_grad_(False)
    with torch.no_grad():
        model.weight.copy_(noise(2, 3))
        model.bias.copy_(noise(2, seed=1))
    return model


def walk(model: nn.Module, ema: EMA, steps: range) -> list[torch.Tensor]:
    """Put new weights in, step after step; all the weights seen, in float64."""
    seen = []
    for step in steps:
        with torch.no_grad():
            model.weight.copy_(noise(2, 3, seed=step))
        ema.update(step)
        seen.append(model.weight.detach().double())
    return seen


def test_it_starts_as_a_copy_of_its_own():
    model = layer()
    ema = EMA(model, 0.9999)
    assert not ema.model.training
    assert not any(parameter.requires_grad for parameter in ema.model.parameters())
    for (name, mine), theirs in zip(ema.model.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs)
        assert (mine.data_ptr() == theirs.data_ptr()) == (name == "bias"), "what is frozen is in memory once"


@pytest.mark.parametrize("decay", [0.0, 0.9, 0.9999])
def test_it_is_the_geometric_mean_of_the_past(decay):
    """ema_n = decay^n w_0 + (1 - decay) sum_k decay^(n-k) w_k, in float64."""
    model = layer()
    ema = EMA(model, decay)
    first = model.weight.detach().double()
    seen = walk(model, ema, range(2, 22))
    expected = decay ** len(seen) * first + (1 - decay) * sum(
        decay ** (len(seen) - k) * w for k, w in enumerate(seen, 1)
    )
    torch.testing.assert_close(ema.model.weight.double(), expected, rtol=0, atol=3e-6)


def test_what_is_not_trained_stays_as_it_was():
    model = layer()
    ema = EMA(model, 0.5)
    bias = model.bias.clone()
    with torch.no_grad():
        model.table.add_(1)
    walk(model, ema, range(2, 5))
    assert torch.equal(ema.model.bias, bias)
    assert torch.equal(ema.model.table, torch.arange(3.0))


def test_going_on_from_its_state_is_bit_for_bit_never_stopping():
    model, other = layer(), layer()
    ema, again = EMA(model, 0.9), EMA(other, 0.9)
    walk(model, ema, range(2, 7))
    other.load_state_dict(model.state_dict())
    again.model.load_state_dict(ema.model.state_dict())
    walk(model, ema, range(7, 12))
    walk(other, again, range(7, 12))
    assert torch.equal(ema.model.weight, again.model.weight)


@pytest.mark.parametrize("decay", [0.9999, 0.5])
def test_a_warm_up_lets_go_of_the_fresh_weights(decay):
    """The decay of step n is (1 + n) / (10 + n) until that reaches ``decay``: 2/11 at the first step, 0.5
    from the eighth on.
    """
    model = layer()
    ema = EMA(model, decay, warmup=True)
    expected = model.weight.detach().double()
    for step in range(1, 31):
        (weight,) = walk(model, ema, range(step, step + 1))
        share = min(decay, (1 + step) / (10 + step))
        expected = share * expected + (1 - share) * weight
    torch.testing.assert_close(ema.model.weight.double(), expected, rtol=0, atol=3e-6)
