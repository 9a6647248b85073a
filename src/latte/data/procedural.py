# SPDX-License-Identifier: Apache-2.0
"""Procedural clips with labels and captions: one coloured shape on a dark background, moving in one
direction.

Clip ``index`` is a pure function of (seed, index), without download or disk. The label is the direction; the
caption names colour, shape and direction; ``shape_grading`` reads all three back from pixels.
Axes: t frames, h height, w width, c channels.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from latte.checks import check
from latte.data.shape_grading import COLOURS, DIRECTIONS, GROUND, SHAPES, read_motion
from latte.runtime import generator

if TYPE_CHECKING:
    from latte.data.base import DataConfig

SUPERSAMPLE = 4
Combination = tuple[str, str, str]
"""Shape, colour, direction."""


@dataclass(frozen=True)
class Scene:
    """The content of one clip. ``size`` (half the extent), ``start`` and ``speed`` are in units of the
    frame's side.
    """

    shape: str
    colour: str
    direction: str
    size: float
    start: tuple[float, float]
    speed: float

    @property
    def caption(self) -> str:
        """'a red square moves left'."""
        return caption_of(self.shape, self.colour, self.direction)

    @property
    def label(self) -> int:
        """Index of the direction in DIRECTIONS: up, down, left, right."""
        return list(DIRECTIONS).index(self.direction)


@lru_cache(maxsize=64)
def split_combinations(hold_out: int) -> tuple[tuple[Combination, ...], tuple[Combination, ...]]:
    """Return (used, held out) of the 72 combinations of shape, colour and direction: one in ``hold_out`` is
    held out, with 0 none.

    They are held out along diagonals, so that every shape, colour and direction, and from 6 on every pair of
    them, occurs in the others.
    """
    check_hold_out(hold_out)
    places = product(range(len(SHAPES)), range(len(COLOURS)), range(len(DIRECTIONS)))
    ranked = sorted(places, key=lambda place: ((4 * place[0] + place[1] + place[2]) % len(COLOURS), place))
    named = [
        (SHAPES[shape], list(COLOURS)[colour], list(DIRECTIONS)[direction])
        for shape, colour, direction in ranked
    ]
    count = len(named) // hold_out if hold_out else 0
    return tuple(named[count:]), tuple(named[:count])


def check_hold_out(hold_out: int) -> None:
    """Raise InputError for a number that leaves no captions, or holds none out."""
    check(
        hold_out == 0 or 2 <= hold_out <= 72,
        f"data.hold_out is {hold_out}, but one caption in so many of 72 is held out; "
        "give 2 to 72, or 0 for none",
    )


def caption_of(shape: str, colour: str, direction: str) -> str:
    """'a red square moves left'."""
    return f"a {colour} {shape} moves {direction}"


def draw_scene(seed: int, index: int, frames: int, hold_out: int = 0) -> Scene:
    """Return the scene of clip ``index``: attributes are uniform, and the shape stays inside the frame.

    Held-out combinations never occur.
    """
    import torch

    u = torch.rand(8, generator=generator(seed, "scene", index), dtype=torch.float64).tolist()
    direction = list(DIRECTIONS)[index % len(DIRECTIONS)]
    size = 0.13 + 0.05 * u[2]
    travel = 0.28 + 0.22 * u[3]  # over the whole clip, so that speed does not depend on the frame count
    margin = size + 0.02
    along = margin + (1 - 2 * margin - travel) * u[4]
    across = margin + (1 - 2 * margin) * u[5]
    dx, dy = DIRECTIONS[direction]
    lead = along if dx + dy > 0 else 1 - along
    start = (lead, across) if dx else (across, lead)
    shape = SHAPES[int(u[0] * len(SHAPES))]
    colour = list(COLOURS)[int(u[1] * len(COLOURS))]
    if hold_out:
        left = [(shape, colour) for shape, colour, way in split_combinations(hold_out)[0] if way == direction]
        shape, colour = left[int(u[0] * len(left))]
    return Scene(shape, colour, direction, size, start, travel / max(frames - 1, 1))


def _inside(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return whether points (x, y), in units of the shape's size around its centre, are inside the shape."""
    if shape == "circle":
        return x * x + y * y <= 1
    if shape == "square":
        return (abs(x) <= 0.86) & (abs(y) <= 0.86)
    return (y <= 0.8) & (y >= 2 * abs(x) - 1.0)


