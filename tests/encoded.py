# SPDX-License-Identifier: Apache-2.0
"""Small sets to encode, and a codec that draws: what the tests of encoding and of encoded latents share."""

from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from latte.autoencoder.codec import CodecConfig, build_codec
from latte.autoencoder.compression import Compression
from latte.data.datasets import DataConfig
from videos import encode, numbered

SHAPES = DataConfig(kind="procedural", resolution=16, frames=4, num_clips=6, seed=3)
TWO_CLIPS = 2 * 4 * 3 * 16 * 16 * 2  # bytes of two clips of SHAPES as float16 pixels


def pixels():
    return build_codec(CodecConfig("pixels"))


class Drawn:
    """A stochastic codec: pixels plus noise. Its ``encode`` calls ``before()`` first."""

    name, fingerprint, stochastic = "drawn", "0123456789abcdef", True
    compression = Compression(channels=3, spatial_factor=1)
    before = staticmethod(lambda: None)

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        return 3, height, width

    def encode(self, frames: Tensor, generator: torch.Generator | None = None) -> Tensor:
        self.before()
        return frames + torch.randn(frames.shape, generator=generator)


def make_videos(root: Path) -> Path:
    """Two classes: an even mp4, one of uneven frame times, a folder of images of another aspect, a short clip."""
    for name in ("a", "b"):
        (root / name).mkdir()
    encode(root / "a" / "even.mp4", numbered(20))
    encode(root / "a" / "uneven.mp4", numbered(16), ticks=[i * 40 + 200 * (i > 7) for i in range(16)])
    for index, frame in enumerate(numbered(9, 40, 40)):
        (root / "b" / "pictures").mkdir(exist_ok=True)
        Image.fromarray(frame).save(root / "b" / "pictures" / f"{index}.png")
    encode(root / "b" / "short.mp4", numbered(3))
    return root


def folder_config(root: Path, **changes) -> DataConfig:
    """Frames as they are: the rates of ``make_videos`` differ, so an open rule would choose by time."""
    given = {"resolution": (24, 32), "frames": 3, "interval": 2, "rule": "strict", "flip": True} | changes
    return DataConfig(root=str(root), **given)


def latents_of(config: DataConfig, out: Path) -> DataConfig:
    """The configuration that reads ``out``, with the clips of ``config``."""
    if config.kind == "procedural":
        return DataConfig(kind="latents", root=str(out), resolution=config.resolution, frames=config.frames)
    return replace(config, kind="latents", root=str(out))


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir()}
