# SPDX-License-Identifier: Apache-2.0
"""Every objective against the slow float64 version, and the laws of the bound."""

import itertools
import math

import pytest
import torch
from reference.diffusion import betas, clip_loss
from support import noise

from latte.diffusion.config import DiffusionConfig, build_process
from latte.diffusion.loss import OBJECTIVES, UNIFORM, bound, discretised_log_likelihood, gaussian_kl, min_snr
from latte.diffusion.schedules import SCHEDULES
from latte.runtime import generator

SHAPE = (2, 3, 2, 2)
CONFIGS = [
    pair for pair in itertools.product(OBJECTIVES, SCHEDULES) if pair != ("rectified_flow", "squared_cosine")
]
STEPS = torch.tensor([0, 1, 30, 99])


def answer(zt):
    """A model's prediction that differs from the truth everywhere, in tensors or floats."""
    return 0.8 * zt + 0.1


def batch(seed=0, dtype=torch.float64):
    z0 = 0.6 * noise(4, *SHAPE, seed=seed, dtype=dtype)
    z0[0, 0, 0] = torch.tensor(
        [[1.2, -1.3], [0.9999, 0.0]]
    )  # the open outer bins of the discretised likelihood at t = 0
    return z0, noise(4, *SHAPE, seed=seed + 1, dtype=dtype), noise(4, *SHAPE, seed=seed + 2, dtype=dtype)


@pytest.mark.parametrize(("objective", "schedule"), CONFIGS)
@pytest.mark.parametrize("learn_sigma", [True, False])
def test_loss_is_the_slow_one(objective, schedule, learn_sigma):
    process = build_process(DiffusionConfig(schedule=schedule, num_steps=100, objective=objective))
    z0, eps, v = batch()

    def denoise(zt, t):
        assert torch.equal(t, STEPS)
        return torch.cat([answer(zt), v], 2) if learn_sigma else answer(zt)

    loss = OBJECTIVES[objective](denoise, process, z0, STEPS, eps)
    for row, t in enumerate(STEPS.tolist()):
        variance = v[row].flatten().tolist() if learn_sigma else None
        slow = clip_loss(
            objective,
            betas(schedule, 100),
            t,
            z0[row].flatten().tolist(),
            eps[row].flatten().tolist(),
            lambda zt: [answer(z) for z in zt],
            variance,
        )
        for ours, expected in zip((loss.total, loss.mse, loss.vlb), slow, strict=True):
            assert ours.dtype == torch.float64
            assert ours[row].item() == pytest.approx(expected, rel=1e-10, abs=1e-10)
    assert (loss.vlb > 0).any() == (learn_sigma and objective != "rectified_flow")


@pytest.mark.parametrize("objective", ["paper", "v", "min_snr"])
def test_the_bound_trains_the_variance_channels_alone(objective):
    process = build_process(DiffusionConfig(objective=objective))
    z0, eps, v = batch()
    output = torch.cat([eps, v], 2).requires_grad_()
    t = torch.tensor([0, 1, 500, 999])
    loss = OBJECTIVES[objective](lambda zt, t: output, process, z0, t, eps)
    prediction, variance = torch.autograd.grad(loss.vlb.sum(), output, retain_graph=True)[0].split(3, 2)
    assert not prediction.any()
    assert variance.flatten(1).any(1).all()
    prediction, variance = torch.autograd.grad(loss.mse.sum(), output)[0].split(3, 2)
    assert not variance.any()
    assert prediction.any() == (objective == "v")  # the epsilon models were given the exact answer


def test_the_bound_is_zero_for_the_true_posterior_only():
    process = build_process(DiffusionConfig())
    z0, eps, _ = batch()
    t = torch.tensor([1, 5, 500, 999])
    zt = process.add_noise(z0, t, eps)
    low = torch.cat([eps, -torch.ones_like(eps)], 2)  # exact noise, variance of the posterior
    torch.testing.assert_close(
        bound(process, low, z0, zt, t), torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-9
    )
    assert (bound(process, torch.cat([eps + 0.1, -torch.ones_like(eps)], 2), z0, zt, t) > 1e-6).all()
    assert (
        bound(process, torch.cat([eps, 3 * torch.ones_like(eps)], 2), z0, zt, t) > 1e-13
    ).all()  # beta is almost the posterior at 999


