# SPDX-License-Identifier: Apache-2.0
"""What the model is trained to do: the error of its prediction, and the variational bound that teaches its variance.

An objective is two choices, what the output means and how much each timestep counts; the rest is the same for all. The bound
(Nichol & Dhariwal 2021, L_hybrid as the released code of Latte has it) sees a detached mean, so that it trains nothing but the
variance channels. Everything runs in the precision of z_0: float32 in training, float64 when a test asks for it.
Axes: b batch, f frames, c channels, h height, w width.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import Tensor

if (
    TYPE_CHECKING
):  # process.py reads OBJECTIVES to check its config, so here its names serve the annotations alone
    from latte.diffusion.process import NoisePath, Process

Denoiser = Callable[[Tensor, Tensor], Tensor]
"""(z (b f c h w), original timesteps (b,) int64) -> (b f c h w), or (b f 2c h w) with a learned variance."""


class Loss(NamedTuple):
    """Per clip, each (b,) and a mean over f c h w: ``total`` is minimised (its batch mean), ``mse`` is unweighted, ``vlb`` is in bits."""

    total: Tensor
    mse: Tensor
    vlb: Tensor


def draw_timesteps(process: "NoisePath", b: int, generator: torch.Generator) -> Tensor:
    """b uniform indices of the process: (b,) int64 on the CPU."""
    return torch.randint(process.num_steps, (b,), generator=generator)


def gaussian_kl(mean: Tensor, log_variance: Tensor, other_mean: Tensor, other_log_variance: Tensor) -> Tensor:
    """KL(N(mean, exp log_variance) || N(other)) of each element, in nats; shapes broadcast."""
    gap = log_variance - other_log_variance
    return 0.5 * (torch.exp(gap) - 1 - gap + (mean - other_mean) ** 2 * torch.exp(-other_log_variance))


def _normal_cdf(x: Tensor) -> Tensor:
    """The tanh approximation of the standard normal distribution function, as the released code has it."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def discretised_log_likelihood(z: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Log of the mass that N(mean, exp log_variance) puts into the bin z +- 1/255, element by element, in nats.

    The outer bins (beyond +-0.999) reach to infinity, as for 8-bit pixels; the released code applies this to latents as it is.
    """
    scale = torch.exp(-0.5 * log_variance)
    above, below = _normal_cdf(scale * (z - mean + 1 / 255)), _normal_cdf(scale * (z - mean - 1 / 255))
    mass = torch.where(z < -0.999, above, torch.where(z > 0.999, 1 - below, above - below))
    return mass.clamp(min=1e-12).log()


def bound(process: "Process", output: Tensor, z0: Tensor, zt: Tensor, t: Tensor) -> Tensor:
    """The term of the variational bound at t (b,): bits per element, (b,).

    KL(q(z_t-1 | z_t, z_0) || p(z_t-1 | z_t)), and at t = 0 the negative log-likelihood of z_0. Detach the prediction in ``output``
    beforehand to train the variance alone.
    """
    true, model = process.posterior(z0, zt, t), process.read(output, zt, t)
    kl = gaussian_kl(true.mean, true.log_variance, model.mean, model.log_variance).flatten(1).mean(1)
    nll = -discretised_log_likelihood(z0, model.mean, model.log_variance).flatten(1).mean(1)
    return torch.where(t == 0, nll, kl) / math.log(2)


def uniform(process: "NoisePath", t: Tensor, z0: Tensor) -> Tensor:
    """Every timestep counts the same: ones (b,)."""
    return torch.ones_like(process.at("signal", t, z0)).flatten()


def min_snr(process: "NoisePath", t: Tensor, z0: Tensor) -> Tensor:
    """min(SNR, 5) / SNR (b,): the easy, almost clean timesteps count less (Hang et al. 2023, eps prediction, gamma = 5)."""
    snr = (process.at("signal", t, z0) / process.at("noise", t, z0)).flatten() ** 2
    return snr.clamp(max=5.0) / snr


@dataclass(frozen=True)
class Objective:
    """A loss: ``prediction`` (of process.PREDICTIONS) is what the output means, ``weight`` how much its error counts at each t."""

    prediction: str
    weight: Callable[["NoisePath", Tensor, Tensor], Tensor] = uniform

    def __call__(self, denoise: Denoiser, process: "NoisePath", z0: Tensor, t: Tensor, eps: Tensor) -> Loss:
        """z0 and eps (b f c h w), t (b,) int64 indices of ``process`` -> Loss: weight x mse + vlb.

        vlb is 0 for a model without variance channels and for rectified flow, which has no variance to learn.
        """
        assert process.prediction == self.prediction, (
            f"a process that predicts {process.prediction} met an objective for {self.prediction}"
        )
        t = t.to(z0.device)
        zt = process.add_noise(z0, t, eps)
        output = denoise(zt, process.original(t))
        prediction, variance = process.split(output, zt)
        mse = ((prediction - process.target(z0, t, eps)) ** 2).flatten(1).mean(1)
        vlb = torch.zeros_like(mse)
        if variance is not None and self.prediction != "flow":
            vlb = bound(cast("Process", process), torch.cat([prediction.detach(), variance], 2), z0, zt, t)
        return Loss(self.weight(process, t, z0) * mse + vlb, mse, vlb)


OBJECTIVES = {
    "paper": Objective("epsilon"),  # L_simple + L_vlb
    "v": Objective("v"),
    "rectified_flow": Objective("flow"),
    "min_snr": Objective("epsilon", min_snr),
}
