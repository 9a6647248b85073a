# SPDX-License-Identifier: Apache-2.0
"""Solvers of the probability flow ODE: DPM-Solver++ and UniPC, which use earlier outputs, and Heun.

With lambda = log(signal / noise) the solution from time s to time t is (DPM-Solver++, eq. 8)

    z_t = noise_t / noise_s z_s + noise_t integral of e^lambda z_0(z_lambda, lambda) d lambda,

whatever signal and noise are, so one formula serves the diffusion process and rectified flow. A solver of
order p integrates the polynomial through the last p estimates of z_0. ``process`` is respaced: a solver
visits each of its indices, then steps to the data, where noise = 0 and z = z_0. Coefficients are float64
numbers, the sums have the precision of z.
Axes: b batch, f frames, c channels, h height, w width.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from latte.diffusion.process import DenoiseFunction, NoisePath

T = TypeVar("T")
Progress = Callable[[int, int], None]
"""(steps done, steps in all)."""
NextNoise = Callable[[], Tensor]
"""-> the next standard normal (b f c h w) on the sampler's device."""

SMALLEST_SIGNAL = 1e-6  # stands for the 0 of rectified flow's pure noise, where lambda is not finite
SHORT = 15  # below so many steps the last steps of DPM-Solver++ have lower orders (diffusers' rule)


class Times(NamedTuple):
    """The times that a solver visits, from noise to data; the last is the data itself."""

    signal: list[float]
    noise: list[float]
    half_log_snr: list[float]
    """lambda; not finite at the data."""

    @classmethod
    def of(cls, process: NoisePath) -> "Times":
        """Return the times of a respaced process, and the data behind them: num_steps + 1."""
        signal = process.signal.flip(0).tolist()
        noise = process.noise.flip(0).tolist()
        if signal[0] == 0:
            signal[0] = SMALLEST_SIGNAL
            noise[0] = 1 - SMALLEST_SIGNAL
        half_log_snr = [math.log(a / b) for a, b in zip(signal, noise, strict=True)]
        return cls([*signal, 1.0], [*noise, 0.0], [*half_log_snr, math.inf])

    def gap(self, i: int) -> float:
        """Return h, how much lambda grows in step ``i``."""
        return self.half_log_snr[i + 1] - self.half_log_snr[i]


class Estimate(NamedTuple):
    """The model's z_0 (b f c h w) at the time with the number ``at``."""

    at: int
    z0: Tensor


def with_progress(steps: Sequence[T], progress: Progress | None) -> Iterator[T]:
    """Yield the steps in order; after the work on step i, call progress(i, how many)."""
    for done, step in enumerate(steps, 1):
        yield step
        if progress is not None:
            progress(done, len(steps))


def estimate_z0(denoise: DenoiseFunction, process: NoisePath, z: Tensor, index: int) -> Tensor:
    """Return the z_0 that the model's output at z (b f c h w) and ``index`` of the process implies."""
    t = torch.full((len(z),), index, device=z.device)
    prediction, _ = process.split(denoise(z, process.original(t)), z)
    z0, _ = process.estimate(prediction, z, t)
    return z0


def dpmpp(
    denoise: DenoiseFunction,
    process: NoisePath,
    z: Tensor,
    next_noise: NextNoise,
    eta: float,
    progress: Progress | None,
    order: int,
) -> Tensor:
    """Multistep DPM-Solver++ of order 1 to 3 (Lu et al. 2022, arXiv 2211.01095, algorithm 2).

    Order 1 is DDIM. One call of the model a step. Order 3 is that of the authors' code and diffusers, whose
    last term is half of the Taylor series': in the limit of many steps it is of order 2, with less error.
    """
    times = Times.of(process)
    num_steps = process.num_steps
    known: list[Estimate] = []
    for i in with_progress(range(num_steps), progress):
        known = [Estimate(i, estimate_z0(denoise, process, z, num_steps - 1 - i)), *known[: order - 1]]
        used = known if num_steps >= SHORT else known[: num_steps - i]
        z = dpmpp_step(times, z, used)
    return z


