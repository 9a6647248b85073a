# SPDX-License-Identifier: Apache-2.0
"""Memory that a model needs: nothing is computed, and nothing of that size is allocated.

Training: weights, gradients, AdamW's two moments and the EMA are float32, known by counting. What a forward
pass saves for the backward pass is observed through autograd, on the meta device: every saved tensor, each
storage once. Two things that devices do and meta does not are imitated: attention in one fused kernel, which
saves no attention matrix, and the reduced precision of ``torch.autocast`` (CUDA's rules). Inference saves
nothing: there ``LiveBytes`` counts tensors that are alive at the same time, on any device.
Axes: b batch, f clip frames, i images, h heads, l sequence, k head width.
"""

import weakref
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import astuple, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from latte.checks import choose
from latte.model.denoiser import CHECKPOINTED_BLOCKS, Denoiser, DenoiserConfig
from latte.tensors import without_memory
from latte.training.optim import OPTIMIZERS, trainable_parameters

FLOAT32 = 4  # bytes
# functions that autocast runs in reduced precision: matrix products
LOWERED = {F.linear, F.conv2d, F.conv3d, F.conv_transpose3d, F.scaled_dot_product_attention}
RAISED = {F.layer_norm}  # and in float32, on CUDA
Adapt = Callable[[Denoiser], None]
"""What a run does to a fresh model before training, such as freezing it and adding adapters."""


def shards_of(scheme: str, processes: int, shard_size: int | None = None) -> int:
    """Return among how many processes weights, gradients, EMA weights and optimizer state are split."""
    sizes = {"ddp": 1, "fsdp": processes, "hsdp": min(shard_size or processes, processes)}
    return choose("train.parallel", scheme, sizes)


