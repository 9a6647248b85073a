# SPDX-License-Identifier: Apache-2.0
"""Curtains that open in the middle: clips for fine-tuning a model of the world, which knows neither this look
nor its words.

Little but the two colours differs from clip to clip, so that a minute of training is enough. Clip ``index``
is a pure function of (seed, index). Captions name curtain and wall, in English and Chinese; the motion is
read back from the pixels. Axes: t frames, h height, w width, c channels.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from latte.checks import check, check_name
from latte.data.procedural import MAX_COLOUR_CHANGE
from latte.data.world.canvas import Canvas
from latte.data.world.kinds import BACKGROUNDS, COLOURS, between
from latte.data.world.scenes import CHINESE, FPS, LANGUAGES, MIXED, with_article
from latte.runtime import generator

if TYPE_CHECKING:
    from latte.data.base import DataConfig

TEMPLATES = {
    "en": "{a_colour} curtain opens in front of {a_ground} wall",
    "zh": "{colour}的幕布在{ground}的墙前拉开",
}
GAP = (0.02, 0.06)  # at time 0, as a share of the frame's width
SPEED = (0.42, 0.50)  # by which it grows in a second
CONTRAST = 60  # grey levels in some channel between curtain and wall
MIN_AGREEMENT = 0.85  # of the pixels; 0.75 for a curtain that vanishes halfway, less when it closes
MAX_STEP = 0.12  # of the gap, from one frame to the next
MIN_SHARE = 0.15  # of the frame: a smaller region is mostly blurred border, once decoded
Pair = tuple[str, str]
"""Colour of the curtain, colour of the wall."""


class CurtainScenes:
    """Opening curtains at 8 frames per second, see ``latte.data.base.SceneSet``; one class.

    InputError for an unknown language, or a ``hold_out`` that leaves no captions.
    """

    classes: ClassVar[tuple[str, ...]] = ("curtain",)
    min_graded_frames: ClassVar[int] = 4

    def __init__(self, config: "DataConfig"):
        self.language = LANGUAGES[0] if config.language is None else config.language
        check_name("data.language", self.language, (*LANGUAGES, MIXED))
        self.config = config
        pairs = [(colour, ground) for colour in COLOURS for ground in BACKGROUNDS if ground != colour]
        share = config.held_out_captions
        check(
            share == 0 or 2 <= share <= len(pairs),
            f"data.hold_out must be 0 or in [2, {len(pairs)}] for data.scenes=curtains, got {share}; "
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
        return np.stack([render_frame(pair, gap_at(time, numbers), *self.config.size) for time in times])

    def read_label(self, clip: np.ndarray) -> int | None:
        """Return 0 when a curtain opens in a clip (t h w c) as in the scenes, else None."""
        colours = colours_of(clip)
        if abs(colours[0] - colours[1]).max() <= CONTRAST:
            return None
        agreement = (curtain_mask(clip, colours) == expected_masks(clip)).mean()
        return 0 if agreement > MIN_AGREEMENT else None

    def is_consistent(self, clip: np.ndarray) -> bool:
        """Return whether a clip (t h w c) keeps the colours of curtain and wall, and the gap never jumps."""
        colours = colours_of(clip)
        mask = curtain_mask(clip, colours)
        for region, colour in ((mask, colours[0]), (~mask, colours[1])):
            large = region.mean((1, 2)) > MIN_SHARE
            frames = zip(clip[large], region[large], strict=True)
            changes = [abs(frame[inside].mean(0) - colour).max() for frame, inside in frames]
            if max(changes, default=0) > MAX_COLOUR_CHANGE:
                return False
        return bool(abs(np.diff(mask.mean((1, 2)))).max(initial=0) <= MAX_STEP)

    def describe(self) -> dict[str, Any]:
        """Return what the clips depend on apart from seed, size, frames and held-out share."""
        return {"scenes": "curtains", "language": self.language}

    def _captions(self, pairs: list[Pair]) -> list[str]:
        return sorted(caption_of(pair, language) for pair in pairs for language in self._languages())

    def _languages(self) -> tuple[str, ...]:
        return LANGUAGES if self.language == MIXED else (self.language,)

    def _scene(self, index: int) -> tuple[Pair, list[float]]:
        import torch

        draws = torch.rand(4, generator=generator(self.config.seed, "curtains", index), dtype=torch.float64)
        numbers = draws.tolist()
        return self.trained[int(numbers[0] * len(self.trained))], numbers


def caption_of(pair: Pair, language: str) -> str:
    """Return the caption of a curtain and a wall of these colours in "en" or "zh"."""
    words = pair if language == "en" else tuple(CHINESE[word] for word in pair)
    articles = {"a_colour": with_article(pair[0]), "a_ground": with_article(pair[1])}
    return TEMPLATES[language].format(colour=words[0], ground=words[1], **articles)


def gap_at(time: float, numbers: Sequence[float] = (0.5, 0.5, 0.5)) -> float:
    """Return the gap at ``time`` seconds, a share of the frame's width in [0, 1]; ``numbers`` in [0, 1) are
    those of the scene, by default the middle of their range.
    """
    return min(between(*GAP, numbers[1]) + between(*SPEED, numbers[2]) * time, 1.0)


def render_frame(pair: Pair, gap: float, height: int, width: int) -> np.ndarray:
    """Render a curtain that is open by ``gap``, a share of the width in [0, 1] -> uint8 (h w c)."""
    canvas = Canvas(height, width, COLOURS[pair[0]])
    centre = (canvas.width / 2, canvas.height / 2)
    canvas.box(centre, (gap * canvas.width / 2, canvas.height), BACKGROUNDS[pair[1]])
    return canvas.pixels()


def expected_masks(clip: np.ndarray) -> np.ndarray:
    """Return bool (t h w): where a curtain of middle gap and speed is, at the times of a clip (t h w c)."""
    frames, height, width = clip.shape[:3]
    place = abs(2 * (np.arange(width) + 0.5) / width - 1)  # (w): 0 in the middle, 1 at both sides
    gaps = np.array([gap_at(frame / FPS) for frame in range(frames)])
    return np.broadcast_to((place > gaps[:, None])[:, None], (frames, height, width))


def colours_of(clip: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the colours (c), (c) of curtain and wall: medians of where the first frame of a clip (t h w c)
    should be closed and its last frame open.
    """
    expected = expected_masks(clip)
    return np.median(clip[0][expected[0]], axis=0), np.median(clip[-1][~expected[-1]], axis=0)


def curtain_mask(clip: np.ndarray, colours: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Return bool (t h w): the pixels of a clip (t h w c) that are nearer to the first of two colours."""
    curtain, wall = (np.square(clip - colour).sum(-1) for colour in colours)
    return curtain < wall
