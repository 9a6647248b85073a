# SPDX-License-Identifier: Apache-2.0
"""Clips of more frames than the model was made for: overlapping windows of its own length, denoised side by side.

A denoiser that wraps a denoiser. At every step the model answers each window, and frames that lie in several get the mean of their
answers, so that all windows move on as one clip (MultiDiffusion, Bar-Tal et al. 2023, arXiv 2302.08113, eq. 5, over space; Gen-L-Video,
Wang et al. 2023, arXiv 2305.18264, over time). The mean is weighted: a frame counts less towards a window's edge, where the model sees one
side of it only (for tiles of a picture: Mixture of Diffusers, Jimenez 2023, arXiv 2302.02412). Neighbours agree through their overlap
alone: what has to hold over the whole clip, such as a path that may not leave the frame, no window can know. From fresh noise every window
draws a scene of its own; ``latte.diffusion.long_video`` gives them all the same (FreeNoise).
Axes: b batch, f frames, c channels, h height, w width.
"""

import torch
from torch import Tensor

from latte.checks import require
from latte.diffusion.loss import Denoiser


def window_starts(frames: int, length: int, overlap: int) -> list[int]:
    """First frames of windows of ``length`` that cover ``frames``; neighbours share ``overlap`` frames, the last two perhaps more."""
    require(
        length >= 1,
        "window",
        length,
        "it counts frames",
        "give the number of frames that the model was made for",
    )
    require(
        0 <= overlap < length, "overlap", overlap, f"windows have {length} frames", f"give 0 to {length - 1}"
    )
    if frames <= length:
        return [0]
    return [*range(0, frames - length, length - overlap), frames - length]


def in_windows(denoise: Denoiser, length: int, overlap: int | None = None) -> Denoiser:
    """``denoise`` for clips of any number of frames, ``length`` of them at a time; ``overlap`` None: half of it.

    A clip that fits into one window is answered by ``denoise`` itself. Memory is that of one window, time that of all of them. With
    ``latte.diffusion.frame_conditioning`` this comes inside: with_known(in_windows(...), ...), and its gradient needs the memory of all windows.
    """
    overlap = length // 2 if overlap is None else overlap
    window_starts(length, length, overlap)

    def answer(z: Tensor, t: Tensor) -> Tensor:
        starts = window_starts(z.shape[1], length, overlap)
        if len(starts) == 1:
            return denoise(z, t)
        total, weights = None, torch.zeros(z.shape[1], device=z.device, dtype=z.dtype)
        hat = edge_weights(length).to(z)
        for start in starts:
            part = denoise(z[:, start : start + length].contiguous(), t).to(z.dtype) * hat.view(-1, 1, 1, 1)
            padded = torch.nn.functional.pad(part, (0, 0) * 3 + (start, z.shape[1] - start - length))
            total = padded if total is None else total + padded
            weights[start : start + length] += hat
        assert total is not None
        return total / weights.view(-1, 1, 1, 1)

    return answer


def edge_weights(length: int) -> Tensor:
    """(f,) rising by equal steps from 1 at the ends to the middle of the window."""
    ramp = torch.arange(1, length + 1)
    return torch.minimum(ramp, ramp.flip(0)).float()
