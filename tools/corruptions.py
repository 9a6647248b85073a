# SPDX-License-Identifier: Apache-2.0
"""Corruptions of clips with a known kind and strength: training data of the built-in detector, and the
sensitivity benchmark of any detector.

Each function takes uint8 (t h w c), a strength (0 changes nothing) and a generator for its random choices.
Corruptions of the frame order are also available as frame numbers, so that it is known exactly which steps
are wrong.
Axes: t frames, h w c height width channels.
"""

import io
import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

Corruption = Callable[[Tensor, float, torch.Generator], Tensor]


def to_uint8(x: Tensor) -> Tensor:
    """Return ``x`` as uint8, rounded and clamped."""
    return x.round().clamp(0, 255).to(torch.uint8)


def blur(clip: Tensor, sigma: float, _: torch.Generator) -> Tensor:
    """Blur by a Gaussian of ``sigma`` pixels, edges repeated."""
    if sigma == 0:
        return clip
    radius = math.ceil(3 * sigma)
    kernel = torch.exp(-torch.arange(-radius, radius + 1.0).square() / (2 * sigma**2))
    kernel = (kernel / kernel.sum())[None, None]
    x = clip.permute(0, 3, 1, 2).float().flatten(0, 1)[:, None]
    x = F.pad(x, [radius] * 4, mode="replicate")
    x = F.conv2d(F.conv2d(x, kernel[:, :, None]), kernel[..., None])
    return to_uint8(x.unflatten(0, (len(clip), 3))[:, :, 0].permute(0, 2, 3, 1))


def noise(clip: Tensor, std: float, random: torch.Generator) -> Tensor:
    """Add Gaussian noise of ``std`` grey levels, independent in each frame."""
    return to_uint8(clip.float() + std * torch.randn(clip.shape, generator=random))


def shuffled_order(frames: int, fraction: float, random: torch.Generator) -> Tensor:
    """Return frame numbers (t,) with a random ``fraction`` of the frames rotated among their positions."""
    positions = torch.randperm(frames, generator=random)[: round(fraction * frames)]
    order = torch.arange(frames)
    order[positions] = positions.roll(1)
    return order


def frozen_order(frames: int, fraction: float) -> Tensor:
    """Return frame numbers (t,) with the last ``fraction`` of the frames frozen."""
    last = frames - 1
    return torch.arange(frames).clamp(max=max(last - round(fraction * last), 0))


def shuffle(clip: Tensor, fraction: float, random: torch.Generator) -> Tensor:
    """Permute a random ``fraction`` of the frames."""
    return clip[shuffled_order(len(clip), fraction, random)]


def freeze(clip: Tensor, fraction: float, _: torch.Generator) -> Tensor:
    """Freeze the last ``fraction`` of the frames."""
    return clip[frozen_order(len(clip), fraction)]


def hue_matrix(degrees: float) -> Tensor:
    """Return the matrix (3 3) that rotates colours about the grey axis."""
    angle = math.radians(degrees)
    a, b = math.cos(angle), math.sin(angle) / math.sqrt(3)
    same, other = a + (1 - a) / 3, (1 - a) / 3
    return torch.tensor(
        [[same, other - b, other + b], [other + b, same, other - b], [other - b, other + b, same]]
    )


def shift_hue(clip: Tensor, degrees: float, _: torch.Generator) -> Tensor:
    """Rotate colours about the grey axis by ``degrees``."""
    return to_uint8(clip.float() @ hue_matrix(degrees).T)


def dim(clip: Tensor, fraction: float, _: torch.Generator) -> Tensor:
    """Remove a ``fraction`` of the light."""
    return to_uint8(clip.float() * (1 - fraction))


def compress(clip: Tensor, loss: float, _: torch.Generator) -> Tensor:
    """Compress by JPEG (4:2:0) of quality 100 - ``loss``; 0 leaves the clip unchanged."""
    if loss == 0:
        return clip
    found = []
    for frame in clip.numpy():
        copy = io.BytesIO()
        Image.fromarray(frame).save(copy, "JPEG", quality=100 - round(loss), subsampling="4:2:0")
        found.append(np.asarray(Image.open(copy, formats=("JPEG",))))
    return torch.from_numpy(np.stack(found))
