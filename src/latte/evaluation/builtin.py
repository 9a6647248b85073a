# SPDX-License-Identifier: Apache-2.0
"""The built-in detector: a small video network trained by this project on the labels of procedural clips, so no download is needed.

Layers see one frame at a time, or three neighbouring frames of one place ((2+1)D); the first temporal layer is also given the differences
of neighbouring frames. Every stage hands over its mean and its spread over time and space: the last one knows what the labels ask for, the
first ones know sharpness and noise. The features are the whitened principal components of these moments; the layer before the answers
itself, measured, hardly saw noise, blur and wrong colours beside the scatter of what it was trained to tell apart.
``python -m latte.train.detector OUT.safetensors`` makes the weights beside this file.
Axes: b clips, t frames, n = b t, c channels, h w size, k features.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from latte.checks import require
from latte.evaluation.layers import Network

WEIGHTS = Path(__file__).with_name("builtin.safetensors")
SIZE, MIN_FRAMES, NUM_FEATURES = 64, 4, 128
ANSWERS = {"direction": 4, "shape": 3, "colour": 6, "speed": 1, "size": 1}  # outputs of the head, in this order
WIDTHS = (32, 48, 64, 128)


def neighbours(x: Tensor) -> Tensor:
    """(b t c h w) -> (b t 3c h w): each frame between the one before and the one after; the ends are their own neighbours."""
    return torch.cat([torch.cat([x[:, :1], x[:, :-1]], 1), x, torch.cat([x[:, 1:], x[:, -1:]], 1)], 2)


def moments(x: Tensor) -> Tensor:
    """(b t c h w) -> (b 2c): mean and standard deviation over time and space."""
    var, mean = torch.var_mean(x, (1, 3, 4), correction=0)
    return torch.cat([mean, (var + 1e-6).sqrt()], 1)


class BuiltinDetector(nn.Module):
    """Clips (b 3 t 64 64) in [-1, 1], t >= 4 -> features (b 128), of variance 1 over clean procedural clips of 16 frames."""

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
        self.whiten = nn.Linear(2 * (one + two + three + four), NUM_FEATURES)  # found after the training, not by it
        self.hidden = nn.Linear(2 * (one + two + three + four), NUM_FEATURES)
        self.head = nn.Linear(NUM_FEATURES, sum(ANSWERS.values()))

    def summary(self, x: Tensor) -> Tensor:
        """(b 3 t 64 64) -> the moments of all stages (b 544); InputError for another size or fewer than 4 frames."""
        shape = tuple(x.shape)
        fits = x.ndim == 5 and shape[2] >= MIN_FRAMES and shape[1::2] == (3, SIZE) and shape[4] == SIZE
        require(fits, "the clip (b c t h w)", shape, f"this detector takes {MIN_FRAMES} frames of {SIZE} x {SIZE} or more", "resize it")

        def each(layer: nn.Conv2d, clip: Tensor) -> Tensor:
            frames = clip.flatten(0, 1).contiguous(memory_format=torch.channels_last)
            return layer(frames).relu().unflatten(0, clip.shape[:2])

        stem = each(self.stem, self.unshuffle(x.transpose(1, 2)))
        still = each(self.down1, stem)
        change = torch.cat([torch.zeros_like(still[:, :1]), still.diff(dim=1)], 1)
        moving = each(self.time1, neighbours(torch.cat([still, change], 2)))
        whole = each(self.time2, neighbours(each(self.down2, moving)))
        whole = each(self.last, whole)
        return torch.cat([moments(part) for part in (stem, still, moving, whole)], 1)

    def forward(self, x: Tensor) -> Tensor:
        """(b 3 t 64 64) -> features (b 128)."""
        return self.whiten(self.summary(x))

    def answers(self, x: Tensor) -> dict[str, Tensor]:
        """(b 3 t 64 64) -> logits of direction (b 4), shape (b 3), colour (b 6); speed (b 1) and size (b 1), each from -1 to 1."""
        parts = self.head(self.hidden(self.summary(x)).relu()).split(list(ANSWERS.values()), 1)
        return dict(zip(ANSWERS, parts, strict=True))


NETWORK = Network(BuiltinDetector, {}, 0.0)
