# SPDX-License-Identifier: Apache-2.0
"""Generate clips: seeds with labels or prompts -> noise -> latents -> frames.

Every clip has its own random stream, so the clip of a seed is the same, to rounding, in a batch of any size.
Axes: b batch, f latent frames, t frames, c channels, h height, w width.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from latte.autoencoder.codec import Codec
from latte.checks import InputError, RunError, check, choose
from latte.data.clips import to_float, to_uint8
from latte.diffusion.frame_conditioning import DEFAULT_STRENGTH, condition_on_frames, restore_frames
from latte.diffusion.guidance import check_guidance, guided
from latte.diffusion.long_video import LONG_VIDEO_METHODS, SampleFunction, partial_progress, window_starts
from latte.diffusion.process import DenoiseFunction, Flow, Process
from latte.diffusion.samplers import SAMPLERS, Noise, indices, sample
from latte.inference.prompts import Prompts
from latte.model.conditioning import NULL_LABEL
from latte.model.denoiser import Denoiser
from latte.runtime import SampleNoise, borrowed

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class SampleConfig:
    """Settings of sampling. ``batch`` and ``fps`` do not change a clip. InputError on construction for a
    value out of range.
    """

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    sampler: str = "ddpm"  # a name in SAMPLERS
    steps: int | str = 250  # a count, or a respacing such as "ddim50"
    guidance: float = 1.0  # classifier-free guidance scale; 1: without guidance
    eta: float = 0.0  # noise of ddim, from 0 (deterministic) to 1 (as ddpm)
    batch: int = 4  # clips generated at once
    fps: float = 8.0  # frame rate of the files

    def __post_init__(self) -> None:
        choose("sample.sampler", self.sampler, SAMPLERS)
        check_guidance(self.guidance, field="sample.guidance")
        check(0 <= self.eta <= 1, f"sample.eta must be in [0, 1], got {self.eta}")
        check(self.batch >= 1, f"sample.batch must be at least 1 clip, got {self.batch}")
        check(0 < self.fps <= 240, f"sample.fps must be in (0, 240], got {self.fps}")
        check(
            not isinstance(self.steps, int) or self.steps >= 1,
            f"sample.steps must be at least 1, got {self.steps}",
        )


def generate(
    model: Denoiser,
    process: Process | Flow,
    codec: Codec,
    seeds: Sequence[int],
    labels: Sequence[int] | None = None,
    config: SampleConfig | None = None,
    *,
    frames: int | None = None,
    size: tuple[int, int] | None = None,
    dtype: torch.dtype = torch.float32,
    progress: Progress | None = None,
    prompts: Prompts | None = None,
    window: int | None = None,
    longer: str = "freenoise",
    overlap: int | None = None,
    conditioning_frames: Mapping[int, np.ndarray] | None = None,
    conditioning_strength: float = DEFAULT_STRENGTH,
    decoder: Codec | None = None,
    offload: torch.device | None = None,
) -> Iterator[tuple[int, np.ndarray]]:
    """Return an iterator over (seed, uint8 (t h w c)), one clip per seed in order, computed batch by batch.

    Each seed has a class number in ``labels`` (-1 or None: the null class), or a text model a prompt.
    ``frames`` and ``size``, (height, width) in pixels, default to what the model was trained with. ``dtype``
    is the precision of matrix products. ``progress(done, total)`` counts denoising steps over all batches.
    The model sees ``window`` frames at a time, sharing ``overlap`` (None: half), joined by ``longer`` of
    LONG_VIDEO_METHODS. ``conditioning_frames``: {frame, -1 for the last: uint8 (h w c) of the clip's size},
    with their guidance strength on the other frames. ``decoder`` decodes instead of ``codec``; ``offload``:
    the device that parts visit while they compute.

    InputError at the call for conditions and settings that do not fit; RunError, while iterating, for
    NaN/Inf.
    """
    config = config or SampleConfig()
    num_frames = model.config.num_frames if frames is None else frames
    span = num_frames if window is None else window
    images = conditioning_frames or {}
    shape = check_settings(model, process, codec, config, len(seeds), num_frames, size, span, longer, overlap)
    check_conditioning_frames(images, codec, shape)
    home = next(model.parameters()).device
    device = offload or home
    denoiser_for = condition(model, labels, prompts, len(seeds), config.guidance, dtype, device)
    walk = walker(config, process, device, conditioning_strength)
    join = LONG_VIDEO_METHODS[longer]

    def run() -> Iterator[tuple[int, np.ndarray]]:
        latents, mask = encode_frames(images, codec, shape, offload)
        known = latents.to(device)
        model.eval()
        parts = [slice(start, start + config.batch) for start in range(0, len(seeds), config.batch)]
        for index, part in enumerate(parts):
            advance = progress and partial_progress(progress, index, len(parts))
            noise = SampleNoise(seeds[part])
            with borrowed(model, device, home):
                z = join(walk, denoiser_for(part), noise, known, mask, span, overlap, advance)
            yield from zip(seeds[part], decode(decoder or codec, z, seeds[part], offload), strict=True)

    return run()


def decode(decoder: Codec, z: Tensor, seeds: Sequence[int], offload: torch.device | None) -> np.ndarray:
    """Decode latents (b f c h w) to uint8 (b t h w c), on ``offload`` if given; RunError for NaN/Inf."""
    check_finite(z, seeds, "latent")
    with torch.no_grad(), borrowed(decoder, offload or decoder.device, decoder.device):
        video = decoder.decode(z)
    check_finite(video, seeds, "decoded video")
    return np.asarray(to_uint8(video))


def changed(config: SampleConfig, **changes: Any) -> SampleConfig:
    """Return ``config`` with those ``changes`` that are not None."""
    return replace(config, **{key: value for key, value in changes.items() if value is not None})


def check_settings(
    model: Denoiser,
    process: Process | Flow,
    codec: Codec,
    config: SampleConfig,
    num_clips: int,
    frames: int,
    size: tuple[int, int] | None,
    window: int,
    longer: str,
    overlap: int | None,
) -> tuple[int, int, int, int]:
    """Return the latent shape (f c h w) of these settings; InputError, in one line, for settings that the
    model cannot use.
    """
    check(frames >= 1, f"frames must be at least 1, got {frames}")
    choose("longer", longer, LONG_VIDEO_METHODS)
    shape = frames, *latent_shape(model, codec, size)
    check_memory(min(config.batch, num_clips), shape, codec)
    window_starts(frames, window, overlap)
    indices(SAMPLERS[config.sampler], process.num_steps, config.steps)
    return shape


def check_memory(batch: int, shape: tuple[int, int, int, int], codec: Codec) -> None:
    """Raise InputError when the frames of one batch alone, as float32, exceed this machine's memory."""
    frames, _, height, width = shape
    needed = 4 * 3 * batch * frames * height * width * codec.spatial_factor**2
    try:
        available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not POSIX: unknown
        return
    check(
        needed <= available,
        f"one batch of {batch} clips of {frames} frames needs {needed / 2**30:,.0f} GiB for its pixels "
        f"alone, but this machine has {available / 2**30:,.0f} GiB; lower --batch, --frames or --size",
    )


def check_finite(values: Tensor, seeds: Sequence[int], what: str) -> None:
    """Raise RunError that names the seeds whose ``values`` (b ...) hold NaN/Inf: codecs would decode them
    to black clips.
    """
    good = values.detach().isfinite().flatten(1).all(1)  # (b,)
    if not bool(good.all()):
        names = ", ".join(str(seed) for seed, fine in zip(seeds, good.tolist(), strict=True) if not fine)
        raise RunError(
            f"the {what} of seed {names} holds NaN/Inf; nothing of this batch was written; "
            "lower the guidance, use another sampler or --dtype fp32, or check the weights"
        )


def check_conditioning_frames(
    conditioning_frames: Mapping[int, np.ndarray], codec: Codec, shape: tuple[int, ...]
) -> None:
    """Raise InputError for a frame that a clip of latent ``shape`` (f c h w) does not have, and for images
    of another size.
    """
    size = shape[2] * codec.spatial_factor, shape[3] * codec.spatial_factor
    for frame, image in conditioning_frames.items():
        check(
            -shape[0] <= frame < shape[0],
            f"conditioning frame {frame} is out of range: a clip has the frames 0 to {shape[0] - 1}",
        )
        check(
            image.shape[:2] == size,
            f"conditioning frame {frame} has the size {image.shape[:2]}, but clips have {size}; resize it",
        )


@torch.no_grad()
def encode_frames(
    conditioning_frames: Mapping[int, np.ndarray],
    codec: Codec,
    shape: tuple[int, ...],
    offload: torch.device | None = None,
) -> tuple[Tensor, Tensor]:
    """Encode {frame: uint8 (h w c)}; return latents (1 f c h w) of ``shape`` (f c h w), 0 elsewhere, and a
    bool mask (f,). With ``offload`` the codec visits that device.
    """
    mask = torch.zeros(shape[0], dtype=torch.bool)
    if not conditioning_frames:
        return torch.zeros(1, *shape, device=codec.device), mask
    with borrowed(codec, offload or codec.device, codec.device):
        latents = torch.zeros(1, *shape, device=codec.device)
        for frame, image in conditioning_frames.items():
            latents[:, frame] = codec.encode(to_float(image[None])[None])[:, 0]  # (1 c h w)
            mask[frame] = True
    return latents, mask


def walker(
    config: SampleConfig, process: Process | Flow, device: torch.device, strength: float
) -> SampleFunction:
    """Return a function that samples with ``config`` and keeps conditioning frames, whose guidance
    strength is ``strength``.
    """

    def walk(
        denoise: DenoiseFunction,
        noise: Noise,
        known: Tensor,
        mask: Tensor,
        scale: float,
        progress: Progress | None,
    ) -> Tensor:
        conditioned = condition_on_frames(denoise, process, known, mask, scale * strength)
        shape = known.shape[1:]
        z = sample(
            config.sampler, conditioned, process, noise, shape, config.steps, config.eta, device, progress
        )
        return restore_frames(z, known, mask)

    return walk


def condition(
    model: Denoiser,
    labels: Sequence[int] | None,
    prompts: Prompts | None,
    count: int,
    scale: float,
    dtype: torch.dtype,
    device: torch.device | None = None,
) -> Callable[[slice], DenoiseFunction]:
    """Return a function from a slice of ``count`` clips to the guided denoiser with their labels or prompts.

    ``device`` is where the model computes, None: where it is now. InputError for conditions that the model
    does not have.
    """
    device = device or next(model.parameters()).device
    call = autocast(model, device, dtype)
    if not model.config.reads_text:
        check(
            prompts is None,
            "prompts were given, but this model reads no text; leave them out, or use a text model",
        )
        numbers = check_labels(model, labels, count)
        if numbers is None:
            return lambda part: guided(call, {}, {}, scale)
        null = torch.full_like(numbers, NULL_LABEL)
        return lambda part: guided(
            call, {"label": numbers[part].to(device)}, {"label": null[part].to(device)}, scale
        )
    if prompts is None or labels is not None:
        raise InputError("this model reads text: pass one prompt per clip, and no labels")
    check(
        len(prompts.text) == count,
        f"there are {len(prompts.text)} prompts, but there are {count} seeds; pass as many",
    )
    return lambda part: guided(call, *prompts.part(part, device), scale)


def check_labels(model: Denoiser, labels: Sequence[int] | None, count: int) -> Tensor | None:
    """Return the labels as int64 (count,), None for an unconditional model; InputError for labels out of
    range.
    """
    classes = model.config.num_classes
    if classes is None:
        check(labels is None, f"labels are {labels}, but this model is unconditional; leave them out")
        return None
    if labels is None:
        labels = [-1] * count
    check(
        len(labels) == count,
        f"there are {len(labels)} labels, but there are {count} seeds; pass one label per seed",
    )
    for label in labels:
        check(
            -1 <= label < classes,
            f"label {label} is out of range: this model has the classes 0 to {classes - 1}, and -1 for none",
        )
    return torch.tensor(labels, dtype=torch.int64)


def latent_shape(model: Denoiser, codec: Codec, size: tuple[int, int] | None) -> tuple[int, int, int]:
    """Return (c, h, w) of the latent of frames of ``size`` in pixels, None: the model's own; InputError if
    it does not divide.
    """
    if size is None:
        return (model.config.latent_channels, *model.config.grid_size)
    step = codec.spatial_factor * model.config.patch_size
    for side in size:
        nearest = max(round(side / step), 1) * step
        check(
            side > 0 and side % step == 0,
            f"size is {size}, but autoencoder and patches make tokens of {step} x {step} pixels; "
            f"the nearest multiple of {side} is {nearest}",
        )
    return codec.latent_shape(*size)


def autocast(model: Denoiser, device: torch.device, dtype: torch.dtype) -> Callable[..., Tensor]:
    """Return ``model`` with its matrix products in ``dtype``; the model itself for float32."""
    if dtype == torch.float32:
        return model

    def call(z: Tensor, t: Tensor, **conditions: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype):
            return model(z, t, **conditions)

    return call
