# SPDX-License-Identifier: Apache-2.0
"""The training objective: the error of the prediction, and the variational bound that trains the variance
channels.

An objective is two choices: what the output means, and how much each timestep counts. The bound (L_hybrid of
Nichol & Dhariwal 2021, as in the released code of Latte) gets a detached mean, so that it trains the variance
channels alone. Everything runs in the precision of z_0: float32 in training, float64 when a test asks for it.
To add an objective: an Objective here and one entry in ``config.OBJECTIVES``.
Axes: b batch, f frames, c channels, h height, w width.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor

from latte.checks import choose
from latte.diffusion.config import OBJECTIVES as OBJECTIVES
from latte.diffusion.config import TIMES as TIMES
from latte.diffusion.process import PREDICTIONS, DenoiseFunction, NoisePath, Process


class Loss(NamedTuple):
    """Per clip, each (b,), averaged over f c h w.

    ``total`` is minimised (its batch mean), ``vlb`` is in bits per element.
    """

    total: Tensor
    mse: Tensor
    vlb: Tensor


def uniform_times(b: int, generator: torch.Generator) -> Tensor:
    """Return b uniform fractions of the path, (b,) float64 in [0, 1)."""
    return torch.rand(b, generator=generator, dtype=torch.float64)


def logit_normal_times(b: int, generator: torch.Generator) -> Tensor:
    """Return b sigmoids of a standard normal, (b,) float64 in (0, 1): the middle of the path more often.

    Esser et al. 2024 (arXiv 2403.03206), Sec. 3.1, with mean 0 and scale 1.
    """
    return torch.randn(b, generator=generator, dtype=torch.float64).sigmoid()


@dataclass(frozen=True)
class TimestepDraw:
    """How training draws timesteps: a key of TIMES, and a shift towards noise.

    The fraction u of the path becomes shift u / (1 + (shift - 1) u) (Esser et al. 2024, eq. 23): sequences of
    more tokens keep their content longer, and take a shift of sqrt(tokens / tokens at which 1 is right).
    """

    times: str = "uniform"
    shift: float = 1.0

    def __call__(self, process: NoisePath, b: int, generator: torch.Generator) -> Tensor:
        """Return b indices of the process: (b,) int64 on the CPU."""
        if self == UNIFORM:
            return torch.randint(process.num_steps, (b,), generator=generator)
        u = choose("train.timesteps", self.times, TIMES)(b, generator)
        shifted = self.shift * u / (1 + (self.shift - 1) * u)
        return (shifted * process.num_steps).long().clamp(max=process.num_steps - 1)


UNIFORM = TimestepDraw()


def two_levels(first: Tensor, second: Tensor, num_frames: int, generator: torch.Generator) -> Tensor:
    """Return (f,) int64: every frame has one of two timesteps (1,), with equal probability.

    The dual timesteps of Self-Flow (arXiv 2603.06507), whole frames in the place of tokens: a clean frame
    informs a noisy one.
    """
    choose_second = torch.rand(num_frames, generator=generator) < 0.5
    return torch.where(choose_second, second, first)  # (f)


def gaussian_kl(mean: Tensor, log_variance: Tensor, other_mean: Tensor, other_log_variance: Tensor) -> Tensor:
    """Return KL(N(mean, exp log_variance) || N(other)) per element, in nats; shapes broadcast."""
    difference = log_variance - other_log_variance
    squared_error = (mean - other_mean) ** 2 * torch.exp(-other_log_variance)
    return 0.5 * (torch.exp(difference) - 1 - difference + squared_error)


def _normal_cdf(x: Tensor) -> Tensor:
    """Return the tanh approximation of the standard normal CDF, as in the released code."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def discretised_log_likelihood(z: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Return the log probability of the bin z +- 1/255 under N(mean, exp log_variance) (DDPM eq. 13).

    In nats per element. The outer bins (beyond +-0.999) extend to infinity, as for 8-bit pixels; the released
    code applies this to latents as is.
    """
    precision = torch.exp(-0.5 * log_variance)
    above = _normal_cdf(precision * (z - mean + 1 / 255))
    below = _normal_cdf(precision * (z - mean - 1 / 255))
    probability = torch.where(z < -0.999, above, torch.where(z > 0.999, 1 - below, above - below))
    return probability.clamp(min=1e-12).log()


def bound(process: Process, output: Tensor, z0: Tensor, zt: Tensor, t: Tensor) -> Tensor:
    """Return the variational bound's term at t (b,) or (b f), in bits per element, in the shape of t.

    KL(q(z_t-1 | z_t, z_0) || p(z_t-1 | z_t)), and at t = 0 the negative log-likelihood of z_0. Detach the
    prediction in ``output`` beforehand to train the variance alone.
    """
    true = process.posterior(z0, zt, t)
    model = process.reverse_step(output, zt, t)
    kl = gaussian_kl(true.mean, true.log_variance, model.mean, model.log_variance)
    nll = -discretised_log_likelihood(z0, model.mean, model.log_variance)
    axes = t.ndim
    return torch.where(t == 0, nll.flatten(axes).mean(axes), kl.flatten(axes).mean(axes)) / math.log(2)


def uniform(process: NoisePath, t: Tensor, z0: Tensor) -> Tensor:
    """Return the same weight for every timestep: ones in the shape of t, (b,) or (b f)."""
    return torch.ones_like(process.at("signal", t, z0)).view(t.shape)


def min_snr(process: NoisePath, t: Tensor, z0: Tensor) -> Tensor:
    """Return min(SNR, 5) / SNR in the shape of t: timesteps with little noise count less.

    Hang et al. 2023, for eps prediction with gamma = 5.
    """
    snr = signal_to_noise(process, t, z0)
    return snr.clamp(max=5.0) / snr


def min_snr_v(process: NoisePath, t: Tensor, z0: Tensor) -> Tensor:
    """Return min(SNR, 5) / (SNR + 1) in the shape of t: the weights of ``min_snr`` for v prediction.

    Hang et al. 2023 (arXiv 2303.09556), Sec. 3.4: the error of v is (SNR + 1) times that of z_0.
    """
    snr = signal_to_noise(process, t, z0)
    return snr.clamp(max=5.0) / (snr + 1)


def velocity_of_z0(process: NoisePath, t: Tensor, z0: Tensor) -> Tensor:
    """Return 1 / noise^2 in the shape of t: the error of z_0 counts as that of the v it implies.

    Li & He 2025 (JiT, arXiv 2511.13720), whose noise is at least 0.05 there, too.
    """
    return 1 / process.at("noise", t, z0).view(t.shape).clamp(min=0.05) ** 2


def signal_to_noise(process: NoisePath, t: Tensor, z0: Tensor) -> Tensor:
    """Return SNR = signal^2 / noise^2 in the shape of t."""
    return (process.at("signal", t, z0) / process.at("noise", t, z0)).view(t.shape) ** 2


@dataclass(frozen=True)
class Objective:
    """A loss, weight x mse + vlb."""

    prediction: str  # what the output means, a key of PREDICTIONS
    weight: Callable[[NoisePath, Tensor, Tensor], Tensor] = (
        uniform  # (process, t, z0) -> weight of the error (b,)
    )

    @property
    def straight_path(self) -> bool:
        """Whether it runs on the straight path of rectified flow, which takes no schedule."""
        return PREDICTIONS[self.prediction].straight_path

    def __call__(
        self, denoise: DenoiseFunction, process: NoisePath, z0: Tensor, t: Tensor, eps: Tensor
    ) -> Loss:
        """Return the Loss at z0 and eps (b f c h w) and indices t int64 of ``process``, (b,) or (b f).

        vlb is 0 for a model without variance channels and for rectified flow, which has no variance to learn.
        """
        assert process.prediction == self.prediction, (
            f"the process predicts {process.prediction}, the objective {self.prediction}"
        )
        t = t.to(z0.device)
        zt = process.add_noise(z0, t, eps)
        output = denoise(zt, process.original(t))
        prediction, variance = process.split(output, zt)
        error = (prediction - process.target(z0, t, eps)) ** 2
        mse = error.flatten(t.ndim).mean(t.ndim)  # (b) or (b f)
        vlb = torch.zeros_like(mse)
        if variance is not None and process.has_posterior:
            detached = torch.cat([prediction.detach(), variance], dim=2)  # (b f 2c h w)
            vlb = bound(cast(Process, process), detached, z0, zt, t)
        loss = Loss(self.weight(process, t, z0) * mse + vlb, mse, vlb)
        if t.ndim == 1:
            return loss
        return Loss(*(term.mean(1) for term in loss))


PAPER = Objective("epsilon")  # L_simple + L_vlb (Latte, Sec. 3.1)
V = Objective("v")
RECTIFIED_FLOW = Objective("flow")
MIN_SNR = Objective("epsilon", min_snr)
V_MIN_SNR = Objective("v", min_snr_v)
Z0 = Objective("z0", velocity_of_z0)  # for autoencoders of many channels, and for pixels (JiT)
