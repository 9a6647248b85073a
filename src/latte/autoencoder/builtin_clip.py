# SPDX-License-Identifier: Apache-2.0
"""The built-in autoencoder of whole short clips: eight frames become one latent frame, 8x smaller each way,
trained by this project on moving shapes.

Eight frames of 4 x 4 pixels are one position of a two-dimensional convolution, and eight frames are encoded
and decoded together, knowing nothing of their neighbours. A diffusion model so never has to make a shape's
colour and outline agree over time: one latent holds them for all eight frames. It is not causal, and images
are too short for it. Without norms or attention any size divisible by 8 works.
The packaged weights were made by ``python -m tools.train_clip_autoencoder OUT.safetensors``.
Axes: b batch, f frames, k = f / 8 latent frames, n = b k, s = 8 frames of a span, c channels, H W pixels, h w
latent size.
"""

from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from latte.autoencoder.base import Compression, VideoCodec, load_network
from latte.autoencoder.builtin import Normaliser, Residual
from latte.autoencoder.builtin_temporal import PATCH, Refiner
from latte.tensors import without_memory

WEIGHTS = Path(__file__).with_name("builtin_clip.safetensors")
SPAN = 8  # frames of a latent frame


class BuiltinClipAutoencoder(nn.Module):
    """Frames (b 8k 3 H W) in [-1, 1] <-> latents (b k 16 H/8 W/8).

    Over moving shapes, each channel of the latents has mean 0 and variance 1.
    """

    def __init__(self, channels: int = 16, wide: int = 80, narrow: int = 48):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(3 * SPAN * PATCH**2, narrow, 1),
            Residual(narrow),
            nn.Conv2d(narrow, wide, 3, stride=2, padding=1),
            Residual(wide),
            Residual(wide),
            nn.ReLU(),
            nn.Conv2d(wide, channels, 1),
        )
        self.normaliser = Normaliser(channels)
        self.decoder = nn.Sequential(
            nn.Conv2d(channels, wide, 3, padding=1),
            Residual(wide),
            Residual(wide),
            nn.Conv2d(wide, 4 * narrow, 1),
            nn.PixelShuffle(2),
            Residual(narrow),
            Residual(narrow),
            nn.ReLU(),
        )
        self.to_pixels = nn.Conv2d(narrow, 3 * SPAN * PATCH**2, 1)
        self.refiner = Refiner(narrow, SPAN)

    def raw_encode(self, spans: Tensor) -> Tensor:
        """Return latents (n c h w), not normalised, of spans (n s 3 H W)."""
        patches = functional.pixel_unshuffle(spans.flatten(1, 2), PATCH)  # (n s*3*16 H/4 W/4)
        return self.encoder(patches.contiguous(memory_format=torch.channels_last)).float()

    def encode_spans(self, spans: Tensor) -> Tensor:
        """Return latents (n c h w) of spans (n s 3 H W)."""
        return self.normaliser(self.raw_encode(spans))

    def decode_spans(self, latent: Tensor) -> Tensor:
        """Return spans (n s 3 H W), about [-1, 1], of latents (n c h w)."""
        hidden = self.decoder(latent.contiguous(memory_format=torch.channels_last))  # (n narrow H/4 W/4)
        images = functional.pixel_shuffle(self.to_pixels(hidden), PATCH)  # (n s*3 H W)
        return self.refiner(hidden, images).unflatten(0, (-1, SPAN))  # (n s 3 H W)

    def encode(self, frames: Tensor) -> Tensor:
        """Return latents (b k c h w) of frames (b 8k 3 H W), one span at a time."""
        spans = frames.unflatten(1, (-1, SPAN)).unbind(1)  # each (b s 3 H W)
        return torch.stack([self.encode_spans(span) for span in spans], 1)

    def decode(self, latent: Tensor) -> Tensor:
        """Return frames (b 8k 3 H W) of latents (b k c h w), one span at a time."""
        return torch.cat([self.decode_spans(part) for part in latent.unbind(1)], 1)


class BuiltinClipCodec(VideoCodec):
    """The built-in autoencoder of short clips as a codec: deterministic, 16 channels, 8x smaller, 8x shorter.

    One span of frames is in the network at a time, whatever ``chunk``.
    """

    name = "builtin_clip"
    compression = Compression(channels=16, spatial_factor=8, temporal_factor=SPAN, causal=False)

    @classmethod
    def load(cls, path: str | None, chunk: int, device: str | torch.device) -> Self:
        """Return the codec.

        ``path`` is a file that ``tools.train_clip_autoencoder`` wrote, None for the packaged weights.
        """
        return cls(load_network(BuiltinClipAutoencoder(), path or WEIGHTS, "codec.path"), chunk, device)

    @classmethod
    def skeleton(cls, path: str | None) -> nn.Module:
        with without_memory():
            return BuiltinClipAutoencoder()

    def encode_clip(self, frames: Tensor, noise: Tensor | None) -> Tensor:
        return self.network.encode(frames)

    def decode_clip(self, latent: Tensor) -> Tensor:
        return self.network.decode(latent)
