# SPDX-License-Identifier: Apache-2.0
"""The solvers against diffusers' schedulers, and against the exact solution of the ODE for Gaussian data."""

import math
from itertools import pairwise

import diffusers
import pytest
import torch
from support import DEVIATION, MEAN, gaussian

from latte.checks import InputError
from latte.diffusion.config import DiffusionConfig, build_process
from latte.diffusion.frame_conditioning import condition_on_frames, restore_frames
from latte.diffusion.long_video import in_windows, shuffled_noise
from latte.diffusion.process import Process
from latte.diffusion.samplers import SAMPLERS, indices, sample
from latte.diffusion.solvers import Estimate, Times, dpmpp_step, unipc_step
from latte.runtime import SampleNoise

SHAPE = (2, 3, 4, 4)
SCHEDULES = ("linear", "squared_cosine")
TRAILING = {"final_sigmas_type": "zero", "timestep_spacing": "trailing"}
LEADING = {"timestep_spacing": "leading"}
REFERENCES = {
    "dpmpp": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", **TRAILING}),
    "unipc": ("UniPCMultistepScheduler", {"predict_x0": True, "solver_type": "bh2", **TRAILING}),
    "euler": ("EulerDiscreteScheduler", {"final_sigmas_type": "zero", **LEADING}),
    "heun": ("HeunDiscreteScheduler", {"clip_sample": False, **LEADING}),
}
ORDERED = [("dpmpp", 1), ("dpmpp", 2), ("dpmpp", 3), ("unipc", 1), ("unipc", 2), ("unipc", 3)]
FLOW = build_process(DiffusionConfig(objective="rectified_flow"))


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def network(z, t):
    """A nonlinear denoiser with variance channels."""
    own = torch.tanh(1.3 * z + t.view(-1, 1, 1, 1, 1) / 700 - 0.5)
    return torch.cat([own, torch.sin(3 * z)], 2)


def doubles(seeds):
    """The noise of these seeds in float64."""
    stream = SampleNoise(seeds)
    return lambda shape: stream(shape).double()


def by_diffusers(name, process, z, sigmas=None, **settings):
    """The sample of diffusers' scheduler over all indices of ``process``; ``sigmas`` replace its table."""
    kind, fixed = REFERENCES[name]
    if isinstance(process, Process):
        settings |= {"num_train_timesteps": process.num_steps, "trained_betas": process.betas.tolist()}
    scheduler = getattr(diffusers, kind)(prediction_type="sample", **{**fixed, **settings})
    if isinstance(process, Process):
        scheduler.alphas_cumprod = process.alphas_cumprod  # its own come from float32 betas
    scheduler.set_timesteps(process.num_steps)
    if sigmas is not None:
        assert scheduler.sigmas.shape == sigmas.shape
        scheduler.sigmas = sigmas
    if fixed.get("timestep_spacing") == "leading":
        z = z * (scheduler.sigmas[0] ** 2 + 1) ** 0.5
    for number, step in enumerate(scheduler.timesteps):
        index = int(step) if isinstance(process, Process) else process.num_steps - 1 - number
        t = torch.full((len(z),), index)
        zt = scheduler.scale_model_input(z, step)
        prediction, _ = process.split(network(zt, process.original(t)), zt)
        z0, _ = process.estimate(prediction, zt, t)
        z = scheduler.step(z0, step, z).prev_sample
    return z


def kept(process, name, steps):
    return process.keep(indices(SAMPLERS[name], process.num_steps, steps))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 5, 14, 20])
@pytest.mark.parametrize(("name", "order"), ORDERED)
def test_a_multistep_solver_is_diffusers(name, order, steps, schedule):
    for objective in ("paper", "v"):
        process = build_process(DiffusionConfig(schedule=schedule, objective=objective))
        ours = sample(name, network, process, SampleNoise([1, 2]), SHAPE, steps, order=order)
        start = SampleNoise([1, 2])(SHAPE)
        reference = by_diffusers(name, kept(process, name, steps), start, solver_order=order)
        assert (ours - reference).square().mean().sqrt() <= 5e-7 * max(reference.abs().max(), 1)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 5, 14, 20, 50])
