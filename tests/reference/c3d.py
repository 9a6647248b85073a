# SPDX-License-Identifier: Apache-2.0
"""C3D written plainly, from the published prototxt: eight convolutions, five pools, three linear layers.

Reference of ``latte.evaluation.networks.c3d``; shares no code with it. Axes: b clip, c channels, t frames, h
w size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PlainC3D(nn.Module):
    """(b 3 16 112 112) RGB in [-1, 1] -> logits (b classes)."""

    def __init__(self, classes: int, width: int, hidden: int):
        super().__init__()
        widths = [3, width, 2 * width, 4 * width, 4 * width, 8 * width, 8 * width, 8 * width, 8 * width]
        names = ["conv1a", "conv2a", "conv3a", "conv3b", "conv4a", "conv4b", "conv5a", "conv5b"]
        for name, c_in, c_out in zip(names, widths[:-1], widths[1:], strict=True):
            self.add_module(name, nn.Conv3d(c_in, c_out, kernel_size=3, padding=1))
        self.fc6 = nn.Linear(8 * width * 4 * 4, hidden)
        self.fc7 = nn.Linear(hidden, hidden)
        self.fc8 = nn.Linear(hidden, classes)
        self.register_buffer("mean", torch.zeros(3, 16, 112, 112))

    def forward(self, x: Tensor) -> Tensor:
        red, green, blue = x[:, 0], x[:, 1], x[:, 2]
        x = torch.stack([blue, green, red], dim=1) * 128.0
        x = x + 128.0 - self.mean
        x = F.max_pool3d(F.relu(self.conv1a(x)), kernel_size=(1, 2, 2), stride=(1, 2, 2))
        x = F.max_pool3d(F.relu(self.conv2a(x)), kernel_size=2, stride=2)
        x = F.relu(self.conv3b(F.relu(self.conv3a(x))))
        x = F.max_pool3d(x, kernel_size=2, stride=2)
        x = F.relu(self.conv4b(F.relu(self.conv4a(x))))
        x = F.max_pool3d(x, kernel_size=2, stride=2)
        x = F.relu(self.conv5b(F.relu(self.conv5a(x))))
        x = F.pad(x, (0, 1, 0, 1))  # 7 x 7 to 8 x 8 with zeros, which never win after a ReLU
        x = F.max_pool3d(x, kernel_size=2, stride=2)
        x = x.reshape(len(x), -1)
        return self.fc8(F.relu(self.fc7(F.relu(self.fc6(x)))))