@dataclass(frozen=True)
class States:
    """Bytes of the float32 tensors that exist for the whole training."""

    weights: int  # frozen ones included
    gradients: int
    optimizer: int  # AdamW's moments, and a step counter per tensor
    ema: int

    def split(self, processes: int) -> "States":
        """Return the part of one of ``processes`` that share all of it."""
        return States(*(-(-size // processes) for size in astuple(self)))

    @property
    def trainable(self) -> int:
        """Number of trainable parameters."""
        return self.gradients // FLOAT32

    @property
    def checkpoint(self) -> int:
        """Bytes of trainable weights, their EMA and the optimizer: what a checkpoint holds."""
        return self.gradients + self.optimizer + self.ema


@dataclass(frozen=True)
class Activations:
    """Bytes saved for the backward pass."""

    plain: int  # without gradient checkpointing
    kept: int  # with it: the inputs of the blocks
    recomputed: int  # with it: one block, or one pair, at a time on top

    @property
    def checkpointed(self) -> int:
        """The peak with gradient checkpointing."""
        return self.kept + self.recomputed


def fresh(config: DenoiserConfig, adapt: Adapt | None) -> Denoiser:
    """Return a fresh model, adapted, on torch's default device."""
    model = config.build()
    if adapt is not None:
        adapt(model)
    return model


def states(
    config: DenoiserConfig, adapt: Adapt | None = None, optimizer: str = "adamw", num_emas: int = 1
) -> States:
    """Return what training with ``optimizer``, a name in OPTIMIZERS, and EMAs holds beside activations."""
    with without_memory():
        model = fresh(config, adapt)
    weights = sum(parameter.numel() * FLOAT32 for parameter in model.parameters())
    trained = trainable_parameters(model)
    size = sum(parameter.numel() * FLOAT32 for parameter in trained.values())
    state_bytes = OPTIMIZERS[optimizer].state_bytes
    kept = sum(state_bytes(name, parameter.shape) for name, parameter in trained.items())
    return States(weights, size, kept, num_emas * size)


def activations(
    config: DenoiserConfig,
    clips: int,
    num_images: int = 0,
    dtype: torch.dtype = torch.float32,
    tokens: int = 1,
    adapt: Adapt | None = None,
    checkpointing: bool | str = True,
) -> Activations:
    """Return what a forward pass of ``clips`` clips with ``num_images`` images each saves, without gradient
    checkpointing and with ``checkpointing``.

    Matrix products are in ``dtype``. Weights do not count, their copies in ``dtype`` do; the objective's own
    tensors, of the latents' size, do not. ``tokens`` are those of a text model's caption, with its padding.
    """
    values: Any = config
    with without_memory():
        model = fresh(config, adapt)
        z = torch.empty(clips, values.num_frames + num_images, values.latent_channels, *values.grid_size)
        t = torch.zeros(clips, dtype=torch.long)
        condition = model.example_condition(clips, num_images, tokens)

    def forward() -> Tensor:
        return model(z, t, **condition, num_images=num_images)

    with OnDevice(dtype):
        plain, per_block = saved_bytes(model, forward)
    model.gradient_checkpointing = checkpointing
    with OnDevice(dtype):
        kept, _ = saved_bytes(model, forward)
    size = CHECKPOINTED_BLOCKS[checkpointing]
    recomputed = max(sum(per_block[start : start + size]) for start in range(0, len(per_block), size))
    return Activations(plain, kept, recomputed)


def saved_bytes(model: Denoiser, forward: Callable[[], Any]) -> tuple[int, list[int]]:
    """Return the bytes that ``forward()`` saves for backward beside the weights, in all and per block."""
    weights = [parameter.untyped_storage() for parameter in model.parameters()]
    weight_ids = {id(storage) for storage in weights}  # valid as long as ``weights`` holds the objects
    saved: dict[int, torch.UntypedStorage] = {}
    before = 0
    per_block: list[int] = []

    def total() -> int:
        return sum(storage.nbytes() for storage in saved.values())

    def save(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if id(storage) not in weight_ids:
            saved[id(storage)] = storage
        return tensor

    def enter(block: nn.Module, inputs: Any) -> None:
        nonlocal before
        before = total()

    def leave(block: nn.Module, inputs: Any, output: Any) -> None:
        per_block.append(total() - before)

    blocks: Any = model.blocks
    with ExitStack() as stack:
        for block in blocks:
            stack.callback(block.register_forward_pre_hook(enter).remove)
            stack.callback(block.register_forward_hook(leave).remove)
        stack.enter_context(saved_tensors_hooks(save, lambda tensor: tensor))
        output = forward()
    del output, weights
    return total(), per_block


class LiveBytes(TorchDispatchMode):
    """Counts the tensors made inside it: ``now``, bytes that are still alive, and ``peak``, their maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self.alive: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        inputs = storages((args, kwargs))
        for key, storage in storages(output).items():
            if key not in inputs and key not in self.alive:  # neither a view nor written in place
                self.count(key, storage)
        return output

    def count(self, key: int, storage: torch.UntypedStorage) -> None:
        """Add a storage's bytes until it is freed."""
        size = storage.nbytes()

        def freed(_: Any) -> None:
            self.now -= size
            del self.alive[key]

        self.alive[key] = weakref.ref(storage, freed)
        self.now += size
        self.peak = max(self.peak, self.now)


def storages(values: Any) -> dict[int, torch.UntypedStorage]:
    """Return the storages of all tensors in nested ``values``, each once."""
    found = [value.untyped_storage() for value in tree_leaves(values) if isinstance(value, Tensor)]
    return {storage._cdata: storage for storage in found}


class OnDevice(TorchFunctionMode):
    """Sends meta tensors through the kernels that a device would use, with matrix products in ``dtype``."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype
        self.copies: dict[int, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.dtype != torch.float32 and func in LOWERED | RAISED:
            dtype = torch.float32
            if func in LOWERED:
                dtype = self.dtype
            args = [self.cast(value, dtype) for value in args]
        if func is F.scaled_dot_product_attention:
            return FusedAttention.apply(*args[:3])
        return func(*args, **(kwargs or {}))

    def cast(self, value: Any, dtype: torch.dtype) -> Any:
        """Return a floating-point tensor in ``dtype``; a trainable weight is copied once, as in autocast."""
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype == dtype:
            return value
        if isinstance(value, nn.Parameter) and value.requires_grad:
            return self.copies.setdefault(id(value), value.to(dtype))
        return value.to(dtype)


class FusedAttention(torch.autograd.Function):
    """Flash attention as autograd sees it.

    One float32 logarithm per row is saved instead of the attention matrix; the output is laid out as (b l h
    k).
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return an empty (b h l k) of queries, keys and values (b h l k)."""
        out = torch.empty_like(q.transpose(1, 2), memory_format=torch.contiguous_format)  # (b l h k)
        out = out.transpose(1, 2)  # (b h l k)
        ctx.save_for_backward(q, k, v, out, torch.empty(q.shape[:-1], device=q.device))
        return out
