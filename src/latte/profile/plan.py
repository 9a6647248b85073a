# SPDX-License-Identifier: Apache-2.0
"""What a run costs before it runs: parameters, operations, memory, batches, disk, and on request the time.

Counting needs neither data nor weights. Only the number of epochs needs the data, if they exist.
"""

import math
import os
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from latte.autoencoder.config import compression_at
from latte.checks import check
from latte.config.run import RunConfig
from latte.data.buckets import check_world
from latte.data.datasets import Dataset, FolderDataset, build_dataset
from latte.data.hold_out import split
from latte.data.order import MixOrder, order_of
from latte.data.selection import bucket_table
from latte.diffusion.config import build_process
from latte.interop.lora import add_lora
from latte.model.denoiser import Denoiser
from latte.profile.fit import Verdict, judge
from latte.profile.flops import Cost, Table3, count, encoding_operations, table3
from latte.profile.kept import Counter
from latte.profile.memory import Activations, Adapt, States, activations, fresh, shards_of, states
from latte.profile.sampling_memory import staging
from latte.profile.step_time import step_seconds
from latte.runtime import FASTEST, memory_of, resolve_device, resolve_dtype, world_size
from latte.training.config import TrainConfig
from latte.training.step import with_dtype


@dataclass(frozen=True)
class Batch:
    """How the global batch is divided: processes x micro_batch x accumulation (the last micro batch may be
    smaller).
    """

    global_batch: int
    processes: int
    micro_batch: int
    accumulation: int
    clips_seen: int  # in the whole training
    clips: int | None  # of the dataset; None without data and for a mix
    epochs: float | None

    @property
    def share(self) -> int:
        """Clips per step of one process."""
        return self.global_batch // self.processes


@dataclass(frozen=True)
class Memory:
    """Bytes on each device in a training step, of what processes split its part; buffers of the codec and of
    kernels, and with fsdp and hsdp the gathered weights of two blocks, come on top.
    """

    weights: int
    gradients: int
    optimizer: int
    ema: int
    activations: int  # of one micro batch, with or without gradient checkpointing as configured
    total: int
    without_checkpointing: int  # activations of one micro batch
    with_checkpointing: int
    dtype: str  # of matrix products


@dataclass(frozen=True)
class Encoding:
    """What the codec makes of a clip, and what that costs."""

    frames: int  # of video
    latent_frames: int
    temporal_factor: int
    operations: int  # of encoding one clip, exact
    clip_bytes: int  # of one clip's latents in shards, float16


@dataclass(frozen=True)
class Disk:
    """Bytes of tensors in one checkpoint and in all that are kept; while one is saved, it comes on top."""

    checkpoint: int
    kept: int


@dataclass(frozen=True)
class Time:
    """Median seconds of a measured step, and hours of the whole run at that speed."""

    step_seconds: float
    hours: float
    device: str


@dataclass(frozen=True)
class Plan:
    """What a run costs. The fields are the keys of ``latte plan --json``."""

    parameters: int
    trainable: int  # parameters that training changes
    operations: int  # multiply-adds of one clip's forward pass, exact
    table3: (
        Table3 | None
    )  # parameters and operations counted as in the paper's Table 3; None for a text model
    latent: tuple[int, int, int, int]  # (frames, channels, height, width)
    tokens: int  # of one clip
    clips_seen: int  # steps x global batch
    memory: Memory
    batch: Batch
    disk: Disk
    time: Time | None  # None unless measured
    sampling: dict[str, Any]  # see latte.profile.sampling_memory
    encoding: Encoding
    buckets: list[dict[str, Any]]  # see latte.data.selection.bucket_table; [] without buckets
    mix: list[dict[str, Any]]  # see mix_rows; [] without data.mix
    verdict: Verdict  # whether a step fits into the memory at hand


