# SPDX-License-Identifier: Apache-2.0
"""The world as a set of scenes for ``data.kind=procedural``: labels are the kinds, captions in English and
Chinese.

Axes: f frames, h height, w width, c channels.
"""

from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from latte.checks import check
from latte.data.world.kinds import KINDS
from latte.data.world.scenes import (
    LANGUAGES,
    MIN_FRAMES,
    MIXED,
    Combination,
    Scene,
    backgrounds_of,
    caption,
    check_hold_out,
    paraphrases,
    render,
    sample_scene,
    split_combinations,
)

if TYPE_CHECKING:
    from latte.data.base import DataConfig

MIN_SIDE = 32  # pixels; below that, a walker's limbs and snow flakes vanish


class WorldScenes:
    """Nine kinds of moving scenes at 8 frames per second, see ``latte.data.base.SceneSet``.

    InputError for frames of less than MIN_SIDE pixels, an unknown language, or a ``hold_out`` that leaves a
    kind or a colour untrained.
    """

    classes: ClassVar[tuple[str, ...]] = tuple(KINDS)
    min_graded_frames: ClassVar[int] = MIN_FRAMES

    def __init__(self, config: "DataConfig"):
        height, width = config.size
        check(
            min(height, width) >= MIN_SIDE,
            f"data.resolution must be at least {MIN_SIDE} for data.scenes=world, got {height} x {width}; "
            "smaller frames do not show what the captions name",
        )
        languages = (*LANGUAGES, MIXED)
        self.language = LANGUAGES[0] if config.language is None else config.language
        check(
            self.language in languages,
            f"data.language must be one of {', '.join(languages)}, got {self.language!r}",
        )
        check_hold_out(config.held_out_captions)
        self.config = config

    @property
    def captions(self) -> list[str]:
        """Every caption that a clip can have, sorted."""
        return self._captions(split_combinations(self.config.held_out_captions)[0])

    @property
    def held_out_captions(self) -> list[str]:
        """Every caption of the held-out combinations, sorted."""
        return self._captions(split_combinations(self.config.held_out_captions)[1])

    def _captions(self, combinations: list[Combination]) -> list[str]:
        scenes = [
            Scene(kind, colour, background, direction, ())
            for kind, colour, direction in combinations
            for background in backgrounds_of(kind, colour)
        ]
        return sorted({text for scene in scenes for text in paraphrases(scene, self.language)})

    def label(self, index: int) -> int:
        """Return the index of the clip's kind among ``classes``."""
        return self.classes.index(self._scene(index).kind)

    def caption(self, index: int) -> str:
        """Return the caption of clip ``index``."""
        return caption(self._scene(index), self.language)

    def render_clip(self, index: int) -> np.ndarray:
        """Return clip ``index``: uint8 (f h w c)."""
        return render(self._scene(index), self.config.frames, *self.config.size)

    def read_label(self, clip: np.ndarray) -> int | None:
        """Return the index of the kind that the grader reads in a clip (t h w c), None for none of them."""
        from latte.data.world.grading import grade

        kind = grade(clip[None])[0].kind
        return self.classes.index(kind) if kind in self.classes else None

    def is_consistent(self, clip: np.ndarray) -> bool:
        """Return whether the grader finds one scene throughout a clip (t h w c), see ``grading.grade``."""
        from latte.data.world.grading import grade

        return grade(clip[None])[0].consistent

    def describe(self) -> dict[str, Any]:
        """Return what the clips depend on apart from seed, size, frames and held-out share."""
        return {"scenes": "world", "language": self.language}

    def _scene(self, index: int) -> Scene:
        return sample_scene(self.config.seed, index, self.config.held_out_captions)
