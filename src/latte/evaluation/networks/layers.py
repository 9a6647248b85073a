# SPDX-License-Identifier: Apache-2.0
"""The one layer all three networks are made of: a convolution with its frozen batch norm folded in, then ReLU.

The detectors are never trained here, so a norm is an affine map that the convolution can carry: half of the passes over memory go away,
and there is no training mode to forget. Activations are channels-last, which the pools and oneDNN's convolutions want.
Axes: b batch, c channels, ... one to three spatial axes (t h w for video, h w for frames), o output channels.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CONVOLUTIONS = {4: F.conv2d, 5: F.conv3d}
MEMORY_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


def public_convolve(
    x: Tensor, weight: Tensor, bias: Tensor, stride: Sequence[int], padding: Sequence[int]
) -> Tensor:
    """(b c ...) with weight (o c ...) and bias (o,) -> (b o ...), zeros around, by the kernel that torch chooses."""
    return CONVOLUTIONS[x.ndim](x, weight, bias, list(stride), list(padding))


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor, stride: Sequence[int], padding: Sequence[int]
) -> Tensor:
    """The same; on the CPU oneDNN is asked for by name.

    For one small clip torch falls back on an im2col kernel that loses the channels-last order; I3D takes about twice as long that way
    (benchmarks/i3d.py).
    """
    if x.device.type == "cpu" and torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled:
        return torch.ops.aten.mkldnn_convolution(
            x, weight, bias, list(padding), list(stride), [1] * len(stride), 1
        )
    return public_convolve(x, weight, bias, stride, padding)


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """Zeros before and after an axis of ``size`` under TensorFlow's SAME rule: ceil(size / stride) outputs, the odd zero behind."""
    total = max(kernel - (stride if size % stride == 0 else size % stride), 0)
    return total // 2, total - total // 2


def max_pool_same(x: Tensor, kernel: Sequence[int], stride: Sequence[int]) -> Tensor:
    """(b c t h w) -> maximum under the SAME rule with zeros outside. Only for x >= 0, where a zero outside never wins.

    Zeros behind only are windows that stick out, which ``ceil_mode`` cuts off; zeros on both sides are ``padding``.
    """
    before = [same_padding(size, k, s)[0] for size, k, s in zip(x.shape[2:], kernel, stride, strict=True)]
    return F.max_pool3d(x, list(kernel), list(stride), before, ceil_mode=True)


class Conv(nn.Module):
    """relu(conv(x) + bias), without the ReLU when ``relu`` is off. ``padding`` None is TensorFlow's SAME rule, else zeros per axis."""

    def __init__(
        self,
        c_in: int,
        c_out: int,
        kernel: Sequence[int],
        stride: Sequence[int] | None = None,
        padding: Sequence[int] | None = None,
        relu: bool = True,
    ):
        super().__init__()
        self.kernel, self.stride, self.padding, self.relu = (
            list(kernel),
            list(stride or [1] * len(kernel)),
            padding,
            relu,
        )
        self.weight = nn.Parameter(torch.zeros(c_out, c_in, *kernel), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(c_out), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """(b c ...) -> (b o ...)."""
        padding = self.padding
        if padding is None:
            pairs = [
                same_padding(size, k, s)
                for size, k, s in zip(x.shape[2:], self.kernel, self.stride, strict=True)
            ]
            padding = [before for before, _ in pairs]
            if any(before != after for before, after in pairs):
                x = F.pad(x, [amount for pair in reversed(pairs) for amount in pair])
                padding = [0] * len(pairs)
        y = convolve(x, self.weight, self.bias, self.stride, padding)
        return F.relu_(y) if self.relu else y


@dataclass(frozen=True)
class Scheme:
    """One public naming of a network's tensors.

    ``names``: public key -> ``layer.role``, None for a counter that nobody reads. Roles are weight and bias of a convolution or linear
    layer, and gain, shift, mean, var of the norm behind it. ``convert`` brings a public tensor into PyTorch's order of axes.
    """

    names: Mapping[str, str | None]
    convert: Callable[[Tensor], Tensor] = lambda tensor: tensor


@dataclass(frozen=True)
class Network:
    """How to make a network and to read its public weights: its class, its namings, and the eps of its norms."""

    build: Callable[[], nn.Module]
    schemes: Mapping[str, Scheme]
    eps: float


def fold_norms(tensors: Mapping[str, Tensor], eps: float) -> dict[str, Tensor]:
    """Tensors called ``layer.role`` -> the state dict of the folded network, float32, computed in float64.

    norm(y) = gain (y - mean) / sqrt(var + eps) + shift, so each output channel of a normed convolution is scaled and shifted once and for
    all. A missing gain is 1 (the TF graphs have none). Layers without a norm pass through.
    """
    folded = {
        name: tensor.float()
        for name, tensor in tensors.items()
        if not name.endswith((".gain", ".shift", ".mean", ".var"))
    }
    for layer in [name.removesuffix(".mean") for name in tensors if name.endswith(".mean")]:
        weight, shift, mean, var = (
            tensors[f"{layer}.{role}"].double() for role in ("weight", "shift", "mean", "var")
        )
        scale = tensors.get(f"{layer}.gain", torch.ones_like(mean)).double() / torch.sqrt(var + eps)
        folded[f"{layer}.weight"] = (weight * scale.reshape(-1, *[1] * (weight.ndim - 1))).float()
        folded[f"{layer}.bias"] = (shift - mean * scale).float()
    return folded


def channels_last(module: nn.Module) -> nn.Module:
    """Store every convolution weight of ``module`` in channels-last order (values and names unchanged); returns ``module``."""
    for parameter in module.parameters():
        if parameter.ndim in MEMORY_FORMATS:
            parameter.data = parameter.data.contiguous(memory_format=MEMORY_FORMATS[parameter.ndim])
    return module
