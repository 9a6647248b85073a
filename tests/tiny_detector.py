# SPDX-License-Identifier: Apache-2.0
"""A detector of a few operations: 16 x 16 pixels, 6 features of brightness, position and motion. Other
processes can import it.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from latte.data.media import write_mp4
from latte.evaluation.detector_files import Weights
from latte.evaluation.detectors import Detector, DetectorSpec, Pixels
from latte.evaluation.protocols import Protocol
from latte.runtime import generator
from latte.tensors import tensors_sha256


class TinyNetwork(nn.Module):
    """float (b c t 16 16) -> (b 6)."""

    def __init__(self, seed: int = 0):
        super().__init__()
        self.mix = nn.Parameter(torch.randn(6, 24, generator=generator(seed, "tiny")), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        static = nn.functional.adaptive_avg_pool3d(x, (1, 2, 2)).flatten(1)
        motion = nn.functional.adaptive_avg_pool3d(x.diff(dim=2).abs(), (1, 2, 2)).flatten(1)
        return torch.cat([static, motion], 1) @ self.mix.T


def open_weights(path: Path | None = None, sha256: str | None = None) -> Weights:
    """``path`` is no file: its name is the seed of other weights."""
    network = TinyNetwork(int(path.name) if path else 0)
    digest = tensors_sha256(network.state_dict())
    return Weights(network, digest, "drawn", 0, digest)


PIXELS = Pixels(16)
SPEC = DetectorSpec(
    open_weights, {"pool": 6}, PIXELS, "Sees brightness and motion, nothing else.", min_frames=2
)
TINY = Protocol("tiny", "tiny", "pool", PIXELS, "For tests.", frames=4, clips=6, start_fake="random")


def build_tiny(
    name: str, device: object, path: Path | None, sha256: str | None, pixels: Pixels, layer: str, group: int
) -> Detector:
    """What ``build_detector`` does, for this detector alone."""
    assert name == "tiny"
    return Detector(name, SPEC, open_weights(path), pixels, layer, group, "cpu")


def render_clip(seed: int, frames: int = 7, size: int = 24) -> np.ndarray:
    """uint8 (t h w c): a bright square that moves over a coarse pattern, both functions of the seed."""
    draw = generator(seed, "clip")
    ground = (
        torch.randint(20, 200, (6, 6, 3), generator=draw)
        .repeat_interleave(size // 6, 0)
        .repeat_interleave(size // 6, 1)
    )
    x, y, step = (
        int(torch.randint(low, high, (), generator=draw)) for low, high in ((0, 12), (0, 16), (1, 4))
    )
    clip = ground.to(torch.uint8).expand(frames, size, size, 3).clone().numpy()
    for t in range(frames):
        left = (x + step * t) % (size - 6)
        clip[t, y : y + 6, left : left + 6] = 250
    return clip


def write_side(folder: Path, seeds: range, frames: int = 7, fps: float = 8) -> Path:
    """A folder of mp4 files 00.mp4, 01.mp4, ..."""
    for index, seed in enumerate(seeds):
        write_mp4(folder / f"{index:02d}.mp4", render_clip(seed, frames), fps)
    return folder
