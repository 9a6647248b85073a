# SPDX-License-Identifier: Apache-2.0
"""Samplers against the exact law of Gaussian data, against diffusers, and against each other; solvers' own
tests are in test_solvers.py.

For data N(m, sd^2) the exact denoiser is affine, so a sampler maps its draws to the sample affinely: row k of
a batch is given 1 as its k-th draw and 0 otherwise, and mean and variance of what it would generate follow
without any randomness (``law``).
"""

import pytest
import torch
from support import DEVIATION, MEAN, gaussian, noise

from latte.checks import InputError, RunError
from latte.diffusion.config import DiffusionConfig, build_process
from latte.diffusion.samplers import SAMPLERS, sample
from latte.runtime import SampleNoise

SHAPE = (2, 3, 2, 2)
PROCESSES = {
    name: build_process(DiffusionConfig(objective=name)) for name in ("paper", "v", "rectified_flow", "z0")
}
PAIRS = [
    (name, objective)
    for objective, p in PROCESSES.items()
    for name, s in SAMPLERS.items()
    if p.prediction in s.predictions
]
SOLVERS = ("dpmpp", "unipc", "euler", "heun")


@pytest.fixture(autouse=True)
def one_thread():
    """These tensors hold a few hundred numbers.

    Waiting for a second thread on a busy machine takes thirty times as long as the work.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def law(name, process, steps, eta=0.0):
    """Exact mean and standard deviation of the samples, see the top of the file."""
    rows, drawn = (steps + 2 if name == "ddpm" or eta else 2), []

    def noise(shape):
        z = torch.zeros(rows, *shape, dtype=torch.float64)
        if len(drawn) + 1 < rows:
            z[len(drawn) + 1] = 1
        drawn.append(1)
        return z

    out = sample(name, gaussian(process), process, noise, (1, 1, 1, 1), steps, eta).flatten()
    return out[0].item(), (out[1:] - out[0]).square().sum().sqrt().item()


def network(z, t):
    """A denoiser with variance channels, nonlinear, each sample for itself."""
    own = torch.tanh(1.3 * z + t.view(-1, 1, 1, 1, 1) / 700 - 0.5)
    return torch.cat([own, torch.sin(3 * z)], 2)


@pytest.mark.parametrize(("name", "objective"), PAIRS)
def test_gaussian_data_is_recovered(name, objective):
    mean, deviation = law(name, PROCESSES[objective], 250)
    assert mean == pytest.approx(MEAN, abs=0.003)
    assert deviation == pytest.approx(DEVIATION, rel=0.04)


@pytest.mark.parametrize("name", ["ddpm", "ddim", "euler", "heun", "dpmpp", "unipc"])
def test_more_steps_come_closer(name):
    errors = [abs(law(name, PROCESSES["paper"], steps)[1] - DEVIATION) for steps in (10, 30, 100)]
    assert errors[0] > errors[1] > errors[2]


def test_the_solvers_beat_ddim_at_few_steps():
    ddim = abs(law("ddim", PROCESSES["paper"], 20)[1] - DEVIATION)
    assert all(
        abs(law(name, PROCESSES["paper"], 20)[1] - DEVIATION) < ddim for name in ("dpmpp", "unipc", "heun")
    )


def test_ddim_at_eta_one_with_all_steps_is_ddpm_in_law():
    process = build_process(DiffusionConfig(num_steps=200))
    assert law("ddim", process, 200, eta=1.0) == pytest.approx(law("ddpm", process, 200), rel=1e-8)


@pytest.mark.parametrize("steps", [4, 50, "10,15,20"])
def test_ddim_at_eta_one_is_ddpm_draw_by_draw(steps):
    """Without a learned variance the two take the same step from the same noise."""
    denoise = gaussian(PROCESSES["paper"])
    ddpm, ddim = (
        sample(
            name,
            denoise,
            PROCESSES["paper"],
            lambda shape, s=SampleNoise([3]): s(shape).double(),
            SHAPE,
            steps,
            eta,
        )
        for name, eta in (("ddpm", 0.0), ("ddim", 1.0))
    )
    torch.testing.assert_close(ddim, ddpm, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("schedule", ["linear", "squared_cosine"])
def test_euler_is_ddim_on_its_grid(schedule):
    """A DDIM step is an Euler step of the same ODE in z / sqrt(alphas_cumprod) and sigma."""
    process = build_process(DiffusionConfig(schedule=schedule))
    euler = sample("euler", gaussian(process), process, SampleNoise([1, 2]), SHAPE, 10)
    ddim = sample(
        "ddim", gaussian(process), process.keep(range(99, 1000, 100)), SampleNoise([1, 2]), SHAPE, 10
    )
    torch.testing.assert_close(euler, ddim, rtol=1e-3, atol=1e-3)


def test_ddim_is_diffusers():
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(
        beta_start=1e-4, beta_end=0.02, clip_sample=False, set_alpha_to_one=True, timestep_spacing="leading"
    )
    scheduler.set_timesteps(50)
    for eta in (0.0, 0.6, 1.0):
        ours = sample("ddim", network, PROCESSES["paper"], SampleNoise([7]), SHAPE, "ddim50", eta)
        stream = SampleNoise([7])
        z = stream(SHAPE)
        for t in scheduler.timesteps:
            draw = stream(SHAPE) if eta and t > 0 else torch.zeros_like(z)
            z = scheduler.step(
                network(z, t.view(1))[:, :, :3], t, z, eta=eta, variance_noise=draw
            ).prev_sample
        torch.testing.assert_close(ours, z, rtol=1e-3, atol=1e-3)


def test_ddpm_is_diffusers():
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(
        variance_type="learned_range",
        timestep_spacing="linspace",
        clip_sample=False,
        beta_start=1e-4,
        beta_end=0.02,
    )
    scheduler.set_timesteps(50)
    ours = sample("ddpm", network, PROCESSES["paper"], SampleNoise([7]), SHAPE, 50)
    stream = SampleNoise([7])
    z = stream(SHAPE)
    for t in (
        scheduler.timesteps
    ):  # its scheduler draws from a generator and not at t = 0, so hand it the one of this sample
        z = scheduler.step(network(z, t.view(1))[0], t, z[0], generator=stream.generators[0]).prev_sample[
            None
        ]
    torch.testing.assert_close(ours, z, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("name", "objective"), PAIRS)
def test_a_sample_does_not_depend_on_its_batch(name, objective):
    def run(seeds):
        return sample(
            name,
            network,
            PROCESSES[objective],
            SampleNoise(seeds),
            SHAPE,
            7,
            eta=0.5 if name == "ddim" else 0.0,
        )

    together = run([11, 12, 13])
    assert together.shape == (3, *SHAPE)
    for row, seed in enumerate((11, 12, 13)):
        assert torch.equal(run([seed])[0], together[row])
    assert not torch.equal(together[0], together[1])


@pytest.mark.parametrize(("name", "objective"), PAIRS)
def test_one_step_goes_from_noise_to_the_exact_mean(name, objective):
    timesteps = []
    process = PROCESSES[objective]
    exact = gaussian(process)
    out = sample(
        name, lambda z, t: timesteps.append(t) or exact(z, t), process, SampleNoise([0, 1]), SHAPE, 1
    )
    assert [t.tolist() for t in timesteps] == [[999, 999]]
    torch.testing.assert_close(out, torch.full_like(out, MEAN), rtol=0, atol=0.01)


@pytest.mark.parametrize(
    ("name", "steps", "timesteps"),
    [
        ("ddpm", 50, [999, 979, 958, 938, 917]),
        ("ddim", 50, [999, 979, 958, 938, 917]),
        ("ddim", "ddim50", [980, 960, 940, 920, 900]),
        ("dpmpp", 50, [999, 979, 959, 939, 919]),
        ("unipc", 50, [999, 979, 959, 939, 919]),
        ("euler", 50, [999, 979, 959, 939, 919]),
        ("heun", 50, [999, 979, 979, 959, 959]),
    ],
)
def test_the_model_gets_original_timesteps(name, steps, timesteps):
    seen = []
    sample(
        name,
        lambda z, t: seen.append(t) or network(z, t),
        PROCESSES["paper"],
        SampleNoise([0, 1]),
        SHAPE,
        steps,
    )
    assert [t[0].item() for t in seen[:5]] == timesteps
    assert all(t.dtype == torch.int64 and t.shape == (2,) and t[0] == t[1] for t in seen)
    assert len(seen) == (99 if name == "heun" else 50)
    assert seen[-1][0] == (0 if name in ("ddpm", "ddim") else 19)


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name != "flow"])
def test_a_sample_is_the_same_read_from_epsilon_or_from_v(name):
    as_eps, as_v = (
        sample(name, gaussian(PROCESSES[k]), PROCESSES[k], SampleNoise([4]), SHAPE, 20)
        for k in ("paper", "v")
    )
    torch.testing.assert_close(as_eps, as_v, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", SOLVERS)
def test_variance_channels_never_reach_a_solver(name):
    plain = sample(name, lambda z, t: network(z, t)[:, :, :3], PROCESSES["paper"], SampleNoise([4]), SHAPE, 5)
    assert torch.equal(plain, sample(name, network, PROCESSES["paper"], SampleNoise([4]), SHAPE, 5))


@pytest.mark.parametrize("steps", [1, 3, 100])
def test_flow_reaches_a_single_point_in_any_number_of_steps(steps):
    process, point = PROCESSES["rectified_flow"], noise(1, *SHAPE)
    out = sample(
        "flow",
        lambda z, t: (z - point) / process.at("times", t, z),
        process,
        SampleNoise([1, 2]),
        SHAPE,
        steps,
    )
    torch.testing.assert_close(out, point.expand_as(out), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("steps", [2, 5, 100])
def test_any_step_count_of_either_schedule_stays_finite(name, steps):
    for schedule in ("linear", "squared_cosine"):
        process = (
            build_process(DiffusionConfig(schedule, 100)) if name != "flow" else PROCESSES["rectified_flow"]
        )
        assert (
            sample(name, gaussian(process), process, SampleNoise([0]), (1, 1, 1, 1), steps).isfinite().all()
        )


@pytest.mark.parametrize(
    ("name", "calls"), [("ddpm", 6), ("ddim", 6), ("dpmpp", 6), ("unipc", 6), ("euler", 6), ("heun", 11)]
)
def test_progress_counts_the_model_calls(name, calls):
    events = []

    def denoise(z, t):
        events.append("call")
        return network(z, t)

    sample(
        name,
        denoise,
        PROCESSES["paper"],
        SampleNoise([0]),
        SHAPE,
        6,
        progress=lambda i, n: events.append((i, n)),
    )
    assert events == [event for i in range(1, calls + 1) for event in ("call", (i, calls))]


def test_a_sample_carries_no_gradient():
    weight = torch.ones((), requires_grad=True)
    out = sample("ddim", lambda z, t: weight * z, PROCESSES["paper"], SampleNoise([0]), SHAPE, 2)
    assert not out.requires_grad


@pytest.mark.parametrize(
    ("name", "objective", "steps", "eta", "message"),
    [
        ("ddpmm", "paper", 5, 0.0, "did you mean 'ddpm'"),
        ("ddim", "paper", 1001, 0.0, "steps is 1001, but the model was trained with 1000 timesteps"),
        ("dpmpp", "paper", 1001, 0.0, "trained with 1000 timesteps"),
        ("ddim", "paper", 0, 0.0, "give 1 to 1000"),
        ("ddpm", "paper", "2000", 0.0, "has only 1000 of the 1000"),
        ("euler", "paper", "ddim50", 0.0, "needs an integer from 1 to 1000"),
        ("ddim", "paper", 5, 1.5, "eta must be between 0 .* got 1.5"),
        ("ddpm", "paper", 5, 0.5, "ddpm has no eta"),
        (
            "ddim",
            "rectified_flow",
            5,
            0.0,
            "ddim cannot use a model that predicts flow; use one of flow, dpmpp, unipc",
        ),
        (
            "flow",
            "paper",
            5,
            0.0,
            "flow cannot use a model that predicts epsilon; use one of ddpm, ddim, dpmpp",
        ),
    ],
)
def test_what_cannot_be_sampled_is_refused_in_one_line(name, objective, steps, eta, message):
    with pytest.raises(InputError, match=message) as caught:
        sample(name, network, PROCESSES[objective], SampleNoise([0]), SHAPE, steps, eta)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name != "flow"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_model_output_that_is_not_finite_names_the_step(name, bad):
    calls = []

    def denoise(z, t):
        calls.append(int(t[0]))
        return torch.full_like(z, bad) if len(calls) == 3 else network(z, t)

    with pytest.raises(RunError, match=r"model output holds NaN or Inf at step 3 \(timestep ") as caught:
        sample(name, denoise, PROCESSES["paper"], SampleNoise([0]), SHAPE, 6)
    assert len(calls) == 3, "it stops there"
    assert f"timestep {calls[-1]}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_latent_that_overflows_in_the_last_step_is_refused():
    process = PROCESSES["rectified_flow"]
    with pytest.raises(RunError, match="after the last step"):
        sample("flow", lambda z, t: -z, process, lambda shape: torch.full((1, *shape), 3e38), SHAPE, 1)
