# SPDX-License-Identifier: Apache-2.0
"""The built-in autoencoder: plain convolutions, 8x smaller each way, trained by this project on procedural
clips.

Without norms or attention a pixel depends on its neighbourhood alone, so any frame size divisible by 8 works.
The packaged weights are made by ``python -m tools.train_autoencoder OUT.safetensors``.
Axes: n frames, c channels, h height, w width.
"""

from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from latte.autoencoder.base import Compression, FrameCodec, load_network
from latte.tensors import without_memory

WEIGHTS = Path(__file__).with_name("builtin.safetensors")


class Residual(nn.Module):
    """x + conv(relu(conv(relu(x)))), (n c h w) -> (n c h w); the identity at the start of training."""

    def __init__(self, channels: int):
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)
        for parameter in self.second.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.first(x.relu()).relu())


class Normaliser(nn.Module):
    """(n c h w) -> mean 0, variance 1 per channel: by the batch's moments in training, then by stored ones.

    The noise that training adds to latents so has a fixed size relative to them.
    """

    mean: Tensor
    var: Tensor

    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        mean = self.mean
        var = self.var
        if self.training:
            var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
        return (x - mean[:, None, None]) / (var[:, None, None] + 1e-6).sqrt()


class BuiltinAutoencoder(nn.Module):
    """Frames (n 3 h w) in [-1, 1] <-> latents (n 4 h/8 w/8).

    Over procedural frames, each channel of the latents has mean 0 and variance 1.
    """

    def __init__(self, channels: int = 4):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(4),
            nn.Conv2d(48, 48, 3, padding=1),
            Residual(48),
            nn.Conv2d(48, 64, 4, stride=2, padding=1),
            Residual(64),
            nn.ReLU(),
            nn.Conv2d(64, channels, 1),
        )
        self.normaliser = Normaliser(channels)
        self.decoder = nn.Sequential(
            nn.Conv2d(channels, 64, 3, padding=1),
            Residual(64),
            Residual(64),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(64, 40, 3, padding=1),
            Residual(40),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(40, 24, 3, padding=1),
            Residual(24),
            nn.ReLU(),
            nn.Conv2d(24, 12, 3, padding=1),
            nn.PixelShuffle(2),
        )

    def encode(self, frames: Tensor) -> Tensor:
        """Return latents (n 4 h/8 w/8) of frames (n 3 h w) in [-1, 1]."""
        return self.normaliser(self.encoder(frames))

    def decode(self, latent: Tensor) -> Tensor:
        """Return frames (n 3 8h 8w), about [-1, 1], not clamped, of latents (n 4 h w)."""
        return self.decoder(latent)


class BuiltinCodec(FrameCodec):
    """The built-in autoencoder as a codec: deterministic, 4 channels, 8x smaller."""

    name = "builtin"
    compression = Compression(channels=4, spatial_factor=8)

    @classmethod
    def load(cls, path: str | None, chunk: int, device: str | torch.device) -> Self:
        """Return the codec.

        ``path`` is a file that ``tools.train_autoencoder`` wrote, None for the packaged weights.
        """
        return cls(load_network(BuiltinAutoencoder(), path or WEIGHTS, "codec.path"), chunk, device)

    @classmethod
    def skeleton(cls, path: str | None) -> nn.Module:
        with without_memory():
            return BuiltinAutoencoder()

    def encode_frames(self, frames: Tensor, noise: Tensor | None) -> Tensor:
        return self.network.encode(frames)

    def decode_frames(self, latent: Tensor) -> Tensor:
        return self.network.decode(latent)
