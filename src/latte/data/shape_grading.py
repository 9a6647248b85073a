# SPDX-License-Identifier: Apache-2.0
"""Read direction, colour, shape and consistency of a clip of one moving shape back from its pixels.

The colours, shapes and directions of ``latte.data.procedural`` are defined here, so that clips and their
grader agree. A clip is consistent when it shows one compact shape throughout whose colour, size and outline
stay: a generated clip can move as its label says and still turn from a white circle into a blue square.
Axes: t frames, h height, w width, c channels.
"""

import math
from dataclasses import dataclass

import numpy as np

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
