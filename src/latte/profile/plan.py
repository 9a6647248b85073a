# SPDX-License-Identifier: Apache-2.0
"""What a run costs, before it runs: parameters and operations, memory, batches, disk, and on request the time, from a few real steps.

Counting needs neither data nor weights; only the number of epochs looks at the data, if they are there.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from latte.checks import require
from latte.config.run import RunConfig
from latte.data.datasets import build_dataset
from latte.diffusion.config import build_process
from latte.interop.lora import add_lora
from latte.profile.flops import Table3, count, table3
from latte.profile.memory import Adapt, activations, fresh, states
from latte.profile.sampling_memory import staging
from latte.profile.step_time import step_seconds
from latte.runtime import resolve_device, resolve_dtype, world_size
from latte.training.config import TrainConfig


@dataclass(frozen=True)
class Batch:
    """``global_batch`` = processes x micro_batch x accumulation (the last micro batch may be smaller); ``epochs`` None without data."""

    global_batch: int
    processes: int
    micro_batch: int
    accumulation: int
    clips_seen: int
    clips: int | None
    epochs: float | None

    @property
    def share(self) -> int:
        """Clips per step of one process."""
        return self.global_batch // self.processes


@dataclass(frozen=True)
class Memory:
    """Bytes on each device in a training step, ``activations`` as configured; the codec's own and the kernels' buffers come on top.

    ``without_checkpointing`` and ``with_checkpointing`` are the activations of one micro batch both ways, ``dtype`` that of the matrix
    products.
    """

    weights: int
    gradients: int
    optimizer: int
    ema: int
    activations: int
    total: int
    without_checkpointing: int
    with_checkpointing: int
    dtype: str


@dataclass(frozen=True)
class Disk:
    """Bytes of tensors in one checkpoint, and in all that are kept; while one is saved, it comes on top."""

    checkpoint: int
    kept: int


@dataclass(frozen=True)
class Time:
    """Median seconds of a measured step, and hours of the whole run at that pace."""

    step_seconds: float
    hours: float
    device: str


@dataclass(frozen=True)
class Plan:
    """``operations`` are those of one clip's forward pass, exact; ``table3`` counts both as the paper did.

    ``table3`` is None for a text model, of which Table 3 has none. ``trainable`` are the parameters that training moves. ``latent`` is
    (frames, channels, height, width); ``tokens`` those of one clip; ``clips_seen`` steps x global batch; ``time`` is None unless it was
    measured. ``sampling`` is what drawing clips holds, see ``latte.profile.sampling_memory``.
    """

    parameters: int
    trainable: int
    operations: int
    table3: Table3 | None
    latent: tuple[int, int, int, int]
    tokens: int
    clips_seen: int
    memory: Memory
    batch: Batch
    disk: Disk
    time: Time | None
    sampling: dict[str, Any]


def plan(
    config: RunConfig, device: str = "auto", processes: int | None = None, measure: bool = False
) -> Plan:
    """What a run costs on ``processes`` devices like ``device`` (None: as many as there are now).

    ``measure`` trains three steps on ``device``, which otherwise need not be here: a GPU is planned for on a laptop. InputError for
    processes that cannot share the global batch, and for data that exist but do not fit.
    """
    model, where = config.network, device_of(device, measure)
    cost = count(model, config.text.tokens)
    counted = None if model.reads_text else table3(config.model)
    latent = (model.num_frames, model.latent_channels, *model.grid_size)
    batch, held = (
        batches(config, world_size() if processes is None else processes),
        states(model, adapters(config), config.train.optimizer),
    )
    kept, time = min(config.train.keep_last, -(-config.train.steps // config.train.checkpoint_every)), None
    if measure:
        objective = config.diffusion.objective
        process = build_process(config.diffusion)
        seconds = step_seconds(
            fresh(model, adapters(config)),
            process,
            objective,
            config.train,
            batch.share,
            where,
            config.text.tokens,
        )
        time = Time(seconds, seconds * config.train.steps / 3600, where.type)
    sampling = staging(
        model, config.codec, config.text, config.sample, where, dtype_of("auto", where)
    ).facts()
    return Plan(
        cost.parameters,
        held.trainable,
        cost.operations,
        counted,
        latent,
        model.num_tokens,
        batch.clips_seen,
        memory(config, batch, where),
        batch,
        Disk(held.checkpoint, kept * held.checkpoint),
        time,
        sampling,
    )


def adapters(config: RunConfig) -> Adapt | None:
    """What a run of adapters does to a fresh model; None for any other run."""
    return (lambda model: add_lora(model, config.lora)) if config.lora.rank else None


def batches(config: RunConfig, processes: int) -> Batch:
    """How the global batch is divided, and how often the data are seen."""
    train: TrainConfig = config.train
    require(processes >= 1, "processes", processes, "it counts devices", "give 1 or more")
    require(
        train.global_batch % processes == 0,
        "train.global_batch",
        train.global_batch,
        f"{processes} processes share it evenly",
        f"give a multiple of {processes}",
    )
    share, seen = train.global_batch // processes, train.steps * train.global_batch
    micro = min(train.micro_batch or share, share)
    there = config.data.root is not None and Path(config.data.root).exists()
    clips = len(build_dataset(config.data)) if there else config.data.num_clips
    return Batch(
        train.global_batch, processes, micro, -(-share // micro), seen, clips, seen / clips if clips else None
    )


def device_of(name: str, needed: bool) -> torch.device:
    """The device to plan for; InputError for one that does not exist, and if it is ``needed`` for one that is not here."""
    if needed or name not in ("cuda", "mps"):
        return resolve_device(name)
    return torch.device(name)


def dtype_of(name: str, device: torch.device) -> torch.dtype:
    """``resolve_dtype`` for a device that need not be here: a GPU is taken for one that has bfloat16."""
    absent = device.type == "cuda" and not torch.cuda.is_available()
    return torch.bfloat16 if absent and name == "auto" else resolve_dtype(name, device)


def memory(config: RunConfig, batch: Batch, device: torch.device) -> Memory:
    """Memory of one training step with the precision that it has on ``device``."""
    train, dtype = config.train, dtype_of(config.train.dtype, device)
    held = states(config.network, adapters(config), config.train.optimizer)
    found = activations(
        config.network, batch.micro_batch, train.num_images, dtype, config.text.tokens, adapters(config)
    )
    mine = found.checkpointed if train.gradient_checkpointing else found.plain
    total = held.weights + held.gradients + held.optimizer + held.ema + mine
    return Memory(
        held.weights,
        held.gradients,
        held.optimizer,
        held.ema,
        mine,
        total,
        found.plain,
        found.checkpointed,
        str(dtype).removeprefix("torch."),
    )
