# SPDX-License-Identifier: Apache-2.0
"""What a dataset of clips is, and the configuration that chooses one.

Axes: f frames, c channels, H height, W width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from latte.checks import RunError, printable
from latte.data.config import PROCEDURAL as PROCEDURAL
from latte.data.config import UNREAD as UNREAD
from latte.data.config import DataConfig as DataConfig


@dataclass(frozen=True)
class Clip:
    """One clip: ``video`` (f c H W) float in [-1, 1], or a latent (f c h w).

    ``label`` is a class index or None, ``key`` names the source.
    """

    video: Tensor
    label: int | None
    caption: str | None
    key: str


class ClipReadError(RunError):
    """A file that could be read when the dataset was opened no longer can; ``path`` and ``reason`` say which
    and why.
    """

    def __init__(self, path: str, reason: str):
        super().__init__(path, reason)  # the arguments, so that a worker process can send the error
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"{printable(self.path)} can no longer be read ({self.reason})"


class Dataset(Protocol):
    """What training and sampling need from a dataset.

    ``classes`` are names, [] without labels. ``latent`` states whether ``Clip.video`` is a latent. A dataset
    of files also has ``files``, see ``latte.data.fingerprint``, and ``empty_classes``, the classes without a
    usable clip.
    """

    classes: list[str]
    latent: bool

    @property
    def skipped(self) -> Sequence[dict[str, str]]:
        """{"path", "reason"} of each candidate that cannot be used."""
        ...

    @property
    def captions(self) -> Sequence[str]:
        """The distinct captions of all clips in a fixed order, [] when clips have none."""
        ...

    def __len__(self) -> int: ...

    def clip(self, index: int, generator: torch.Generator) -> Clip:
        """Return clip ``index``; every random choice is drawn from ``generator``. ClipReadError for a broken
        file.
        """
        ...

    def image(self, index: int, generator: torch.Generator) -> Clip:
        """Return a random frame of clip ``index``: video (1 c H W)."""
        ...

    def describe(self) -> dict[str, Any]:
        """Return a JSON object that changes whenever the data do."""
        ...


class SceneSet(Protocol):
    """Procedural clips: label, caption and pixels are functions of (the configuration, index) alone.

    InputError on construction for a key of the configuration that does not fit these scenes.
    """

    classes: ClassVar[tuple[str, ...]]
    min_graded_frames: ClassVar[int]
    """Frames that a clip needs for ``read_label`` and ``is_consistent``."""

    def read_label(self, clip: np.ndarray) -> int | None:
        """Return the class that ``clip``, uint8 (f H W c), shows, None when it is not clear."""
        ...

    def is_consistent(self, clip: np.ndarray) -> bool:
        """Return whether ``clip`` shows one scene whose colours, outlines and sizes stay."""
        ...

    @property
    def captions(self) -> list[str]:
        """Every caption that a clip can have, sorted."""
        ...

    @property
    def held_out_captions(self) -> list[str]:
        """The captions that ``data.hold_out`` keeps away, sorted; [] for 0."""
        ...

    def label(self, index: int) -> int:
        """Return the class of clip ``index``."""
        ...

    def caption(self, index: int) -> str:
        """Return the caption of clip ``index``."""
        ...

    def render_clip(self, index: int) -> np.ndarray:
        """Return clip ``index``: uint8 (f H W c)."""
        ...

    def describe(self) -> dict[str, Any]:
        """Return what the clips depend on apart from seed, resolution, frames and hold_out, as plain data."""
        ...
