# SPDX-License-Identifier: Apache-2.0
"""The procedural world: nine kinds of moving scenes, every attribute known, every frame a pure function of
(seed, time).

Scene ``index`` of seed ``s`` is a pure function of (s, index): no download, no disk, no state.
``latte.data.world.captions`` names its attributes in English and Chinese, and ``latte.data.world.grading``
reads them back from pixels. Axes: t frames, h height, w width, c channels.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from latte.checks import check
from latte.data.world.canvas import Canvas
from latte.data.world.kinds import BACKGROUNDS, COLOURS, KINDS
from latte.runtime import generator

FPS = 8.0
MIN_FRAMES = 4  # of a clip that the grader reads
Combination = tuple[str, str, str]
"""Kind, colour, direction."""


@dataclass(frozen=True)
class Scene:
    """What one clip shows.

    ``numbers`` are uniform in [0, 1); the kind turns them into size, speed, phase and places.
    """

    kind: str
    colour: str
    background: str
    direction: str
    numbers: tuple[float, ...]

    @property
    def combination(self) -> Combination:
        """(kind, colour, direction): what a caption asks for and what is held out together."""
        return self.kind, self.colour, self.direction


def combinations() -> list[Combination]:
    """All (kind, colour, direction) that exist, in a fixed order."""
    return [
        (name, colour, direction)
        for name, kind in KINDS.items()
        for colour in kind.colours
        for direction in kind.directions
    ]


def split_combinations(hold_out: int) -> tuple[list[Combination], list[Combination]]:
    """Return (trained, held out) combinations: one in ``hold_out`` of each kind is held out, none for 0.

    The held-out ones lie on diagonals of colour and direction, so every direction of a kind is still seen in
    training, and so is every colour of a kind that has directions; of a kind without, some colours are seen
    with other kinds only.
    """
    if not hold_out:
        return combinations(), []
    trained, held_out = [], []
    for combination in combinations():
        kind = KINDS[combination[0]]
        diagonal = kind.colours.index(combination[1]) + 3 * kind.directions.index(combination[2])
        target = held_out if diagonal % hold_out == hold_out - 1 else trained
        target.append(combination)
    return trained, held_out


def check_hold_out(hold_out: int) -> None:
    """InputError for a share that leaves a kind or colour untrained, or holds nothing out of a kind."""
    allowed = [0, *(share for share in range(2, len(combinations())) if _is_balanced(share))]
    check(
        hold_out in allowed,
        f"data.hold_out must be one of {', '.join(map(str, allowed))} for data.scenes=world, got {hold_out}; "
        "other shares leave a colour untrained or hold nothing out of a kind",
    )


@lru_cache
def _is_balanced(hold_out: int) -> bool:
    """Return whether every colour is still trained and every kind has held-out combinations."""
    trained, held_out = split_combinations(hold_out)
    return {c[1] for c in trained} == set(COLOURS) and {c[0] for c in held_out} == set(KINDS)


def backgrounds_of(kind: str, colour: str) -> list[str]:
    """Return the backgrounds that a scene of this kind and colour can have."""
    return [background for background in KINDS[kind].backgrounds if background != colour]


@lru_cache
def _combinations_of(kind: str, hold_out: int, held_out: bool) -> tuple[Combination, ...]:
    """Return the trained, or the held-out, combinations of one kind."""
    return tuple(c for c in split_combinations(hold_out)[held_out] if c[0] == kind)


def sample_scene(seed: int, index: int, hold_out: int = 0, held_out: bool = False) -> Scene:
    """Sample the scene of clip ``index``: kinds in turn, colour and direction uniform among the trained (or
    held-out) combinations.
    """
    import torch

    draws = torch.rand(16, generator=generator(seed, "world", index), dtype=torch.float64).tolist()
    name = list(KINDS)[index % len(KINDS)]
    pool = _combinations_of(name, hold_out, held_out)
    _, colour, direction = pool[int(draws[0] * len(pool))]
    backgrounds = backgrounds_of(name, colour)
    background = backgrounds[int(draws[1] * len(backgrounds))]
    return Scene(name, colour, background, direction, tuple(draws[2:]))


def render_frame(scene: Scene, time: float, height: int, width: int) -> np.ndarray:
    """Render the scene at ``time`` seconds -> uint8 (h w c)."""
    canvas = Canvas(height, width, BACKGROUNDS[scene.background])
    KINDS[scene.kind].draw(
        canvas, scene.numbers, time, COLOURS[scene.colour], BACKGROUNDS[scene.background], scene.direction
    )
    return canvas.pixels()


def render(scene: Scene, frames: int, height: int, width: int, fps: float = FPS) -> np.ndarray:
    """Render ``frames`` frames at ``fps`` per second -> uint8 (t h w c)."""
    return np.stack([render_frame(scene, frame / fps, height, width) for frame in range(frames)])
