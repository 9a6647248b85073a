# SPDX-License-Identifier: Apache-2.0
"""Image-video joint training (Latte, Sec. 3.3.4): images of the same dataset behind every clip.

The images are drawn independently of the clip and of each other, and have their own labels and captions. They
are appended on the frame axis; the model passes them through its spatial blocks only. A codec that compresses
time encodes the clip as a clip and every image by itself, so an image is one latent frame. Axes: f clip
frames, i images, c channels, H height, W width.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from latte.autoencoder.compression import check_images as check_images
from latte.checks import check
from latte.data.base import Clip, Dataset
from latte.data.buckets import Buckets
from latte.data.order import Shares


def append_images(clip: Tensor, images: Tensor) -> Tensor:
    """Return clip (f c H W) followed by images (i c H W): (f+i c H W); InputError when they differ in
    channels or size.
    """
    check(
        clip.ndim == images.ndim == 4 and clip.shape[1:] == images.shape[1:],
        f"images of shape {tuple(images.shape)} do not fit a clip of shape {tuple(clip.shape)}: "
        "channels, height and width must be the same",
    )
    return torch.cat((clip, images))  # (f+i c H W)


class JointDataset:
    """``dataset`` with ``num_images`` images behind each clip.

    ``Clip.video`` is (f+i c H W); label and caption are [of the clip, of each image ...], or None without
    labels or captions. InputError for a dataset whose ``check_images`` raises it.
    """

    def __init__(self, dataset: Dataset, num_images: int):
        check(
            num_images >= 1, f"train.num_images must be at least 1 (0 trains on clips only), got {num_images}"
        )
        if hasattr(dataset, "check_images"):
            dataset.check_images(num_images)
        self.dataset = dataset
        self.num_images = num_images
        self.classes = dataset.classes
        self.latent = dataset.latent

    @property
    def captions(self) -> Sequence[str]:
        """Those of the dataset."""
        return self.dataset.captions

    @property
    def skipped(self) -> Sequence[dict[str, str]]:
        """What the dataset cannot use."""
        return self.dataset.skipped

    @property
    def files(self) -> dict[str, str]:
        """The content fingerprints of the dataset's files, {} when it has none."""
        return getattr(self.dataset, "files", {})

    @property
    def buckets(self) -> Buckets | None:
        """Those of the dataset."""
        return getattr(self.dataset, "buckets", None)

    @property
    def shares(self) -> Shares | None:
        """Those of a mix."""
        return getattr(self.dataset, "shares", None)

    @property
    def members(self) -> tuple[Sequence[int], ...]:
        """The clips of each bucket."""
        return getattr(self.dataset, "members", ())

    def __len__(self) -> int:
        return len(self.dataset)

    def clip(self, index: int, generator: torch.Generator) -> Clip:
        """Return clip ``index`` of the dataset and, behind it, images of random clips.

        With buckets they come from the clips of its frame size, with a mix from its sets by their weights.
        """
        clip = self.dataset.clip(index, generator)
        images = self.images(index, generator)
        video = append_images(clip.video, torch.cat([image.video for image in images]))
        changes: dict[str, Any] = {"video": video}
        if clip.label is not None:
            changes["label"] = [clip.label, *(image.label for image in images)]
        if clip.caption is not None:
            changes["caption"] = [clip.caption, *(image.caption for image in images)]
        return replace(clip, **changes)

    def images(self, index: int, generator: torch.Generator) -> list[Clip]:
        """Return the images that follow clip ``index``."""
        if self.shares is not None:
            return [self.dataset.random_image(generator) for _ in range(self.num_images)]  # type: ignore
        picks = torch.randint(self.pool_size(index), (self.num_images,), generator=generator).tolist()
        return [self.dataset.image(self.pooled(index, pick), generator) for pick in picks]

    def pool(self, index: int) -> list[Sequence[int]]:
        """Return the clips whose frames have the size of clip ``index``, in parts."""
        if self.buckets is None:
            return [range(len(self.dataset))]
        size = self.dataset.bucket(index).size  # type: ignore[attr-defined]
        pairs = zip(self.buckets.shapes, self.members, strict=True)
        return [members for bucket, members in pairs if bucket.size == size]

    def pool_size(self, index: int) -> int:
        """Return the number of clips in ``pool``."""
        return sum(map(len, self.pool(index)))

    def pooled(self, index: int, pick: int) -> int:
        """Return clip number ``pick`` of ``pool``."""
        for part in self.pool(index):
            if pick < len(part):
                return part[pick]
            pick -= len(part)
        raise IndexError(pick)

    def describe(self) -> dict[str, Any]:
        """Return the dataset's description and the number of images."""
        return {**self.dataset.describe(), "num_images": self.num_images}
