# SPDX-License-Identifier: Apache-2.0
"""Codecs that compress time, small and exact, for tests; fixture ``time_codecs`` puts them into the table.

The causal one takes 1 + 4 k frames. A latent frame is the mean of its span plus half the latent frame before
it, so a latent depends on everything since the first frame of its clip: latents of a clip that starts
elsewhere differ, as with causal convolutions. Space is exact: a square of 2 x 2 pixels becomes channels.
Axes: f frames, f' latent frames, s span of a latent frame, c channels, H W pixels, h w latent size.
"""

from typing import Self

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from latte.autoencoder.base import Compression, VideoCodec
from latte.autoencoder.codec import CODECS, CodecConfig, build_codec

MEMORY = 0.5  # how much of a latent frame the next one keeps


class TimeCodec(VideoCodec):
    """Causal, 4 frames per latent frame after the first, 2 x 2 pixels per latent pixel, 12 channels."""

    name = "time"
    compression = Compression(channels=12, spatial_factor=2, temporal_factor=4)

    @classmethod
    def load(cls, path: str | None, chunk: int, device: str | torch.device) -> Self:
        return cls(cls.skeleton(path), chunk, device)

    @classmethod
    def skeleton(cls, path: str | None) -> nn.Module:
        return nn.Identity()

    def encode_clip(self, frames: Tensor, noise: Tensor | None) -> Tensor:
        space = pixel_unshuffle(frames[0], self.spatial_factor)  # (f c h w)
        latents = []
        for index in range(self.latent_frames(len(space))):
            span = self.compression.span(index)
            latent = space[span.start : span.stop].mean(0)  # (c h w)
            latents.append(latent + MEMORY * latents[-1] if latents else latent)
        found = torch.stack(latents)[None]  # (1 f' c h w)
        return found if noise is None else found + noise

    def decode_clip(self, latent: Tensor) -> Tensor:
        before = torch.cat((torch.zeros_like(latent[0, :1]), latent[0, :-1]))  # (f' c h w)
        means = latent[0] - MEMORY * before  # (f' c h w)
        spans = [len(self.compression.span(index)) for index in range(len(means))]
        repeated = torch.cat([mean.expand(n, -1, -1, -1) for mean, n in zip(means, spans, strict=True)])
        return pixel_shuffle(repeated, self.spatial_factor)[None]  # (1 f 3 H W)


class DrawnTimeCodec(TimeCodec):
    """The same with a posterior: ``encode`` with a generator adds standard normal noise."""

    name = "time_drawn"
    stochastic = True


class BlockCodec(TimeCodec):
    """Not causal: takes 4 k frames, encodes no images, and the mean of every block stands for itself."""

    name = "time_blocks"
    compression = Compression(channels=12, spatial_factor=2, temporal_factor=4, causal=False)


TIME_CODECS = (TimeCodec, DrawnTimeCodec, BlockCodec)
# What a run with ``TimeCodec`` needs beside the recipe: 9 frames of 16 x 16 become 3 latent frames of 8 x 8.
TIME_WORDS = ["codec.name=time", "data.frames=9", "data.resolution=16"]


def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the codecs into the table of codecs until the end of a test."""
    for kind in TIME_CODECS:
        monkeypatch.setitem(CODECS, kind.name, kind)


def time_codec(kind: type[TimeCodec] = TimeCodec) -> TimeCodec:
    """Return a codec of the table; ``registered`` must have been called."""
    codec = build_codec(CodecConfig(kind.name))
    assert isinstance(codec, kind)
    return codec
