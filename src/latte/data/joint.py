# SPDX-License-Identifier: Apache-2.0
"""Image-video joint training (Latte, Sec. 3.3.4): stills of the same set behind every clip.

The stills are drawn independently of the clip and of each other, and bring their own labels. They ride on the
frame axis; the model sends them through its spatial path alone. Axes: f clip frames, i stills, c channels, H
height, W width.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from latte.checks import InputError, require
from latte.data.base import Clip, Dataset


def append_images(clip: Tensor, images: Tensor) -> Tensor:
    """(f c H W), (i c H W) -> (f+i c H W); InputError when their sizes differ."""
    if clip.shape[1:] != images.shape[1:]:
        raise InputError(
            f"stills are {tuple(images.shape[1:])} (c h w) but the clip is {tuple(clip.shape[1:])}; "
            "give both readers the same data.resolution"
        )
    return torch.cat([clip, images])


class JointDataset:
    """``dataset`` with ``num_images`` stills behind each clip: video (f+i c H W), label and caption [clip's,
    stills' ...] or None.
    """

    def __init__(self, dataset: Dataset, num_images: int):
        require(
            num_images >= 1,
            "train.num_images",
            num_images,
            "it counts stills",
            "give 1 or more, or 0 for clips alone",
        )
        self.dataset, self.num_images = dataset, num_images
        self.classes, self.latent = dataset.classes, dataset.latent

    @property
    def captions(self) -> Sequence[str]:
        """The data set's."""
        return self.dataset.captions

    @property
    def skipped(self) -> Sequence[dict[str, str]]:
        """What the data set left out."""
        return self.dataset.skipped

    def __len__(self) -> int:
        return len(self.dataset)

    def clip(self, index: int, generator: torch.Generator) -> Clip:
        """Clip ``index`` as the data set draws it, then its stills."""
        clip = self.dataset.clip(index, generator)
        picks = torch.randint(len(self.dataset), (self.num_images,), generator=generator).tolist()
        stills = [self.dataset.still(pick, generator) for pick in picks]
        video = append_images(clip.video, torch.cat([still.video for still in stills]))
        label = None if clip.label is None else [clip.label, *(still.label for still in stills)]
        caption = None if clip.caption is None else [clip.caption, *(still.caption for still in stills)]
        return replace(clip, video=video, label=label, caption=caption)

    def describe(self) -> dict[str, Any]:
        """The data set's description and the number of stills."""
        return {**self.dataset.describe(), "num_images": self.num_images}
