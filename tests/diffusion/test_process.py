# SPDX-License-Identifier: Apache-2.0
"""The process against published constants, Bayes by brute force, diffusers and the released respacing."""

import math
import pickle

import pytest
import torch
from reference.diffusion import bayes, betas, remaining
from support import noise

from latte.checks import InputError
from latte.diffusion.config import DiffusionConfig, build_process
from latte.diffusion.process import PREDICTIONS, Process
from latte.diffusion.schedules import SCHEDULES, spaced_timesteps, trailing_timesteps

PAPER = build_process(DiffusionConfig())


def test_constants_of_the_paper():
    assert (
        PAPER.betas.dtype == PAPER.alphas_cumprod.dtype == PAPER.posterior_log_variance.dtype == torch.float64
    )
    assert PAPER.betas[0].item() == 1e-4
    assert PAPER.alphas_cumprod[0].item() == pytest.approx(0.9999, rel=1e-14)
    assert PAPER.alphas_cumprod[499].item() == pytest.approx(0.07858724288, rel=1e-9)
    assert PAPER.alphas_cumprod[999].item() == pytest.approx(4.035829765e-5, rel=1e-9)
    assert PAPER.posterior_variance[0].item() == 0
    assert (
        PAPER.posterior_log_variance[0].item()
        == PAPER.posterior_log_variance[1].item()
        == pytest.approx(-9.81672514, rel=1e-9)
    )


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("num_steps", [40, 1000])
def test_schedules_agree_with_the_formulas(schedule, num_steps):
    process = build_process(DiffusionConfig(schedule=schedule, num_steps=num_steps))
    slow = betas(schedule, num_steps)
    torch.testing.assert_close(process.betas, torch.tensor(slow, dtype=torch.float64), rtol=1e-10, atol=0)
    assert process.alphas_cumprod[-1].item() == pytest.approx(remaining(slow, num_steps - 1), rel=1e-9)
    assert (process.betas.diff() > 0).all() or schedule == "squared_cosine"
    assert (process.alphas_cumprod.diff() < 0).all()


def test_add_noise_has_the_moments_of_the_chain():
    """Iterating z_t = sqrt(1 - beta) z_t-1 + sqrt(beta) n gives add_noise's mean and variance."""
    mean, variance = 1.0, 0.0
    one, none = (
        torch.ones(1, 1, 1, 1, 1, dtype=torch.float64),
        torch.zeros(1, 1, 1, 1, 1, dtype=torch.float64),
    )
    for t in range(1000):
        beta = PAPER.betas[t].item()
        mean, variance = math.sqrt(1 - beta) * mean, (1 - beta) * variance + beta
        at = torch.tensor([t])
        assert PAPER.add_noise(one, at, none).item() == pytest.approx(mean, rel=1e-9)
        assert PAPER.add_noise(none, at, one).item() ** 2 == pytest.approx(variance, rel=1e-9)


@pytest.mark.parametrize("t", [1, 20, 500, 999])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_posterior_is_bayes(t, schedule):
    process = build_process(DiffusionConfig(schedule=schedule))
    z0, zt = 0.7, 0.7 * process.signal[t].item() - 0.4 * process.noise[t].item()
    mean, variance = bayes(betas(schedule, 1000), t, z0, zt)
    at = process.posterior(
        *torch.tensor([z0, zt], dtype=torch.float64).view(2, 1, 1, 1, 1, 1), torch.tensor([t])
    )
    assert at.mean.item() == pytest.approx(mean, rel=1e-6)
    assert at.variance.item() == pytest.approx(variance, rel=1e-5)
    assert at.log_variance.item() == pytest.approx(math.log(variance), rel=1e-5)


