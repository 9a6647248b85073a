# SPDX-License-Identifier: Apache-2.0
"""Classifier-free guidance as a denoiser that wraps a model (Ho & Salimans 2022): no sampler knows about it.

Axes: b batch, f frames, c channels, h height, w width.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from latte.checks import InputError, require
from latte.diffusion.loss import Denoiser

NULL_LABEL = -1
"""The label that stands for "no class"."""

Model = Callable[..., Tensor]
"""(z (b f c h w), original timesteps (b,), condition ...) -> (b f c|2c h w), such as ``latte.model.latte.Latte`` with label (b,) or None
as its condition, or ``latte.model.text.LatteText`` with text (b l k) and mask (b l)."""


def conditional(model: Model, label: Tensor | None = None) -> Denoiser:
    """``model`` with its labels (b,) int64 bound; with None the model itself: an unconditional one is a denoiser already."""
    return model if label is None else lambda z, t: model(z, t, label)


def guided(
    model: Model, label: Tensor | None, scale: float, window: tuple[int, int] | None = None
) -> Denoiser:
    """``guided_pair`` of ``label`` (b,) against the null class; InputError without labels (scale 1 apart), too."""
    if label is not None:
        return guided_pair(model, (label,), (torch.full_like(label, NULL_LABEL),), scale, window)
    check_guidance(scale, window)
    if scale != 1:
        raise InputError(
            f"guidance is {scale}, but an unconditional model has nothing to be guided by; give guidance 1, or labels"
        )
    return conditional(model)


def guided_pair(
    model: Model,
    condition: Sequence[Tensor],
    null: Sequence[Tensor],
    scale: float,
    window: tuple[int, int] | None = None,
) -> Denoiser:
    """u + scale (c - u), with c the model's answer under ``condition`` and u under ``null``, the condition of nothing.

    Both are what the model takes behind z and t, each tensor (b ...), of the same shapes: a caption and its negative are padded to one
    length, with a mask. One call of the model on 2b clips, the conditional half first, combined in the precision of z. Only the
    prediction's channels are guided; variance channels are those of the conditional half. At scale 1 this is the plain conditional
    model, one pass of b clips. ``window`` (first, last) guides only the original timesteps inside it, both ends included, and is the
    conditional model elsewhere (Kynkaanniemi et al. 2024). InputError for a negative or not finite scale, a reversed window, and
    conditions that do not match.
    """
    check_guidance(scale, window)
    shapes = [[tuple(tensor.shape) for tensor in side] for side in (condition, null)]
    require(
        shapes[0] == shapes[1],
        "shapes of the null condition",
        shapes[1],
        f"the condition has {shapes[0]}",
        "pad both to one length",
    )

    def plain(z: Tensor, t: Tensor) -> Tensor:
        return model(z, t, *condition)

    def both(z: Tensor, t: Tensor) -> Tensor:
        joint = [torch.cat(pair) for pair in zip(condition, null, strict=True)]
        with_condition, without = model(torch.cat([z, z]), torch.cat([t, t]), *joint).to(z.dtype).chunk(2)
        c, u = with_condition[:, :, : z.shape[2]], without[:, :, : z.shape[2]]
        return torch.cat([u + scale * (c - u), with_condition[:, :, z.shape[2] :]], 2)

    def inside_window(z: Tensor, t: Tensor) -> Tensor:
        assert window is not None
        inside = (t >= window[0]) & (t <= window[1])
        if not inside.any():
            return plain(z, t)
        if inside.all():
            return both(z, t)
        return torch.where(inside.view(-1, *[1] * (z.ndim - 1)), both(z, t), plain(z, t))

    if scale == 1:
        return plain
    return both if window is None else inside_window


def check_guidance(scale: float, window: tuple[int, int] | None) -> None:
    """InputError for what is no weight and no window."""
    require(
        math.isfinite(scale) and scale >= 0,
        "guidance",
        scale,
        "it must be finite and not negative",
        "give 1 for none, 4 for strong",
    )
    if window is not None:
        require(
            window[0] <= window[1],
            "guidance window",
            window,
            "it runs from the first to the last guided timestep",
            "swap them",
        )
