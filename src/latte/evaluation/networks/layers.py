# SPDX-License-Identifier: Apache-2.0
"""The layer of all public networks: a convolution with its frozen batch norm merged, then ReLU.

The detectors are never trained here, so a norm is an affine map that is merged into the convolution: this
saves half of the passes over memory, and there is no training mode to forget. Activations are channels-last,
the fastest order for pools and oneDNN.
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
    """Convolve (b c ...) with weight (o c ...) to (b o ...), zero padding, by torch's choice of kernel."""
    return CONVOLUTIONS[x.ndim](x, weight, bias, list(stride), list(padding))


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor, stride: Sequence[int], padding: Sequence[int]
) -> Tensor:
    """Do the same, with oneDNN selected explicitly on the CPU.

    For one small clip torch falls back to an im2col kernel that loses the channels-last order, which makes
    I3D about twice as slow (benchmarks/i3d.py).
    """
    if x.device.type == "cpu" and torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled:
        return torch.ops.aten.mkldnn_convolution(
            x, weight, bias, list(padding), list(stride), [1] * len(stride), 1
        )
    return public_convolve(x, weight, bias, stride, padding)


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """Return the zeros before and after an axis under TensorFlow's SAME rule; an odd zero goes last."""
    total = max(kernel - (size % stride or stride), 0)
    return total // 2, total - total // 2


def max_pool_same(x: Tensor, kernel: Sequence[int], stride: Sequence[int]) -> Tensor:
    """Max-pool (b c t h w) under the SAME rule with zero padding, which is correct for x >= 0 only.

    Padding at the end alone is done by ``ceil_mode``, padding on both sides by ``padding``.
    """
    before = [same_padding(size, k, s)[0] for size, k, s in zip(x.shape[2:], kernel, stride, strict=True)]
    return F.max_pool3d(x, list(kernel), list(stride), before, ceil_mode=True)


class Conv(nn.Module):
    """relu(conv(x) + bias), ReLU optional. ``padding`` None: the SAME rule; else zeros per axis."""

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
        self.stride = list(stride or [1] * len(kernel))
        self.kernel = list(kernel)
        self.padding = padding
        self.relu = relu
        self.weight = nn.Parameter(torch.zeros(c_out, c_in, *kernel), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(c_out), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (b c ...) to (b o ...)."""
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
        if self.relu:
            F.relu_(y)
        return y


@dataclass(frozen=True)
class Scheme:
    """One public naming of a network's tensors.

    ``names``: {public key: ``layer.role``}, None for an unused counter. Roles are weight and bias of a
    convolution or linear layer, and gain, shift, mean, var of the norm after it. ``convert`` permutes a
    public tensor to PyTorch's order of axes.
    """

    names: Mapping[str, str | None]
    convert: Callable[[Tensor], Tensor] = lambda tensor: tensor


@dataclass(frozen=True)
class Network:
    """How to build a network and read its public weights: its class, its namings, the eps of its norms."""

    build: Callable[[], nn.Module]
    schemes: Mapping[str, Scheme]
    eps: float


def fold_norms(tensors: Mapping[str, Tensor], eps: float) -> dict[str, Tensor]:
    """Merge norms into convolutions: {``layer.role``: tensor} to a float32 state dict, computed in float64.

    norm(y) = gain (y - mean) / sqrt(var + eps) + shift, so each output channel of the convolution is scaled
    and shifted once. A missing gain is 1 (the TF graphs have none). Layers without a norm are unchanged.
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
    """Store every convolution weight of ``module`` in channels-last order (values and names unchanged);
    return ``module``.
    """
    for parameter in module.parameters():
        if parameter.ndim in MEMORY_FORMATS:
            parameter.data = parameter.data.contiguous(memory_format=MEMORY_FORMATS[parameter.ndim])
    return module
