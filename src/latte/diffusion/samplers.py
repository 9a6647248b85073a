# SPDX-License-Identifier: Apache-2.0
"""From noise to a sample, one small function per sampler; each visits every timestep of a process that is
respaced for it.

DDPM, DDIM and the Euler steps of rectified flow are here; DDPM and DDIM have the released code's respacing.
The solvers are in ``solvers.py``. Start noise and later noise come from one generator per sample, and no step
mixes samples: a sample does not depend on its batch. To add a sampler: a function, a Sampler, and one entry
in ``config.SAMPLERS``.
Axes: b batch, f frames, c channels, h height, w width.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from latte.checks import RunError, check, choose
from latte.diffusion.config import SAMPLERS as SAMPLERS
from latte.diffusion.config import check_order
from latte.diffusion.process import DenoiseFunction, Flow, Process
from latte.diffusion.schedules import spaced_timesteps, trailing_timesteps
from latte.diffusion.solvers import NextNoise, Progress, dpmpp, heun, unipc, with_progress

Noise = Callable[[Sequence[int]], Tensor]
"""Shape -> the next standard normal (b, *shape) float32, such as ``runtime.SampleNoise``."""


def ddpm(
    denoise: DenoiseFunction,
    process: Process,
    z: Tensor,
    next_noise: NextNoise,
    eta: float,
    progress: Progress | None,
) -> Tensor:
    """Ancestral sampling (DDPM, algorithm 2) with the model's own variance.

    The last step also draws noise, as in the released code, and drops it.
    """
    for i in with_progress(range(process.num_steps - 1, -1, -1), progress):
        t = torch.full((len(z),), i, device=z.device)
        step = process.reverse_step(denoise(z, process.original(t)), z, t)
        noise = next_noise()
        z = step.mean
        if i > 0:
            z = z + torch.exp(0.5 * step.log_variance) * noise
    return z


def ddim(
    denoise: DenoiseFunction,
    process: Process,
    z: Tensor,
    next_noise: NextNoise,
    eta: float,
    progress: Progress | None,
) -> Tensor:
    """DDIM (Song et al. 2021, eq. 12 and 16); eta 0 is deterministic, eta 1 is DDPM."""
    for i in with_progress(range(process.num_steps - 1, -1, -1), progress):
        t = torch.full((len(z),), i, device=z.device)
        step = process.reverse_step(denoise(z, process.original(t)), z, t)
        alpha = process.alphas_cumprod[i].item()
        alpha_prev = process.alphas_cumprod_prev[i].item()
        sigma = eta * math.sqrt((1 - alpha_prev) / (1 - alpha) * (1 - alpha / alpha_prev))
        z = math.sqrt(alpha_prev) * step.z0 + math.sqrt(max(1 - alpha_prev - sigma**2, 0)) * step.eps
        if eta > 0:
            z = z + sigma * next_noise()
    return z


def flow(
    denoise: DenoiseFunction,
    process: Flow,
    z: Tensor,
    next_noise: NextNoise,
    eta: float,
    progress: Progress | None,
) -> Tensor:
    """Euler steps along dz/ds = eps - z_0 from s = 1 (noise) to s = 0 (Liu et al. 2023, eq. 1)."""
    times = process.times.tolist()
    for i in with_progress(range(process.num_steps - 1, -1, -1), progress):
        t = torch.full((len(z),), i, device=z.device)
        prediction, _ = process.split(denoise(z, process.original(t)), z)
        z0, eps = process.estimate(prediction, z, t)
        s = times[i - 1] if i else 0.0
        z = (1 - s) * z0 + s * eps
    return z


class Sampler(NamedTuple):
    """A sampler and what it needs."""

    run: Callable[..., Tensor]
    """(denoise, respaced process, z, next_noise, eta, progress) -> z_0."""
    timesteps: Callable[[int, str], list[int]] = spaced_timesteps
    """(num_steps, steps) -> the indices it visits."""
    predictions: tuple[str, ...] = ("epsilon", "v", "z0")
    """What a model's output may mean, keys of PREDICTIONS."""
    has_eta: bool = False
    """Whether it has DDIM's eta."""
    orders: tuple[int, ...] = ()
    """The orders that it can have, the default first; empty: ``run`` takes no ``order``."""


