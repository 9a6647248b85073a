# SPDX-License-Identifier: Apache-2.0
"""Residual branches that keep less for the backward pass: what is cheap is computed again there.

Norm, modulation and GELU are recomputed from their inputs, and the gradient of a gate needs no branch output:
with y = a W' + b and the gradient D of x + gate * y, sum_t D y = rowsum((D' a) * W) + b * sum_t D, where D' a
also gives the gradient of W. So a block saves 10 instead of 20 times its tokens. The forward pass runs the
same operations as the block without it, and returns the same bits; gradients agree to rounding.
Axes: b batch, f frames (or images), n tokens of a frame, d width, k input features of the last linear layer.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint


class Modulated(NamedTuple):
    """norm(x) * (1 + scale) + shift, not yet computed: tokens x (b f n d), shift and scale (b f|1 1 d)."""

    x: Tensor
    shift: Tensor
    scale: Tensor
    eps: float

    @property
    def shape(self) -> torch.Size:
        """That of the tokens."""
        return self.x.shape


def is_plain(layer: nn.Module) -> bool:
    """Return whether ``layer`` is a linear layer without adapters, int8 weights or hooks of its own."""
    return type(layer) is nn.Linear and not layer._forward_hooks and not layer._forward_pre_hooks


def product_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype that a matrix product of x has here: autocast's, or its own."""
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return x.dtype


def without_autocast(x: Tensor) -> AbstractContextManager:
    """Inside, every operation has the dtypes that it is given."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


def again(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``function``, to be computed again in the backward pass.

    For modulations, whose product takes no time: under autocast they would keep copies of their weights.
    """
    if not torch.is_grad_enabled():
        return function
    return partial(checkpoint, function, use_reentrant=False, preserve_rng_state=False)


def modulated_linear(layer: nn.Module, tokens: Modulated) -> Tensor:
    """Return layer(norm(x) * (1 + scale) + shift), (b f n out); saves x instead of three tensors."""
    assert isinstance(layer, nn.Linear)
    return ModulatedLinear.apply(*tokens, layer.weight, layer.bias, product_dtype(tokens.x))


def gated_linear(x: Tensor, gate: Tensor, layer: nn.Module, a: Tensor, gelu: bool) -> Tensor:
    """Return x + gate * layer(a), or of layer(gelu(a)), (b f n d); saves a and neither GELU nor product.

    x (b f n d), gate (b f|1 1 d), a (b f n k).
    """
    assert isinstance(layer, nn.Linear)
    return GatedLinear.apply(x, gate, a, layer.weight, layer.bias, gelu, product_dtype(x))


class ModulatedLinear(Function):
    """See ``modulated_linear``."""

    @staticmethod
    def forward(ctx: Any, x, shift, scale, eps, weight, bias, dtype) -> Tensor:
        """Return the product (b f n out) in ``dtype``."""
        with without_autocast(x):
            normed, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], None, None, eps)
            y = torch.addcmul(shift, normed, 1 + scale).to(dtype)
            ctx.save_for_backward(x, shift, scale, weight, mean, rstd)
            ctx.eps = eps
            ctx.dtype = dtype
            return F.linear(y, weight.to(dtype), bias.to(dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, shift, scale, weight and bias."""
        x, shift, scale, weight, mean, rstd = ctx.saved_tensors
        rows = grad.flatten(0, -2)  # (bfn out)
        grad_y = (rows @ weight.to(ctx.dtype)).view(x.shape).to(x.dtype)  # (b f n d)
        normed = torch.native_layer_norm(x, x.shape[-1:], None, None, ctx.eps)[0]
        grad_weight = grad_bias = None
        if ctx.needs_input_grad[4]:
            y = torch.addcmul(shift, normed, 1 + scale).to(ctx.dtype)  # (b f n d)
            grad_weight = (rows.mT @ y.flatten(0, -2)).to(weight.dtype)  # (out d)
            grad_bias = rows.sum(0).to(weight.dtype)
        grad_scale = normed.mul_(grad_y).sum_to_size(scale.shape)
        grad_shift = grad_y.sum_to_size(shift.shape)
        grad_x = torch.ops.aten.native_layer_norm_backward(
            grad_y.mul_(1 + scale), x, x.shape[-1:], mean, rstd, None, None, [True, False, False]
        )[0]
        return grad_x, grad_shift, grad_scale, None, grad_weight, grad_bias, None


class GatedLinear(Function):
    """See ``gated_linear``."""

    @staticmethod
    def forward(ctx: Any, x, gate, a, weight, bias, gelu, dtype) -> Tensor:
        """Return the tokens (b f n d)."""
        with without_autocast(x):
            ctx.save_for_backward(gate, a, weight, bias)
            ctx.gelu = gelu
            ctx.dtype = dtype
            inner = activated(a, gelu).to(dtype)
            y = F.linear(inner, weight.to(dtype), bias.to(dtype))
            return torch.addcmul(x, gate, y.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, gate, a, weight and bias."""
        gate, a, weight, bias = ctx.saved_tensors
        inner = activated(a, ctx.gelu).to(ctx.dtype)
        gates = gate.expand(len(grad), -1, -1, -1).flatten(0, -2)  # (g d), a clip or an image each
        outer = grad.to(ctx.dtype).reshape(len(gates), -1, grad.shape[-1])  # (g t d)
        inner = inner.reshape(len(gates), -1, inner.shape[-1])  # (g t k)
        grad_weight = torch.zeros_like(weight)
        grad_gates = torch.empty_like(gates)
        sums = outer.sum(1).to(weight.dtype)  # (g d)
        for row, (of_outer, of_inner) in enumerate(zip(outer, inner, strict=True)):
            product = (of_outer.mT @ of_inner).to(weight.dtype)  # (d k)
            grad_weight.addcmul_(gates[row][:, None], product)
            grad_gates[row] = product.mul_(weight).sum(1)
        grad_gate = (grad_gates + bias * sums).view(len(grad), *gate.shape[1:]).sum_to_size(gate.shape)
        grad_a = (grad * gate).to(ctx.dtype).flatten(0, -2) @ weight.to(ctx.dtype)  # (bfn k)
        grad_a = grad_a.view(a.shape).to(a.dtype)
        if ctx.gelu:
            grad_a = torch.ops.aten.gelu_backward(grad_a, a, approximate="tanh")
        grad_bias = (gates * sums).sum(0)
        return grad, grad_gate, grad_a, grad_weight, grad_bias, None, None


def activated(a: Tensor, gelu: bool) -> Tensor:
    """Return a, or the tanh-GELU of it."""
    return F.gelu(a, approximate="tanh") if gelu else a
