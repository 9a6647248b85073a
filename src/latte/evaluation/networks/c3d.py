# SPDX-License-Identifier: Apache-2.0
"""C3D fine-tuned on UCF-101: the classifier of the video Inception Score (Tran 2015; Saito 2020).

The network was trained in Caffe on BGR frames in [0, 255] minus a mean clip. The conversion is part of the
module, because the mean is stored with the weights.
Axes: b clip, c channels, t frames (16), h w size (112), k classes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latte.checks import check
from latte.evaluation.networks.layers import Conv, Network, Scheme

NORM_EPS = 0.0  # C3D has no norm
NUM_FRAMES = 16
SIZE = 112
LAYERS = ("conv1a", "conv2a", "conv3a", "conv3b", "conv4a", "conv4b", "conv5a", "conv5b", "fc6", "fc7", "fc8")


class C3D(nn.Module):
    """Map clips (b 3 16 112 112), RGB in [-1, 1], to UCF-101 logits (b k). 78,409,573 parameters."""

    mean: Tensor

    def __init__(self, num_classes: int = 101, width: int = 64, hidden: int = 4096):
        super().__init__()
        w = width
        kernel = (3, 3, 3)
        self.conv1a = Conv(3, w, kernel)
        self.conv2a = Conv(w, 2 * w, kernel)
        self.conv3a = Conv(2 * w, 4 * w, kernel)
        self.conv3b = Conv(4 * w, 4 * w, kernel)
        self.conv4a = Conv(4 * w, 8 * w, kernel)
        self.conv4b = Conv(8 * w, 8 * w, kernel)
        self.conv5a = Conv(8 * w, 8 * w, kernel)
        self.conv5b = Conv(8 * w, 8 * w, kernel)
        self.fc6 = nn.Linear(8 * w * 16, hidden)
        self.fc7 = nn.Linear(hidden, hidden)
        self.fc8 = nn.Linear(hidden, num_classes)
        self.requires_grad_(False)
        self.register_buffer("mean", torch.zeros(3, NUM_FRAMES, SIZE, SIZE))  # BGR, 0..255

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (b k); InputError for another number of frames or size."""
        check(
            x.shape[1:] == self.mean.shape,
            f"C3D reads {NUM_FRAMES} frames of {SIZE} x {SIZE}, got {tuple(x.shape)}; crop and resize them",
        )
        x = (x.flip(1) * 128 + (128 - self.mean)).contiguous(memory_format=torch.channels_last_3d)
        x = F.max_pool3d(self.conv1a(x), (1, 2, 2))
        x = F.max_pool3d(self.conv2a(x), 2)
        x = F.max_pool3d(self.conv3b(self.conv3a(x)), 2)
        x = F.max_pool3d(self.conv4b(self.conv4a(x)), 2)
        x = self.conv5b(self.conv5a(x))
        x = F.max_pool3d(x, 2, ceil_mode=True)  # the border is covered: 7 x 7 becomes 4 x 4
        x = F.relu(self.fc6(x.flatten(1)))
        return self.fc8(F.relu(self.fc7(x)))


def crop_mean(tensor: Tensor) -> Tensor:
    """Crop the published mean clip (3 16 128 171) to [8:120, 8:120]; return weights unchanged."""
    if tensor.shape[-2:] == (128, 171):
        return tensor[..., 8 : 8 + SIZE, 8 : 8 + SIZE]
    return tensor


def public_names(separator: str, weight: str, bias: str) -> dict[str, str | None]:
    """Return {public key: our key} of the 11 layers and the mean clip."""
    roles = ((weight, "weight"), (bias, "bias"))
    names: dict[str, str | None] = {
        f"{layer}{separator}{public}": f"{layer}.{role}" for layer in LAYERS for public, role in roles
    }
    return names | {"mean": "mean"}


SCHEMES = {
    "torch": Scheme(public_names(".", "weight", "bias"), crop_mean),
    "chainer": Scheme(public_names("/", "W", "b"), crop_mean),
}

NETWORK = Network(C3D, SCHEMES, NORM_EPS)
