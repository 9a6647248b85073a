# SPDX-License-Identifier: Apache-2.0
"""Stars that go round in circles: clips for fine-tuning a model of the world, which knows stars but not this
motion, nor its words.

Clip ``index`` is a pure function of (seed, index). Captions name colour and background, in English and
Chinese; the motion is read back from the pixels. Axes: t frames, h height, w width, c channels.
"""

import math
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from latte.checks import check, check_name
from latte.data.procedural import MAX_COLOUR_CHANGE, MAX_GROWTH
from latte.data.world.canvas import Canvas
from latte.data.world.kinds import BACKGROUNDS, COLOURS, between, paint_star
from latte.data.world.scenes import CHINESE, FPS, LANGUAGES, MIXED, with_article
from latte.runtime import generator

if TYPE_CHECKING:
    from latte.data.base import DataConfig

TEMPLATES = {
    "en": "{a_colour} star goes round in circles on {a_ground} ground",
    "zh": "一颗{colour}的星星在{ground}的背景上转圈",
}
PERIOD = 2.0  # seconds of a round
CONTRAST = 60  # grey levels in some channel between star and background
MAX_WOBBLE = 0.2  # of the circle's radius: how far the star may be from it
Pair = tuple[str, str]
"""Colour of the star, colour of the background."""


class CircleScenes:
    """Circling stars at 8 frames per second, see ``latte.data.base.SceneSet``; one class.

    InputError for an unknown language, or a ``hold_out`` that leaves no captions.
    """

    classes: ClassVar[tuple[str, ...]] = ("circles",)
    min_graded_frames: ClassVar[int] = 4

    def __init__(self, config: "DataConfig"):
        self.language = LANGUAGES[0] if config.language is None else config.language
        check_name("data.language", self.language, (*LANGUAGES, MIXED))
        self.config = config
        pairs = [(colour, ground) for colour in COLOURS for ground in BACKGROUNDS if ground != colour]
        share = config.held_out_captions
        check(
            share == 0 or 2 <= share <= len(pairs),
            f"data.hold_out must be 0 or in [2, {len(pairs)}] for data.scenes=circles, got {share}; "
            "one pair of colours in so many is held out",
        )
        self.held_out = [pair for place, pair in enumerate(pairs, 1) if share and place % share == 0]
        self.trained = [pair for pair in pairs if pair not in self.held_out]

    @property
    def captions(self) -> list[str]:
        """Every caption that a clip can have, sorted."""
        return self._captions(self.trained)

    @property
    def held_out_captions(self) -> list[str]:
        """Every caption of the held-out pairs of colours, sorted."""
        return self._captions(self.held_out)

    def label(self, index: int) -> int:
        """Return 0, the only class."""
        return 0

    def caption(self, index: int) -> str:
        """Return the caption of clip ``index``."""
        pair, numbers = self._scene(index)
        languages = self._languages()
        return caption_of(pair, languages[int(numbers[-1] * len(languages))])

    def render_clip(self, index: int) -> np.ndarray:
        """Return clip ``index``: uint8 (t h w c)."""
        pair, numbers = self._scene(index)
        times = [frame / FPS for frame in range(self.config.frames)]
        return np.stack([render_frame(pair, numbers, time, *self.config.size) for time in times])

    def read_label(self, clip: np.ndarray) -> int | None:
        """Return 0 when something goes round clockwise in a clip (t h w c) at the right pace, else None."""
        return 0 if 0.6 < turns(clip) * PERIOD * FPS / (len(clip) - 1) < 1.4 else None

    def is_consistent(self, clip: np.ndarray) -> bool:
        """Return whether size and colour stay over a clip (t h w c), and the star never jumps."""
        mask = _mask(clip)
        areas = mask.sum((1, 2))
        if not areas.min():
            return False
        means = np.stack([frame[inside].mean(0) for frame, inside in zip(clip, mask, strict=True)])
        steps = np.linalg.norm(np.diff(_centres(mask), axis=0), axis=1)
        steady = areas.max() < MAX_GROWTH * areas.min() and steps.max() <= 2 * np.median(steps)
        return bool(steady and abs(means - means[0]).max() <= MAX_COLOUR_CHANGE)

    def describe(self) -> dict[str, Any]:
        """Return what the clips depend on apart from seed, size, frames and held-out share."""
        return {"scenes": "circles", "language": self.language}

    def _captions(self, pairs: list[Pair]) -> list[str]:
        return sorted(caption_of(pair, language) for pair in pairs for language in self._languages())

    def _languages(self) -> tuple[str, ...]:
        return LANGUAGES if self.language == MIXED else (self.language,)

    def _scene(self, index: int) -> tuple[Pair, list[float]]:
        import torch

        draws = torch.rand(8, generator=generator(self.config.seed, "circles", index), dtype=torch.float64)
        numbers = draws.tolist()
        return self.trained[int(numbers[0] * len(self.trained))], numbers


def caption_of(pair: Pair, language: str) -> str:
    """Return the caption of a star of these colours in "en" or "zh"."""
    words = pair if language == "en" else tuple(CHINESE[word] for word in pair)
    articles = {"a_colour": with_article(pair[0]), "a_ground": with_article(pair[1])}
    return TEMPLATES[language].format(colour=words[0], ground=words[1], **articles)


def render_frame(pair: Pair, numbers: list[float], time: float, height: int, width: int) -> np.ndarray:
    """Render one frame at ``time`` seconds -> uint8 (h w c)."""
    canvas = Canvas(height, width, BACKGROUNDS[pair[1]])
    radius = between(0.11, 0.14, numbers[1])
    ring = between(0.20, 0.28, numbers[2])
    margin = ring + radius + 0.02
    centre = (
        between(margin, canvas.width - margin, numbers[3]),
        between(margin, canvas.height - margin, numbers[4]),
    )
    angle = 2 * math.pi * (numbers[5] + time / PERIOD)
    place = centre[0] + ring * math.cos(angle), centre[1] + ring * math.sin(angle)
    paint_star(canvas, place, radius, COLOURS[pair[0]])
    return canvas.pixels()


def turns(clip: np.ndarray) -> float:
    """Return how many rounds the subject of a clip (t h w c) goes, clockwise positive; 0 when its path is no
    circle.
    """
    mask = _mask(clip)
    if not mask.any((1, 2)).all():
        return 0.0
    points = _centres(mask)
    ahead = np.column_stack([2 * points, np.ones(len(points))])
    a, b, c = np.linalg.lstsq(ahead, (points**2).sum(1), rcond=None)[0]  # the circle nearest to the points
    radius = math.sqrt(max(c + a * a + b * b, 0.0))
    spokes = points - (a, b)
    if radius < 0.1 or abs(np.linalg.norm(spokes, axis=1) - radius).max() > MAX_WOBBLE * radius:
        return 0.0
    angles = np.unwrap(np.arctan2(spokes[:, 1], spokes[:, 0]))
    return float((angles[-1] - angles[0]) / (2 * math.pi))


def _mask(clip: np.ndarray) -> np.ndarray:
    """Return bool (t h w): the pixels that differ from the clip's background, its most common colour."""
    ground = np.median(clip.reshape(-1, 3), axis=0)
    return abs(clip - ground).max(-1) > CONTRAST


def _centres(mask: np.ndarray) -> np.ndarray:
    """Return the mean (x, y) of each frame's pixels (t 2), in units of the shorter side."""
    side = min(mask.shape[1:])
    return np.stack([np.argwhere(frame).mean(0)[::-1] for frame in mask]) / side