def test_kl_is_torchs():
    a, b, c, d = (noise(50, seed=i, dtype=torch.float64) for i in range(4))
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(a, torch.exp(b / 2)), normal(c, torch.exp(d / 2)))
    torch.testing.assert_close(gaussian_kl(a, b, c, d), expected)


def test_the_discretised_likelihood_sums_to_one_over_the_bins():
    bins = torch.linspace(-1, 1, 256, dtype=torch.float64)
    for mean, log_variance in itertools.product((-0.9, 0.1, 1.5), (-6.0, -1.0, 2.0)):
        log_mass = discretised_log_likelihood(bins, torch.tensor(mean), torch.tensor(log_variance))
        assert log_mass.exp().sum().item() == pytest.approx(1, abs=1e-6)
    sharp = discretised_log_likelihood(bins[100:101], torch.tensor(0.9), torch.tensor(-12.0))
    assert sharp.item() == pytest.approx(math.log(1e-12))


def test_timesteps_are_uniform_and_a_function_of_the_generator():
    process = build_process(DiffusionConfig(num_steps=50))
    t = UNIFORM(process, 50_000, generator(0, "t"))
    assert torch.equal(t, UNIFORM(process, 50_000, generator(0, "t")))
    assert t.dtype == torch.int64
    counts = torch.bincount(t, minlength=50)
    assert len(counts) == 50
    assert ((counts - 1000.0) ** 2 / 1000).sum() < 95  # chi-square with 49 degrees of freedom: 1 in 10,000


def test_min_snr_weight_falls_towards_clean_data_and_is_one_in_noise():
    process = build_process(DiffusionConfig(objective="min_snr"))
    weight = min_snr(process, torch.arange(1000), torch.zeros(1, 1, 1, 1, 1, dtype=torch.float64))
    snr = process.alphas_cumprod / (1 - process.alphas_cumprod)
    torch.testing.assert_close(weight, torch.minimum(snr, torch.tensor(5.0, dtype=torch.float64)) / snr)
    assert (weight.diff() >= 0).all()
    assert weight[-1] == 1
    assert weight[0] < 0.001


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_clips_loss_does_not_depend_on_its_batch(objective):
    process = build_process(DiffusionConfig(num_steps=100, objective=objective))
    z0, eps, _ = batch(dtype=torch.float32)

    def denoise(zt, t):
        return torch.cat([answer(zt), torch.tanh(zt)], 2)

    together = OBJECTIVES[objective](denoise, process, z0, STEPS, eps)
    for row in range(4):
        alone = OBJECTIVES[objective](
            denoise, process, z0[row : row + 1], STEPS[row : row + 1], eps[row : row + 1]
        )
        assert torch.equal(torch.cat(alone), torch.stack([part[row] for part in together]))


def test_half_precision_answers_are_judged_in_float32():
    process = build_process(DiffusionConfig())
    z0, eps, v = batch(dtype=torch.float32)
    output = torch.cat([eps, v], 2).bfloat16()
    loss = OBJECTIVES["paper"](lambda zt, t: output, process, z0, STEPS, eps)
    full = OBJECTIVES["paper"](lambda zt, t: output.float(), process, z0, STEPS, eps)
    assert all(torch.equal(a, b) and a.dtype == torch.float32 for a, b in zip(loss, full, strict=True))


def test_the_model_gets_original_timesteps():
    process = build_process(DiffusionConfig()).respaced("50")
    timesteps = []
    z0, eps, _ = batch()
    OBJECTIVES["paper"](
        lambda zt, t: timesteps.append(t) or zt, process, z0, torch.tensor([0, 1, 2, 49]), eps
    )
    assert timesteps[0].tolist() == [0, 20, 41, 999]


def test_an_objective_never_meets_a_process_of_another_prediction():
    z0, eps, _ = batch()
    with pytest.raises(AssertionError, match="predicts epsilon"):
        OBJECTIVES["v"](lambda zt, t: zt, build_process(DiffusionConfig()), z0, STEPS, eps)
