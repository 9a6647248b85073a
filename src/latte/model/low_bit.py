# SPDX-License-Identifier: Apache-2.0
"""Matrix products of the blocks in int8 or FP8 (W8A8): weights scaled per output channel, inputs per token.

y = (q_x q_w') s_x s_w + b with q = round(v / s) and s = max |v| / largest number, symmetric, computed at
every call. Attention, norms, modulation, embeddings and the last layer keep their precision. On a CPU the
tokens pass in portions that stay in its cache, an MLP as one.
Axes: r rows (tokens), k input features, o output features.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latte.checks import check
from latte.model.blocks import MLP, MLP_SLOT, Branch
from latte.model.conditioning import Modulation

PORTION = 256  # rows
MULTIPLE = 16  # of features, on a GPU
FEWEST_ROWS = 32  # of a product on a GPU
TINY = 1e-12  # the scale of a token of zeros
FP8_MAX = 448.0  # of float8_e4m3fn


class Int8Linear(nn.Module):
    """A linear layer in int8; only for inference."""

    name = "int8"

    weight: Tensor  # (k o) int8, columns contiguous
    scale: Tensor  # (1 o)
    bias: Tensor  # (o)

    def __init__(self, layer: nn.Linear):
        super().__init__()
        largest = layer.weight.detach().float().abs().amax(1, keepdim=True).clamp_min(TINY)  # (o 1)
        quantised = (layer.weight.detach().float() * (127 / largest)).round().to(torch.int8)  # (o k)
        self.register_buffer("weight", quantised.t())
        self.register_buffer("scale", (largest / 127).t().contiguous())
        self.register_buffer("bias", layer.bias.detach().float())

    def product(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Return float32 (r o) of rows (r k), in ``out`` if given."""
        x = x.float()
        largest = torch.maximum(x.amax(1, keepdim=True), -x.amin(1, keepdim=True)).clamp_min_(TINY)  # (r 1)
        rows = (x * (127 / largest)).round_().to(torch.int8)
        y = torch.ops.aten._int_mm(rows, self.weight).float().mul_(largest / 127)
        return torch.addcmul(self.bias, y, self.scale, out=y if out is None else out)

    def forward(self, x: Tensor) -> Tensor:
        """Return (... o) of (... k)."""
        return in_portions(self.product, x, len(self.bias))


class Fp8Linear(nn.Module):
    """A linear layer in FP8 (e4m3) on a GPU that has it; only for inference."""

    name = "fp8"

    weight: Tensor  # (k o) float8, columns contiguous
    scale: Tensor  # (1 o)
    bias: Tensor  # (o)

    def __init__(self, layer: nn.Linear):
        super().__init__()
        largest = layer.weight.detach().float().abs().amax(1, keepdim=True).clamp_min(TINY)  # (o 1)
        quantised = (layer.weight.detach().float() * (FP8_MAX / largest)).to(torch.float8_e4m3fn)
        self.register_buffer("weight", quantised.t())
        self.register_buffer("scale", (largest / FP8_MAX).t().contiguous())
        self.register_buffer("bias", layer.bias.detach().to(torch.bfloat16))

    def product(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Return bfloat16 (r o) of rows (r k); in ``out``, if given, in its dtype."""
        largest = x.abs().amax(1, keepdim=True).float().clamp_min(TINY)  # (r 1)
        rows = (x * (FP8_MAX / largest)).to(torch.float8_e4m3fn)
        y = torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage]
            rows, self.weight, scale_a=largest / FP8_MAX, scale_b=self.scale, out_dtype=torch.bfloat16
        )
        y = y + self.bias
        return y if out is None else out.copy_(y)

    def forward(self, x: Tensor) -> Tensor:
        """Return (... o) of (... k)."""
        return in_portions(self.product, x, len(self.bias))


class LowBitMLP(Branch):
    """An MLP of two low-bit layers, one portion of tokens after the other."""

    modulation_slot = MLP_SLOT

    def __init__(self, fc1: nn.Module, fc2: nn.Module):
        super().__init__()
        self.fc1: Any = fc1
        self.fc2: Any = fc2

    def product(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Return (r k) of rows (r k), in ``out`` if given."""
        return self.fc2.product(fast_gelu(self.fc1.product(x)), out)

    def forward(self, x: Tensor, images: bool = False) -> Tensor:
        """Return (b f n d) from tokens (b f n d)."""
        return in_portions(self.product, x, x.shape[-1])


def fast_gelu(x: Tensor) -> Tensor:
    """Return the tanh-GELU of x as x sigmoid(2 u), equal to rounding; on a CPU twice as fast."""
    if x.device.type != "cpu":
        return F.gelu(x, approximate="tanh")
    inner = torch.square(x).mul_(2 * 0.7978845608028654 * 0.044715).add_(2 * 0.7978845608028654).mul_(x)
    return inner.sigmoid_().mul_(x)


def in_portions(product: Callable[..., Tensor], x: Tensor, features: int) -> Tensor:
    """Return (... features) of (... k) from a function of rows, which also takes a place for its result: on a
    CPU of PORTION rows at a time.
    """
    rows = x.reshape(-1, x.shape[-1])  # (r k)
    count = len(rows)
    if x.device.type != "cpu":
        missing = max(FEWEST_ROWS - count, 0)
        return product(F.pad(rows, (0, 0, 0, missing)))[:count].view(*x.shape[:-1], features)
    y = torch.empty(count, features)
    for start in range(0, count, PORTION):
        product(rows[start : start + PORTION], y[start : start + PORTION])
    return y.view(*x.shape[:-1], features)


KINDS: dict[torch.dtype, type[Int8Linear] | type[Fp8Linear]] = {
    torch.int8: Int8Linear,
    torch.float8_e4m3fn: Fp8Linear,
}


def low_bit(model: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """Return a model like ``model`` whose blocks compute matrix products in ``dtype``, a key of KINDS, on
    ``device``.

    Everything else, hooks included, is shared with ``model``; low-bit weights are made now, so make it again
    when the weights have changed. InputError for a width that the products of a GPU do not take.
    """
    result = copy.copy(model)
    result._modules = {
        name: lowered(child, KINDS[dtype], device) if isinstance(child, nn.ModuleList) else child
        for name, child in model._modules.items()
    }
    return result


def lowered(module: nn.Module, kind: Any, device: torch.device) -> nn.Module:
    """Return ``module`` with low-bit linear layers, sharing every other part."""
    if isinstance(module, Modulation):
        return module
    if type(module) is nn.Linear:
        features = module.in_features, module.out_features
        check(
            device.type == "cpu" or all(count % MULTIPLE == 0 for count in features),
            f"dtype is {kind.name}, but a layer has {features[0]} and "
            f"{features[1]} features, and the GPU's products need multiples of {MULTIPLE}; use bf16 or fp32",
        )
        return kind(module).to(device)
    result = copy.copy(module)
    result._modules = {
        name: child if child is None else lowered(child, kind, device)
        for name, child in module._modules.items()
    }
    if type(module) is MLP:
        first, second = (result._modules[name] for name in ("fc1", "fc2"))
        return LowBitMLP(first, second)  # pyright: ignore[reportArgumentType]
    return result
