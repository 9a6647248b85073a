# SPDX-License-Identifier: Apache-2.0
"""Procedural clips with labels and captions: one coloured shape on a dark background, moving in one
direction; and direction, colour, shape and consistency of such a clip, read back from its pixels.

Clip ``index`` is a pure function of (seed, index), without download or disk. The label is the direction; the
caption names colour, shape and direction. A clip is consistent when it shows one compact shape throughout
whose colour, size and outline stay: a generated clip can move as its label says and still turn from a white
circle into a blue square. Axes: t frames, h height, w width, c channels.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from latte.checks import check
from latte.runtime import generator

DIRECTIONS = {"up": (0.0, -1.0), "down": (0.0, 1.0), "left": (-1.0, 0.0), "right": (1.0, 0.0)}
SHAPES = ("circle", "square", "triangle")
COLOURS = {
    "red": (230, 60, 50),
    "green": (70, 200, 80),
    "blue": (70, 110, 240),
    "yellow": (240, 210, 60),
    "magenta": (220, 80, 210),
    "white": (235, 235, 235),
}
GROUND = (24, 26, 34)
MAX_COLOUR_CHANGE = 40.0  # grey levels between the shape's mean colour and that in the first frame
MAX_GROWTH = 1.35  # largest area over smallest
MIN_SAME_SHAPE = 7 / 8  # of the frames


@dataclass(frozen=True)
class Motion:
    """What ``read_motion`` found: names, None if not clear; ``coherent`` means one compact shape in every
    frame.

    The three ``keeps_`` fields say whether the mean colour of the shape's pixels stays within
    MAX_COLOUR_CHANGE of the first frame's, whether its area varies by less than MAX_GROWTH, and whether the
    same outline is read in MIN_SAME_SHAPE of the frames.
    """

    direction: str | None
    colour: str | None
    shape: str | None
    coherent: bool
    keeps_colour: bool = False
    keeps_size: bool = False
    keeps_shape: bool = False

    @property
    def consistent(self) -> bool:
        """Whether the clip shows one shape that stays the same throughout."""
        return self.coherent and self.keeps_colour and self.keeps_size and self.keeps_shape


def _mask(frames: np.ndarray) -> np.ndarray:
    """Return bool (t h w) for uint8 (t h w c): the pixels nearer to the brightest colour than to the
    background.
    """
    distance = np.abs(frames.astype(np.float64) - np.array(GROUND, np.float64)).max(axis=-1)
    return distance > max(0.5 * np.quantile(distance, 0.995), 40)


def _compact(mask: np.ndarray) -> bool:
    """Return whether the mask (h w) is one connected piece, ignoring specks of less than a twelfth of it."""
    if not mask.any():
        return False
    left = mask.copy()
    pieces = []
    while left.any():
        grown = np.zeros_like(left)
        grown[tuple(np.argwhere(left)[0])] = True
        while True:
            spread = grown.copy()
            spread[1:] |= grown[:-1]
            spread[:-1] |= grown[1:]
            spread[:, 1:] |= grown[:, :-1]
            spread[:, :-1] |= grown[:, 1:]
            spread &= left
            if (spread == grown).all():
                break
            grown = spread
        pieces.append(int(grown.sum()))
        left &= ~grown
    return max(pieces) >= sum(pieces) * 11 / 12


def _shape_of(mask: np.ndarray) -> str:
    """Return the name of the shape of a mask (h w), from how it fills the halves of its bounding box."""
    rows = np.where(mask.any(1))[0]
    columns = np.where(mask.any(0))[0]
    box = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].astype(np.float64)
    half = max(len(box) // 2, 1)
    if box[:half].mean() < 0.62 * box[-half:].mean():
        return "triangle"
    return "square" if box.mean() > 0.5 * (1 + math.pi / 4) else "circle"


def read_motion(frames: np.ndarray) -> Motion:
    """Measure direction, colour and shape of a clip from its pixels, uint8 (t h w c), and whether it shows
    one shape throughout.

    The direction is that of the centroid's regression line over time. It is None when the path is shorter
    than 12 % of the frame, when the sideways drift exceeds half of the path, or when a frame holds no compact
    shape.
    """
    mask = _mask(frames)
    coherent = all(_compact(m) for m in mask)
    if not coherent:
        return Motion(None, None, None, False)
    areas = mask.sum((1, 2))
    coherent = bool(areas.max() <= 2 * areas.min())
    points = np.stack([np.argwhere(m).mean(0)[::-1] for m in mask]) / min(frames.shape[1:3])
    times = np.arange(len(points)) - (len(points) - 1) / 2
    path = (times @ (points - points.mean(0))) / max((times @ times), 1e-9) * max(len(points) - 1, 1)
    along = abs(path).max()
    across = abs(path).min()
    direction = None
    if along >= 0.12 and across <= 0.5 * along:
        direction = max(DIRECTIONS, key=lambda name: float(np.dot(DIRECTIONS[name], path)))
    inner = np.median(frames[mask].astype(np.float64), axis=0)
    colour = min(COLOURS, key=lambda name: float(np.linalg.norm(np.array(COLOURS[name]) - inner)))
    names = [_shape_of(m) for m in mask]
    shape = max(set(names), key=names.count)
    means = np.stack([frame[m].mean(0) for frame, m in zip(frames.astype(np.float64), mask, strict=True)])
    return Motion(
        direction,
        colour,
        shape,
        coherent,
        keeps_colour=bool(abs(means - means[0]).max() <= MAX_COLOUR_CHANGE),
        keeps_size=bool(areas.max() < MAX_GROWTH * areas.min()),
        keeps_shape=names.count(shape) >= MIN_SAME_SHAPE * len(names),
    )


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
