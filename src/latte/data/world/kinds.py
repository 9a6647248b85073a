# SPDX-License-Identifier: Apache-2.0
"""The nine kinds of scenes: how each is painted at a time, and which colours, backgrounds and directions it
has.

``draw(canvas, u, time, colour, ground, direction)`` paints one frame; ``u`` are the scene's uniform numbers
in [0, 1). A new kind is one function and one entry in ``KINDS``, with its words in ``captions.py``. Distances
are in units of the frame's shorter side, times in seconds.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from latte.data.world.canvas import Canvas, Colour, shade

COLOURS: dict[str, Colour] = {
    "red": (226, 48, 44),
    "orange": (244, 138, 30),
    "yellow": (246, 216, 56),
    "green": (60, 186, 84),
    "blue": (58, 108, 238),
    "purple": (142, 72, 214),
    "pink": (246, 130, 190),
    "white": (240, 240, 240),
}
BACKGROUNDS: dict[str, Colour] = {
    "black": (18, 18, 24),
    "grey": (104, 106, 112),
    "brown": (96, 72, 52),
    "green": (22, 82, 86),
    "blue": (26, 36, 78),
}
NIGHT: Colour = (14, 16, 34)
WOOD: Colour = (150, 112, 74)
SKIN: Colour = (236, 196, 160)
Draw = Callable[[Canvas, Sequence[float], float, Colour, Colour, str], None]
SIGN = {"left": -1.0, "right": 1.0, "up": -1.0, "down": 1.0, "none": 0.0}


@dataclass(frozen=True)
class Kind:
    """How a kind is painted, and which attributes it varies; ``("none",)`` means that it has no direction.

    ``size`` is the index of the number that sets the subject's size, None where nothing has one.
    """

    draw: Draw
    directions: tuple[str, ...] = ("left", "right")
    colours: tuple[str, ...] = tuple(COLOURS)
    backgrounds: tuple[str, ...] = tuple(BACKGROUNDS)
    size: int | None = None


def between(low: float, high: float, u: float) -> float:
    """Map u in [0, 1) to [low, high)."""
    return low + (high - low) * u


def crossing(canvas: Canvas, u: Sequence[float], time: float, direction: str, margin: float) -> float:
    """Return the x of something that moves steadily and stays inside the frame for four seconds."""
    span = canvas.width - 2 * margin
    speed = between(0.14, 0.22, u[0])
    path = min(4 * speed, span)
    start = margin + (span - path) * u[1]
    moved = (speed * time) % (2 * path)
    moved = moved if moved <= path else 2 * path - moved
    return start + moved if direction == "right" else start + path - moved


def ball(
    canvas: Canvas, u: Sequence[float], time: float, colour: Colour, ground: Colour, direction: str
) -> None:
    """A ball bounces over a floor, its shadow below it."""
    radius = between(0.09, 0.13, u[2])
    floor = 0.80 * canvas.height
    canvas.image[:] = shade(ground, 1.5)
    canvas.below(np.full_like(canvas.x, floor - radius * 0.4), ground)
    period = between(0.8, 1.2, u[3])
    phase = (time / period + u[4]) % 1
    height = between(0.28, 0.42, u[5]) * 4 * phase * (1 - phase)
    x = crossing(canvas, u, time, direction, radius + 0.04)
    closeness = 1 - height
    canvas.ellipse(
        (x, floor), (radius * (0.6 + 0.5 * closeness), radius * 0.28), (8, 8, 10), 0.25 + 0.5 * closeness
    )
    centre = (x, floor - radius - height)
    canvas.circle(centre, radius, colour)
    canvas.circle(
        (centre[0] - 0.35 * radius, centre[1] - 0.35 * radius), 0.3 * radius, shade(colour, 1.6), 0.8
    )


def clouds(
    canvas: Canvas, u: Sequence[float], time: float, colour: Colour, ground: Colour, direction: str
) -> None:
    """Clouds drift over a sky whose light changes slowly, above a strip of land."""
    light = 1 + 0.12 * math.sin(2 * math.pi * (0.12 * time + u[2]))
    canvas.gradient(shade(colour, 0.62 * light), shade(colour, 1.30 * light))
    drift = SIGN[direction] * between(0.10, 0.18, u[0]) * time
    span = canvas.width + 0.7
    for index in range(3):
        x = (u[3 + index] * 0.33 + index / 3 * 1.0) * span + drift * (1 + 0.25 * index)
        x = x % span - 0.35
        y = between(0.14, 0.5, (u[6 + index] + index / 3) % 1) * canvas.height
        size = between(0.07, 0.10, u[9 + index])
        for offset, lift, scale in ((-1.2, 0.25, 0.8), (0.0, -0.15, 1.2), (1.2, 0.2, 0.9), (0.0, 0.35, 1.3)):
            canvas.ellipse(
                (x + offset * size, y + lift * size),
                (1.15 * scale * size, 0.7 * scale * size),
                (250, 250, 252),
                0.85,
            )
    hills = 0.86 * canvas.height + 0.03 * np.sin(2 * math.pi * (canvas.x * 1.3 + u[12]))
    canvas.below(hills, shade(ground, 0.7))


def waves(
    canvas: Canvas, u: Sequence[float], time: float, colour: Colour, ground: Colour, direction: str
) -> None:
    """Three rows of waves roll over coloured water under a plain sky."""
    canvas.image[:] = shade(ground, 1.55)
    speed = SIGN[direction] * between(0.20, 0.32, u[0])
    length = between(0.5, 0.7, u[1])
    height = between(0.03, 0.05, u[2])
    for row, light in enumerate((0.62, 0.82, 1.0)):
        phase = 2 * math.pi * ((canvas.x - speed * time * (1 + 0.15 * row)) / length + u[3 + row])
        edge = (0.36 + 0.2 * row) * canvas.height - height * (np.sin(phase) + 0.25 * np.sin(2 * phase + 0.8))
        canvas.below(edge, shade(colour, light))
        foam = np.maximum(edge - canvas.y, canvas.y - edge - 0.018)
        canvas.paint(foam, shade(colour, 1.55), 0.9)


def pendulum(
    canvas: Canvas, u: Sequence[float], time: float, colour: Colour, ground: Colour, direction: str
) -> None:
    """A bob swings on a rod from a beam."""
    pivot = (between(0.47, 0.53, u[0]) * canvas.width, 0.12)
    length = between(0.40, 0.50, u[1])
    angle = between(0.45, 0.70, u[2]) * math.cos(2 * math.pi * (time / between(1.3, 1.9, u[3]) + u[4]))
    bob = (pivot[0] + length * math.sin(angle), pivot[1] + length * math.cos(angle))
    canvas.box((pivot[0], 0.07), (0.2, 0.035), WOOD)
    canvas.line(pivot, bob, 0.013, (205, 205, 210))
    canvas.circle(bob, between(0.09, 0.13, u[5]), colour)


def snow(
    canvas: Canvas, u: Sequence[float], time: float, colour: Colour, ground: Colour, direction: str
) -> None:
    """Snow falls on a house, blown to one side."""
    canvas.gradient(shade(ground, 0.8), shade(ground, 1.15))
    canvas.below(np.full_like(canvas.x, 0.84 * canvas.height), (232, 236, 244))
    centre, half = between(0.35, 0.65, u[0]) * canvas.width, between(0.15, 0.2, u[1])
    top = 0.84 * canvas.height - 1.25 * half
    canvas.box((centre, 0.84 * canvas.height - 0.6 * half), (half, 0.65 * half), colour)
    roof = [(centre - 1.25 * half, top), (centre + 1.25 * half, top), (centre, top - 0.8 * half)]
    canvas.polygon(roof, shade(colour, 0.55))
    canvas.box((centre, 0.84 * canvas.height - 0.3 * half), (0.2 * half, 0.32 * half), (60, 44, 34))
    wind = SIGN[direction] * between(0.20, 0.28, u[2])
    fall = between(0.22, 0.3, u[3])
    flakes = np.random.default_rng(int(u[4] * 2**32)).random((22, 3))
    for x, y, size in flakes:
        place = ((x + wind * time) % 1 * canvas.width, (y + fall * time) % 1 * canvas.height)
        canvas.circle(place, 0.014 + 0.012 * size, (252, 252, 255), 0.95)


def solid(
    canvas: Canvas, u: Sequence[float], time: float, colour: Colour, ground: Colour, direction: str
) -> None:
    """A cube turns about its vertical axis, seen from above, its faces lit from the left."""
    size = between(0.22, 0.28, u[0])
    centre = (between(0.46, 0.54, u[1]) * canvas.width, between(0.48, 0.54, u[2]) * canvas.height)
    turn = SIGN[direction] * 2 * math.pi * between(0.16, 0.26, u[3]) * time + math.pi / 2 * u[4]
    tilt = between(0.32, 0.42, u[5])
    canvas.ellipse((centre[0], centre[1] + 1.05 * size), (1.25 * size, 0.4 * size), (6, 6, 8), 0.45)

    def project(corner: int, y: float) -> tuple[float, float]:
        angle = turn + math.pi / 2 * corner + math.pi / 4
        return centre[0] + size * math.cos(angle), centre[1] + y * size + tilt * size * math.sin(angle)

    for corner in range(4):
        normal = turn + math.pi / 2 * (corner + 1)
        if math.sin(normal) > 0:
            light = 0.62 - 0.28 * math.cos(normal)
            low, high = (
                [project(corner + k, 0.72) for k in (0, 1)],
                [project(corner + k, -0.72) for k in (1, 0)],
            )
            canvas.polygon([*low, *high], shade(colour, light))
    canvas.polygon([project(corner, -0.72) for corner in range(4)], shade(colour, 1.2))


def fireworks(
    canvas: Canvas, u: Sequence[float], time: float, colour: Colour, ground: Colour, direction: str
) -> None:
    """Two bursts of sparks open, fall and fade over a dark city."""
    canvas.gradient(NIGHT, shade(NIGHT, 1.1))
    period = between(1.5, 1.9, u[0])
    for burst in range(2):
        age = (time / period + u[1] + 0.5 * burst) % 1
        round_number = math.floor(time / period + u[1] + 0.5 * burst)
        jitter = (u[2 + burst] + 0.381966 * round_number) % 1
        centre = (
            between(0.28, 0.72, jitter) * canvas.width,
            between(0.26, 0.44, u[4 + burst]) * canvas.height,
        )
        reach = between(0.2, 0.27, u[6 + burst]) * (1 - (1 - age) ** 3)
        for ray in range(12):
            angle = 2 * math.pi * (ray / 12 + u[8])
            spark = (centre[0] + reach * math.cos(angle), centre[1] + reach * math.sin(angle) + 0.14 * age**2)
            tail = (
                centre[0] + 0.7 * reach * math.cos(angle),
                centre[1] + 0.7 * reach * math.sin(angle) + 0.1 * age**2,
            )
            canvas.line(tail, spark, 0.013, colour, min(1.0, 2.2 * (1 - age)))
    skyline = 0.86 - 0.08 * (np.floor(canvas.x * 7 + u[9]) * 0.618 % 1)
    canvas.below(skyline * canvas.height, shade(ground, 0.55))


def walker(
    canvas: Canvas, u: Sequence[float], time: float, colour: Colour, ground: Colour, direction: str
) -> None:
    """A person in coloured clothes walks along the ground."""
    canvas.image[:] = shade(ground, 1.5)
    floor = 0.84 * canvas.height
    canvas.below(np.full_like(canvas.x, floor), shade(ground, 0.8))
    size, face = between(0.5, 0.58, u[2]), SIGN[direction]
    x = crossing(canvas, u, time, direction, 0.2)
    stride = 2 * math.pi * (between(1.0, 1.3, u[3]) * time + u[4])
    hip = (x, floor - 0.46 * size + 0.012 * abs(math.sin(stride)))
    shoulder = (x + 0.01 * face, hip[1] - 0.30 * size)
    dark = shade(colour, 0.5)
    for side, limb in ((math.pi, shade(dark, 0.75)), (0.0, dark)):
        swing = 0.5 * math.sin(stride + side)
        knee = (hip[0] + 0.23 * size * math.sin(swing), hip[1] + 0.23 * size * math.cos(swing))
        bend = swing - face * 0.5 * max(0.0, math.cos(stride + side))
        foot = (knee[0] + 0.23 * size * math.sin(bend), knee[1] + 0.23 * size * math.cos(bend))
        canvas.line(hip, knee, 0.036 * size / 0.5, limb)
        canvas.line(knee, foot, 0.030 * size / 0.5, limb)
        canvas.line(foot, (foot[0] + face * 0.07 * size, foot[1]), 0.026, limb)
    canvas.line(shoulder, hip, 0.11 * size, colour)
    arm = -0.6 * math.sin(stride)
    hand = (shoulder[0] + 0.28 * size * math.sin(arm), shoulder[1] + 0.03 + 0.28 * size * math.cos(arm))
    canvas.line((shoulder[0], shoulder[1] + 0.03), hand, 0.024, shade(colour, 0.72))
    canvas.circle((shoulder[0] + 0.02 * face, shoulder[1] - 0.20 * size), 0.11 * size, SKIN)


def star(
    canvas: Canvas, u: Sequence[float], time: float, colour: Colour, ground: Colour, direction: str
) -> None:
    """A five-pointed star glides along a straight line over a plain ground."""
    radius = between(0.14, 0.18, u[2])
    steady = crossing(canvas, u, time, "right" if SIGN[direction] > 0 else "left", radius + 0.02)
    across = between(radius + 0.03, 1 - radius - 0.03, u[3])
    centre = (
        (steady, across * canvas.height)
        if direction in ("left", "right")
        else (across * canvas.width, steady)
    )
    paint_star(canvas, centre, radius, colour)


def paint_star(canvas: Canvas, centre: tuple[float, float], radius: float, colour: Colour) -> None:
    """Paint a five-pointed star that stands on two of its points."""
    x, y = canvas.x - centre[0], canvas.y - centre[1]
    sector = np.arctan2(x, -y) / (2 * math.pi / 5)
    angle = abs(sector - np.rint(sector)) * (2 * math.pi / 5)
    distance = np.hypot(x, y)
    inner = 0.45 * radius
    tip, notch = np.array([0.0, radius]), inner * np.array([math.sin(math.pi / 5), math.cos(math.pi / 5)])
    edge = (notch - tip) / np.linalg.norm(notch - tip)
    point = distance * np.sin(angle), distance * np.cos(angle)
    canvas.paint((point[1] - tip[1]) * edge[0] - (point[0] - tip[0]) * edge[1], colour)


KINDS: dict[str, Kind] = {
    "ball": Kind(ball, size=2),
    "clouds": Kind(
        clouds,
        colours=("orange", "blue", "purple", "pink", "green", "red"),
        backgrounds=("black", "brown", "green"),
    ),
    "waves": Kind(
        waves,
        colours=("blue", "green", "purple", "orange", "red", "pink"),
        backgrounds=("grey", "brown", "blue"),
        size=2,
    ),
    "pendulum": Kind(pendulum, directions=("none",), size=5),
    "snow": Kind(
        snow,
        colours=("red", "orange", "yellow", "green", "blue", "purple"),
        backgrounds=("grey", "blue", "green"),
        size=1,
    ),
    "cube": Kind(solid, size=0),
    "fireworks": Kind(fireworks, directions=("none",), backgrounds=("black", "brown", "green")),
    "walker": Kind(walker, colours=("red", "orange", "yellow", "green", "blue", "purple", "pink"), size=2),
    "star": Kind(star, directions=("left", "right", "up", "down"), size=2),
}