def render(scene: Scene, frames: int, height: int, width: int) -> np.ndarray:
    """Return the frames of a scene, uint8 (t h w c). Every pixel is the mean of SUPERSAMPLE^2 points."""
    ground = np.array(GROUND, np.float64)
    colour = np.array(COLOURS[scene.colour], np.float64)
    clip = np.empty((frames, height, width, 3), np.uint8)
    clip[:] = GROUND
    side = min(height, width)
    dx, dy = DIRECTIONS[scene.direction]
    for t in range(frames):
        centre_x = scene.start[0] * width + dx * scene.speed * t * side
        centre_y = scene.start[1] * height + dy * scene.speed * t * side
        reach = scene.size * side
        left = max(math.floor(centre_x - reach), 0)
        right = min(math.ceil(centre_x + reach), width)
        top = max(math.floor(centre_y - reach), 0)
        bottom = min(math.ceil(centre_y + reach), height)
        x = ((np.arange(left * SUPERSAMPLE, right * SUPERSAMPLE) + 0.5) / SUPERSAMPLE - centre_x) / reach
        y = ((np.arange(top * SUPERSAMPLE, bottom * SUPERSAMPLE) + 0.5) / SUPERSAMPLE - centre_y) / reach
        points = _inside(scene.shape, x[None], y[:, None]).reshape(
            bottom - top, SUPERSAMPLE, right - left, SUPERSAMPLE
        )
        clip[t, top:bottom, left:right] = np.rint(ground + points.mean((1, 3))[..., None] * (colour - ground))
    return clip


class ShapeScenes:
    """Moving shapes as a set of scenes, see ``latte.data.base.SceneSet``: labels are the directions.

    InputError for a language, or a ``hold_out`` out of range.
    """

    classes: ClassVar[tuple[str, ...]] = tuple(DIRECTIONS)
    min_graded_frames: ClassVar[int] = 2

    def __init__(self, config: "DataConfig"):
        check(
            config.language is None,
            f"data.language is {config.language!r}, but the captions of moving shapes are in English only; "
            "leave it out, or set data.scenes=world",
        )
        check_hold_out(config.held_out_captions)
        self.config = config

    @property
    def captions(self) -> list[str]:
        """Every caption that a clip can have, sorted."""
        return sorted(
            caption_of(*combination) for combination in split_combinations(self.config.held_out_captions)[0]
        )

    @property
    def held_out_captions(self) -> list[str]:
        """Every caption of the held-out combinations, sorted."""
        return sorted(
            caption_of(*combination) for combination in split_combinations(self.config.held_out_captions)[1]
        )

    def label(self, index: int) -> int:
        """Return the index of the clip's direction among ``classes``."""
        return self._scene(index).label

    def caption(self, index: int) -> str:
        """Return the caption of clip ``index``."""
        return self._scene(index).caption

    def render_clip(self, index: int) -> np.ndarray:
        """Return clip ``index``: uint8 (t h w c)."""
        return render(self._scene(index), self.config.frames, *self.config.size)

    def read_label(self, clip: np.ndarray) -> int | None:
        """Return the index of the direction that the pixels of a clip (t h w c) show, None for none."""
        direction = read_motion(clip).direction
        return None if direction is None else self.classes.index(direction)

    def is_consistent(self, clip: np.ndarray) -> bool:
        """Return whether a clip (t h w c) shows one shape that stays the same throughout."""
        return read_motion(clip).consistent

    def describe(self) -> dict[str, Any]:
        """Return nothing: 0.1.0 had no other scenes, and its runs must resume."""
        return {}

    def _scene(self, index: int) -> Scene:
        config = self.config
        return draw_scene(config.seed, index, config.frames, config.held_out_captions)