def dpmpp_step(times: Times, z: Tensor, known: Sequence[Estimate]) -> Tensor:
    """Return z (b f c h w) at the time after the newest of 1 to 3 ``known`` estimates, newest first.

    The order is their number. Derivatives of z_0 over a step are differences of the estimates; order 2 is the
    midpoint variant.
    """
    i, z0 = known[0]
    signal = times.signal[i + 1]
    decay = times.noise[i + 1] / times.noise[i]
    h = times.gap(i)
    if math.isinf(h):  # to the data
        return z0
    phi_1 = math.expm1(-h)
    z = decay * z - signal * phi_1 * z0
    if len(known) == 1:
        return z
    r0 = times.gap(known[1].at) / h
    first = (1 / r0) * (z0 - known[1].z0)  # (b f c h w), as are the others
    if len(known) == 2:
        return z - 0.5 * signal * phi_1 * first
    r1 = times.gap(known[2].at) / h
    second = (first - (known[1].z0 - known[2].z0) / r1) / (r0 + r1)
    first = first + r0 * second
    return z + signal * (phi_1 / h + 1) * first - signal * ((phi_1 + h) / h**2 - 0.5) * second


def unipc(
    denoise: DenoiseFunction,
    process: NoisePath,
    z: Tensor,
    next_noise: NextNoise,
    eta: float,
    progress: Progress | None,
    order: int,
) -> Tensor:
    """UniPC of order 1 to 3 with B(h) = e^h - 1 (Zhao et al. 2023, arXiv 2302.04867, algorithms 1 and 2).

    The estimate at a new time first corrects z there, then predicts the next: one call of the model a step.
    """
    times = Times.of(process)
    num_steps = process.num_steps
    known: list[Estimate] = []
    before = z
    for i in with_progress(range(num_steps), progress):
        new = Estimate(i, estimate_z0(denoise, process, z, num_steps - 1 - i))
        if known:
            z = unipc_step(times, before, known, new)
        known = [new, *known][: min(order, num_steps - i)]
        before = z
        z = unipc_step(times, z, known)
    return z


def unipc_step(times: Times, z: Tensor, known: Sequence[Estimate], ahead: Estimate | None = None) -> Tensor:
    """Return z (b f c h w) at the time after the newest of the ``known`` estimates, newest first.

    Without ``ahead`` this is the predictor UniP, whose order is the number of estimates. With ``ahead``, the
    estimate at that time, it is the corrector UniC, of one order more.
    """
    i, z0 = known[0]
    signal = times.signal[i + 1]
    h = times.gap(i)
    if math.isinf(h):  # to the data
        return z0
    scale = signal * math.expm1(-h)
    support = [*known[1:], *([ahead] if ahead else [])]
    ratios = [(times.half_log_snr[at] - times.half_log_snr[i]) / h for at, _ in support]
    z = times.noise[i + 1] / times.noise[i] * z - scale * z0
    for weight, ratio, (_, other) in zip(unipc_weights(h, ratios), ratios, support, strict=True):
        z = z - scale * weight / ratio * (other - z0)
    return z


def unipc_weights(h: float, ratios: Sequence[float]) -> list[float]:
    """Return the weights of the differences at ``ratios``, (lambda - lambda_s) / h each (UniPC, eq. 6).

    They solve sum_m weight_m ratio_m^(k-1) = b_k for k = 1 to their number. One alone has 1/2, which is of
    the same order.
    """
    if len(ratios) < 2:
        return [0.5] * len(ratios)
    phi = math.expm1(-h)
    b_values = []
    phi_k = -phi / h - 1
    for k in range(1, len(ratios) + 1):
        b_values.append(phi_k * math.factorial(k) / phi)
        phi_k = -phi_k / h - 1 / math.factorial(k + 1)
    columns = torch.tensor(ratios, dtype=torch.float64)
    powers = torch.stack([columns**k for k in range(len(ratios))])  # (k m)
    return torch.linalg.solve(powers, torch.tensor(b_values, dtype=torch.float64)).tolist()


def heun(
    denoise: DenoiseFunction,
    process: NoisePath,
    z: Tensor,
    next_noise: NextNoise,
    eta: float,
    progress: Progress | None,
) -> Tensor:
    """Heun's method for z / signal over noise / signal (Karras et al. 2022, algorithm 1): 2 steps - 1 calls
    of the model.
    """
    times = Times.of(process)
    num_steps = process.num_steps
    point = z
    slope = torch.zeros_like(z)
    for call in with_progress(range(2 * num_steps - 1), progress):
        i = (call + 1) // 2
        z0 = estimate_z0(denoise, process, point, num_steps - 1 - i)
        eps = (point - times.signal[i] * z0) / times.noise[i]
        if call % 2:  # the mean of the slopes at both ends of the step to i
            ratio = times.signal[i] / times.signal[i - 1]
            step = (
                times.noise[i] - ratio * times.noise[i - 1]
            )  # of noise / signal, in units of the new signal
            z = ratio * z + step * 0.5 * (slope + eps)
            point = z
        else:
            slope = eps
            point = times.signal[i + 1] * z0 + times.noise[i + 1] * eps
    return point
