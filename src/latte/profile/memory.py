# SPDX-License-Identifier: Apache-2.0
"""Memory that a model needs: nothing is computed, and nothing of that size is allocated.

Training: weights, gradients, AdamW's two moments and the average are float32, known by counting. What a
forward pass keeps for the backward pass is asked of autograd, on the meta device: every saved tensor, each
storage once. Two things that devices do and meta does not are done by hand: attention in one fused kernel,
which keeps no map, and the reduced precision of ``torch.autocast`` (CUDA's rules). Inference keeps nothing:
there ``LiveBytes`` counts what lives at the same time, on any device.
Axes: b batch, f clip frames, i stills, h heads, l sequence, k head width.
"""

import weakref
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from latte.model.denoiser import Denoiser, DenoiserConfig

FLOAT32 = 4
LOWERED = {
    F.linear,
    F.conv2d,
    F.conv3d,
    F.conv_transpose3d,
    F.scaled_dot_product_attention,
}  # autocast's matrix products
RAISED = {F.layer_norm}  # autocast on CUDA norms in float32
Adapt = Callable[[Denoiser], None]


@dataclass(frozen=True)
class States:
    """Bytes of the float32 tensors that live as long as training does.

    Frozen weights are in memory once and in no checkpoint.
    """

    weights: int
    gradients: int
    optimizer: int
    ema: int

    @property
    def trainable(self) -> int:
        """The number of parameters that training moves."""
        return self.gradients // FLOAT32

    @property
    def checkpoint(self) -> int:
        """What moves of the weights, its average, and the optimiser: what comes back into a resumed run."""
        return self.gradients + self.optimizer + self.ema


@dataclass(frozen=True)
class Activations:
    """Bytes kept for backward without checkpointing (``plain``); with it.

    ``kept``, and one block ``recomputed`` at a time.
    """

    plain: int
    kept: int
    recomputed: int

    @property
    def checkpointed(self) -> int:
        """The most that is held with gradient checkpointing."""
        return self.kept + self.recomputed


def fresh(config: DenoiserConfig, adapt: Adapt | None) -> Denoiser:
    """A fresh model, adapted, without storage if the context says so."""
    model = config.build()
    if adapt is not None:
        adapt(model)
    return model


def states(config: DenoiserConfig, adapt: Adapt | None = None) -> States:
    """What AdamW and the average hold beside the weights: two moments each, and a step counter per tensor.

    ``adapt`` is what a run does to the fresh model before it trains it, such as to freeze it and to add
    adapters.
    """
    with torch.device("meta"):
        parameters = list(fresh(config, adapt).parameters())
    weights = sum(parameter.numel() * FLOAT32 for parameter in parameters)
    sizes = [parameter.numel() * FLOAT32 for parameter in parameters if parameter.requires_grad]
    return States(weights, sum(sizes), 2 * sum(sizes) + FLOAT32 * len(sizes), sum(sizes))


def activations(
    config: DenoiserConfig,
    clips: int,
    num_images: int = 0,
    dtype: torch.dtype = torch.float32,
    tokens: int = 1,
    adapt: Adapt | None = None,
) -> Activations:
    """What one forward pass of ``clips`` clips with ``num_images`` stills each keeps, with matrix products in
    ``dtype``.

    The weights are not counted, their lowered copies are. The objective's own tensors, of the latents' size,
    are not among it. ``tokens`` are those of a text model's caption; ``adapt`` is as for ``states``.
    """
    with torch.device("meta"):
        model = fresh(config, adapt)
        z = torch.empty(clips, config.num_frames + num_images, config.latent_channels, *config.grid_size)
        t = torch.zeros(clips, dtype=torch.long)
        condition = model.example_condition(clips, num_images, tokens)

    def forward() -> Tensor:
        return model(z, t, **condition, num_images=num_images)

    with OnDevice(dtype):
        plain, of_blocks = saved_bytes(model, forward)
    model.gradient_checkpointing = True
    with OnDevice(dtype):
        kept, _ = saved_bytes(model, forward)
    return Activations(plain, kept, max(of_blocks))


def saved_bytes(model: Denoiser, forward: Callable[[], Any]) -> tuple[int, list[int]]:
    """Bytes that ``forward()`` saves for backward, beside the weights, and how many of them each call of a "
    "block adds."""
    own = {id(parameter.untyped_storage()) for parameter in model.parameters()}
    held = [
        parameter.untyped_storage() for parameter in model.parameters()
    ]  # an id means something while its object lives
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


class LiveBytes(TorchDispatchMode):
    """Inside it.

    ``now``, the bytes of all tensors made since and still alive, and ``peak``, the most that there were at a
    time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.alive: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        given = storages((args, kwargs))
        for key, storage in storages(output).items():
            if (
                key not in given and key not in self.alive
            ):  # a view, or what is written in place, is nothing new
                self.count(key, storage)
        return output

    def count(self, key: int, storage: torch.UntypedStorage) -> None:
        """Add a storage's bytes until it is gone."""
        size = storage.nbytes()

        def gone(_: Any) -> None:
            self.now -= size
            del self.alive[key]

        self.alive[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


def storages(values: Any) -> dict[int, torch.UntypedStorage]:
    """The storages of all tensors in nested ``values``, each once."""
    found = [value.untyped_storage() for value in tree_leaves(values) if isinstance(value, Tensor)]
    return {storage._cdata: storage for storage in found}


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
        """``value`` in ``dtype`` if it is a tensor.

        A weight that is trained is copied once, as autocast does.
        """
        if not (isinstance(value, nn.Parameter) and value.requires_grad):
            return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        return self.copies.setdefault(id(value), value.to(dtype)) if value.dtype != dtype else value


class Fused(torch.autograd.Function):
    """Flash attention as autograd sees it.

    The output lies as (b l h k), and a float32 logarithm per row stands for the map.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q k v (b h l k) -> an empty (b h l k)."""
        out = torch.empty_like(q.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
        ctx.save_for_backward(q, k, v, out, torch.empty(q.shape[:-1], device=q.device))
        return out
