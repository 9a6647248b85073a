# SPDX-License-Identifier: Apache-2.0
"""The Inception-v3 of FID: the TensorFlow graph of 2015-12-05 with 1008 outputs (Szegedy et al. 2016; Heusel
et al. 2017).

It keeps torchvision's names and differs in its pools: averages do not count the padding, and the last block
takes a maximum where every other block takes an average. 94 convolutions with norms (eps 1e-3), which
``fold_norms`` of layers.py merges on loading.
Axes: b frames, c channels, h w size, k features.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latte.checks import choose
from latte.evaluation.networks.layers import Conv, Network, Scheme

NORM_EPS = 1e-3
Step = tuple[str, int, tuple[int, int], int]  # name, channels out, kernel, stride; stride 2 has no padding

STEM = (  # name, c_in, c_out, kernel, stride, padding; a 3x3/2 max pool follows 2b and 4a
    ("Conv2d_1a_3x3", 3, 32, 3, 2, 0),
    ("Conv2d_2a_3x3", 32, 32, 3, 1, 0),
    ("Conv2d_2b_3x3", 32, 64, 3, 1, 1),
    ("Conv2d_3b_1x1", 64, 80, 1, 1, 0),
    ("Conv2d_4a_3x3", 80, 192, 3, 1, 0),
)


def chain(name: str, *steps: tuple[int, tuple[int, int]], last_stride: int = 1) -> list[list[Step]]:
    """Return consecutive convolutions called name_1, name_2, ... (a single one is called ``name``)."""
    names = [name] if len(steps) == 1 else [f"{name}_{i}" for i in range(1, len(steps) + 1)]
    strides = [1] * (len(steps) - 1) + [last_stride]
    return [
        [(step_name, out, kernel, stride)]
        for step_name, (out, kernel), stride in zip(names, steps, strides, strict=True)
    ]


def fork(name: str, width: int) -> list[Step]:
    """Return a row and a column convolution of the same input, in parallel."""
    return [(f"{name}a", width, (1, 3), 1), (f"{name}b", width, (3, 1), 1)]


ONE, THREE, FIVE, ROW, COLUMN = (1, 1), (3, 3), (5, 5), (1, 7), (7, 1)


def block_a(pooled: int) -> list[list[list[Step]]]:
    """35 x 35: 1x1, 5x5, double 3x3, average pool."""
    double = chain("branch3x3dbl", (64, ONE), (96, THREE), (96, THREE))
    return [
        chain("branch1x1", (64, ONE)),
        chain("branch5x5", (48, ONE), (64, FIVE)),
        double,
        chain("branch_pool", (pooled, ONE)),
    ]


def block_b() -> list[list[list[Step]]]:
    """35 x 35 to 17 x 17."""
    double = chain("branch3x3dbl", (64, ONE), (96, THREE), (96, THREE), last_stride=2)
    return [chain("branch3x3", (384, THREE), last_stride=2), double, []]


def block_c(width: int) -> list[list[list[Step]]]:
    """17 x 17: 1x1, one 7x7 and two 7x7 in factors, average pool."""
    single = chain("branch7x7", (width, ONE), (width, ROW), (192, COLUMN))
    double = chain("branch7x7dbl", (width, ONE), (width, COLUMN), (width, ROW), (width, COLUMN), (192, ROW))
    return [chain("branch1x1", (192, ONE)), single, double, chain("branch_pool", (192, ONE))]


def block_d() -> list[list[list[Step]]]:
    """17 x 17 to 8 x 8."""
    seven = chain("branch7x7x3", (192, ONE), (192, ROW), (192, COLUMN), (192, THREE), last_stride=2)
    return [chain("branch3x3", (192, ONE), (320, THREE), last_stride=2), seven, []]


def block_e() -> list[list[list[Step]]]:
    """8 x 8: 1x1, forked 3x3, forked double 3x3, pool."""
    single = [[("branch3x3_1", 384, ONE, 1)], fork("branch3x3_2", 384)]
    double = [*chain("branch3x3dbl", (448, ONE), (384, THREE)), fork("branch3x3dbl_3", 384)]
    return [chain("branch1x1", (320, ONE)), single, double, chain("branch_pool", (192, ONE))]


BLOCKS = {  # name: channels in, branches (the last one begins with the pool), pool
    "Mixed_5b": (192, block_a(32), "average"),
    "Mixed_5c": (256, block_a(64), "average"),
    "Mixed_5d": (288, block_a(64), "average"),
    "Mixed_6a": (288, block_b(), "halve"),
    "Mixed_6b": (768, block_c(128), "average"),
    "Mixed_6c": (768, block_c(160), "average"),
    "Mixed_6d": (768, block_c(160), "average"),
    "Mixed_6e": (768, block_c(192), "average"),
    "Mixed_7a": (768, block_d(), "halve"),
    "Mixed_7b": (1280, block_e(), "average"),
    "Mixed_7c": (2048, block_e(), "maximum"),
}

POOLS = {
    "average": lambda x: F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False),
    "maximum": lambda x: F.max_pool2d(x, 3, stride=1, padding=1),
    "halve": lambda x: F.max_pool2d(x, 3, stride=2),
}


class Block(nn.Module):
    """Concatenate branches over one input on the channel axis; the last branch begins with a pool."""

    def __init__(self, c_in: int, branches: list[list[list[Step]]], pool: str):
        super().__init__()
        self.pool = POOLS[pool]
        self.branches = [[[name for name, *_ in step] for step in branch] for branch in branches]
        for branch in branches:
            width = c_in
            for step in branch:
                for name, out, kernel, stride in step:
                    padding = [k // 2 for k in kernel] if stride == 1 else [0, 0]
                    self.add_module(name, Conv(width, out, kernel, (stride, stride), padding))
                width = sum(out for _, out, *_ in step)

    def forward(self, x: Tensor) -> Tensor:
        """Map (b c h w) to (b o h' w')."""
        inputs = [x] * (len(self.branches) - 1) + [self.pool(x)]
        outputs = []
        for y, branch in zip(inputs, self.branches, strict=True):
            for step in branch:
                parts = [getattr(self, name)(y) for name in step]
                y = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
            outputs.append(y)
        return torch.cat(outputs, dim=1)


class Inception(nn.Module):
    """Map frames (b 3 299 299) scaled to (x - 128) / 128 to features (b k) of ``layer``.

    Layers: 'pool3' (2048, for FID) and 'logits' (1008, for IS, without the bias, as in the original Inception
    Score).
    """

    def __init__(self, num_classes: int = 1008):
        super().__init__()
        for name, c_in, c_out, k, stride, padding in STEM:
            self.add_module(name, Conv(c_in, c_out, (k, k), (stride, stride), (padding, padding)))
        for name, spec in BLOCKS.items():
            self.add_module(name, Block(*spec))
        self.fc = nn.Linear(2048, num_classes).requires_grad_(False)

    def forward(self, x: Tensor, layer: str = "pool3") -> Tensor:
        """Return the features (b k) of ``layer``."""
        head = choose(
            "layer",
            layer,
            {"pool3": lambda pooled: pooled, "logits": lambda pooled: F.linear(pooled, self.fc.weight)},
        )
        x = x.contiguous(memory_format=torch.channels_last)
        for name, *_ in STEM:
            x = getattr(self, name)(x)
            if name in ("Conv2d_2b_3x3", "Conv2d_4a_3x3"):
                x = F.max_pool2d(x, 3, stride=2)
        for name in BLOCKS:
            x = getattr(self, name)(x)
        return head(x.mean((2, 3)))


def public_names() -> dict[str, str | None]:
    """Return {public key: our key}: 94 convolutions with 6 tensors each, 2 of the last layer; 566 keys."""
    roles = {
        "bn.weight": "gain",
        "bn.bias": "shift",
        "bn.running_mean": "mean",
        "bn.running_var": "var",
        "conv.weight": "weight",
    }
    layers = [name for name, *_ in STEM]
    layers += [
        f"{block}.{name}"
        for block, spec in BLOCKS.items()
        for branch in spec[1]
        for step in branch
        for name, *_ in step
    ]
    names: dict[str, str | None] = {
        f"{layer}.{public}": f"{layer}.{role}" for layer in layers for public, role in roles.items()
    }
    names |= {f"{layer}.bn.num_batches_tracked": None for layer in layers}
    return names | {"fc.weight": "fc.weight", "fc.bias": "fc.bias"}


SCHEMES = {"pytorch-fid": Scheme(public_names())}

NETWORK = Network(Inception, SCHEMES, NORM_EPS)
