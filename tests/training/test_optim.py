# SPDX-License-Identifier: Apache-2.0
"""AdamW and the EMA against formulas in float64, the learning rate, clipping, the guard, and optimizer
states.
"""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import noise
from torch import nn

from latte.checkpoint.run import load_checkpoint
from latte.checks import InputError, RunError
from latte.distributed import Group
from latte.training.config import learning_rate
from latte.training.optim import (
    EMA,
    OPTIMIZERS,
    FiniteGuard,
    OptimizerKind,
    TrainState,
    build_optimizer,
    clip_gradients,
    load_optimizer_tensors,
    optimizer_tensors,
)
from tiny_runs import SHORT, TINY, run


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


def test_frozen_parameters_are_not_the_trained():
    model = layer()
    model.bias.requires_grad_(False)
    assert [len(group["params"]) for group in build_optimizer(model, 1e-3, 0.0).param_groups] == [1]


def test_the_learning_rate_rises_in_a_line_and_stays():
    assert [learning_rate(step, 2.0, 4) for step in range(1, 7)] == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]
    assert learning_rate(1, 2.0, 0) == 2.0


def test_the_learning_rate_falls_at_the_end_and_never_reaches_zero():
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
def test_a_nan_or_inf_never_reaches_weights_or_average(bad, place):
    state = TrainState(layer(), 1e-2, 0.0, 0.9)
    losses = torch.zeros(3)
    for step in (1, 2):
        with_gradient(state.model, step)
        state.update(step, losses, 1e-2, 0.1, Group())
    before = {
        group: {key: value.clone() for key, value in part.items()} for group, part in state.parts().items()
    }
    with_gradient(state.model, 3)
    if place == "loss":
        losses[0] = bad
    else:
        state.model.weight.grad[1, 2] = bad
    with pytest.raises(RunError, match="loss or gradient of step 3 is NaN or Inf"):
        state.update(3, losses, 1e-2, 0.1, Group())
    for group, part in state.parts().items():
        assert all(torch.equal(value, before[group][key]) for key, value in part.items())


def test_a_guard_that_must_not_wait_keeps_the_first_bad_step_until_it_is_asked():
    guard = FiniteGuard(torch.device("cpu"), immediate=False)
    for step, value in enumerate([1.0, float("inf"), 2.0, float("nan")], 1):
        guard.watch(step, torch.tensor([0.0, value]))
        if step == 1:
            guard.check()
    with pytest.raises(RunError, match="step 2 "):
        guard.check()


def frozen_layer() -> nn.Module:
    model = nn.Linear(3, 2)
    model.register_buffer("table", torch.arange(3.0))
    model.bias.requires_grad_(False)
    with torch.no_grad():
        model.weight.copy_(noise(2, 3))
        model.bias.copy_(noise(2, seed=1))
    return model


def update_weights(model: nn.Module, ema: EMA, steps: range) -> list[torch.Tensor]:
    """Put new weights in, step after step; all the weights seen, in float64."""
    seen = []
    for step in steps:
        with torch.no_grad():
            model.weight.copy_(noise(2, 3, seed=step))
        ema.update(step)
        seen.append(model.weight.detach().double())
    return seen


def test_it_starts_as_a_copy_of_its_own():
    model = frozen_layer()
    ema = EMA(model, 0.9999)
    assert not ema.model.training
    assert not any(parameter.requires_grad for parameter in ema.model.parameters())
    for (name, copied), original in zip(
        ema.model.state_dict().items(), model.state_dict().values(), strict=True
    ):
        assert torch.equal(copied, original)
        assert (copied.data_ptr() == original.data_ptr()) == (name == "bias"), (
            "what is frozen is in memory once"
        )


@pytest.mark.parametrize("decay", [0.0, 0.9, 0.9999])
def test_it_is_the_geometric_mean_of_the_past(decay):
    """ema_n = decay^n w_0 + (1 - decay) sum_k decay^(n-k) w_k, in float64."""
    model = frozen_layer()
    ema = EMA(model, decay)
    first = model.weight.detach().double()
    seen = update_weights(model, ema, range(2, 22))
    expected = decay ** len(seen) * first + (1 - decay) * sum(
        decay ** (len(seen) - k) * w for k, w in enumerate(seen, 1)
    )
    torch.testing.assert_close(ema.model.weight.double(), expected, rtol=0, atol=3e-6)


