# SPDX-License-Identifier: Apache-2.0
"""Sampling with conditioning frames: image to video (the first frame), interpolation (first and last), or any
others.

Works with any trained model and any sampler. A wrapper around a denoise function, as guidance is one. Each
step does two things:
- Replacement. At conditioning frames the prediction is the true one, of z_0 itself. Every sampler then
  follows q(z_t | z_0) with the noise it started from, and ends at z_0. RePaint (Lugmayr et al. 2022, eq. 8a)
  draws that noise again at every step, and so fits ancestral samplers alone.
- Guidance. Replacement alone hardly changes the other frames: their content is decided in heavy noise, where
  conditioning frames carry little information. So z_0 moves by Cov(z_0, frames) Cov(frames)^-1 (frames - the
  model's estimate of them): moment matching posterior sampling (Rozet et al. 2024, arXiv 2405.13712), whose
  covariances are noise^2 / signal times the gradient of the estimate (Tweedie). Of the conjugate gradients
  that invert the covariance we take the first step, which needs one gradient. Reconstruction guidance (Ho et
  al. 2022, arXiv 2204.03458, eq. 7) moves along the same direction by a fixed weight; no single weight suited
  all of our data sets (docs/LOG.md).
Axes: b batch, f frames, c channels, h height, w width.
"""

import math

import torch
from torch import Tensor

from latte.checks import check
from latte.diffusion.process import DenoiseFunction, NoisePath

DEFAULT_STRENGTH = 2.0
"""Multiplies the moment-matching step; above 1 it compensates for omitted iterations (docs/results.md)."""
MAX_STRENGTH = 100.0


def condition_on_frames(
    denoise: DenoiseFunction,
    process: NoisePath,
    frames: Tensor,
    mask: Tensor,
    strength: float = DEFAULT_STRENGTH,
) -> DenoiseFunction:
    """Return ``denoise`` conditioned on ``frames`` (b f c h w) where ``mask``, bool (f,) or (b f), is True.

    ``frames`` outside the mask are not read. ``process`` is the one of training, not respaced. Strength 0 is
    replacement alone, one pass of the model a step; any other needs the gradient as well, about three times
    the work. With an empty mask this is ``denoise`` itself. The sample equals ``frames`` to rounding;
    ``restore_frames`` makes it exact. InputError for shapes that do not fit and for a strength outside
    0..MAX_STRENGTH.
    """
    where = check_frames(frames, mask)
    check(
        math.isfinite(strength) and 0 <= strength <= MAX_STRENGTH,
        f"strength of the frame guidance must be between 0 and {MAX_STRENGTH:g}, got {strength}; 0 is "
        f"replacement alone, the default is {DEFAULT_STRENGTH}",
    )
    if not bool(mask.any()):
        return denoise
    replacement_only = strength == 0 or bool(mask.all())

    def conditioned(z: Tensor, t: Tensor) -> Tensor:
        targets = frames.to(z)
        at = where.to(z.device)
        signal = process.at("signal", t, z)
        noise = process.at("noise", t, z)
        if replacement_only:
            prediction, v = process.split(denoise(z, t), z)
        else:
            prediction, v, slope = estimate_with_gradient(z, t, targets, at)
            z0, _ = process.estimate(prediction, z, t)
            error = torch.where(at, z0 - targets, 0.0)
            z0 = z0 - strength * step_length(error, slope) * slope
            prediction = process.target(z0, t, (z - signal * z0) / noise)
        prediction = torch.where(at, process.target(targets, t, (z - signal * targets) / noise), prediction)
        if v is None:
            return prediction
        # a learned variance of -1 is the posterior's own, see Process.reverse_step
        return torch.cat([prediction, torch.where(at, -1.0, v)], dim=2)  # (b f 2c h w)

    def estimate_with_gradient(
        z: Tensor, t: Tensor, targets: Tensor, at: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Return prediction, variance channels, and the gradient of the squared error at the frames.

        Each is (b f c h w); the gradient is with respect to z.
        """
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            prediction, v = process.split(denoise(z, t), z)
            z0, _ = process.estimate(prediction, z, t)
            squared_error = torch.where(at, z0 - targets, 0.0).square().sum()
            (slope,) = torch.autograd.grad(squared_error, z)
        return prediction.detach(), None if v is None else v.detach(), slope

    return conditioned


def step_length(error: Tensor, slope: Tensor) -> Tensor:
    """Return how far to move down the ``slope`` of the squared ``error``, both (b f c h w), as (b 1 1 1 1).

    With J the gradient of the estimate and e its error, 0 outside the conditioning frames, the slope is 2 J
    e. The first step of conjugate gradients for Cov y = e, Cov = noise^2 / signal J, is y = e (e.e) / (e.Cov
    e), and Cov y = slope (e.e) / (e.slope). Where e.slope is not positive, J is no covariance, and the step
    is 0.
    """
    squares = (error * error).sum((1, 2, 3, 4), keepdim=True)  # (b 1 1 1 1)
    along = (error * slope).sum((1, 2, 3, 4), keepdim=True)  # (b 1 1 1 1)
    return torch.where(along > 0, squares / along, 0.0)


def restore_frames(z: Tensor, frames: Tensor, mask: Tensor) -> Tensor:
    """Return the sample z (b f c h w) with the conditioning frames copied in bit for bit."""
    return torch.where(check_frames(frames, mask).to(z.device), frames.to(z), z)


def check_frames(frames: Tensor, mask: Tensor) -> Tensor:
    """Return the mask, bool (f,) or (b f), as (1|b f 1 1 1).

    InputError when it does not fit ``frames`` (b f c h w).
    """
    check(
        frames.ndim == 5,
        f"conditioning frames have shape {tuple(frames.shape)}, but must be latents (b f c h w); encode a "
        "clip",
    )
    clips, num_frames = frames.shape[:2]
    check(
        mask.dtype == torch.bool and tuple(mask.shape) in ((num_frames,), (clips, num_frames)),
        f"mask is {mask.dtype} of shape {tuple(mask.shape)}, but {clips} clips of {num_frames} frames need "
        f"bool ({num_frames},) or ({clips}, {num_frames})",
    )
    return mask.view(-1, num_frames, 1, 1, 1)  # (1|b f 1 1 1)
