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

from latte.diffusion.config import OBJECTIVES as OBJECTIVES
from latte.diffusion.process import PREDICTIONS, DenoiseFunction, NoisePath, Process


class Loss(NamedTuple):
    """Per clip, each (b,), averaged over f c h w.

    ``total`` is minimised (its batch mean), ``vlb`` is in bits per element.
    """

    total: Tensor
    mse: Tensor
    vlb: Tensor


def draw_timesteps(process: NoisePath, b: int, generator: torch.Generator) -> Tensor:
    """Return b uniform indices of the process: (b,) int64 on the CPU."""
    return torch.randint(process.num_steps, (b,), generator=generator)


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
    """Return the variational bound's term at t (b,), in bits per element: (b,).

    KL(q(z_t-1 | z_t, z_0) || p(z_t-1 | z_t)), and at t = 0 the negative log-likelihood of z_0. Detach the
    prediction in ``output`` beforehand to train the variance alone.
    """
    true = process.posterior(z0, zt, t)
    model = process.reverse_step(output, zt, t)
    kl = gaussian_kl(true.mean, true.log_variance, model.mean, model.log_variance)
    nll = -discretised_log_likelihood(z0, model.mean, model.log_variance)
    return torch.where(t == 0, nll.flatten(1).mean(1), kl.flatten(1).mean(1)) / math.log(2)  # (b)


def uniform(process: NoisePath, t: Tensor, z0: Tensor) -> Tensor:
    """Return the same weight for every timestep: ones (b,)."""
    return torch.ones_like(process.at("signal", t, z0)).flatten()  # (b)


def min_snr(process: NoisePath, t: Tensor, z0: Tensor) -> Tensor:
    """Return min(SNR, 5) / SNR (b,): timesteps with little noise count less.

    Hang et al. 2023, for eps prediction with gamma = 5.
    """
    snr = (process.at("signal", t, z0) / process.at("noise", t, z0)).flatten() ** 2  # (b)
    return snr.clamp(max=5.0) / snr


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
        """Return the Loss at z0 and eps (b f c h w) and indices t (b,) int64 of ``process``.

        vlb is 0 for a model without variance channels and for rectified flow, which has no variance to learn.
        """
        assert process.prediction == self.prediction, (
            f"the process predicts {process.prediction}, the objective {self.prediction}"
        )
        t = t.to(z0.device)
        zt = process.add_noise(z0, t, eps)
        output = denoise(zt, process.original(t))
        prediction, variance = process.split(output, zt)
        mse = ((prediction - process.target(z0, t, eps)) ** 2).flatten(1).mean(1)  # (b)
        vlb = torch.zeros_like(mse)
        if variance is not None and process.has_posterior:
            detached = torch.cat([prediction.detach(), variance], dim=2)  # (b f 2c h w)
            vlb = bound(cast(Process, process), detached, z0, zt, t)
        return Loss(self.weight(process, t, z0) * mse + vlb, mse, vlb)


PAPER = Objective("epsilon")  # L_simple + L_vlb (Latte, Sec. 3.1)
V = Objective("v")
RECTIFIED_FLOW = Objective("flow")
MIN_SNR = Objective("epsilon", min_snr)
