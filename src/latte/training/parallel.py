# SPDX-License-Identifier: Apache-2.0
"""How the processes of a run share its model: the forward pass that trains, and how gradients are summed.

An entry of ``PARALLELISMS`` prepares the model; what else a run keeps (EMA weights, optimizer state) follows
the model's parameters, which are ordinary tensors or, where each process holds a part, DTensors.
"""

import copy
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from latte.checkpoint.split import Rows
from latte.distributed import Group
from latte.model.denoiser import Denoiser
from latte.training.config import PARALLELISMS as PARALLELISMS
from latte.training.config import TrainConfig

BUCKET_MIB = 25  # gradients that are summed in one operation


class Parallelism(Protocol):
    """An entry of ``PARALLELISMS``, called with the model on its device and the same values everywhere.

    With one process it leaves the model as it is.
    """

    forward: Callable[..., Tensor]  # what stands for the model in a training step
    accumulate: Callable[[], AbstractContextManager[Any]]  # inside, backward may leave gradients unsummed
    loss_scale: float  # by which the loss is multiplied, so that gradients are summed, not averaged
    skeleton: nn.Module | None  # where weights are split: a second model without weights, for the EMA
    writers: int  # the first processes, which together hold everything once and save it

    def __init__(
        self, model: Denoiser, group: Group, config: TrainConfig, device: torch.device, dtype: torch.dtype
    ): ...


class Replicated:
    """Every process holds the whole model (DistributedDataParallel).

    Gradients are summed over the processes in buckets of BUCKET_MIB while the backward pass computes the
    others, once a step. torch averages them; a hook that sums would leave Python objects to gloo's threads,
    which hang when those are released as the process group ends.
    """

    skeleton = None
    writers = 1

    def __init__(
        self, model: Denoiser, group: Group, config: TrainConfig, device: torch.device, dtype: torch.dtype
    ):
        self.forward: Callable[..., Tensor] = model
        self.loss_scale = 1.0
        self.accumulate: Callable[[], AbstractContextManager[Any]] = nullcontext
        if group.size == 1:
            return
        with warnings.catch_warnings():  # torch 2.13 renames broadcast_buffers, which 2.11 needs
            warnings.simplefilter("ignore", FutureWarning)
            wrapped = DistributedDataParallel(
                model,
                broadcast_buffers=False,
                init_sync=False,  # the values are broadcast before
                bucket_cap_mb=BUCKET_MIB,
                gradient_as_bucket_view=True,  # no second copy of the gradients
            )
        self.forward = wrapped
        self.loss_scale = float(group.size)
        self.accumulate = wrapped.no_sync


def without_weights(model: nn.Module) -> nn.Module:
    """Return a copy of ``model`` whose parameters take no memory; buffers are copied."""
    empty = {id(weight): on_meta(weight) for weight in model.parameters()}
    return copy.deepcopy(model, empty).eval().requires_grad_(False)  # pyright: ignore[reportArgumentType]


def on_meta(weight: Tensor) -> nn.Parameter:
    """Return a parameter of the shape of ``weight``, without values."""
    return nn.Parameter(torch.empty(weight.shape, dtype=weight.dtype, device="meta"), requires_grad=False)


def local_part(tensor: Any) -> Tensor:
    """Return this process's part of a tensor that the processes split, any other as it is."""
    if hasattr(tensor, "to_local"):
        return tensor.to_local()
    return tensor


def whole(tensor: Any) -> Tensor:
    """Return all of a tensor that the processes split, any other as it is. All processes must call it."""
    if hasattr(tensor, "full_tensor"):
        return tensor.full_tensor()
    return tensor


def own_parts(tensors: Mapping[str, Any], rank: int) -> dict[str, Tensor]:
    """Return what process ``rank`` saves of ``tensors``: its rows of those that are split, in the first
    process also the others.
    """
    parts = {name: local_part(tensor) for name, tensor in tensors.items()}
    split = {name for name, tensor in tensors.items() if hasattr(tensor, "placements")}
    return {name: part for name, part in parts.items() if rank == 0 or (name in split and part.numel())}


def split_like(tensor: Tensor | Rows, like: Any) -> Tensor:
    """Return the whole ``tensor`` split as ``like`` is; as it is for an ordinary ``like``.

    Of ``Rows`` only those of this process are read.
    """
    if not hasattr(like, "placements"):
        return tensor.read() if isinstance(tensor, Rows) else tensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    mesh = like.device_mesh
    local = local_part(like)
    if not isinstance(tensor, Rows):
        return distribute_tensor(tensor.to(local.device), mesh, like.placements, src_data_rank=None)
    size = -(-tensor.shape[0] // mesh.size(-1))  # rows of a process, fewer in the last ones
    start = min(size * mesh.get_local_rank(-1), tensor.shape[0])
    part = tensor.read(start, start + local.shape[0]).to(local.device)
    return DTensor.from_local(
        part, mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