# Solvers step from the last index straight to the data, so indices that include 0 waste a step: on Gaussian
# data of standard deviation 1, dpmpp at 10 steps gives 0.95 on trailing timesteps and 1.33 on the released
# ones. Heun needs 50 steps on squared_cosine.
DDPM = Sampler(ddpm)
DDIM = Sampler(ddim, has_eta=True)
FLOW = Sampler(flow, trailing_timesteps, predictions=("flow",))
DPMPP = Sampler(dpmpp, trailing_timesteps, ("epsilon", "v", "z0", "flow"), orders=(2, 1, 3))
UNIPC = Sampler(unipc, trailing_timesteps, ("epsilon", "v", "z0", "flow"), orders=(2, 1, 3))
EULER = Sampler(partial(dpmpp, order=1), trailing_timesteps)
HEUN = Sampler(heun, trailing_timesteps)


def indices(sampler: Sampler, num_steps: int, steps: int | str) -> list[int]:
    """Return the indices that ``sampler`` visits, ascending: ``steps`` of ``num_steps``.

    A single step starts from pure noise and so is the last index, where the released code's list has the
    first. InputError for more steps than there are.
    """
    if isinstance(steps, int):
        check(
            1 <= steps <= num_steps,
            f"steps is {steps}, but the model was trained with {num_steps} timesteps; give 1 to {num_steps}",
        )
    if steps in (1, "1"):
        return [num_steps - 1]
    return sampler.timesteps(num_steps, str(steps))


def check_finite(denoise: DenoiseFunction) -> DenoiseFunction:
    """Return ``denoise`` that raises RunError, naming the step, when its input or output holds NaN or Inf."""
    num_calls = 0

    def checked(z: Tensor, t: Tensor) -> Tensor:
        nonlocal num_calls
        num_calls += 1
        output = denoise(z, t)
        for name, tensor in (("latent", z), ("model output", output)):
            if not bool(tensor.isfinite().all()):
                raise RunError(
                    f"sampling: the {name} holds NaN or Inf at step {num_calls} (timestep "
                    f"{int(t.flatten()[0])}); check the weights, use a lower guidance, or --dtype fp32"
                )
        return output

    return checked


@torch.no_grad()
def sample(
    name: str,
    denoise: DenoiseFunction,
    process: Process | Flow,
    noise: Noise,
    shape: Sequence[int],
    steps: int | str,
    eta: float = 0.0,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
    order: int | None = None,
) -> Tensor:
    """Return a sample z_0 (b f c h w) of the sampler ``name`` of SAMPLERS.

    denoise: (z, original timesteps (b,)) -> model output, guidance included.
    process: the one of training, not respaced.
    noise: shape -> the next standard normal (b, *shape), such as ``runtime.SampleNoise(seeds)``; the
        sample has its precision, float32.
    shape: (f c h w).
    steps: a count, or for ddpm and ddim a respacing such as "ddim50".
    eta: 0 (deterministic) to 1, for ddim alone.
    progress: called with (i, n) after each of the n steps.
    order: of dpmpp and unipc, None for their default.

    InputError for any other combination, RunError that names the step when the latent or the model's output
    holds NaN or Inf.
    """
    sampler = choose("sampler", name, SAMPLERS)
    fitting = ", ".join(other for other, entry in SAMPLERS.items() if process.prediction in entry.predictions)
    check(
        process.prediction in sampler.predictions,
        f"sampler {name} cannot use a model that predicts {process.prediction}; use one of {fitting}",
    )
    check(0 <= eta <= 1, f"eta must be between 0 (deterministic) and 1, got {eta}")
    check(
        eta == 0 or sampler.has_eta,
        f"eta is {eta}, but sampler {name} has no eta; leave it at 0, or use ddim",
    )
    check_order(name, order)
    run = partial(sampler.run, order=order or sampler.orders[0]) if sampler.orders else sampler.run
    respaced = process.keep(indices(sampler, process.num_steps, steps))

    def next_noise() -> Tensor:
        return noise(shape).to(device)

    z = run(check_finite(denoise), respaced, next_noise(), next_noise, eta, progress)
    if not bool(z.isfinite().all()):
        raise RunError(
            "sampling: the latent holds NaN or Inf after the last step; check the weights, use a lower "
            "guidance, or --dtype fp32"
        )
    return z
