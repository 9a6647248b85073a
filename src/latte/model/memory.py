# SPDX-License-Identifier: Apache-2.0
"""Memory that training a model needs: nothing is computed, and nothing of that size is allocated.

Weights, gradients, AdamW's two moments and the average are float32, known by counting. What a forward pass keeps for the backward pass is
asked of autograd, on the meta device: every saved tensor, each storage once. Two things that devices do and meta does not are done by hand:
attention in one fused kernel, which keeps no map, and the reduced precision of ``torch.autocast`` (CUDA's rules).
Axes: b batch, f clip frames, i stills, h heads, l sequence, k head width.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from latte.model.latte import ModelConfig
from latte.model.text import Network, TextConfig, network

FLOAT32 = 4
LOWERED = {F.linear, F.conv2d, F.conv3d, F.conv_transpose3d, F.scaled_dot_product_attention}  # autocast's matrix products
RAISED = {F.layer_norm}  # autocast on CUDA norms in float32


@dataclass(frozen=True)
class States:
    """Bytes of the float32 tensors that live as long as training does; ``checkpoint`` are those that it writes."""

    weights: int
    gradients: int
    optimizer: int
    ema: int

    @property
    def checkpoint(self) -> int:
        """Weights, average and optimiser: what comes back into a resumed run."""
        return self.weights + self.optimizer + self.ema


@dataclass(frozen=True)
class Activations:
    """Bytes kept for backward without checkpointing (``plain``); with it: ``kept``, and one block ``recomputed`` at a time."""

    plain: int
    kept: int
    recomputed: int

    @property
    def checkpointed(self) -> int:
        """The most that is held with gradient checkpointing."""
        return self.kept + self.recomputed


def states(config: ModelConfig | TextConfig) -> States:
    """What AdamW and the average hold beside the weights: two moments each, and a step counter per tensor."""
    with torch.device("meta"):
        sizes = [parameter.numel() * FLOAT32 for parameter in network(config).parameters()]
    return States(sum(sizes), sum(sizes), 2 * sum(sizes) + FLOAT32 * len(sizes), sum(sizes))


def activations(
    config: ModelConfig | TextConfig, clips: int, num_images: int = 0, dtype: torch.dtype = torch.float32, tokens: int = 1
) -> Activations:
    """What one forward pass of ``clips`` clips with ``num_images`` stills each keeps, with matrix products in ``dtype``.

    The weights are not counted, their lowered copies are. The objective's own tensors, of the latents' size, are not among it. ``tokens``
    are those of a text model's caption.
    """
    with torch.device("meta"):
        model = network(config)
        z = torch.empty(clips, config.num_frames + num_images, config.latent_channels, *config.grid_size)
        t, rows = torch.zeros(clips, dtype=torch.long), (clips, 1 + num_images) if num_images else (clips,)
        if isinstance(config, TextConfig):
            told = torch.empty(*rows, tokens, config.caption_channels), torch.ones(*rows, tokens, dtype=torch.bool)
        else:
            told = (None if config.num_classes is None else torch.zeros(rows, dtype=torch.long),)
    with OnDevice(dtype):
        plain, of_blocks = saved_bytes(model, lambda: model(z, t, *told, num_images))
    model.gradient_checkpointing = True
    with OnDevice(dtype):
        kept, _ = saved_bytes(model, lambda: model(z, t, *told, num_images))
    return Activations(plain, kept, max(of_blocks))


def saved_bytes(model: Network, forward: Callable[[], Any]) -> tuple[int, list[int]]:
    """Bytes that ``forward()`` saves for backward, beside the weights, and how many of them each call of a block adds."""
    own = {id(parameter.untyped_storage()) for parameter in model.parameters()}
    held = [parameter.untyped_storage() for parameter in model.parameters()]  # an id means something while its object lives
    found: dict[int, torch.UntypedStorage] = {}
    before, of_blocks = 0, []

    def total() -> int:
        return sum(storage.nbytes() for storage in found.values())

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if id(storage) not in own:
            found[id(storage)] = storage
        return tensor

    def enter(block: nn.Module, inputs: Any) -> None:
        nonlocal before
        before = total()

    def leave(block: nn.Module, inputs: Any, output: Any) -> None:
        of_blocks.append(total() - before)

    with ExitStack() as stack:
        for block in model.blocks:
            stack.callback(block.register_forward_pre_hook(enter).remove)
            stack.callback(block.register_forward_hook(leave).remove)
        stack.enter_context(saved_tensors_hooks(keep, lambda tensor: tensor))
        output = forward()
    del output, held
    return total(), of_blocks


class OnDevice(TorchFunctionMode):
    """Meta tensors go through the kernels that a device would take, with matrix products in ``dtype``."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype, self.copies = dtype, {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.dtype != torch.float32 and func in LOWERED | RAISED:
            args = [self.cast(value, self.dtype if func in LOWERED else torch.float32) for value in args]
        if func is F.scaled_dot_product_attention:
            return Fused.apply(*args[:3])
        return func(*args, **(kwargs or {}))

    def cast(self, value: Any, dtype: torch.dtype) -> Any:
        """``value`` in ``dtype`` if it is a tensor; a weight is copied once, as autocast does."""
        if not isinstance(value, nn.Parameter):
            return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        return self.copies.setdefault(id(value), value.to(dtype)) if value.dtype != dtype else value


class Fused(torch.autograd.Function):
    """Flash attention as autograd sees it: the output lies as (b l h k), and a float32 logarithm per row stands for the map."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q k v (b h l k) -> an empty (b h l k)."""
        out = torch.empty_like(q.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
        ctx.save_for_backward(q, k, v, out, torch.empty(q.shape[:-1], device=q.device))
        return out
