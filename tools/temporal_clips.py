# SPDX-License-Identifier: Apache-2.0
"""Clips that the built-in temporal autoencoder learns from: the procedural world, moving shapes, and drifting
textures.

Scenes are those of seeds that no recipe draws. Axes: n clips, t frames, h height, w width, c channels.
"""

import os
from pathlib import Path

import numpy as np
import torch

from latte.data import procedural
from latte.data.world import scenes as world
from latte.runtime import generator

TRAIN_SEED, TEST_SEED = 9_000_000, 9_100_000  # scenes that no recipe draws
FPS = (6.0, 12.0)  # of the world's clips in training
SLACK = 8  # frames of a world clip beyond ``frames``, for random starts


def world_clip(seed: int, index: int, frames: int, size: int, fps: float | None = None) -> np.ndarray:
    """Render scene ``index`` of the procedural world, at a random frame rate if ``fps`` is None: uint8 (t h w
    c).
    """
    if fps is None:
        draw = torch.rand((), generator=generator(seed, "frame rate", index)).item()
        fps = FPS[0] + (FPS[1] - FPS[0]) * draw
    return world.render(world.sample_scene(seed, index), frames, size, size, fps)


def shape_clip(seed: int, index: int, frames: int, size: int) -> np.ndarray:
    """Render moving shape ``index``: uint8 (t h w c).

    In every other pair of fours it goes twice as fast, there and back.
    """
    if index % 8 < 4:
        return procedural.render(procedural.draw_scene(seed, index, frames), frames, size, size)
    half = frames // 2 + 1
    there = procedural.render(procedural.draw_scene(seed, index, half), half, size, size)
    return np.concatenate((there, there[-2::-1]))[:frames]


def texture_clip(seed: int, index: int, frames: int, size: int) -> np.ndarray:
    """Return a random texture that drifts over another: uint8 (t h w c).

    Both, and the mask between them, are fields of random Fourier coefficients whose amplitude falls with the
    frequency, as in photographs; each moves by a constant phase per frame, so it wraps around.
    """
    rng = np.random.default_rng(generator(seed, "texture", index).initial_seed())
    fx = np.fft.rfftfreq(size)
    fy = np.fft.fftfreq(size)[:, None]
    frequency = np.hypot(fx, fy)
    frequency[0, 0] = 1
    times = np.arange(frames)[:, None, None, None]

    def field(channels: int, power: float) -> np.ndarray:
        """Drifting fields of mean 0 and variance 1: (t c h w)."""
        noise = rng.standard_normal((channels, size, size))
        spectrum = np.fft.rfft2(noise) / frequency**power
        spectrum[:, 0, 0] = 0
        speed = rng.normal(0, 0.012 * size, 2) * rng.integers(0, 2)
        drift = np.exp(-2j * np.pi * times * (fx * speed[0] + fy * speed[1]))
        moving = np.fft.irfft2(spectrum * drift, s=(size, size))
        return moving / moving.std()

    def layer() -> np.ndarray:
        """A texture around a random colour: (t 3 h w) in about [0, 1]."""
        shared = field(1, rng.uniform(1.0, 2.0))
        own = field(3, rng.uniform(1.2, 2.0))
        colour = rng.uniform(0.1, 0.9, (3, 1, 1))
        return colour + rng.uniform(0, 0.25) * shared + rng.uniform(0, 0.12) * own

    mask = np.clip(0.5 + rng.uniform(2, 12) * (field(1, 2.0) - rng.uniform(-0.5, 1.0)), 0, 1)
    clip = (1 - mask) * layer() + mask * layer()
    return np.rint(255 * np.clip(clip, 0, 1)).astype(np.uint8).transpose(0, 2, 3, 1)


MAKERS = {"world": world_clip, "shapes": shape_clip, "textures": texture_clip}
"""Kind of clip -> (seed, index, frames, size) -> uint8 (t h w c)."""


def render_pool(kind: str, seed: int, num_clips: int, frames: int, size: int) -> np.ndarray:
    """Render clips 0, 1, ... of a kind: uint8 (n t h w c)."""
    return np.stack([MAKERS[kind](seed, index, frames, size) for index in range(num_clips)])


def cached_pool(
    folder: Path | None, kind: str, seed: int, num_clips: int, frames: int, size: int
) -> np.ndarray:
    """Return ``render_pool``'s clips from a .npy file in ``folder``, written first if it is not there."""
    if folder is None:
        return render_pool(kind, seed, num_clips, frames, size)
    path = folder / f"{kind}-{seed}-{num_clips}x{frames}x{size}.npy"
    if not path.exists():
        temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
        with temporary.open("wb") as file:
            np.save(file, render_pool(kind, seed, num_clips, frames, size))
        temporary.replace(path)
    return np.load(path, mmap_mode="r")