@pytest.mark.parametrize(
    ("dtype", "gives"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
)
def test_tables_change_precision_only_on_output(dtype, gives):
    z, t = noise(3, 2, 4, 2, 2, dtype=dtype), torch.tensor([0, 500, 999])
    out = PAPER.at("signal", t, z)
    assert out.dtype == gives
    assert out.shape == (3, 1, 1, 1, 1)
    assert torch.equal(out.flatten(), PAPER.signal[t].to(gives))
    assert PAPER.add_noise(z, t, z).dtype == gives
    assert PAPER.reverse_step(z, z, t).mean.dtype == gives


def test_a_half_precision_output_is_read_in_float32():
    z, t = noise(2, 2, 4, 2, 2), torch.tensor([3, 700])
    output = noise(2, 2, 8, 2, 2, seed=1, dtype=torch.bfloat16)
    for half, full in zip(
        PAPER.reverse_step(output, z, t), PAPER.reverse_step(output.float(), z, t), strict=True
    ):
        assert torch.equal(half, full)


@pytest.mark.parametrize("steps", ["250", "50"])
def test_one_ancestral_step_is_diffusers_with_learned_range(steps):
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(
        variance_type="learned_range",
        timestep_spacing="linspace",
        clip_sample=False,
        beta_start=1e-4,
        beta_end=0.02,
    )
    scheduler.set_timesteps(int(steps))
    process = PAPER.respaced(steps)
    assert process.timestep_map.tolist() == scheduler.timesteps.tolist()[::-1]
    z, output = noise(1, 2, 4, 4, 4), noise(1, 2, 8, 4, 4, seed=1)
    for index in (0, 1, process.num_steps // 2, process.num_steps - 1):
        reading = process.reverse_step(output, z, torch.tensor([index]))
        draw = torch.randn((2, 4, 4, 4), generator=torch.Generator().manual_seed(5))
        ours = reading.mean + (index > 0) * torch.exp(0.5 * reading.log_variance) * draw
        expected = scheduler.step(
            output[0], process.timestep_map[index], z[0], generator=torch.Generator().manual_seed(5)
        ).prev_sample
        torch.testing.assert_close(ours[0], expected, rtol=2e-4, atol=2e-4)


def test_variance_spans_the_range_between_posterior_and_beta():
    z, t = noise(2, 1, 1, 2, 2, dtype=torch.float64), torch.tensor([3, 700])
    for v, table in ((-1.0, PAPER.posterior_log_variance), (1.0, PAPER.betas.log())):
        reading = PAPER.reverse_step(torch.cat([z, torch.full_like(z, v)], 2), z, t)
        torch.testing.assert_close(reading.log_variance, table[t].view(2, 1, 1, 1, 1).expand_as(z))
    plain = PAPER.reverse_step(z, z, t)
    assert torch.equal(plain.log_variance, PAPER.posterior_log_variance[t].view(2, 1, 1, 1, 1).expand_as(z))
    assert torch.equal(plain.mean, reading.mean)


@pytest.mark.parametrize("objective", ["paper", "v", "rectified_flow", "z0"])
def test_reading_undoes_the_target(objective):
    process = build_process(DiffusionConfig(objective=objective))
    z0, eps = noise(4, 2, 3, 2, 2, dtype=torch.float64), noise(4, 2, 3, 2, 2, seed=1, dtype=torch.float64)
    t = torch.tensor([0, 10, 500, 998])
    z0_back, eps_back = process.estimate(process.target(z0, t, eps), process.add_noise(z0, t, eps), t)
    torch.testing.assert_close(z0_back, z0)
    torch.testing.assert_close(eps_back, eps)


def test_every_prediction_is_reached_by_an_objective():
    assert {
        build_process(DiffusionConfig(objective=name)).prediction
        for name in ("paper", "v", "rectified_flow", "z0")
    } == set(PREDICTIONS)


def test_respacing_lists_of_the_released_code():
    quarter = PAPER.respaced("250").timestep_map.tolist()
    assert (quarter[:4], quarter[-2:], len(quarter)) == ([0, 4, 8, 12], [995, 999], 250)
    fifty = PAPER.respaced("50").timestep_map.tolist()
    assert (fifty[:5], fifty[-2:], len(fifty)) == ([0, 20, 41, 61, 82], [979, 999], 50)
    assert PAPER.respaced("ddim50").timestep_map.tolist() == list(range(0, 1000, 20))
    assert PAPER.respaced("ddim3").timestep_map.tolist() == [0, 334, 668]
    assert PAPER.respaced("1").timestep_map.tolist() == [0]
    parts = PAPER.respaced("10,15,20").timestep_map.tolist()
    assert [sum(lo <= i < hi for i in parts) for lo, hi in ((0, 334), (334, 667), (667, 1000))] == [
        10,
        15,
        20,
    ]
    assert (parts[0], parts[9], parts[10], parts[24], parts[25], parts[44]) == (0, 333, 334, 666, 667, 999)


@pytest.mark.parametrize("count", [1, 2, 7, 250, 999, 1000])
def test_every_respacing_ascends_without_repeats(count):
    for grid in (spaced_timesteps, trailing_timesteps):
        kept = grid(1000, str(count))
        assert len(kept) == len(set(kept)) == count
        assert kept == sorted(kept)
        assert 0 <= kept[0] <= kept[-1] <= 999
    assert trailing_timesteps(1000, str(count))[-1] == 999


@pytest.mark.parametrize("sections", ["250", "ddim50", "10,15,20", "1000", "1"])
def test_respaced_process_keeps_the_marginals(sections):
    short = PAPER.respaced(sections)
    torch.testing.assert_close(
        short.alphas_cumprod, PAPER.alphas_cumprod[short.timestep_map], rtol=1e-10, atol=0
    )
    assert torch.equal(short.original(torch.arange(short.num_steps)), short.timestep_map)
    z = noise(1, 1, 4, 2, 2)
    assert all(
        part.isfinite().all() for part in short.reverse_step(torch.cat([z, z], 2), z, torch.tensor([0]))
    )


def test_respacing_twice_still_names_original_timesteps():
    assert PAPER.respaced("250").respaced("2").timestep_map.tolist() == [0, 999]


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ("ddim300", "no integer stride"),
        ("1001", "has only 1000"),
        ("400,400,300", "section 1 of 3 has only 334"),
        ("0", "must be a positive integer"),
        ("ten", "must be a positive integer"),
        ("ddim5,5", "must be a positive integer"),
        ("", "must be a positive integer"),
        ("-5", "must be a positive integer"),
    ],
)
def test_bad_respacings_are_refused(sections, message):
    with pytest.raises(InputError, match=message):
        PAPER.respaced(sections)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"schedule": "cosine"}, "did you mean 'squared_cosine'"),
        ({"objective": "rectified"}, "did you mean 'rectified_flow'"),
        ({"num_steps": 20}, "use 21 or more"),
        ({"num_steps": 0, "schedule": "squared_cosine"}, "must be an integer from 1"),
        ({"num_steps": 10**9}, "must be an integer from 1 to 1000000"),
        ({"num_steps": 10.5}, "must be an integer from 1"),
        ({"objective": "rectified_flow", "schedule": "squared_cosine"}, "leave diffusion.schedule at linear"),
    ],
)
def test_bad_configs_are_refused_on_construction(keys, message):
    with pytest.raises(InputError, match=message) as caught:
        DiffusionConfig(**keys)
    assert "\n" not in str(caught.value)


def test_betas_outside_the_open_interval_are_refused():
    for bad in ([0.0, 0.1], [0.1, 1.0], [float("nan")], []):
        with pytest.raises(InputError, match="inside"):
            Process(torch.tensor(bad))


@pytest.mark.parametrize("shape", [(1, 2, 3, 2, 2), (1, 2, 12, 2, 2), (1, 3, 4, 2, 2), (1, 2, 4, 2, 3)])
def test_an_output_of_another_shape_is_refused(shape):
    z = noise(1, 2, 4, 2, 2)
    with pytest.raises(InputError, match="4 channels, or 8"):
        PAPER.reverse_step(noise(*shape), z, torch.tensor([5]))


def test_a_process_can_be_sent_to_another_python():
    process = pickle.loads(pickle.dumps(PAPER.respaced("50")))
    assert torch.equal(process.betas, PAPER.respaced("50").betas)
