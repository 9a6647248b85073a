# SPDX-License-Identifier: Apache-2.0
"""I3D, the inflated Inception-v1 of Kinetics-400 whose logits FVD compares (Carreira and Zisserman 2017;
Unterthiner et al. 2018).

58 convolutions, TensorFlow's SAME padding throughout, norm eps 1e-3, no norm gain in the TF graph.
``fold_norms`` of layers.py merges the norms into the convolutions on loading.
Axes: b clip, c channels, t frames, h w size, k classes.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from latte.checks import check
from latte.evaluation.networks.layers import Conv, Network, Scheme, max_pool_same
from latte.runtime import generator

NORM_EPS = 1e-3
MIN_FRAMES = 9  # fewer leave no input for the last average pool over 2 time steps
MIXED = {  # c_in; widths of the branches 1x1 | 1x1, 3x3x3 | 1x1, 3x3x3 | pool, 1x1
    "3b": (192, 64, (96, 128), (16, 32), 32),
    "3c": (256, 128, (128, 192), (32, 96), 64),
    "4b": (480, 192, (96, 208), (16, 48), 64),
    "4c": (512, 160, (112, 224), (24, 64), 64),
    "4d": (512, 128, (128, 256), (24, 64), 64),
    "4e": (512, 112, (144, 288), (32, 64), 64),
    "4f": (528, 256, (160, 320), (32, 128), 128),
    "5b": (832, 256, (160, 320), (32, 128), 128),
    "5c": (832, 384, (192, 384), (48, 128), 128),
}


class Mixed(nn.Module):
    """Concatenate four branches over the same input on the channel axis."""

    def __init__(self, c_in: int, single: int, middle: tuple[int, int], small: tuple[int, int], pooled: int):
        super().__init__()
        one, three = (1, 1, 1), (3, 3, 3)
        self.b0 = Conv(c_in, single, one)
        self.b1a = Conv(c_in, middle[0], one)
        self.b1b = Conv(*middle, three)
        self.b2a = Conv(c_in, small[0], one)
        self.b2b = Conv(*small, three)
        self.b3 = Conv(c_in, pooled, one)

    def forward(self, x: Tensor) -> Tensor:
        """Map non-negative (b c t h w) to non-negative (b o t h w)."""
        pooled = max_pool_same(x, (3, 3, 3), (1, 1, 1))
        return torch.cat([self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3(pooled)], dim=1)


class I3D(nn.Module):
    """Map clips (b 3 t 224 224) in [-1, 1], t >= 9, to Kinetics logits (b k), averaged over time."""

    def __init__(self, num_classes: int = 400):
        super().__init__()
        self.conv_1a = Conv(3, 64, (7, 7, 7), (2, 2, 2))
        self.conv_2b = Conv(64, 64, (1, 1, 1))
        self.conv_2c = Conv(64, 192, (3, 3, 3))
        self.mixed = nn.ModuleDict({name: Mixed(*widths) for name, widths in MIXED.items()})
        self.logits = Conv(1024, num_classes, (1, 1, 1), relu=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (b k); InputError below 9 frames or outside of 193 to 224 pixels (last map 7 x 7)."""
        x = x.contiguous(memory_format=torch.channels_last_3d)
        shape = tuple(x.shape)
        x = max_pool_same(self.conv_1a(x), (1, 3, 3), (1, 2, 2))
        x = max_pool_same(self.conv_2c(self.conv_2b(x)), (1, 3, 3), (1, 2, 2))
        for name, mixed in self.mixed.items():
            if name == "4b":
                x = max_pool_same(x, (3, 3, 3), (2, 2, 2))
            if name == "5b":
                x = max_pool_same(x, (2, 2, 2), (2, 2, 2))
            x = mixed(x)
        check(
            x.shape[2] >= 2 and x.shape[3:] == (7, 7),
            f"I3D reads at least {MIN_FRAMES} frames of 224 x 224, got {shape}; lengthen or resize them",
        )
        # the 2 x 7 x 7 average pool, the last convolution and the mean over time are linear: means come first
        mean = x.float().mean((3, 4))  # (b c t)
        mean = (mean[..., :-1] + mean[..., 1:]).mean(2) / 2  # (b c)
        return self.logits(mean.to(x.dtype)[..., None, None, None]).flatten(1)


