# SPDX-License-Identifier: Apache-2.0
"""Fully sharded training (torch's FSDP2): each process keeps a part of every weight, gradient, EMA weight and
optimizer state, and gathers a block's weights while it computes that block (Zhao et al. 2023, arXiv
2304.11277).
"""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard

from latte.checks import check
from latte.distributed import Group, limit_on
from latte.model.denoiser import Denoiser
from latte.training.config import TrainConfig
from latte.training.optim import OPTIMIZERS
from latte.training.parallel import without_weights


class Sharded:
    """FSDP: the weights are split over all processes.

    Blocks are gathered one by one, in ``dtype``; gradients are summed in float32 after every micro batch, so
    that no process ever holds all of them. InputError for what cannot be split.
    """

    def __init__(
        self, model: Denoiser, group: Group, config: TrainConfig, device: torch.device, dtype: torch.dtype
    ):
        self.forward: Callable[..., Tensor] = model
        self.loss_scale = 1.0
        self.accumulate: Callable[[], AbstractContextManager[Any]] = nullcontext
        self.skeleton: nn.Module | None = None
        self.writers = 1
        check_sharded(model, config, device)
        if group.size == 1:
            return
        self.skeleton = without_weights(model)
        mesh = self.mesh(group, config, device)
        self.writers = mesh.size(-1)
        options: dict[str, Any] = {"mesh": mesh}
        if config.cpu_offload:
            options["offload_policy"] = CPUOffloadPolicy()
        precision = MixedPrecisionPolicy()
        if dtype != torch.float32:  # the matrix products of blocks round weights to it in any case
            precision = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
        for block in model.blocks:
            fully_shard(block, mp_policy=precision, **options)
        fully_shard(model, **options)
        for module in model.modules():
            if isinstance(module, FSDPModule):  # the sum over processes in the place of their mean
                module.set_force_sum_reduction_for_comms(True)
                module.set_gradient_divide_factor(1.0)

    def mesh(self, group: Group, config: TrainConfig, device: torch.device) -> DeviceMesh:
        """Return the processes among which weights are split: all of them."""
        return init_device_mesh(device.type, (group.size,))


class HybridSharded(Sharded):
    """HSDP: the weights are split over ``train.shard_size`` processes (null: those of a machine), of whose
    groups each holds the whole model; gradients are summed over both.
    """

    def mesh(self, group: Group, config: TrainConfig, device: torch.device) -> DeviceMesh:
        """Return the processes as (groups, processes of a group); InputError when they do not divide."""
        size = config.shard_size or int(os.environ.get("LOCAL_WORLD_SIZE", group.size))
        check(
            group.size % size == 0,
            f"train.shard_size is {size}, but {group.size} processes cannot be divided into groups of "
            f"{size}; give a divisor of {group.size}, or another number of processes",
        )
        mesh = init_device_mesh(
            device.type, (group.size // size, size), mesh_dim_names=("replicas", "shards")
        )
        for part in mesh.get_all_groups():
            _set_pg_timeout(limit_on(device, group.timeout), part)
        return mesh


def check_sharded(model: Denoiser, config: TrainConfig, device: torch.device) -> None:
    """InputError for a model, an optimizer or a device whose training cannot be split."""
    name = f"train.parallel is {config.parallel}"
    check(
        all(weight.requires_grad for weight in model.parameters()),
        f"{name}, but adapters (lora.rank) are too small to be split; give train.parallel=ddp",
    )
    check(
        OPTIMIZERS[config.optimizer].elementwise,
        f"{name}, but train.optimizer={config.optimizer} needs whole matrices; give train.optimizer=adamw, "
        "or train.parallel=ddp",
    )
    check(not config.compile, f"{name}, which train.compile does not support; turn one off")
    check(
        not (config.cpu_offload and device.type == "cpu"),
        "train.cpu_offload keeps weights and optimizer state in main memory, where they are already with "
        "device cpu; leave it out",
    )
