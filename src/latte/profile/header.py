# SPDX-License-Identifier: Apache-2.0
"""What a run says before its first step, and how long it will take once some steps have been measured."""

import logging
import time

import torch

from latte.checks import duration
from latte.config.run import RunConfig
from latte.data.datasets import Dataset
from latte.files import size_text as size
from latte.model.denoiser import Denoiser
from latte.profile.kept import Counter
from latte.profile.memory import states
from latte.profile.plan import Batch, adapters, batches, memory, shards
from latte.runtime import resolve_dtype, threads_text, world_size
from latte.training.callbacks import Callback, TrainEvent

LOG = logging.getLogger(__name__)
MEASURED_STEPS = 5  # after a first one, which sets everything up
ENDLESS = 1 << 39  # clips of a procedural set without a limit


def header(
    config: RunConfig, model: Denoiser, dataset: Dataset, held_out: Dataset | None, device: torch.device
) -> list[str]:
    """Return the lines that a run begins with: where it computes, the model, the data, the batch, memory."""
    train = config.train
    network = config.network
    processes = world_size()
    batch = batches(config, train.shares(processes), dataset)
    state = states(network, adapters(config), train.optimizer, 1 + len(train.ema_widths))
    held = memory(config, state, device, Counter(), train, batch.micro_batch, shards(config, processes))
    dtype = str(resolve_dtype(train.dtype, device)).removeprefix("torch.")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    trained = f", {state.trainable:,} of them trained" if state.trainable != parameters else ""
    latent = " x ".join(map(str, (network.num_frames, network.latent_channels, *network.grid_size)))
    sharing = f"{batch.processes} processes"
    if train.sequence_parallel > 1:
        sharing = f"{batch.processes} groups of {train.sequence_parallel} processes"
    passes = f"{batch.micro_batch} clips x {batch.accumulation} accumulated x {sharing}"
    return [
        f"device: {device_name(device)}, {dtype}, processes: {processes}",
        f"model: {parameters:,} parameters{trained}",
        f"clips: {clips_text(dataset, held_out)}",
        f"clip: {config.data.frames} frames, latent {latent}, {network.num_tokens:,} tokens",
        f"batch: {train.global_batch} clips = {passes}; {train.steps:,} steps see {seen(batch)}",
        f"memory of a step: about {size(held.total)} a device ({size(held.activations)} of activations)",
    ]


def device_name(device: torch.device) -> str:
    """Return the name of a GPU, or the kind of another device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"cpu, {threads_text()}"
    return device.type


def clips_text(dataset: Dataset, held_out: Dataset | None) -> str:
    """Return how many clips there are to train on, and how many are held out."""
    parts = [part for part in (dataset, held_out) if part is not None]
    counts = ["unlimited" if len(part) > ENDLESS else f"{len(part):,}" for part in parts]
    return ", held out: ".join(counts)


def seen(batch: Batch) -> str:
    """Return how many clips a run sees, and how often each of a limited set."""
    if not batch.clips or batch.clips > ENDLESS:
        return f"{batch.clips_seen:,}"
    return f"{batch.clips_seen:,}, each {batch.clips_seen / batch.clips:,.1f} times"


class ExpectedTime(Callback):
    """Logs the time that the run will take, once, after MEASURED_STEPS steps."""

    def on_start(self, event: TrainEvent) -> None:
        """Count from the step that the run starts at."""
        self.first = event.step + 1
        self.since = 0.0

    def on_step(self, event: TrainEvent) -> None:
        """Measure the steps after the first."""
        done = event.step - self.first
        if done == 0:
            self.since = time.perf_counter()
        left = event.total_steps - event.step
        if done == MEASURED_STEPS and left > 0:
            per_step = (time.perf_counter() - self.since) / MEASURED_STEPS
            text = duration(per_step * left)
            LOG.info("expected time: %s for %s more steps, %.3g s each", text, f"{left:,}", per_step)
