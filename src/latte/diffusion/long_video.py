# SPDX-License-Identifier: Apache-2.0
"""Clips longer than the model's own: overlapping windows of its own length, and the methods that make one
clip of them.

A method is a function (sample, denoise, noise, frames, mask, window, overlap, progress) -> z_0 (b f c h w),
where ``frames`` (1|b f c h w) holds the conditioning frames and ``mask``, bool (f,), their positions. A clip
that fits into one window is the ordinary sample, whatever the method. To add a method: one function and one
entry in ``config.LONG_VIDEO_METHODS``.

Clip, window, overlap and chain count latent frames. Where a causal codec compresses time, the first latent
frame of a clip stands for one frame of video, all others for several, and the model learned that the first
one it sees is of that kind. In a later window it is not: there an overlap of at least one latent frame helps,
whose first one has the least weight (freenoise) or is given (chained).
Axes: b batch, f latent frames, c channels, h height, w width.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from latte.checks import check
from latte.diffusion.config import LONG_VIDEO_METHODS as LONG_VIDEO_METHODS
from latte.diffusion.process import DenoiseFunction
from latte.diffusion.samplers import Noise, Progress

SampleFunction = Callable[[DenoiseFunction, Noise, Tensor, Tensor, float, Progress | None], Tensor]
"""(denoise, noise, frames, mask, strength_scale, progress) -> a sample (b f c h w) that equals the
conditioning frames bit for bit; ``strength_scale`` multiplies the strength of frame guidance."""
CHAIN_STRENGTH = 0.25
"""Scale of the frame guidance in a chain, where half a window is given. Chains of skies, half a window
shared, strength 2: the contrast of the second 16 frames over that of the first is 0.99 at 0.25, 1.17 at 0.5
and 1.33 at 1 (docs/LOG.md)."""


def freenoise(
    sample: SampleFunction,
    denoise: DenoiseFunction,
    noise: Noise,
    frames: Tensor,
    mask: Tensor,
    window: int,
    overlap: int | None,
    progress: Progress | None,
) -> Tensor:
    """Denoise all windows side by side, from shuffled copies of one window's noise.

    The scene stays the same, and motion nearly repeats: all windows start from the same frames of noise. See
    ``in_windows`` and ``shuffled_noise``.
    """
    if overlap is None:
        overlap = window // 2
    stride = window - overlap
    windowed = in_windows(denoise, window, overlap)
    return sample(windowed, shuffled_noise(noise, window, stride), frames, mask, 1.0, progress)


def chained(
    sample: SampleFunction,
    denoise: DenoiseFunction,
    noise: Noise,
    frames: Tensor,
    mask: Tensor,
    window: int,
    overlap: int | None,
    progress: Progress | None,
) -> Tensor:
    """Generate one window after the other, each conditioned on the frames it shares with those before.

    The scene stays and moves on, as long as it resembles the training data. A finished window is never
    changed by a later one. Memory is that of one window with its gradient, time two to three times that of
    ``freenoise``.
    """
    starts = window_starts(mask.shape[0], window, overlap)
    z = frames
    done = mask.clone()
    for number, start in enumerate(starts):
        part = slice(start, start + window)
        part_progress = progress and partial_progress(progress, number, len(starts))
        strength_scale = CHAIN_STRENGTH if number else 1.0
        generated = sample(denoise, noise, z[:, part], done[part], strength_scale, part_progress)
        z = z.expand(len(generated), *z.shape[1:])
        z = torch.cat([z[:, :start], generated, z[:, start + window :]], dim=1)  # (b f c h w)
        done[part] = True
    return z


FRAME_GUIDED = ("chained",)  # those that guide later windows by the frames they share with earlier ones


def window_starts(frames: int, length: int, overlap: int | None = None) -> list[int]:
    """Return the first latent frames of windows of ``length`` that cover ``frames``.

    Neighbours share ``overlap`` latent frames, None for half of them, the last two perhaps more. InputError
    for windows that do not fit.
    """
    if overlap is None:
        overlap = length // 2
    check(
        length >= 1,
        f"window must be at least 1 latent frame, got {length}; use the number the model was trained on",
    )
    check(
        0 <= overlap < length,
        f"overlap is {overlap}, but windows have {length} latent frames; give 0 to {length - 1}",
    )
    if frames <= length:
        return [0]
    return [*range(0, frames - length, length - overlap), frames - length]


def in_windows(denoise: DenoiseFunction, length: int, overlap: int | None = None) -> DenoiseFunction:
    """Return ``denoise`` for clips of any length; it sees ``length`` frames at a time.

    Neighbouring windows share ``overlap`` frames, None for half of them. Frames in several windows get the
    weighted mean of their predictions, so that all windows advance as one clip (MultiDiffusion, Bar-Tal et
    al. 2023, arXiv 2302.08113, eq. 5, over space; Gen-L-Video, Wang et al. 2023, arXiv 2305.18264, over
    time). A frame counts less towards a window's edge, where the model sees its context on one side only
    (Mixture of Diffusers, Jimenez 2023, arXiv 2302.02412). Windows agree through their overlap alone. Memory
    is that of one window. Frame conditioning wraps this one, condition_on_frames(in_windows(...), ...); its
    gradient then holds all windows.
    """
    window_starts(length, length, overlap)  # refuse a wrong overlap now

    def windowed(z: Tensor, t: Tensor) -> Tensor:
        frames = z.shape[1]
        starts = window_starts(frames, length, overlap)
        if len(starts) == 1:
            return denoise(z, t)
        window_weights = edge_weights(length).to(z)
        weights = torch.zeros(frames, device=z.device, dtype=z.dtype)
        total = None
        for start in starts:
            prediction = denoise(z[:, start : start + length].contiguous(), t).to(z.dtype)
            weighted = prediction * window_weights.view(-1, 1, 1, 1)
            after = frames - start - length
            padded = torch.nn.functional.pad(weighted, (0, 0) * 3 + (start, after))  # (b f c|2c h w)
            total = padded if total is None else total + padded
            weights[start : start + length] += window_weights
        assert total is not None
        return total / weights.view(-1, 1, 1, 1)

    return windowed


def edge_weights(length: int) -> Tensor:
    """Return weights (length,) that rise in equal steps from 1 at both ends to the middle of the window."""
    ramp = torch.arange(1, length + 1)
    return torch.minimum(ramp, ramp.flip(0)).float()


def shuffled_noise(noise: Noise, window: int, stride: int) -> Noise:
    """Return noise whose first ``window`` frames are ``noise``'s, and whose others are shuffled copies.

    Every further ``stride`` frames are those that leave the window, in another order: all windows start from
    the same frames of noise, so their content is alike (FreeNoise, Qiu et al. 2023, arXiv 2310.15169, Sec.
    3.2). The order, too, is drawn from each sample's own generator.
    """

    def extended(shape: Sequence[int]) -> Tensor:
        z = noise((min(shape[0], window), *shape[1:]))  # (b window c h w)
        while z.shape[1] < shape[0]:
            leaving = z[:, z.shape[1] - window :][:, :stride]
            order = noise((stride,)).argsort(1).view(len(z), stride, *[1] * (z.ndim - 2))  # (b stride 1 1 1)
            z = torch.cat([z, leaving.take_along_dim(order, 1)], dim=1)  # (b f+stride c h w)
        return z[:, : shape[0]]

    return extended


def partial_progress(progress: Progress, part: int, num_parts: int) -> Progress:
    """Return the progress of one part as a share of ``num_parts`` equal ones."""
    return lambda done, steps: progress(part * steps + done, num_parts * steps)