def random_filters(seed: int) -> I3D:
    """Return an I3D with random filters, bit-identical on every machine: integers, centred before the one
    division.

    Every filter has mean zero. Without that all clips give nearly parallel features (measured on 48 real
    clips: the covariance has an effective rank of 1.2 instead of 5.8, and shuffled frames move the features
    60 times less).
    """
    network = I3D()
    random = generator(seed, "random-i3d")
    relu_gain = 2 / (1 - 1 / math.pi)  # a ReLU keeps (1 - 1/pi) / 2 of the variance
    for name, parameter in network.named_parameters():
        if not name.endswith(".weight"):
            continue
        fan_in = parameter[0].numel()
        integers = torch.randint(-(2**15), 2**15, parameter.shape, generator=random, dtype=torch.int64)
        centred = (integers * fan_in - integers.sum(dim=(1, 2, 3, 4), keepdim=True)).double()
        variance = (1.0 if name == "logits.weight" else relu_gain) / fan_in
        parameter.data = (centred * (math.sqrt(3 * variance) / (2**15 * fan_in))).float()
    return network


def layer_names() -> Iterator[tuple[str, str, str, str]]:
    """Yield the names (ours, piergiaj, hassony2, TensorFlow) of each of the 58 convolutions."""
    for name in ("1a_7x7", "2b_1x1", "2c_3x3"):
        yield f"conv_{name[:2]}", f"Conv3d_{name}", f"conv3d_{name}", f"Conv3d_{name}"
    for name in MIXED:
        narrow = "0a_3x3" if name == "5b" else "0b_3x3"  # the one irregular name of the TF graph
        for ours, piergiaj, hassony2, tf in (
            ("b0", "b0", "branch_0", "Branch_0/Conv3d_0a_1x1"),
            ("b1a", "b1a", "branch_1.0", "Branch_1/Conv3d_0a_1x1"),
            ("b1b", "b1b", "branch_1.1", "Branch_1/Conv3d_0b_3x3"),
            ("b2a", "b2a", "branch_2.0", "Branch_2/Conv3d_0a_1x1"),
            ("b2b", "b2b", "branch_2.1", f"Branch_2/Conv3d_{narrow}"),
            ("b3", "b3b", "branch_3.1", "Branch_3/Conv3d_0b_1x1"),
        ):
            yield (
                f"mixed.{name}.{ours}",
                f"Mixed_{name}.{piergiaj}",
                f"mixed_{name}.{hassony2}",
                f"Mixed_{name}/{tf}",
            )
    yield "logits", "logits", "conv3d_0c_1x1", "Logits/Conv3d_0c_1x1"


def torch_names(column: int, norm: str) -> dict[str, str | None]:
    """Return {public key: our key} of a PyTorch naming whose norms are called ``norm``: 344 keys."""
    roles = {"weight": "gain", "bias": "shift", "running_mean": "mean", "running_var": "var"}
    names: dict[str, str | None] = {}
    for layer in layer_names():
        ours = layer[0]
        public = layer[column]
        names[f"{public}.conv3d.weight"] = f"{ours}.weight"
        if ours == "logits":
            names[f"{public}.conv3d.bias"] = f"{ours}.bias"
            continue
        names |= {f"{public}.{norm}.{role}": f"{ours}.{canonical}" for role, canonical in roles.items()}
        names[f"{public}.{norm}.num_batches_tracked"] = None
    return names


def tf_names() -> dict[str, str | None]:
    """Return {TensorFlow variable: our key}: 230 names, no gains."""
    roles = {
        "conv_3d/w": "weight",
        "batch_norm/beta": "shift",
        "batch_norm/moving_mean": "mean",
        "batch_norm/moving_variance": "var",
    }
    names: dict[str, str | None] = {}
    for ours, _, _, tf in layer_names():
        layer_roles = {"conv_3d/w": "weight", "conv_3d/b": "bias"} if ours == "logits" else roles
        names |= {
            f"RGB/inception_i3d/{tf}/{role}": f"{ours}.{canonical}" for role, canonical in layer_roles.items()
        }
    return names


def from_tf(tensor: Tensor) -> Tensor:
    """Return a TF kernel (t h w c o) as (o c t h w), anything else, (1 1 1 1 c) included, as (c,)."""
    if tensor.ndim == 5 and tensor.shape[3] > 1:
        return tensor.permute(4, 3, 0, 1, 2)
    return tensor.flatten()


SCHEMES = {
    "piergiaj": Scheme(torch_names(1, "bn")),
    "hassony2": Scheme(torch_names(2, "batch3d")),
    "tensorflow": Scheme(tf_names(), convert=from_tf),
}

NETWORK = Network(I3D, SCHEMES, NORM_EPS)
PORTED_EPS = 1e-5  # VideoGPT, TATS and cd-fvd run the same weights with PyTorch's default eps
PORTED = Network(I3D, SCHEMES, PORTED_EPS)