@pytest.mark.parametrize(("name", "order"), [*ORDERED, ("heun", None)])
def test_in_float64_it_is_diffusers_to_rounding(name, order, steps, schedule):
    """Its tables are float32, which hides small mistakes: here it gets ours. Its DPM-Solver++ still
    rounds every sample to float32.
    """
    process = build_process(DiffusionConfig(schedule=schedule, objective="v"))
    respaced = kept(process, name, steps)
    ratios = (respaced.noise / respaced.signal).flip(0)
    if name == "heun":
        ratios = torch.cat([ratios[:1], ratios[1:].repeat_interleave(2)])
    sigmas = torch.cat([ratios, torch.zeros(1, dtype=torch.float64)])
    settings = {} if order is None else {"solver_order": order}
    reference = by_diffusers(name, respaced, doubles([1, 2])(SHAPE), sigmas, **settings)
    ours = sample(name, network, process, doubles([1, 2]), SHAPE, steps, order=order)
    assert ours.dtype == reference.dtype == torch.float64
    assert (ours - reference).abs().max() <= (1e-6 if name == "dpmpp" else 1e-9) * reference.abs().max()


@pytest.mark.parametrize("steps", [1, 4, 20, 50])
def test_euler_is_diffusers(steps):
    process = build_process(DiffusionConfig())
    respaced = kept(process, "euler", steps)
    sigmas = torch.cat([(respaced.noise / respaced.signal).flip(0), torch.zeros(1, dtype=torch.float64)])
    reference = by_diffusers("euler", respaced, doubles([1, 2])(SHAPE), sigmas)
    ours = sample("euler", network, process, doubles([1, 2]), SHAPE, steps)
    assert (ours - reference).abs().max() <= 1e-6 * reference.abs().max()


@pytest.mark.parametrize("steps", [1, 4, 20, 50])
@pytest.mark.parametrize(("name", "order"), ORDERED)
def test_rectified_flow_is_diffusers(name, order, steps):
    respaced = kept(FLOW, name, steps)
    sigmas = torch.cat([respaced.times.flip(0), torch.zeros(1, dtype=torch.float64)])
    sigmas[0] -= 1e-6  # as diffusers does where lambda is infinite
    flow = {"use_flow_sigmas": True, "solver_order": order}
    reference = by_diffusers(name, respaced, doubles([1, 2])(SHAPE), sigmas, **flow)
    ours = sample(name, network, FLOW, doubles([1, 2]), SHAPE, steps, order=order)
    assert (ours - reference).abs().max() <= 1e-6 * reference.abs().max()


def even_in_lambda(steps):
    """A process of ``steps`` indices at equal gaps of lambda, from -2 to 1."""
    half_log_snr = torch.linspace(1, -2, steps, dtype=torch.float64)
    alphas_cumprod = torch.sigmoid(2 * half_log_snr)
    previous = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod[:-1]])
    return Process(1 - alphas_cumprod / previous, prediction="v")


def ode_error(name, order, steps):
    """Distance of the sample from the exact solution: z keeps its number of standard deviations, and then
    becomes the estimate at the last time.
    """
    process = even_in_lambda(steps)
    z = torch.linspace(-2, 2, 24, dtype=torch.float64).view(1, 1, 1, 4, 6)
    found = sample(name, gaussian(process), process, lambda shape: z, z.shape[1:], steps, order=order)
    first, last = ((process.signal[i].item(), process.noise[i].item()) for i in (-1, 0))
    deviations = [math.hypot(a * DEVIATION, s) for a, s in (first, last)]
    exact = last[0] * MEAN + (z - first[0] * MEAN) * deviations[1] / deviations[0]
    z0 = MEAN + last[0] * DEVIATION**2 / deviations[1] ** 2 * (exact - last[0] * MEAN)
    return (found - z0).abs().max().item()


@pytest.mark.parametrize(
    ("name", "order", "expected"),
    [("dpmpp", 1, 1), ("dpmpp", 2, 2), ("unipc", 1, 2), ("unipc", 2, 3), ("heun", None, 2)],
)
def test_the_error_falls_with_the_order_of_the_solver(name, order, expected):
    """The corrector gives UniPC one order more than its predictor."""
    errors = [ode_error(name, order, steps + 1) for steps in (80, 160, 320)]
    slopes = [math.log2(coarse / fine) for coarse, fine in pairwise(errors)]
    assert all(abs(slope - expected) < 0.25 for slope in slopes), (errors, slopes)


def step_error(step, order, corrected, num_steps):
    """Error of one step near lambda = 0.3, from exact values at the times before it."""
    process = even_in_lambda(num_steps)
    times = Times.of(process)
    i = round(0.7 * num_steps)

    def exact(at):
        a, s = times.signal[at], times.noise[at]
        return torch.tensor([a * MEAN + math.hypot(a * DEVIATION, s)], dtype=torch.float64)

    def estimate(at):
        a, s = times.signal[at], times.noise[at]
        slope = a * DEVIATION**2 / (a**2 * DEVIATION**2 + s**2)
        return Estimate(at, MEAN + slope * (exact(at) - a * MEAN))

    known = [estimate(i - back) for back in range(order)]
    ahead = (estimate(i + 1),) if corrected else ()
    return (step(times, exact(i), known, *ahead) - exact(i + 1)).abs().item()


