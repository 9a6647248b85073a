# SPDX-License-Identifier: Apache-2.0
"""The built-in detector: a small video network trained by this project to read procedural clips and their damage; nothing is downloaded.

Layers see one frame at a time, or three neighbouring frames of one place ((2+1)D); the first temporal layer is also given the differences
of neighbouring frames. Every stage hands over its mean, its spread and its peaks: the last one knows the shape, the first ones know
sharpness and noise. Two layers on top read off what the clip shows and how it was damaged; the features are the last of them, on the scale
of undamaged clips. ``python -m tools.train_detector OUT.safetensors`` makes the weights beside this file.
Axes: b clips, t frames, n = b t, c channels, h w size, k features.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from latte.checks import require
from latte.evaluation.networks.layers import Network

WEIGHTS = Path(__file__).with_name("builtin.safetensors")
SIZE, MIN_FRAMES, NUM_FEATURES = 64, 4, 48
CLASSES = {"direction": 4, "shape": 3, "colour": 6}
MEASURES = (
    "speed",
    "size",
    "x",
    "y",
    "red",
    "green",
    "blue",
    "motion",
    "still",
    "wild",
    "blur",
    "noise",
    "hue",
)
ANSWERS = CLASSES | dict.fromkeys(MEASURES, 1)  # outputs of the head, in this order
WIDTHS, HIDDEN = (32, 48, 64, 128), (160, 96)


def neighbours(x: Tensor) -> Tensor:
    """(b t c h w) -> (b t 3c h w): each frame between the one before and the one after; the ends are their own neighbours."""
    return torch.cat([torch.cat([x[:, :1], x[:, :-1]], 1), x, torch.cat([x[:, 1:], x[:, -1:]], 1)], 2)


def moments(x: Tensor) -> Tensor:
    """(b t c h w) -> (b 3c): mean and standard deviation over time and space, and the mean over time of the greatest value in space."""
    var, mean = torch.var_mean(x, (1, 3, 4), correction=0)
    return torch.cat([mean, (var + 1e-6).sqrt(), x.amax((3, 4)).mean(1)], 1)


class BuiltinDetector(nn.Module):
    """Clips (b 3 t 64 64) in [-1, 1], t >= 4 -> features (b 48), of about unit variance over undamaged procedural clips."""

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
        self.head = nn.Linear(HIDDEN[1], sum(ANSWERS.values()))
        self.whiten = nn.Linear(HIDDEN[1], NUM_FEATURES)  # found after the training, not by it

    def summary(self, x: Tensor) -> Tensor:
        """(b 3 t 64 64) -> the moments of all stages (b 816); InputError for another size or fewer than 4 frames."""
        shape = tuple(x.shape)
        fits = x.ndim == 5 and shape[2] >= MIN_FRAMES and shape[1::2] == (3, SIZE) and shape[4] == SIZE
        require(
            fits,
            "the clip (b c t h w)",
            shape,
            f"this detector takes {MIN_FRAMES} frames of {SIZE} x {SIZE} or more",
            "resize it",
        )

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

    def code(self, x: Tensor) -> Tensor:
        """(b 3 t 64 64) -> the layer before the answers (b 96)."""
        return self.second(self.hidden(self.summary(x)).relu()).relu()

    def forward(self, x: Tensor) -> Tensor:
        """(b 3 t 64 64) -> features (b 48)."""
        return self.whiten(self.code(x))

    def answers(self, x: Tensor) -> dict[str, Tensor]:
        """(b 3 t 64 64) -> logits of direction (b 4), shape (b 3), colour (b 6), and each of ``MEASURES`` (b 1)."""
        parts = self.head(self.code(x)).split(list(ANSWERS.values()), 1)
        return dict(zip(ANSWERS, parts, strict=True))


NETWORK = Network(BuiltinDetector, {}, 0.0)