def test_what_is_not_trained_stays_as_it_was():
    model = frozen_layer()
    ema = EMA(model, 0.5)
    bias = model.bias.clone()
    with torch.no_grad():
        model.table.add_(1)
    update_weights(model, ema, range(2, 5))
    assert torch.equal(ema.model.bias, bias)
    assert torch.equal(ema.model.table, torch.arange(3.0))


def test_resuming_from_its_state_is_bit_for_bit_never_stopping():
    model, other = frozen_layer(), frozen_layer()
    ema, again = EMA(model, 0.9), EMA(other, 0.9)
    update_weights(model, ema, range(2, 7))
    other.load_state_dict(model.state_dict())
    again.model.load_state_dict(ema.model.state_dict())
    update_weights(model, ema, range(7, 12))
    update_weights(other, again, range(7, 12))
    assert torch.equal(ema.model.weight, again.model.weight)


@pytest.mark.parametrize("decay", [0.9999, 0.5])
def test_a_warm_up_lets_go_of_the_fresh_weights(decay):
    """The decay of step n is (1 + n) / (10 + n) until that reaches ``decay``: 2/11 at the first step, 0.5
    from the eighth on.
    """
    model = frozen_layer()
    ema = EMA(model, decay, warmup=True)
    expected = model.weight.detach().double()
    for step in range(1, 31):
        (weight,) = update_weights(model, ema, range(step, step + 1))
        share = min(decay, (1 + step) / (10 + step))
        expected = share * expected + (1 - share) * weight
    torch.testing.assert_close(ema.model.weight.double(), expected, rtol=0, atol=3e-6)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_resumes_bit_for_bit(tmp_path, optimizer):
    config = replace(SHORT, optimizer=optimizer, steps=8, lr=1e-2, warmup_steps=0)
    whole = run(tmp_path / "whole", config)
    for steps in (3, 8):
        parts = run(tmp_path / "parts", replace(config, steps=steps))
    assert parts["weights_sha256"] == whole["weights_sha256"]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_minimises_a_quadratic(optimizer):
    model: Any = nn.Module()
    model.blocks = nn.ModuleList([layer()])
    model.head = layer()
    built = build_optimizer(model, 5e-2, 0.0, optimizer)
    losses = []
    for _ in range(200):
        loss = sum(parameter.square().sum() for parameter in model.parameters())
        losses.append(loss.item())
        built.zero_grad()
        loss.backward()
        built.step()
    assert losses[-1] < 0.1 * losses[0]


def test_another_optimizer_is_refused_on_resume_and_an_unknown_one_with_the_names(tmp_path):
    run(tmp_path, replace(SHORT, steps=2))
    with pytest.raises(InputError, match=r'train\.optimizer: the run has "adamw", you gave "adafactor"'):
        run(tmp_path, replace(SHORT, optimizer="adafactor"))
    with pytest.raises(InputError, match=r"train\.optimizer is 'adam', which is not one of adamw, adafactor"):
        replace(SHORT, optimizer="adam")


def test_the_default_optimizer_leaves_no_trace_in_a_checkpoint(tmp_path):
    """So that runs of 0.1.0, which had no other, resume."""
    saved = run(tmp_path, replace(SHORT, steps=1))["checkpoint"]
    assert load_checkpoint(Path(saved)).state["facts"]["train"] == {"global_batch": 4}


def test_an_optimizer_of_a_users_own_needs_one_entry_of_the_table(tmp_path, monkeypatch):
    from latte.profile.memory import states

    kind = OptimizerKind(
        lambda parameters, lr, decay: torch.optim.SGD(parameters.values(), lr), lambda name, shape: 0
    )
    monkeypatch.setitem(OPTIMIZERS, "sgd", kind)
    assert run(tmp_path, replace(SHORT, optimizer="sgd", steps=2))["step"] == 2
    assert states(TINY, optimizer="sgd").optimizer == 0