@pytest.mark.parametrize(
    ("step", "corrected", "order", "slope"),
    [
        *((dpmpp_step, False, order, slope) for order, slope in ((1, 2), (2, 3), (3, 3))),
        *((unipc_step, False, order, order + 1) for order in (1, 2, 3)),
        *((unipc_step, True, order, order + 2) for order in (1, 2, 3)),
    ],
)
def test_a_step_from_exact_values_has_its_order(step, corrected, order, slope):
    """A solver starts with steps of lower orders, which hide the order of the later ones. The third order of
    DPM-Solver++ has half of the last term, as in its authors' code: less error, not another slope.
    """
    errors = [step_error(step, order, corrected, num_steps) for num_steps in (80, 160, 320)]
    slopes = [math.log2(coarse / fine) for coarse, fine in pairwise(errors)]
    assert all(abs(found - slope) < 0.25 for found in slopes), (errors, slopes)
    if (step, order) == (dpmpp_step, 3):
        assert errors[-1] < 0.2 * step_error(step, 2, corrected, 320)


@pytest.mark.parametrize("name", ["dpmpp", "unipc"])
def test_a_flow_needs_fewer_steps_than_by_euler(name):
    def error(sampler, steps):
        z = torch.linspace(-2, 2, 24, dtype=torch.float64).view(1, 1, 1, 4, 6)
        found = sample(sampler, gaussian(FLOW), FLOW, lambda shape: z, z.shape[1:], steps)
        return (found - (MEAN + DEVIATION * z)).abs().max().item()

    assert error(name, 10) < 0.5 * error("flow", 10)
    assert error(name, 20) < 0.5 * error("flow", 20)
    assert error(name, 40) < 0.6 * error(name, 20)


@pytest.mark.parametrize("name", ["dpmpp", "unipc", "heun"])
def test_times_start_at_the_noise_and_end_at_the_data(name):
    for process in (build_process(DiffusionConfig()), FLOW):
        times = Times.of(process.keep([249, 499, 999]))
        assert len(times.signal) == len(times.noise) == len(times.half_log_snr) == 4
        assert (times.signal[-1], times.noise[-1]) == (1.0, 0.0)
        assert all(math.isfinite(value) for value in times.half_log_snr[:-1])
        assert sorted(times.half_log_snr) == times.half_log_snr


@pytest.mark.parametrize("process", [FLOW, build_process(DiffusionConfig(objective="v"))], ids=["flow", "v"])
@pytest.mark.parametrize(("name", "order"), [("dpmpp", 3), ("unipc", 2)])
def test_conditioning_frames_and_windows_work(name, order, process):
    frames = torch.full((1, 5, 3, 4, 4), 0.9)
    mask = torch.tensor([True, False, False, False, False])
    windowed = in_windows(gaussian(process), 2, 1)
    for strength in (0.0, 2.0):
        denoise = condition_on_frames(windowed, process, frames, mask, strength)
        noise = shuffled_noise(SampleNoise([3, 4]), 2, 1)
        z = sample(name, denoise, process, noise, (5, 3, 4, 4), 8, order=order)
        assert (z[:, :1] - 0.9).abs().max() < 1e-4
        assert torch.equal(restore_frames(z, frames, mask)[:, :1], frames[:, :1].expand(2, -1, -1, -1, -1))
        assert z.std() < 0.6


@pytest.mark.parametrize(
    ("name", "order", "message"),
    [
        (
            "ddim",
            2,
            "order is 2, but sampler ddim has no choice of orders; leave it out, or use dpmpp, unipc",
        ),
        ("dpmpp", 4, "order is 4, but sampler dpmpp has the orders 1, 2, 3"),
        ("unipc", 0, "order is 0, but sampler unipc has the orders 1, 2, 3"),
    ],
)
def test_an_order_that_a_sampler_does_not_have_is_refused(name, order, message):
    with pytest.raises(InputError, match=message):
        sample(name, network, build_process(DiffusionConfig()), SampleNoise([0]), SHAPE, 4, order=order)


def test_order_2_is_the_default_and_fewer_steps_than_the_order_are_enough():
    process = build_process(DiffusionConfig())
    for name in ("dpmpp", "unipc"):
        default, second, third = (
            sample(name, network, process, SampleNoise([1]), SHAPE, 6, order=order) for order in (None, 2, 3)
        )
        assert torch.equal(default, second)
        assert not torch.equal(default, third)
        assert sample(name, network, process, SampleNoise([1]), SHAPE, 2, order=3).isfinite().all()
