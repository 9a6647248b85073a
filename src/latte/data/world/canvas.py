# SPDX-License-Identifier: Apache-2.0
"""Antialiased drawing on a float image by signed distances: what the scenes of the procedural world are
painted with.

Coordinates: x to the right and y downwards, in units of the frame's shorter side; a square frame spans [0, 1]
x [0, 1]. A signed distance is negative inside a shape; coverage falls from 1 to 0 over one pixel around its
zero (Quilez, "2D distance functions"). Axes: h height, w width, c channels.
"""

from collections.abc import Sequence

import numpy as np

Colour = tuple[float, float, float]
Point = tuple[float, float]


class Canvas:
    """A float64 RGB image (h w 3) in [0, 255] with the coordinates ``x`` (1 w) and ``y`` (h 1) of its pixel
    centres.
    """

    def __init__(self, height: int, width: int, colour: Colour):
        self.side = min(height, width)
        self.width = width / self.side
        self.height = height / self.side
        self.x = (np.arange(width)[None] + 0.5) / self.side
        self.y = (np.arange(height)[:, None] + 0.5) / self.side
        self.image = np.empty((height, width, 3))
        self.image[:] = colour

    def paint(
        self, distance: np.ndarray, colour: Colour | np.ndarray, opacity: float | np.ndarray = 1.0
    ) -> None:
        """Blend ``colour`` where the signed ``distance`` (h w) is negative; ``colour`` may be an image (h w
        3).
        """
        coverage = np.clip(0.5 - distance * self.side, 0, 1) * opacity  # (h w)
        self.image += coverage[..., None] * (np.asarray(colour) - self.image)

    def gradient(self, top: Colour, bottom: Colour) -> None:
        """Fill the image with a vertical gradient."""
        share = (self.y / self.height)[..., None]  # (h 1 1)
        self.image[:] = np.asarray(top) * (1 - share) + np.asarray(bottom) * share

    def circle(self, centre: Point, radius: float, colour: Colour, opacity: float = 1.0) -> None:
        """Paint a disc."""
        self.paint(np.hypot(self.x - centre[0], self.y - centre[1]) - radius, colour, opacity)

    def ellipse(self, centre: Point, radii: Point, colour: Colour, opacity: float = 1.0) -> None:
        """Paint an axis-aligned ellipse; its distance is exact on the boundary only, which is all that
        coverage needs.
        """
        scaled = np.hypot((self.x - centre[0]) / radii[0], (self.y - centre[1]) / radii[1])
        self.paint((scaled - 1) * min(radii), colour, opacity)

    def box(self, centre: Point, half: Point, colour: Colour, opacity: float = 1.0) -> None:
        """Paint an axis-aligned rectangle with half extents ``half``."""
        self.paint(
            np.maximum(abs(self.x - centre[0]) - half[0], abs(self.y - centre[1]) - half[1]), colour, opacity
        )

    def line(self, start: Point, end: Point, radius: float, colour: Colour, opacity: float = 1.0) -> None:
        """Paint a segment with round caps."""
        run = (end[0] - start[0], end[1] - start[1])
        length = max(run[0] ** 2 + run[1] ** 2, 1e-12)
        along = ((self.x - start[0]) * run[0] + (self.y - start[1]) * run[1]) / length
        along = np.clip(along, 0, 1)
        distance = np.hypot(self.x - start[0] - along * run[0], self.y - start[1] - along * run[1])
        self.paint(distance - radius, colour, opacity)

    def polygon(self, corners: Sequence[Point], colour: Colour, opacity: float = 1.0) -> None:
        """Paint a convex polygon, corners in either order: the largest distance to its edges' lines."""
        area = sum(
            a[0] * b[1] - b[0] * a[1] for a, b in zip(corners, [*corners[1:], corners[0]], strict=True)
        )
        turn = np.sign(area) if area else 1.0
        distance = np.full(self.image.shape[:2], -np.inf)
        for a, b in zip(corners, [*corners[1:], corners[0]], strict=True):
            edge = (b[0] - a[0], b[1] - a[1])
            norm = max(np.hypot(*edge), 1e-12)
            outwards = ((self.x - a[0]) * edge[1] - (self.y - a[1]) * edge[0]) / norm * turn
            distance = np.maximum(distance, outwards)
        self.paint(distance, colour, opacity)

    def below(self, edge: np.ndarray, colour: Colour, opacity: float = 1.0) -> None:
        """Paint everything under the curve ``edge`` (1 w), a height for each column."""
        self.paint(edge - self.y, colour, opacity)

    def pixels(self) -> np.ndarray:
        """Return the image rounded to uint8 (h w 3)."""
        return np.rint(np.clip(self.image, 0, 255)).astype(np.uint8)


def shade(colour: Colour, light: float) -> Colour:
    """Scale a colour's brightness: below 1 towards black, above 1 towards white."""
    values = np.asarray(colour, np.float64)
    values = values * light if light <= 1 else values + (255 - values) * (light - 1)
    return float(values[0]), float(values[1]), float(values[2])
