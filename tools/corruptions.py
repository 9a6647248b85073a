# SPDX-License-Identifier: Apache-2.0
"""Damage of known kind and strength: what the built-in detector learns to tell, and what the sensitivity of any detector is measured with.

Each function takes uint8 (t h w c), a strength of which 0 changes nothing, and a generator for what is drawn at random. Damages of the
order of frames are also there as the frames' numbers, so that it is known exactly which step is a wrong one.
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

Damage = Callable[[Tensor, float, torch.Generator], Tensor]


def to_bytes(x: Tensor) -> Tensor:
    """float -> uint8, rounded and clamped."""
    return x.round().clamp(0, 255).to(torch.uint8)


def blur(clip: Tensor, sigma: float, _: torch.Generator) -> Tensor:
    """Gaussian blur of ``sigma`` pixels, edges repeated."""
    if sigma == 0:
        return clip
    reach = math.ceil(3 * sigma)
    kernel = torch.exp(-torch.arange(-reach, reach + 1.0).square() / (2 * sigma**2))
    kernel = (kernel / kernel.sum())[None, None]
    x = clip.permute(0, 3, 1, 2).float().flatten(0, 1)[:, None]
    x = F.pad(x, [reach] * 4, mode="replicate")
    x = F.conv2d(F.conv2d(x, kernel[:, :, None]), kernel[..., None])
    return to_bytes(x.unflatten(0, (len(clip), 3))[:, :, 0].permute(0, 2, 3, 1))


def noise(clip: Tensor, std: float, draw: torch.Generator) -> Tensor:
    """Gaussian noise of ``std`` grey levels, other in each frame."""
    return to_bytes(clip.float() + std * torch.randn(clip.shape, generator=draw))


def shuffled_order(frames: int, share: float, draw: torch.Generator) -> Tensor:
    """Numbers of the frames when ``share`` of them, drawn at random, change places in a circle: (t,)."""
    places = torch.randperm(frames, generator=draw)[: round(share * frames)]
    order = torch.arange(frames)
    order[places] = places.roll(1)
    return order


def frozen_order(frames: int, share: float) -> Tensor:
    """Numbers of the frames when the last ``share`` of them stand still: (t,)."""
    last = frames - 1
    return torch.arange(frames).clamp(max=max(last - round(share * last), 0))


def shuffle(clip: Tensor, share: float, draw: torch.Generator) -> Tensor:
    """``share`` of the frames change places."""
    return clip[shuffled_order(len(clip), share, draw)]


def freeze(clip: Tensor, share: float, _: torch.Generator) -> Tensor:
    """The last ``share`` of the frames stand still."""
    return clip[frozen_order(len(clip), share)]


def hue_matrix(degrees: float) -> Tensor:
    """(3 3): turns colours about the grey axis."""
    angle = math.radians(degrees)
    a, b = math.cos(angle), math.sin(angle) / math.sqrt(3)
    same, other = a + (1 - a) / 3, (1 - a) / 3
    return torch.tensor(
        [[same, other - b, other + b], [other + b, same, other - b], [other - b, other + b, same]]
    )


def turn_hue(clip: Tensor, degrees: float, _: torch.Generator) -> Tensor:
    """Colours turned about the grey axis by ``degrees``."""
    return to_bytes(clip.float() @ hue_matrix(degrees).T)


def dim(clip: Tensor, share: float, _: torch.Generator) -> Tensor:
    """``share`` of the light is taken away."""
    return to_bytes(clip.float() * (1 - share))


def compress(clip: Tensor, loss: float, _: torch.Generator) -> Tensor:
    """Through JPEG (4:2:0) of quality 100 - ``loss``; 0 leaves the clip alone."""
    if loss == 0:
        return clip
    found = []
    for frame in clip.numpy():
        copy = io.BytesIO()
        Image.fromarray(frame).save(copy, "JPEG", quality=100 - round(loss), subsampling="4:2:0")
        found.append(np.asarray(Image.open(copy, formats=("JPEG",))))
    return torch.from_numpy(np.stack(found))
