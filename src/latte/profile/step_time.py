# SPDX-License-Identifier: Apache-2.0
"""Seconds of a training step, from a few real ones on random latents: the codec and the reading of clips are not in it."""

import time
from statistics import median
from typing import Any

import torch

from latte.diffusion.loss import OBJECTIVES
from latte.diffusion.process import NoisePath
from latte.model.denoiser import Denoiser
from latte.runtime import generator, resolve_dtype
from latte.training.condition import Captions
from latte.training.config import TrainConfig
from latte.training.distributed import Group
from latte.training.optim import TrainState
from latte.training.step import Task, backward

MEASURED = 3


def step_seconds(
    model: Denoiser,
    process: NoisePath,
    objective: str,
    config: TrainConfig,
    share: int,
    device: torch.device,
    tokens: int = 1,
) -> float:
    """Median of MEASURED steps of one process with ``share`` clips, after one to warm up; ``model`` is trained a little.

    ``tokens`` are those of a text model's captions.

    The gradient of one micro batch is measured and counted as often as ``share`` needs it; AdamW and the average come once a step.
    """
    model.to(device).train()
    model.gradient_checkpointing = config.gradient_checkpointing
    learner = TrainState(model, config.lr, config.weight_decay, config.ema_decay)
    micro, shape = min(config.micro_batch or share, share), model.config
    task = Task(
        model,
        torch.compile(model) if config.compile else model,
        process,
        OBJECTIVES[objective],
        None,
        0,
        config.global_batch,
        None,
        device,
        resolve_dtype(config.dtype, device),
        config.num_images,
    )
    frames = shape.num_frames + config.num_images
    video = torch.randn(
        micro, frames, shape.latent_channels, *shape.grid_size, generator=generator("measure")
    )
    rows = (micro, 1 + config.num_images) if config.num_images else (micro,)
    told: Any = torch.zeros(rows, dtype=torch.long)
    if shape.reads_text:
        text, mask = torch.zeros(tokens, shape.caption_channels), torch.ones(tokens, dtype=torch.bool)
        told = Captions(text.expand(*rows, -1, -1), mask.expand(*rows, -1), text, mask, 0.1)
    seconds = []
    for step in range(1, 2 + MEASURED):
        start = now(device)
        losses = backward(task, step, range(micro), video, told)
        middle = now(device)
        learner.update(step, losses, config.lr, config.clip_norm, Group())
        seconds.append((middle - start) * share / micro + now(device) - middle)
    return median(seconds[1:])


def now(device: torch.device) -> float:
    """The clock, when the device has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()
