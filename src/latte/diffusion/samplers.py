# SPDX-License-Identifier: Apache-2.0
"""From noise to a sample, one small function per sampler; each walks every timestep of a process that is respaced for it.

DDPM and DDIM are our own, with the released code's respacing. DPM-Solver++, UniPC, Euler and Heun are diffusers' schedulers, built
from explicit values and fed z_0, so that what a model's output means stays in ``process.py``. Rectified flow has its own Euler steps.
Start noise and later draws come from one stream per sample, and no step mixes samples: a sample does not depend on its batch.
Axes: b batch, f frames, c channels, h height, w width.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from latte.checks import InputError, choose, require
from latte.diffusion.loss import Denoiser
from latte.diffusion.process import Flow, Process, spread, trailing

T = TypeVar("T")
Progress = Callable[[int, int], None]
Draw = Callable[[], Tensor]


def _walk(items: Sequence[T], progress: Progress | None) -> Iterator[T]:
    """The items in order; after the work on item i, progress(i, how many)."""
    for i, item in enumerate(items, 1):
        yield item
        if progress is not None:
            progress(i, len(items))


def ddpm(
    denoise: Denoiser, process: Process, z: Tensor, draw: Draw, eta: float, progress: Progress | None
) -> Tensor:
    """Ancestral sampling (DDPM algorithm 2) with the model's own variance; the last step also draws, and drops it."""
    for i in _walk(range(process.num_steps - 1, -1, -1), progress):
        t = torch.full((len(z),), i, device=z.device)
        reading, noise = process.read(denoise(z, process.original(t)), z, t), draw()
        z = reading.mean if i == 0 else reading.mean + torch.exp(0.5 * reading.log_variance) * noise
    return z


def ddim(
    denoise: Denoiser, process: Process, z: Tensor, draw: Draw, eta: float, progress: Progress | None
) -> Tensor:
    """Song et al. 2021, eq. 12 and 16; eta 0 draws nothing after the start, eta 1 is DDPM with the posterior's variance."""
    for i in _walk(range(process.num_steps - 1, -1, -1), progress):
        t = torch.full((len(z),), i, device=z.device)
        reading = process.read(denoise(z, process.original(t)), z, t)
        now, before = process.alphas_cumprod[i].item(), process.alphas_cumprod_prev[i].item()
        sigma = eta * math.sqrt((1 - before) / (1 - now) * (1 - now / before))
        z = math.sqrt(before) * reading.z0 + math.sqrt(max(1 - before - sigma**2, 0)) * reading.eps
        if eta > 0:
            z = z + sigma * draw()
    return z


def flow(
    denoise: Denoiser, process: Flow, z: Tensor, draw: Draw, eta: float, progress: Progress | None
) -> Tensor:
    """Euler steps along the learned velocity dz/ds = eps - z_0 from s = 1 (noise) to s = 0 (Liu et al. 2023, eq. 1)."""
    times = process.times.tolist()
    for i in _walk(range(process.num_steps - 1, -1, -1), progress):
        t = torch.full((len(z),), i, device=z.device)
        prediction, _ = process.split(denoise(z, process.original(t)), z)
        z0, eps = process.estimate(prediction, z, t)
        s = times[i - 1] if i else 0.0
        z = (1 - s) * z0 + s * eps
    return z


def _scheduler(kind: str, settings: dict[str, Any], process: Process) -> Any:
    """The diffusers scheduler ``kind`` over all steps of ``process``, every value that matters given here."""
    try:
        import diffusers
    except ImportError as error:
        raise InputError(
            f"{kind} comes from diffusers, which is not installed; pip install diffusers, or use sampler ddpm or ddim"
        ) from error
    n = process.num_steps
    scheduler = getattr(diffusers, kind)(
        num_train_timesteps=n, trained_betas=process.betas.tolist(), prediction_type="sample", **settings
    )
    scheduler.alphas_cumprod = (
        process.alphas_cumprod
    )  # it computes them from float32 betas, too coarse for a few large steps
    scheduler.set_timesteps(n)
    return scheduler


def solver(
    kind: str,
    settings: dict[str, Any],
    denoise: Denoiser,
    process: Process,
    z: Tensor,
    draw: Draw,
    eta: float,
    progress: Progress | None,
) -> Tensor:
    """A deterministic solver of diffusers. Its timesteps are the indices of ``process``; Heun calls the model 2 steps - 1 times."""
    scheduler = _scheduler(kind, settings, process)
    z = z * scheduler.init_noise_sigma
    for step in _walk(scheduler.timesteps, progress):
        t = torch.full((len(z),), int(step), device=z.device)
        zt = scheduler.scale_model_input(z, step)
        prediction, _ = process.split(denoise(zt, process.original(t)), zt)
        z = scheduler.step(process.estimate(prediction, zt, t)[0], step, z).prev_sample
    return z


