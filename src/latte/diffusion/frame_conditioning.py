# SPDX-License-Identifier: Apache-2.0
"""Frames that are given: image to video (the first), interpolation (first and last), or any others, with any model and any sampler.

A denoiser that wraps a denoiser, as guidance is one. Two things happen at every step:
- Replacement. At the given frames the answer is the true one, z_0 itself. Every sampler then walks there through q(z_t | z_0) with the
  noise that it started from (a sampler that draws does so from the posterior of the true z_0), and arrives at z_0. The image counterpart
  is RePaint (Lugmayr et al. 2022, eq. 8a), which draws that noise anew at every step and so fits ancestral samplers alone.
- Guidance. By itself replacement leaves the other frames free: they have made up their minds in heavy noise, where the given ones tell
  them next to nothing. So z_0 moves by Cov(z_0, given) Cov(given)^-1 (given - the model's guess for it): moment matching posterior
  sampling (Rozet et al. 2024, arXiv 2405.13712), whose covariances are noise^2 / signal times the gradient of the guess (Tweedie). Of the
  conjugate gradients that solve for the inverse we take the first step, which needs one gradient. Reconstruction guidance (Ho et al. 2022,
  arXiv 2204.03458, eq. 7) goes the same way by a fixed weight: the one that fits a frame of shapes tears a sky apart (docs/LOG.md).
Axes: b batch, f frames, c channels, h height, w width.
"""

import math

import torch
from torch import Tensor

from latte.checks import require
from latte.diffusion.loss import Denoiser
from latte.diffusion.process import NoisePath

STRENGTH = 2.0
"""Times the step of moment matching: 1 is all of it, more makes up for the iterations left out. Figures: docs/results.md."""


def with_known(
    denoise: Denoiser, process: NoisePath, known: Tensor, mask: Tensor, strength: float = STRENGTH
) -> Denoiser:
    """``denoise`` that knows the frames of ``known`` (b f c h w) where ``mask``, bool (f,) or (b f), is True; others are never looked at.

    ``process`` is the one that the model was trained with, not respaced. Strength 0 is replacement alone, one pass of the model a step;
    anything else costs the gradient as well, about three. With no frame known this is ``denoise`` itself. The sample is ``known`` to
    rounding; ``restore`` makes it so exactly. InputError for shapes that do not fit, and for a strength below 0.
    """
    where = check_known(known, mask)
    require(
        math.isfinite(strength) and strength >= 0,
        "strength",
        strength,
        "it weighs a gradient",
        f"give 0 for none, or {STRENGTH}",
    )
    if not bool(mask.any()):
        return denoise

    def answer(z: Tensor, t: Tensor) -> Tensor:
        given, at = known.to(z), where.to(z.device)
        a, s = process.at("signal", t, z), process.at("noise", t, z)
        if strength == 0 or bool(mask.all()):
            prediction, v = process.split(denoise(z, t), z)
        else:
            prediction, v, slope = guess(z, t, given, at)
            z0, _ = process.estimate(prediction, z, t)
            z0 = z0 - strength * step_length(torch.where(at, z0 - given, 0.0), slope) * slope
            prediction = process.target(z0, t, (z - a * z0) / s)
        prediction = torch.where(at, process.target(given, t, (z - a * given) / s), prediction)
        # a learned variance of -1 is the posterior's own, see Process.read
        return prediction if v is None else torch.cat([prediction, torch.where(at, -1.0, v)], 2)

    def guess(z: Tensor, t: Tensor, given: Tensor, at: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """The model's prediction and variance channels, and how the error at the given frames changes with z (b f c h w)."""
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            prediction, v = process.split(denoise(z, t), z)
            z0, _ = process.estimate(prediction, z, t)
            error = torch.where(at, z0 - given, 0.0).square().sum()
            (slope,) = torch.autograd.grad(error, z)
        return prediction.detach(), None if v is None else v.detach(), slope

    return answer


def step_length(error: Tensor, slope: Tensor) -> Tensor:
    """How far to go down the ``slope`` of the squared ``error``, both (b f c h w), as (b 1 1 1 1).

    With J the gradient of the guess and e its error, 0 beside the given frames, the slope is 2 J e. The first step of conjugate gradients
    for Cov y = e, Cov = s^2/a J, is y = e (e.e) / (e.Cov e), and Cov y = slope (e.e) / (e.slope). Where e.slope is not above 0, J is no
    covariance, and the step is 0.
    """
    squares, along = ((error * other).sum((1, 2, 3, 4), keepdim=True) for other in (error, slope))
    return torch.where(along > 0, squares / along, 0.0)


def restore(z: Tensor, known: Tensor, mask: Tensor) -> Tensor:
    """The sample z (b f c h w) with the given frames put back bit for bit."""
    return torch.where(check_known(known, mask).to(z.device), known.to(z), z)


def check_known(known: Tensor, mask: Tensor) -> Tensor:
    """The mask, bool (f,) or (b f), as (1|b f 1 1 1); InputError when it does not fit ``known`` (b f c h w)."""
    require(
        known.ndim == 5,
        "shape of known",
        tuple(known.shape),
        "known frames are latents (b f c h w)",
        "encode a clip",
    )
    fits = mask.dtype == torch.bool and tuple(mask.shape) in ((known.shape[1],), tuple(known.shape[:2]))
    require(
        fits,
        "mask",
        f"{mask.dtype} {tuple(mask.shape)}",
        f"there are {known.shape[0]} clips of {known.shape[1]} frames",
        f"give bool ({known.shape[1]},) or {tuple(known.shape[:2])}",
    )
    return mask.view(-1, known.shape[1], 1, 1, 1)
