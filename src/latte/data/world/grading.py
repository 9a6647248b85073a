# SPDX-License-Identifier: Apache-2.0
"""Read kind, colour, direction and consistency of a clip of the procedural world back from its pixels.

A small network, trained on the world's own clips by ``tools/train_grader.py``, reads from every single frame
what must not change within a clip (kind, colour, background, size) and from the whole clip its direction. A
clip is consistent when all frames agree, the size stays within the spread of true clips, and no step between
frames is larger than those of true clips. A size that jumps by half of its range is noticed in pendulum,
cube, walker and most snow scenes, in about half of the balls and stars, and never in waves, whose height is
too small to be read. Axes: b batch, t frames, h height, w width, c channels, k features.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from latte.checks import InputError
from latte.data.world.kinds import BACKGROUNDS, COLOURS, KINDS
from latte.data.world.scenes import MIN_FRAMES

WEIGHTS = Path(__file__).with_name("grader.safetensors")
KIND_NAMES = (*KINDS, "other")  # other: no subject, two of them, or something that no scene shows
COLOUR_NAMES = tuple(COLOURS)
BACKGROUND_NAMES = tuple(BACKGROUNDS)
DIRECTION_NAMES = ("none", "left", "right", "up", "down")
SIDE = 64  # pixels that the network sees
LIGHT = (0.299, 0.587, 0.114)  # luma weights of ITU-R BT.601
Z95 = 1.959964  # standard deviations of a 95 % interval


@dataclass(frozen=True)
class Grade:
    """What the grader reads: names, "other" for no known scene, and whether the clip is the same scene
    throughout.
    """

    kind: str
    colour: str
    direction: str
    consistent: bool


@dataclass(frozen=True)
class Reading:
    """The network's outputs: logits per frame (b t ...), ``size`` (b t) in [0, 1], and per clip ``direction``
    (b 5).
    """

    kind: Tensor
    colour: Tensor
    background: Tensor
    size: Tensor
    direction: Tensor


@dataclass(frozen=True)
class Share:
    """How many of ``count`` clips have a property, at least one clip."""

    hits: int
    count: int

    @classmethod
    def of(cls, flags: Sequence[bool]) -> "Share":
        """Count the True among ``flags``."""
        return cls(sum(map(bool, flags)), len(flags))

    @property
    def value(self) -> float:
        """The fraction of the clips, in [0, 1]."""
        return self.hits / self.count

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the fraction (Wilson's, which holds near 0 and 1)."""
        p = self.value
        n = self.count
        centre = (p + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
        half = Z95 / (1 + Z95**2 / n) * math.sqrt(p * (1 - p) / n + Z95**2 / (4 * n * n))
        return max(0.0, round(centre - half, 9)), min(1.0, round(centre + half, 9))


class GraderNetwork(nn.Module):
    """Frames (b t 3 64 64) in [-1, 1] -> ``Reading``. ``size_bound`` and ``step_bound`` hold a limit for each
    kind.
    """

    size_bound: Tensor
    step_bound: Tensor

    def __init__(self, width: int = 64):
        super().__init__()
        self.frame = nn.Sequential(
            nn.Conv2d(3, 24, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(24, 48, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(48, width, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
        )
        self.heads = nn.Linear(2 * width, len(KIND_NAMES) + len(COLOUR_NAMES) + len(BACKGROUND_NAMES) + 1)
        self.motion = nn.Sequential(
            nn.Conv3d(3, 16, (3, 4, 4), stride=(1, 2, 2), padding=1),
            nn.ReLU(),
            nn.Conv3d(16, 32, (3, 4, 4), stride=(1, 2, 2), padding=1),
            nn.ReLU(),
            nn.Conv3d(32, 32, 3, padding=1),
            nn.ReLU(),
        )
        self.direction = nn.Linear(64, len(DIRECTION_NAMES))
        self.register_buffer("size_bound", torch.full((len(KINDS),), torch.inf))
        self.register_buffer("step_bound", torch.full((len(KINDS),), torch.inf))

    def forward(self, frames: Tensor) -> Reading:
        """Read clips (b t 3 64 64)."""
        maps = self.frame(frames.flatten(0, 1)).flatten(2)  # (bt k hw)
        features = torch.cat([maps.mean(-1), maps.amax(-1)], dim=-1).unflatten(
            0, frames.shape[:2]
        )  # (b t 2k)
        counts = [len(KIND_NAMES), len(COLOUR_NAMES), len(BACKGROUND_NAMES), 1]
        kind, colour, background, size = self.heads(features).split(counts, dim=-1)
        small = functional.avg_pool3d(frames.transpose(1, 2), (1, 2, 2))  # (b 3 t 32 32)
        motion = self.motion(small).flatten(2)  # (b k thw)
        pooled = torch.cat([motion.mean(-1), motion.amax(-1)], dim=-1)  # (b 2k)
        return Reading(kind, colour, background, size.squeeze(-1).sigmoid(), self.direction(pooled))


def to_input(clips: np.ndarray) -> Tensor:
    """Convert uint8 clips (b t h w c) to the network's input (b t 3 64 64) in [-1, 1]."""
    frames = torch.from_numpy(clips).float().flatten(0, 1).permute(0, 3, 1, 2) / 127.5 - 1  # (bt 3 h w)
    if frames.shape[-2:] != (SIDE, SIDE):
        frames = functional.interpolate(frames, (SIDE, SIDE), mode="bilinear", antialias=True)
    return frames.unflatten(0, clips.shape[:2])


def largest_step(clips: np.ndarray) -> np.ndarray:
    """Return for each clip (b t h w c) the largest change between neighbouring frames beyond its median one.

    Grey levels, mean absolute difference of the luma: flicker, cuts and jumps stand out, even motion cancels.
    """
    luma = clips.astype(np.float32) @ np.array(LIGHT, np.float32)  # (b t h w)
    steps = np.abs(np.diff(luma, axis=1)).mean((2, 3))  # (b t-1)
    return steps.max(1) - np.median(steps, axis=1)


@lru_cache(maxsize=1)
def load_grader() -> GraderNetwork:
    """Load the packaged network, frozen."""
    network = GraderNetwork()
    network.load_state_dict({name: tensor.float() for name, tensor in load_file(WEIGHTS).items()})
    return network.eval().requires_grad_(False)


def size_spread(size: Tensor) -> Tensor:
    """Return the range of the size (b t) within each clip, its highest and lowest frame left out."""
    ordered = size.sort(dim=1).values  # (b t)
    return ordered[:, -2] - ordered[:, 1]


@torch.no_grad()
def grade(clips: np.ndarray, network: GraderNetwork | None = None) -> list[Grade]:
    """Grade uint8 clips (b t h w c), at least 4 frames each, sampled at 8 frames per second.

    Kind, colour and direction are those of the clip as a whole; ``consistent`` requires that every frame
    shows the same kind, colour and background, that the size holds, and that no step between frames exceeds
    those of true clips. InputError for another shape.
    """
    if clips.ndim != 5 or clips.shape[-1] != 3 or clips.shape[1] < MIN_FRAMES or clips.dtype != np.uint8:
        raise InputError(
            "clips must be uint8 of shape (clips, frames, height, width, 3) with at least "
            f"{MIN_FRAMES} frames, "
            f"got {clips.dtype} {clips.shape}"
        )
    network = network or load_grader()
    reading = network(to_input(clips))
    kind, colour, background = (
        logits.log_softmax(-1) for logits in (reading.kind, reading.colour, reading.background)
    )  # (b t ...)
    whole = [logits.mean(1).argmax(-1) for logits in (kind, colour, background)]  # (b) each
    agree = [
        (logits.argmax(-1) == answer[:, None]).all(1)
        for logits, answer in zip((kind, colour, background), whole, strict=True)
    ]
    spread, steps = size_spread(reading.size), torch.from_numpy(largest_step(clips))
    grades = []
    for index in range(len(clips)):
        name = KIND_NAMES[int(whole[0][index])]
        consistent = name != "other" and all(bool(flags[index]) for flags in agree)
        if consistent:
            place = int(whole[0][index])
            consistent = bool(spread[index] <= network.size_bound[place])
            consistent = consistent and bool(steps[index] <= network.step_bound[place])
        direction = DIRECTION_NAMES[int(reading.direction[index].argmax())]
        grades.append(Grade(name, COLOUR_NAMES[int(whole[1][index])], direction, consistent))
    return grades