def plan(
    config: RunConfig,
    device: str = "auto",
    processes: int | None = None,
    measure: bool = False,
    kept: bool = False,
    available: int | None = None,
) -> Plan:
    """Return what a run costs on ``processes`` devices like ``device`` (None: as many as torchrun started).

    ``measure`` trains a few steps on ``device``; without it the device need not exist, so a run on a GPU can
    be planned on a laptop. ``kept``: counts of an earlier plan come from the user's cache. ``available``:
    bytes of the device's memory, for the verdict; by default those of a device of that kind here. InputError
    for processes that cannot share the global batch and for existing data that do not fit.
    """
    model = config.network
    train = config.train
    planned_device = device_of(device, measure)
    available = available or memory_here(planned_device)
    if processes is None:
        processes = world_size()
    check_processes(train.global_batch, shares := train.shares(processes))
    check_world(train.global_batch, shares, config.buckets)
    if measure or planned_device.type == "cpu" or torch.cuda.is_available():
        train = with_dtype(train, model, planned_device)
    config = replace(config, train=train)
    dtype = dtype_of("auto", planned_device)
    counter = Counter(config, kept)
    stages = (model, config.codec, config.text, config.sample, planned_device, dtype)
    sampling = counter(dict, lambda: staging(*stages).facts(), *stages)
    cost = counter(Cost, lambda: count(model, config.text.tokens), model, config.text.tokens)
    trained = (train.optimizer, 1 + len(train.ema_widths))
    state = counter(States, lambda: states(model, adapters(config), *trained), model, config.lora, *trained)
    dataset = existing_data(config)
    batch = batches(config, shares, trained_on(config, dataset))
    parts = shards(config, processes)
    counted = partial(memory, config, state, planned_device, counter)
    held = counted(train, batch.micro_batch, parts)
    num_kept = min(train.keep_last, -(-train.steps // train.checkpoint_every))
    return Plan(
        parameters=cost.parameters,
        trainable=state.trainable,
        operations=cost.operations,
        table3=None if model.reads_text else counter(Table3, lambda: table3(config.model), config.model),
        latent=(model.num_frames, model.latent_channels, *model.grid_size),
        tokens=model.num_tokens,
        clips_seen=batch.clips_seen,
        memory=held,
        batch=batch,
        disk=Disk(state.checkpoint, num_kept * state.checkpoint),
        time=measured_time(config, batch, planned_device) if measure else None,
        sampling=sampling,
        encoding=counter(Encoding, lambda: encoding(config), model, config.codec, config.data),
        buckets=bucket_rows(config, dataset),
        mix=mix_rows(config, trained_on(config, dataset)),
        verdict=judge(train, batch, held, parts, planned_device, available, counted),
    )


def memory_here(device: torch.device) -> int | None:
    """Return the bytes of memory of ``device``; None for a GPU that this machine does not have."""
    if device.type == "cuda" and not torch.cuda.is_available():
        return None
    if device.type == "mps" and not torch.backends.mps.is_available():
        return None
    return memory_of(device)


def encoding(config: RunConfig) -> Encoding:
    """Return what the codec of ``config`` makes of a clip."""
    model = config.network
    frames = config.data.frames
    values = model.num_frames * model.latent_channels * math.prod(model.grid_size)
    return Encoding(
        frames=frames,
        latent_frames=model.num_frames,
        temporal_factor=compression_at(config.codec.name, config.codec.path).temporal_factor,
        operations=encoding_operations(config.codec, frames, config.data.size),
        clip_bytes=values * torch.float16.itemsize,
    )


def shards(config: RunConfig, processes: int) -> int:
    """Return among how many processes the states of training are split; InputError unless they divide."""
    train = config.train
    size = shards_of(
        train.parallel, processes, train.shard_size or int(os.environ.get("LOCAL_WORLD_SIZE", processes))
    )
    check(
        processes % size == 0,
        f"train.shard_size is {size}, but {processes} processes cannot be divided into groups of {size}; "
        f"give a divisor of {processes}, or another number of processes",
    )
    return size


def adapters(config: RunConfig) -> Adapt | None:
    """Return the function that adds the run's adapters to a model; None for a run without."""
    if not config.lora.rank:
        return None
    return lambda model: add_lora(model, config.lora)


def check_processes(global_batch: int, processes: int) -> None:
    """InputError unless ``processes`` can share the global batch evenly."""
    check(processes >= 1, f"--processes must be at least 1, got {processes}")
    check(
        global_batch % processes == 0,
        f"train.global_batch is {global_batch}, which {processes} processes cannot share evenly; "
        f"give a multiple of {processes}",
    )


def existing_data(config: RunConfig) -> Dataset | None:
    """Return the dataset of the run if its files are there, None otherwise and for procedural clips."""
    roots = [data.root for _, data in config.data.sets.values() if data.kind != "procedural"]
    if config.data.mix is None:
        roots = [config.data.root]
    if not all(root and Path(root).exists() for root in roots):
        return None
    return build_dataset(config.data, buckets=config.buckets)


def trained_on(config: RunConfig, dataset: Dataset | None) -> Dataset | None:
    """Return the dataset without what ``data.hold_out`` keeps away."""
    return None if dataset is None else split(dataset, config.data.hold_out)[0]


def bucket_rows(config: RunConfig, dataset: Dataset | None) -> list[dict[str, Any]]:
    """Return a row per bucket, with its clips if the data are there; [] without buckets."""
    if config.buckets is None:
        return []
    if isinstance(dataset, FolderDataset):
        return bucket_table(dataset.selection, config.train.global_batch)
    unknown = dict.fromkeys(("clips", "lost", "upscaled"))
    pairs = zip(config.buckets.shapes, config.buckets.batch_sizes(config.train.global_batch), strict=True)
    return [
        {"bucket": str(bucket), **unknown, "batch": size, "tokens": bucket.tokens} for bucket, size in pairs
    ]


def mix_rows(config: RunConfig, dataset: Dataset | None) -> list[dict[str, Any]]:
    """Return a row per set of clips of ``data.mix``: weight, share, clips, those seen in training, epochs.

    What needs the data is None without them. [] without a mix.
    """
    if config.data.mix is None:
        return []
    order = None
    if dataset is not None:
        order = order_of(dataset, config.run.seed, config.train.global_batch)
    sets = {name: part for name, (part, _) in config.data.sets.items() if not part.images}
    total = sum(part.weight for part in sets.values())
    rows = []
    for number, (name, part) in enumerate(sets.items()):
        row = {"set": name, "weight": part.weight, "share": part.weight / total}
        row |= dict.fromkeys(("clips", "clips_seen", "epochs"))
        if isinstance(order, MixOrder):
            clips = order.shares.sizes[number]
            seen = order.counts_before(config.train.steps)[number]
            row |= {"clips": clips, "clips_seen": seen, "epochs": seen / clips}
        rows.append(row)
    return rows


def batches(config: RunConfig, processes: int, dataset: Dataset | None) -> Batch:
    """Return how the global batch is divided, and how often training sees the data."""
    train = config.train
    share = train.global_batch // processes
    clips_seen = train.steps * train.global_batch
    micro_batch = min(train.micro_batch or share, share)
    clips = config.data.num_clips
    if dataset is not None and not config.data.mix:  # of a mix each set has epochs of its own
        clips = len(dataset)
        clips_seen = order_of(dataset, config.run.seed, train.global_batch).clips_before(train.steps)
    return Batch(
        global_batch=train.global_batch,
        processes=processes,
        micro_batch=micro_batch,
        accumulation=-(-share // micro_batch),
        clips_seen=clips_seen,
        clips=clips,
        epochs=clips_seen / clips if clips else None,
    )


def device_of(name: str, needed: bool) -> torch.device:
    """Return the device to plan for; InputError for an unknown one, or a missing one that is ``needed``."""
    if needed or name not in ("cuda", "mps"):
        return resolve_device(name)
    return torch.device(name)


def dtype_of(name: str, device: torch.device) -> torch.dtype:
    """Return ``resolve_dtype`` for a device that need not exist: a missing GPU is taken to have bfloat16."""
    if name in ("auto", FASTEST) and device.type == "cuda" and not torch.cuda.is_available():
        return torch.bfloat16
    return resolve_dtype(name, device)


def memory(
    config: RunConfig,
    state: States,
    device: torch.device,
    counter: Counter,
    train: TrainConfig,
    micro_batch: int,
    parts: int,
) -> Memory:
    """Return the memory of one training step with the settings ``train`` and the precision that it has on
    ``device``, where ``parts`` processes split ``state``.
    """
    state = state.split(parts)
    dtype = dtype_of(train.dtype, device)
    add_adapters = adapters(config)

    def adapt(model: Denoiser) -> None:
        if add_adapters:
            add_adapters(model)
        model.recompute(train.recompute)

    inputs = (config.network, micro_batch, train.num_images, dtype, config.text.tokens)
    stages = train.gradient_checkpointing or True
    adapted = (config.lora, train.recompute, stages)
    found = counter(Activations, lambda: activations(*inputs, adapt, stages), *inputs, *adapted)
    held = found.plain
    if train.gradient_checkpointing:
        held = found.checkpointed
    return Memory(
        weights=state.weights,
        gradients=state.gradients,
        optimizer=state.optimizer,
        ema=state.ema,
        activations=held,
        total=state.weights + state.gradients + state.optimizer + state.ema + held,
        without_checkpointing=found.plain,
        with_checkpointing=found.checkpointed,
        dtype=str(dtype).removeprefix("torch."),
    )


def measured_time(config: RunConfig, batch: Batch, device: torch.device) -> Time:
    """Train a few steps on random latents and return the time of a step and of the whole run."""
    seconds = step_seconds(
        fresh(config.network, adapters(config)),
        build_process(config.diffusion),
        config.diffusion.objective,
        config.train,
        share=batch.share,
        device=device,
        tokens=config.text.tokens,
    )
    return Time(seconds, seconds * config.train.steps / 3600, device.type)
