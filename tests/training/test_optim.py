# SPDX-License-Identifier: Apache-2.0
"""AdamW against the formula in float64, the learning rate, clipping, the guard, and the optimiser's state."""

import math

import pytest
import torch
from support import noise
from torch import nn

from latte.checks import InputError, RunError
from latte.training.config import learning_rate
from latte.training.distributed import Group
from latte.training.optim import (
    FiniteGuard,
    TrainState,
    build_optimizer,
    clip_gradients,
    load_optimizer_tensors,
    optimizer_tensors,
)


def layer() -> nn.Module:
    model = nn.Linear(4, 3)
    with torch.no_grad():
        model.weight.copy_(noise(3, 4))
        model.bias.copy_(noise(3, seed=1))
    return model


def with_gradient(model: nn.Module, step: int) -> nn.Module:
    for number, parameter in enumerate(model.parameters()):
        parameter.grad = noise(*parameter.shape, seed=100 * step + number)
    return model


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_it_is_adam_with_decoupled_weight_decay(weight_decay):
    """Loshchilov & Hutter 2019, algorithm 2, with betas 0.9 and 0.999 and epsilon 1e-8."""
    model = layer()
    optimizer = build_optimizer(model, 1e-2, weight_decay)
    w, m, v = model.weight.detach().double(), torch.zeros(3, 4).double(), torch.zeros(3, 4).double()
    for step in range(1, 8):
        g = with_gradient(model, step).weight.grad.double()
        optimizer.step()
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        w = (
            w
            - 1e-2 * weight_decay * w
            - 1e-2 * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
        )
    torch.testing.assert_close(model.weight.double(), w, rtol=0, atol=1e-6)


def test_frozen_parameters_are_not_the_optimisers_business():
    model = layer()
    model.bias.requires_grad_(False)
    assert [len(group["params"]) for group in build_optimizer(model, 1e-3, 0.0).param_groups] == [1]


def test_the_rate_rises_in_a_line_and_stays():
    assert [learning_rate(step, 2.0, 4) for step in range(1, 7)] == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]
    assert learning_rate(1, 2.0, 0) == 2.0


def test_the_rate_falls_at_the_end_and_never_reaches_zero():
    rates = [learning_rate(step, 8.0, 2, decay_steps=3, steps=8) for step in range(1, 9)]
    assert rates == [4.0, 8.0, 8.0, 8.0, 8.0, 6.0, 4.0, 2.0]
    assert all(learning_rate(step, 1.0, 5, decay_steps=20, steps=8) > 0 for step in range(1, 9))


def test_clipping_scales_the_whole_gradient_and_reports_the_norm_before():
    model = with_gradient(layer(), 1)
    before = [parameter.grad.clone() for parameter in model.parameters()]
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in before))
    assert clip_gradients(model.parameters(), None).item() == pytest.approx(norm)
    assert all(
        torch.equal(parameter.grad, old) for parameter, old in zip(model.parameters(), before, strict=True)
    )
    assert clip_gradients(model.parameters(), 2 * norm).item() == pytest.approx(norm)
    assert all(
        torch.equal(parameter.grad, old) for parameter, old in zip(model.parameters(), before, strict=True)
    )
    assert clip_gradients(model.parameters(), 0.1).item() == pytest.approx(norm)
    for parameter, old in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(parameter.grad, old * 0.1 / norm, rtol=1e-5, atol=0)


def test_the_optimisers_state_goes_through_its_tensors_bit_for_bit():
    model, other = layer(), layer()
    optimizer, again = build_optimizer(model, 1e-2, 0.0), build_optimizer(other, 1e-2, 0.0)
    for step in range(3):
        with_gradient(model, step)
        optimizer.step()
    saved = {key: value.clone() for key, value in optimizer_tensors(model, optimizer).items()}
    assert set(saved) == {
        f"{name}:{what}" for name in ("weight", "bias") for what in ("step", "exp_avg", "exp_avg_sq")
    }
    other.load_state_dict(model.state_dict())
    load_optimizer_tensors(other, again, saved)
    for step in range(3, 6):
        with_gradient(model, step), with_gradient(other, step)
        optimizer.step(), again.step()
    assert torch.equal(model.weight, other.weight)
    assert torch.equal(model.bias, other.bias)


@pytest.mark.parametrize("change", [{"head:exp_avg": torch.zeros(3)}, {"weight:exp_avg": torch.zeros(4, 4)}])
def test_another_models_state_is_refused(change):
    model = layer()
    with pytest.raises(InputError, match="does not fit this model"):
        load_optimizer_tensors(model, build_optimizer(model, 1e-2, 0.0), change)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", ["loss", "gradient"])
def test_a_number_that_is_none_never_reaches_weights_or_average(bad, place):
    learner = TrainState(layer(), 1e-2, 0.0, 0.9)
    losses = torch.zeros(3)
    for step in (1, 2):
        with_gradient(learner.model, step)
        learner.update(step, losses, 1e-2, 0.1, Group())
    before = {
        group: {key: value.clone() for key, value in part.items()}
        for group, part in learner.tensors().items()
    }
    with_gradient(learner.model, 3)
    if place == "loss":
        losses[0] = bad
    else:
        learner.model.weight.grad[1, 2] = bad
    with pytest.raises(RunError, match="loss or gradient of step 3 is NaN or Inf"):
        learner.update(3, losses, 1e-2, 0.1, Group())
    for group, part in learner.tensors().items():
        assert all(torch.equal(value, before[group][key]) for key, value in part.items())


def test_a_guard_that_must_not_wait_keeps_the_first_bad_step_until_it_is_asked():
    guard = FiniteGuard(torch.device("cpu"), immediate=False)
    for step, value in enumerate([1.0, float("inf"), 2.0, float("nan")], 1):
        guard.watch(step, torch.tensor([0.0, value]))
        if step == 1:
            guard.check()
    with pytest.raises(RunError, match="step 2 "):
        guard.check()
