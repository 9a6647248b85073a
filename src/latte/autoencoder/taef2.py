# SPDX-License-Identifier: Apache-2.0
"""taef2: a small image autoencoder (madebyollin/taesd, MIT), 8x smaller each way, 32 latent channels.

Written from the names and shapes of its two weight files, ``taef2_encoder`` and ``taef2_decoder``
(.safetensors or .pth). It is deterministic. Its images are in [0, 1]; its raw latents have a standard
deviation of 0.83 over natural video, which the scale undoes.
Axes: n frames, c channels, h height, w width.
"""

from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from latte.autoencoder.base import Compression, FrameCodec, load_network, located
from latte.autoencoder.config import published_text
from latte.checks import InputError
from latte.tensors import without_memory

WIDTH = 64


def conv(inputs: int, outputs: int, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    """Return a 3 x 3 convolution that keeps the size at stride 1."""
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=bias)


class Block(nn.Module):
    """relu(x + three convolutions of x), (n 64 h w) -> (n 64 h w).

    With ``pool`` a wide 1x1 branch is added to x first.
    """

    def __init__(self, pool: bool = False):
        super().__init__()
        self.conv = nn.Sequential(
            conv(WIDTH, WIDTH), nn.ReLU(), conv(WIDTH, WIDTH), nn.ReLU(), conv(WIDTH, WIDTH)
        )
        wide = 4 * WIDTH
        layers = (
            nn.Conv2d(WIDTH, wide, 1, bias=False),
            nn.GroupNorm(4, wide),
            nn.ReLU(),
            nn.Conv2d(wide, WIDTH, 1, bias=False),
        )
        self.pool = nn.Sequential(*layers) if pool else None

    def forward(self, x: Tensor) -> Tensor:
        if self.pool is not None:
            x = x + self.pool(x)
        return (x + self.conv(x)).relu()


class SoftClamp(nn.Module):
    """3 tanh(x / 3): bounds extreme latents."""

    def forward(self, x: Tensor) -> Tensor:
        return 3 * (x / 3).tanh()


def build_encoder() -> nn.Sequential:
    """Return the network (n 3 8h 8w) in [0, 1] -> (n 32 h w)."""
    layers: list[nn.Module] = [conv(3, WIDTH), Block()]
    for pool in (False, False, True):
        layers += [conv(WIDTH, WIDTH, stride=2, bias=False), Block(pool), Block(pool), Block(pool)]
    return nn.Sequential(*layers, conv(WIDTH, 32))


def build_decoder() -> nn.Sequential:
    """Return the network (n 32 h w) -> (n 3 8h 8w), about [0, 1]."""
    layers: list[nn.Module] = [SoftClamp(), conv(32, WIDTH), nn.ReLU(), Block(True), Block(True), Block(True)]
    for blocks in (3, 3, 1):
        layers += [
            nn.Upsample(scale_factor=2),
            conv(WIDTH, WIDTH, bias=False),
            *(Block() for _ in range(blocks)),
        ]
    return nn.Sequential(*layers, conv(WIDTH, 3))


class Taef2Codec(FrameCodec):
    """taef2 as a codec: latents scaled by 1.2 to about unit variance."""

    name = "taef2"
    compression = Compression(channels=32, spatial_factor=8)
    scale = 1.2

    @classmethod
    def load(cls, path: str | None, chunk: int, device: str | torch.device) -> Self:
        """Return the codec.

        ``path`` is the folder of taef2_encoder and taef2_decoder, .safetensors preferred to .pth.
        """
        if path is None or not Path(path).is_dir():
            place = "missing" if path is None else f"{located(path)}, which is no folder"
            raise InputError(
                f"codec.path is {place}: codec 'taef2' needs the folder of taef2_encoder and "
                f"taef2_decoder{published_text(cls.name)}"
            )
        parts = {"encoder": build_encoder(), "decoder": build_decoder()}
        for part, network in parts.items():
            files = [Path(path) / f"taef2_{part}{suffix}" for suffix in (".safetensors", ".pth")]
            found = next((file for file in files if file.is_file()), None)
            if found is None:
                raise InputError(
                    f"codec.path is {located(path)}, which holds neither {files[0].name} nor {files[1].name}"
                    f"{published_text(cls.name)}"
                )
            load_network(network, found, "codec.path")
        return cls(nn.ModuleDict(parts), chunk, device)

    @classmethod
    def skeleton(cls, path: str | None) -> nn.Module:
        with without_memory():
            return nn.ModuleDict({"encoder": build_encoder(), "decoder": build_decoder()})

    def encode_frames(self, frames: Tensor, noise: Tensor | None) -> Tensor:
        return self.network["encoder"]((frames + 1) / 2) * self.scale

    def decode_frames(self, latent: Tensor) -> Tensor:
        return self.network["decoder"](latent / self.scale) * 2 - 1
