# SPDX-License-Identifier: Apache-2.0
"""Time of a training step from a few real ones on random latents, without the codec and without loading
clips.

Axes: b clips, f frames, c channels, h w latent size, l tokens of a caption, k its channels.
"""

import time
from statistics import median
from typing import Any

import torch

from latte.diffusion.loss import OBJECTIVES
from latte.diffusion.process import NoisePath
from latte.distributed import Group
from latte.model.denoiser import Denoiser, condition_shape
from latte.runtime import generator, resolve_dtype
from latte.training.condition import Captions
from latte.training.config import TrainConfig
from latte.training.optim import TrainState
from latte.training.step import Task, backward, set_up_blocks, step_options

MEASURED = 3  # steps, after one to warm up


class TrainingStep:
    """A step of ``clips`` clips on random latents: ``update(gradient())``; ``model`` is trained a little.

    ``tokens`` is the length of captions of a text model.
    """

    def __init__(
        self,
        model: Denoiser,
        process: NoisePath,
        objective: str,
        config: TrainConfig,
        clips: int,
        device: torch.device,
        tokens: int = 1,
    ):
        model.to(device).train()
        set_up_blocks(model, config, device)
        self.config = config
        self.clips = clips
        self.device = device
        self.state = TrainState(
            model,
            lr=config.lr,
            weight_decay=config.weight_decay,
            ema_decay=config.ema_decay,
            ema_widths=config.ema_widths,
            optimizer=config.optimizer,
        )
        self.task = Task(
            model=model,
            forward=model,
            process=process,
            objective=OBJECTIVES[objective],
            codec=None,
            seed=0,
            global_batch=config.global_batch,
            micro_batch=None,
            device=device,
            dtype=resolve_dtype(config.dtype, device),
            num_images=config.num_images,
            options=step_options(config),
        )
        shape = model.config
        num_frames = shape.num_frames + config.num_images
        size = (clips, num_frames, shape.latent_channels, *shape.grid_size)
        self.video = torch.randn(size, generator=generator("measure"))  # (b f c h w)
        self.condition = example_condition(model, clips, config.num_images, tokens)
        self.steps = 0

    def gradient(self) -> torch.Tensor:
        """Add the gradient of the clips to the model's; return their loss terms (3,)."""
        self.steps += 1
        return backward(self.task, self.steps, range(self.clips), self.video, self.condition)

    def update(self, losses: torch.Tensor) -> None:
        """Clip the gradient, update weights and EMA weights."""
        self.state.update(self.steps, losses, self.config.lr, self.config.clip_norm, Group())


def step_seconds(
    model: Denoiser,
    process: NoisePath,
    objective: str,
    config: TrainConfig,
    share: int,
    device: torch.device,
    tokens: int = 1,
) -> float:
    """Return the median seconds of a step of one process with ``share`` clips; ``model`` is trained a little.

    The gradient of one micro batch is measured and counted as often as ``share`` needs it; the optimizer and
    the EMA weights are updated once a step. ``tokens`` is the length of captions of a text model.
    """
    micro_batch = min(config.micro_batch or share, share)
    measured = TrainingStep(model, process, objective, config, micro_batch, device, tokens)
    seconds = []
    for _ in range(1 + MEASURED):
        start = now(device)
        losses = measured.gradient()
        middle = now(device)
        measured.update(losses)
        seconds.append((middle - start) * share / micro_batch + now(device) - middle)
    return median(seconds[1:])


def example_condition(model: Denoiser, clips: int, num_images: int, tokens: int) -> Any:
    """Return labels (b) or captions (b l k) of a batch, with images (b 1+i) or (b 1+i l k)."""
    rows = condition_shape(clips, num_images)
    if not model.config.reads_text:
        return torch.zeros(rows, dtype=torch.long)
    text = torch.zeros(tokens, model.config.caption_channels)
    mask = torch.ones(tokens, dtype=torch.bool)
    return Captions(text.expand(*rows, -1, -1), mask.expand(*rows, -1), text, mask, 0.1)


def now(device: torch.device) -> float:
    """Return the time in seconds after ``device`` has finished its work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()
