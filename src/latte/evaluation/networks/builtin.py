# SPDX-License-Identifier: Apache-2.0
"""The built-in detector: a small video network trained on procedural clips, with its weights in the package.

Layers see one frame at a time, or three neighbouring frames at one position ((2+1)D); the first temporal
layer also reads the differences of neighbouring frames. Every stage is pooled to its mean, standard deviation
and peak: the last stage encodes the shape, the first ones sharpness and noise. Two layers on top predict the
content of a clip and how it was corrupted. The features are the last hidden layer, whitened over uncorrupted
clips. ``python -m tools.train_detector OUT.safetensors`` makes the weights.
Axes: b clips, t frames, n = b t, c channels, h w size, k features.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from latte.checks import check
from latte.evaluation.networks.layers import Network

WEIGHTS = Path(__file__).with_name("builtin.safetensors")
SIZE = 64
MIN_FRAMES = 4
NUM_FEATURES = 48
CLASSES = {"direction": 4, "shape": 3, "colour": 6}
SCENE = ("speed", "size", "x", "y", "red", "green", "blue")  # what a procedural clip shows
CORRUPTION = ("motion", "frozen", "erratic", "blur", "noise", "hue")  # how it was corrupted
MEASURES = SCENE + CORRUPTION
OUTPUTS = CLASSES | dict.fromkeys(MEASURES, 1)  # name: width, in the order of the head
WIDTHS, HIDDEN = (32, 48, 64, 128), (160, 96)


def neighbours(x: Tensor) -> Tensor:
    """Return (b t 3c h w): each frame of ``x`` (b t c h w) with both neighbours; the ends are repeated."""
    previous = torch.cat([x[:, :1], x[:, :-1]], 1)
    following = torch.cat([x[:, 1:], x[:, -1:]], 1)
    return torch.cat([previous, x, following], 2)  # (b t 3c h w)


def moments(x: Tensor) -> Tensor:
    """Return (b 3c) of ``x`` (b t c h w): mean, standard deviation, time average of the spatial maximum."""
    var, mean = torch.var_mean(x, (1, 3, 4), correction=0)
    return torch.cat([mean, (var + 1e-6).sqrt(), x.amax((3, 4)).mean(1)], 1)


class BuiltinDetector(nn.Module):
    """Map clips (b 3 t 64 64) in [-1, 1], t >= 4, to features (b 48), of unit variance on clean clips."""

    def __init__(self) -> None:
        super().__init__()
        one, two, three, four = WIDTHS
        self.unshuffle = nn.PixelUnshuffle(4)
        self.stem = nn.Conv2d(48, one, 3, padding=1)
        self.down1 = nn.Conv2d(one, two, 3, stride=2, padding=1)
        self.time1 = nn.Conv2d(6 * two, three, 1)
        self.down2 = nn.Conv2d(three, three, 3, stride=2, padding=1)
        self.time2 = nn.Conv2d(3 * three, four, 1)
        self.last = nn.Conv2d(four, four, 3, padding=1)
        self.hidden = nn.Linear(3 * (one + two + three + four), HIDDEN[0])
        self.second = nn.Linear(HIDDEN[0], HIDDEN[1])
        self.head = nn.Linear(HIDDEN[1], sum(OUTPUTS.values()))
        self.whiten = nn.Linear(HIDDEN[1], NUM_FEATURES)  # PCA whitening, computed after training

    def summary(self, x: Tensor) -> Tensor:
        """Return the pooled stages (b 816) of ``x`` (b 3 t 64 64); InputError for any other shape."""
        shape = tuple(x.shape)
        fits = x.ndim == 5 and shape[2] >= MIN_FRAMES and shape[1::2] == (3, SIZE) and shape[4] == SIZE
        size = f"at least {MIN_FRAMES} frames of {SIZE} x {SIZE}"
        check(fits, f"the built-in detector reads {size}, got {shape}; resize or lengthen the clips")

        def per_frame(layer: nn.Conv2d, clip: Tensor) -> Tensor:
            frames = clip.flatten(0, 1).contiguous(memory_format=torch.channels_last)  # (n c h w)
            return layer(frames).relu().unflatten(0, clip.shape[:2])  # (b t c h w)

        stem = per_frame(self.stem, self.unshuffle(x.transpose(1, 2)))
        static = per_frame(self.down1, stem)
        change = torch.cat([torch.zeros_like(static[:, :1]), static.diff(dim=1)], 1)
        moving = per_frame(self.time1, neighbours(torch.cat([static, change], 2)))
        last = per_frame(self.time2, neighbours(per_frame(self.down2, moving)))
        last = per_frame(self.last, last)
        return torch.cat([moments(stage) for stage in (stem, static, moving, last)], 1)  # (b 816)

    def embed(self, x: Tensor) -> Tensor:
        """Return the last hidden layer (b 96) of ``x`` (b 3 t 64 64)."""
        return self.second(self.hidden(self.summary(x)).relu()).relu()

    def forward(self, x: Tensor) -> Tensor:
        """Return the features (b 48) of ``x`` (b 3 t 64 64)."""
        return self.whiten(self.embed(x))

    def predict(self, x: Tensor) -> dict[str, Tensor]:
        """Return logits of direction (b 4), shape (b 3), colour (b 6), and each of ``MEASURES`` (b 1)."""
        parts = self.head(self.embed(x)).split(list(OUTPUTS.values()), 1)
        return dict(zip(OUTPUTS, parts, strict=True))


NETWORK = Network(BuiltinDetector, {}, 0.0)