class Sampler(NamedTuple):
    """``run(denoise, respaced process, z, draw, eta, progress)`` -> z0; which indices it visits, predictions it reads, if it has an eta."""

    run: Callable[..., Tensor]
    grid: Callable[[int, str], list[int]] = spread
    predictions: tuple[str, ...] = ("epsilon", "v")
    has_eta: bool = False


# The scheduler sees a process that is respaced already, and must visit each of its N indices: that is "trailing" for the first two classes
# and "leading" for the others, which also starts those from the noise itself rather than from it scaled by sqrt(1 - alphas_cumprod).
MULTISTEP = {"solver_order": 2, "final_sigmas_type": "zero", "timestep_spacing": "trailing"}
DPMPP = {"algorithm_type": "dpmsolver++", "solver_type": "midpoint", **MULTISTEP}
UNIPC = {"predict_x0": True, "solver_type": "bh2", **MULTISTEP}
EULER = {"interpolation_type": "linear", "final_sigmas_type": "zero", "timestep_spacing": "leading"}
HEUN = {"clip_sample": False, "timestep_spacing": "leading"}

# Solvers go from the last kept index straight to the data, so a grid that holds index 0 wastes a step: on Gaussian data of standard
# deviation 1, dpmpp at 10 steps gives 0.95 on the trailing grid and 1.33 on the released one. Heun wants 50 steps on squared_cosine.
SAMPLERS = {
    "ddpm": Sampler(ddpm),
    "ddim": Sampler(ddim, has_eta=True),
    "dpmpp": Sampler(partial(solver, "DPMSolverMultistepScheduler", DPMPP), trailing),
    "unipc": Sampler(partial(solver, "UniPCMultistepScheduler", UNIPC), trailing),
    "euler": Sampler(partial(solver, "EulerDiscreteScheduler", EULER), trailing),
    "heun": Sampler(partial(solver, "HeunDiscreteScheduler", HEUN), trailing),
    "flow": Sampler(flow, trailing, predictions=("flow",)),
}


def indices(sampler: Sampler, num_steps: int, steps: int | str) -> list[int]:
    """The indices that ``sampler`` visits, ascending: ``steps`` of ``num_steps``; InputError for more than there are.

    One step starts from pure noise and so stands at the last index, where the released code's list has the first.
    """
    if isinstance(steps, int):
        rule = f"the model was trained with {num_steps} steps"
        require(1 <= steps <= num_steps, "steps", steps, rule, f"give 1 to {num_steps}")
    return [num_steps - 1] if steps in (1, "1") else sampler.grid(num_steps, str(steps))


@torch.no_grad()
def sample(
    name: str,
    denoise: Denoiser,
    process: Process | Flow,
    noise: Callable[[Sequence[int]], Tensor],
    shape: Sequence[int],
    steps: int | str,
    eta: float = 0.0,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
) -> Tensor:
    """Draw z_0 (b f c h w) with the sampler ``name`` of SAMPLERS; b is what ``noise`` holds, such as ``runtime.SampleNoise(seeds)``.

    denoise: (z, original timesteps (b,)) -> model output, guidance included. process: as the model was trained, not respaced.
    noise(shape): the next standard normal (b, *shape); its precision, float32, is that of the sample. shape: (f c h w).
    steps: a count, or for ddpm and ddim a respacing such as "ddim50". eta: 0 (deterministic) to 1, for ddim alone.
    progress(i, n): called after each of the n model calls. InputError for any other combination.
    """
    sampler = choose("sampler", name, SAMPLERS)
    fitting = ", ".join(n for n, other in SAMPLERS.items() if process.prediction in other.predictions)
    rule = f"this model predicts {process.prediction}, which {name} cannot read"
    require(process.prediction in sampler.predictions, "sampler", name, rule, f"use one of {fitting}")
    require(0 <= eta <= 1, "eta", eta, "it lies in 0..1", "give 0 for a deterministic sample")
    require(eta == 0 or sampler.has_eta, "eta", eta, f"{name} has no eta", "leave it at 0, or use ddim")
    short = process.keep(indices(sampler, process.num_steps, steps))

    def draw() -> Tensor:
        return noise(shape).to(device)

    return sampler.run(denoise, short, draw(), draw, eta, progress)
