# SPDX-License-Identifier: Apache-2.0
"""What one training step computes: noised clips, their loss and its gradient, for any division of the
global batch.

Every draw is keyed by (seed, step, position in the global batch), and the loss is a sum over clips divided
by the global batch: so a step is the same, to rounding, for every micro batch and number of processes.
Axes: b batch, f frames, f' latent frames, i images, c channels, h height, w width.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latte.autoencoder.codec import Codec
from latte.checkpoint.record import recorded_setting
from latte.checks import InputError
from latte.diffusion.loss import UNIFORM, Loss, TimestepDraw, two_levels
from latte.diffusion.process import NoisePath
from latte.model.compiled import compile_blocks
from latte.model.config import DenoiserConfig
from latte.model.denoiser import Denoiser
from latte.model.fastest import CANDIDATES, fastest
from latte.model.latte import ModelConfig
from latte.runtime import FASTEST, generator, world_size
from latte.training.between_blocks import (
    captured,
    distance_to_latent,
    kept_tokens,
    layer_pair,
    misalignment,
    routed,
    routed_blocks,
)
from latte.training.condition import Captions, Condition, Labels
from latte.training.config import TrainConfig

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepOptions:
    """What differs from the plain training step."""

    layer_sync: float = 0.0  # weight of LayerSync in the loss
    timesteps: TimestepDraw = UNIFORM
    frame_noise: float = 0.0  # share of the clips whose frames have one of two timesteps each
    codec_align: float = 0.0  # weight of the alignment with the codec in the loss
    route: float = 0.0  # share of the tokens that pass by the middle blocks

    @property
    def between_blocks(self) -> bool:
        """Whether anything is done with the tokens between blocks."""
        return bool(self.layer_sync or self.codec_align or self.route)


PLAIN = StepOptions()


def step_options(config: TrainConfig) -> StepOptions:
    """Return the settings of ``config`` that change a training step."""
    draw = TimestepDraw(config.timesteps, config.timestep_shift)
    return StepOptions(config.layer_sync, draw, config.frame_noise, config.codec_align, config.route)


@dataclass(frozen=True)
class Task:
    """What stays the same from step to step."""

    model: Denoiser
    forward: Callable[..., Tensor]  # the model, or what stands for it
    process: NoisePath
    objective: Callable[..., Loss]
    codec: Codec | None  # None: the data are latents
    seed: int
    global_batch: int  # of the reference bucket, if there are buckets
    micro_batch: int | None  # for that batch; None: all clips of this process at once
    device: torch.device
    dtype: torch.dtype  # of matrix products; everything outside the model is float32
    num_images: int = 0  # behind every clip
    options: StepOptions = PLAIN
    # Around every micro batch but the last: gradients are added up in this process only.
    accumulate: Callable[[], AbstractContextManager[Any]] = nullcontext
    loss_scale: float = 1.0  # see ``latte.training.parallel``


def set_up_blocks(model: Denoiser, config: TrainConfig, device: torch.device) -> None:
    """Apply the settings of ``config`` that decide the speed and memory of blocks, and not their values.

    EMA weights copied afterwards are not compiled. InputError when torch.compile does not work on ``device``.
    """
    model.gradient_checkpointing = config.gradient_checkpointing
    model.recompute(config.recompute)
    if config.compile:
        compile_blocks(model, device, "train.compile")


def with_dtype(
    config: TrainConfig, shape: DenoiserConfig, device: torch.device, run_dir: Path | None = None
) -> TrainConfig:
    """Return ``config`` with a dtype in the place of 'fastest': the one that the run in ``run_dir`` began
    with, so that resuming changes no number, otherwise the measured one.
    """
    if config.dtype != FASTEST:
        return config
    name = run_dir and recorded_setting(run_dir, "train", "dtype")
    if name in CANDIDATES:
        LOG.info("dtype: %s, as recorded in %s; to change it, give a dtype instead of fastest", name, run_dir)
        return replace(config, dtype=str(name))
    share = max(config.global_batch // config.shares(world_size()), 1)
    clips = min(config.micro_batch or share, share)
    return replace(config, dtype=fastest(shape, device, clips, training=True))


def backward(
    task: Task,
    step: int,
    positions: Sequence[int],
    video: Tensor,
    given: Tensor | Captions | None,
    global_batch: int | None = None,
) -> Tensor:
    """Add the gradient of some clips of step ``step`` to the model's; return their share of (loss, mse,
    vlb), (3,) on the device. With several processes, the last micro batch sums the gradients over them.

    video (b f+i c H W), the condition ``given`` (label (b,) or (b 1+i) int64, None, or captions) and
    ``positions`` in the global batch belong together. ``global_batch`` is that of the step, None for
    ``task.global_batch``; a micro batch changes in proportion. InputError for labels that the
    model does not have.
    """
    clips = global_batch or task.global_batch
    size = micro_batch_of(task, clips) or len(positions)
    condition = condition_for(task.model, given)
    total = torch.zeros(3, device=task.device)
    for start in range(0, len(positions), size):
        part = slice(start, start + size)
        summed: Callable[[], AbstractContextManager[Any]] = nullcontext
        if start + size < len(positions):
            summed = task.accumulate
        with summed():
            loss = micro_batch_loss(task, step, positions[part], video[part], condition.part(part))
            (loss.total.sum() * task.loss_scale / clips).backward()
        total += torch.stack([term.detach().float().sum() for term in loss]) / clips  # (3)
    return total


def micro_batch_of(task: Task, global_batch: int) -> int | None:
    """Return the clips of a forward pass in a step of ``global_batch`` clips: the memory of a pass stays the
    same.
    """
    if task.micro_batch is None:
        return None
    return max(1, task.micro_batch * global_batch // task.global_batch)


def micro_batch_loss(
    task: Task, step: int, positions: Sequence[int], video: Tensor, condition: Condition
) -> Loss:
    """Return the objective of one micro batch, each term (b,)."""
    z0 = encode(task, step, positions, to_device(video, task.device))  # (b f'+i c h w)
    # The order of the draws from a clip's stream (t, eps, dropped condition, timesteps of frames) is part of
    # the result.
    streams = [generator(task.seed, "train", step, position) for position in positions]
    t = torch.cat([task.options.timesteps(task.process, 1, stream) for stream in streams])  # (b)
    eps = torch.stack([torch.randn(z0.shape[1:], generator=stream) for stream in streams])  # (b f'+i c h w)
    kept = condition.drop(streams).inputs()
    inputs = {name: to_device(tensor, task.device) for name, tensor in kept.items()}
    if task.options.frame_noise:
        t = frame_timesteps(task, t, z0.shape[1], streams)  # (b f')

    def denoise(zt: Tensor, t: Tensor) -> Tensor:
        with torch.autocast(task.device.type, task.dtype, enabled=task.dtype != torch.float32):
            output = task.forward(zt, t, **inputs, num_images=task.num_images)
        return output.float()

    t = to_device(t, task.device)
    eps = to_device(eps, task.device)
    if not task.options.between_blocks:
        return task.objective(denoise, task.process, z0, t, eps)
    return loss_between_blocks(task, z0, streams, lambda: task.objective(denoise, task.process, z0, t, eps))


def loss_between_blocks(
    task: Task, z0: Tensor, streams: Sequence[torch.Generator], objective: Callable[[], Loss]
) -> Loss:
    """Return ``objective()`` with the options that act between blocks, each term (b,); z0 (b f' c h w)."""
    config = task.model.config
    options = task.options
    early, deep = layer_pair(config.num_blocks)
    with ExitStack() as stack:
        if options.route:
            tokens = z0.shape[-2] * z0.shape[-1] // config.patch_size**2
            kept = kept_tokens(options.route, tokens, streams)  # (b k)
            stack.enter_context(routed(task.model, routed_blocks(config.num_blocks), kept))
        of_early, of_deep = stack.enter_context(captured(task.model, (early, deep)))
        loss = objective()
    total = loss.total
    if options.layer_sync:
        total = total + options.layer_sync * misalignment(of_early, of_deep)
    if options.codec_align:
        distance = distance_to_latent(of_early, z0, config.patch_size, config.frames_per_token)
        total = total + options.codec_align * distance
    return loss._replace(total=total)


def frame_timesteps(task: Task, t: Tensor, num_frames: int, streams: Sequence[torch.Generator]) -> Tensor:
    """Return (b f') timesteps: those of t (b,) for all frames of a clip, or one of two levels for each.

    The probability of the second is ``frame_noise``.
    """
    rows = []
    for first, stream in zip(t.split(1), streams, strict=True):
        mixed = float(torch.rand((), generator=stream)) < task.options.frame_noise
        second = task.options.timesteps(task.process, 1, stream) if mixed else first
        rows.append(two_levels(first, second, num_frames, stream))
    return torch.stack(rows)  # (b f')


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a CPU tensor to ``device``; through pinned memory, so that the host does not wait for earlier
    work of the GPU.
    """
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


@torch.no_grad()
def encode(task: Task, step: int, positions: Sequence[int], video: Tensor) -> Tensor:
    """Return latents (b f'+i c h w) float32 of clips (b f+i 3 H W), one by one: no clip's latent depends on
    the rest of the batch.
    """
    if task.codec is None:
        return video.float()
    latents = []
    for clip, position in zip(video.split(1), positions, strict=True):
        stream = generator(task.seed, "encode", step, position)
        latents.append(encode_joint(task.codec, clip, task.num_images, stream))
    return torch.cat(latents).to(task.device, torch.float32)  # (b f'+i c h w)


def encode_joint(codec: Codec, video: Tensor, num_images: int, stream: torch.Generator) -> Tensor:
    """Return latents (1 f'+i c h w) of one clip and the images behind it (1 f+i 3 H W).

    A codec that compresses time encodes the clip as a clip and every image by itself: one latent frame each.
    """
    if num_images == 0 or codec.temporal_factor == 1:
        return codec.encode(video, stream)
    clip, images = video.split([video.shape[1] - num_images, num_images], dim=1)
    latent = codec.encode(clip, stream)  # (1 f' c h w)
    single = codec.encode(images.transpose(0, 1), stream).transpose(0, 1)  # (1 i c h w)
    return torch.cat((latent, single), dim=1)  # (1 f'+i c h w)


def condition_for(model: Denoiser, given: Tensor | Captions | None) -> Condition:
    """Return labels or captions in the form that ``model`` takes; InputError when they are missing or
    wrong.
    """
    if model.config.reads_text:
        if not isinstance(given, Captions):
            raise InputError(
                "text.name is set, but the data have no captions; give data.captions, or procedural clips"
            )
        return given
    assert not isinstance(given, Captions)
    return Labels(label_for(model.config, given), model.config.class_dropout)


def label_for(config: ModelConfig, label: Tensor | None) -> Tensor | None:
    """Return the labels that a class model takes, None for an unconditional one; InputError when they are
    missing or wrong.
    """
    num_classes = config.num_classes
    if num_classes is None:
        return None
    if label is None:
        raise InputError(
            f"model.num_classes is {num_classes}, but the data have no labels; "
            "set model.num_classes=null, or give data with a folder per class"
        )
    wrong = label[(label < 0) | (label >= num_classes)].tolist()
    if wrong:
        raise InputError(
            f"a label is {wrong[0]}, but the model has classes 0 to {num_classes - 1}; "
            "set model.num_classes to the number of classes of the data"
        )
    return label
