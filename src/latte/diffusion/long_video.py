# SPDX-License-Identifier: Apache-2.0
"""Clips of more frames than the model was made for, a window of its own length at a time: how windows become one clip.

Each choice is a function (walk, denoise, noise, known, mask, window, overlap, progress) -> z_0 (b f c h w), where ``known`` (1|b f c h w)
holds the frames that are given and ``mask``, bool (f,), says which these are. A clip that fits into one window is the plain sample,
whatever the choice; neighbours share ``overlap`` frames.
Axes: b batch, f frames, c channels, h height, w width.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from latte.diffusion.loss import Denoiser
from latte.diffusion.samplers import Progress
from latte.diffusion.windows import in_windows, window_starts

Noise = Callable[[Sequence[int]], Tensor]
"""The next standard normal (b, *shape), such as ``runtime.SampleNoise``."""
Walk = Callable[[Denoiser, Noise, Tensor, Tensor, float, Progress | None], Tensor]
"""(denoiser, noise, known, mask, pull, progress) -> a sample (b f c h w) that holds the known frames bit for bit; ``pull`` times the
strength is how hard they pull at the others."""
CHAIN_PULL = 0.25
"""Many frames of one scene pull harder than one does. Chains of skies, half a window shared, strength 2: the contrast of the second 16
frames over that of the first is 0.99 at 0.25, 1.17 at 0.5 and 1.33 at 1 (docs/LOG.md)."""


def freenoise(
    walk: Walk,
    denoise: Denoiser,
    noise: Noise,
    known: Tensor,
    mask: Tensor,
    window: int,
    overlap: int | None,
    progress: Progress | None,
) -> Tensor:
    """All windows side by side (``in_windows``), from the first one's noise again and again (``repeated``).

    A scene stays, and so, nearly, does what moves in it: every window draws the same few frames anew.
    """
    stride = window - (window // 2 if overlap is None else overlap)
    return walk(
        in_windows(denoise, window, overlap), repeated(noise, window, stride), known, mask, 1.0, progress
    )


def chained(
    walk: Walk,
    denoise: Denoiser,
    noise: Noise,
    known: Tensor,
    mask: Tensor,
    window: int,
    overlap: int | None,
    progress: Progress | None,
) -> Tensor:
    """One window after the other, each given the frames that it shares with those before (``with_known``).

    A scene stays and moves on, as far as it remains what the model knows. What is drawn is drawn once: a later window never changes an
    earlier one. Memory is that of one window, with its gradient; that also makes it two to three times the work of ``freenoise``.
    """
    starts = window_starts(mask.shape[0], window, window // 2 if overlap is None else overlap)
    z, done = known, mask.clone()
    for number, start in enumerate(starts):
        part = slice(start, start + window)
        tell = None if progress is None else share(progress, number, len(starts))
        drawn = walk(denoise, noise, z[:, part], done[part], CHAIN_PULL if number else 1.0, tell)
        z, done[part] = z.expand(len(drawn), *z.shape[1:]), True
        z = torch.cat([z[:, :start], drawn, z[:, start + window :]], 1)
    return z


def repeated(noise: Noise, window: int, stride: int) -> Noise:
    """Noise whose first ``window`` frames are ``noise``'s own, and every later ``stride`` of them those that just left, shuffled.

    So all windows start from the same frames of noise, in other orders, and draw much the same things (FreeNoise, Qiu et al. 2023,
    arXiv 2310.15169, sec. 3.2). The order, too, is drawn from each sample's own stream.
    """

    def draw(shape: Sequence[int]) -> Tensor:
        z = noise((min(shape[0], window), *shape[1:]))
        while z.shape[1] < shape[0]:
            leaving = z[:, z.shape[1] - window :][:, :stride]
            order = noise((stride,)).argsort(1).view(len(z), stride, *[1] * (z.ndim - 2))
            z = torch.cat([z, leaving.take_along_dim(order, 1)], 1)
        return z[:, : shape[0]]

    return draw


def share(progress: Progress, part: int, parts: int) -> Progress:
    """The progress of one part as that of ``parts`` equal ones."""
    return lambda done, steps: progress(part * steps + done, parts * steps)


LONGER = {"freenoise": freenoise, "chained": chained}
