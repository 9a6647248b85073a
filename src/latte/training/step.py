# SPDX-License-Identifier: Apache-2.0
"""What one step of training computes: noised clips, their loss and its gradient, over any split of the global batch.

Every draw is keyed by (seed, step, position in the global batch), and the loss is a sum over clips divided by the global batch: so a
step is the same, to rounding, whatever the micro batch and the number of processes.
Axes: b batch, f frames, i stills, c channels, h height, w width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from latte.autoencoder.codec import Codec
from latte.checks import InputError, require
from latte.diffusion.loss import Loss, draw_timesteps
from latte.diffusion.process import NoisePath
from latte.model.denoiser import Denoiser
from latte.model.latte import ModelConfig
from latte.runtime import generator
from latte.training.condition import Captions, Condition, Labels


@dataclass(frozen=True)
class Task:
    """What stays the same from step to step.

    ``forward`` is ``model`` itself or its compiled form; ``codec`` is None when the data are latents already; ``dtype`` is that of the
    matrix products, everything outside the model is float32; ``num_images`` stills ride behind every clip.
    """

    model: Denoiser
    forward: Callable[..., Tensor]
    process: NoisePath
    objective: Callable[..., Loss]
    codec: Codec | None
    seed: int
    global_batch: int
    micro_batch: int | None
    device: torch.device
    dtype: torch.dtype
    num_images: int = 0


def backward(
    task: Task, step: int, positions: Sequence[int], video: Tensor, told: Tensor | Captions | None
) -> Tensor:
    """Add the gradient of these clips' share of step ``step`` to the model's; their share of (loss, mse, vlb), (3,) on the device.

    video (b f+i c H W), what the model is ``told`` (label (b,) or (b 1+i) int64 or None; or captions) and ``positions`` in the global
    batch belong together. InputError for labels that the model does not have.
    """
    size = task.micro_batch or len(positions)
    condition = condition_for(task.model, told)
    total = torch.zeros(3, device=task.device)
    for start in range(0, len(positions), size):
        part = slice(start, start + size)
        loss = part_loss(task, step, positions[part], video[part], condition.part(part))
        (loss.total.sum() / task.global_batch).backward()
        total += torch.stack([term.detach().float().sum() for term in loss]) / task.global_batch
    return total


def part_loss(task: Task, step: int, positions: Sequence[int], video: Tensor, condition: Condition) -> Loss:
    """The objective of one micro batch, per clip."""
    z0 = encode(task, step, positions, place(video, task.device))
    streams = [generator(task.seed, "train", step, position) for position in positions]
    t = torch.cat([draw_timesteps(task.process, 1, stream) for stream in streams])
    eps = torch.stack([torch.randn(z0.shape[1:], generator=stream) for stream in streams])
    inputs = {key: place(tensor, task.device) for key, tensor in condition.drop(streams).inputs().items()}

    def denoise(zt: Tensor, t: Tensor) -> Tensor:
        with torch.autocast(task.device.type, task.dtype, enabled=task.dtype != torch.float32):
            output = task.forward(zt, t, **inputs, num_images=task.num_images)
        return output.float()

    return task.objective(denoise, task.process, z0, place(t, task.device), place(eps, task.device))


def place(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on ``device``; by way of pinned memory, so that the host does not wait for the GPU's earlier work."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


@torch.no_grad()
def encode(task: Task, step: int, positions: Sequence[int], video: Tensor) -> Tensor:
    """Latents (b f c h w) float32 of clips (b f 3 H W), one by one, so that no clip's latent depends on its neighbours."""
    if task.codec is None:
        return video.float()
    streams = [generator(task.seed, "encode", step, position) for position in positions]
    clips = [task.codec.encode(clip, stream) for clip, stream in zip(video.split(1), streams, strict=True)]
    return torch.cat(clips).to(task.device, torch.float32)


def condition_for(model: Denoiser, told: Tensor | Captions | None) -> Condition:
    """Labels or captions as ``model`` takes them: no labels for an unconditional one; InputError when it gets none or the wrong ones."""
    if model.config.reads_text:
        if not isinstance(told, Captions):
            raise InputError(
                "text.name is set, but the data have no captions; give data.captions, or procedural clips"
            )
        return told
    assert not isinstance(told, Captions)
    return Labels(label_for(model.config, told), model.config.class_dropout)


def label_for(config: ModelConfig, label: Tensor | None) -> Tensor | None:
    """The labels as a class model takes them: None for an unconditional one; InputError when it gets none or a wrong one."""
    num_classes = config.num_classes
    if num_classes is None:
        return None
    if label is None:
        raise InputError(
            f"model.num_classes is {num_classes}, but the data have no labels; "
            "give model.num_classes=null, or data with a folder per class"
        )
    wrong = label[(label < 0) | (label >= num_classes)].tolist()
    rule = f"the model has classes 0 to {num_classes - 1}"
    require(not wrong, "label", wrong and wrong[0], rule, "give a model.num_classes that fits the data")
    return label
