# SPDX-License-Identifier: Apache-2.0
"""No autoencoder: the pixels themselves, for small experiments and exact tests."""

from typing import Self

import torch
from torch import Tensor, nn

from latte.autoencoder.base import Codec
from latte.checks import require


class PixelCodec(Codec):
    """The fingerprint: (n 3 H W) -> the same."""

    name, channels, downscale = "pixels", 3, 1

    @classmethod
    def load(cls, path: str | None, chunk: int, device: str | torch.device) -> Self:
        """``path`` must be None: there are no weights."""
        require(path is None, "codec.path", path, "codec 'pixels' has no weights", "leave it out")
        return cls(nn.Identity(), chunk, device)

    @classmethod
    def skeleton(cls, path: str | None) -> nn.Module:
        return nn.Identity()

    def encode_frames(self, frames: Tensor, noise: Tensor | None) -> Tensor:
        return frames

    def decode_frames(self, latent: Tensor) -> Tensor:
        return latent
