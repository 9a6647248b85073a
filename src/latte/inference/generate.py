# SPDX-License-Identifier: Apache-2.0
"""Seeds and labels, or prompts -> noise -> latents -> frames.

Every clip has a random stream of its own, so the clip of a seed is the same, to rounding, in whatever batch it is drawn.
Axes: b batch, f latent frames, t frames, c channels, h height, w width.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from latte.autoencoder.codec import Codec
from latte.checks import InputError, choose, require
from latte.data.clips import to_float, to_uint8
from latte.diffusion.frame_conditioning import DEFAULT_STRENGTH, condition_on_frames, restore_frames
from latte.diffusion.guidance import check_guidance, guided
from latte.diffusion.long_video import LONG_VIDEO_METHODS, SampleFunction, partial_progress
from latte.diffusion.process import DenoiseFunction, Flow, Process
from latte.diffusion.samplers import SAMPLERS, Noise, sample
from latte.inference.prompts import Prompts
from latte.model.conditioning import NULL_LABEL
from latte.model.denoiser import Denoiser
from latte.runtime import SampleNoise, borrowed

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class SampleConfig:
    """How clips are drawn. ``steps`` is a count or a respacing such as "ddim50"; ``guidance`` 1 is the plain model.

    ``batch`` clips are drawn at once, and ``fps`` is that of the files: neither changes a clip.
    """

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    sampler: str = "ddpm"
    steps: int | str = 250
    guidance: float = 1.0
    eta: float = 0.0
    batch: int = 4
    fps: float = 8.0

    def __post_init__(self) -> None:
        choose("sample.sampler", self.sampler, SAMPLERS)
        check_guidance(self.guidance, field="sample.guidance")
        require(
            0 <= self.eta <= 1, "sample.eta", self.eta, "it runs from DDIM (0) to DDPM (1)", "give 0 to 1"
        )
        require(self.batch >= 1, "sample.batch", self.batch, "it counts clips", "give 1 or more")
        require(0 < self.fps <= 240, "sample.fps", self.fps, "it counts frames in a second", "give 1 to 240")
        if isinstance(self.steps, int):
            require(self.steps >= 1, "sample.steps", self.steps, "it counts steps", "give 1 or more")


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
    given: Mapping[int, np.ndarray] | None = None,
    given_strength: float = DEFAULT_STRENGTH,
    decoder: Codec | None = None,
    offload: torch.device | None = None,
) -> Iterator[tuple[int, np.ndarray]]:
    """One clip per seed, in order, as (seed, uint8 (t h w c)), decoded and handed out batch by batch.

    ``labels``: one class per seed, -1 for none; None for all of them. ``frames`` and ``size`` (height, width in pixels) default to those
    the model was made for. ``dtype`` is that of matrix products. ``progress(done, all)`` counts denoising steps over all batches.
    A text model reads ``prompts``, one per seed, instead of labels. ``window``: the model sees that many frames at a time, so that memory
    does not grow with ``frames``; windows share ``overlap`` frames (None: half) and become one clip as ``longer``, of LONG_VIDEO_METHODS, has it
    (diffusion/longer.py). ``given``: pictures, uint8 (h w c) of the clip's size, that every clip shows at these frames, -1 for the last,
    and that pull at the others with ``given_strength`` (diffusion/known.py). Raises InputError for labels that the model does not know, for
    prompts that are missing or not wanted, for sizes that the codec and the patches do not divide, and for frames that a clip does not
    have. ``decoder`` draws the frames in ``codec``'s place. With ``offload`` model and codec stay where they are, such as in the host's
    memory, and the one at work goes to that device.
    """
    config = config or SampleConfig()
    home = next(model.parameters()).device
    device, decoder = offload or home, decoder or codec
    tell_model = condition(model, labels, prompts, len(seeds), config.guidance, dtype, device)
    frames = model.config.num_frames if frames is None else frames
    require(frames >= 1, "frames", frames, "a clip has at least one", "give 1 or more")
    shape = (frames, *latent_shape(model, codec, size))
    with borrowed(codec, device if given and offload else codec.device, codec.device):
        latents, mask = encode_given(given or {}, codec, shape)
    known = latents.to(device), mask
    join, walk = choose("longer", longer, LONG_VIDEO_METHODS), walker(config, process, device, given_strength)
    window = frames if window is None else window
    model.eval()
    batches = [slice(start, start + config.batch) for start in range(0, len(seeds), config.batch)]
    for index, part in enumerate(batches):
        tell = None if progress is None else partial_progress(progress, index, len(batches))
        with borrowed(model, device, home):
            z = join(walk, tell_model(part), SampleNoise(seeds[part]), *known, window, overlap, tell)
        with torch.no_grad(), borrowed(decoder, offload or decoder.device, decoder.device):
            clips = to_uint8(decoder.decode(z))
        yield from zip(seeds[part], np.asarray(clips), strict=True)


@torch.no_grad()
def encode_given(
    given: Mapping[int, np.ndarray], codec: Codec, shape: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """{frame: picture, uint8 (h w c)} -> latents (1 f c h w) of ``shape`` (f c h w), 0 elsewhere, and which frames are given, bool (f,)."""
    latents, mask = torch.zeros(1, *shape, device=codec.device), torch.zeros(shape[0], dtype=torch.bool)
    size = shape[2] * codec.downscale, shape[3] * codec.downscale
    for frame, picture in given.items():
        require(
            -shape[0] <= frame < shape[0],
            "given frame",
            frame,
            f"a clip has the frames 0 to {shape[0] - 1}",
            "give one of these",
        )
        require(
            picture.shape[:2] == size,
            "size of a given frame",
            picture.shape[:2],
            f"the clips are {size}",
            "resize it",
        )
        latents[:, frame], mask[frame] = codec.encode(to_float(picture[None])[None])[:, 0], True
    return latents, mask


def walker(
    config: SampleConfig, process: Process | Flow, device: torch.device, strength: float
) -> SampleFunction:
    """The sampler of ``config`` as a walk to a sample that holds the frames it is given, which pull at the others with ``strength``."""

    def walk(
        denoise: DenoiseFunction,
        noise: Noise,
        known: Tensor,
        mask: Tensor,
        pull: float,
        progress: Progress | None,
    ) -> Tensor:
        told = condition_on_frames(denoise, process, known, mask, pull * strength)
        z = sample(
            config.sampler, told, process, noise, known.shape[1:], config.steps, config.eta, device, progress
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
    """Some of ``count`` clips -> the guided denoiser that is told their labels or prompts; InputError for what the model cannot be told.

    ``device`` is where the model will be when it is asked, None: where it is now.
    """
    device = device or next(model.parameters()).device
    call = autocast(model, device, dtype)
    if not model.config.reads_text:
        if prompts is not None:
            raise InputError(
                "prompts were given, but this model reads no text; leave them out, or give a model of captions"
            )
        numbers = check_labels(model, labels, count)
        if numbers is None:
            return lambda part: guided(call, {}, {}, scale)
        null = torch.full_like(numbers, NULL_LABEL)
        return lambda part: guided(
            call, {"label": numbers[part].to(device)}, {"label": null[part].to(device)}, scale
        )
    if prompts is None or labels is not None:
        raise InputError("this model reads text: give it a prompt per clip, and no labels")
    require(
        len(prompts.text) == count,
        "prompts",
        len(prompts.text),
        f"there are {count} seeds",
        "give one prompt per seed",
    )
    return lambda part: guided(call, *prompts.part(part, device), scale)


def check_labels(model: Denoiser, labels: Sequence[int] | None, count: int) -> Tensor | None:
    """Labels as int64 (count,), or None for an unconditional model; InputError with the valid range for any other."""
    classes = model.config.num_classes
    if classes is None:
        if labels is not None:
            raise InputError(
                f"labels are {list(labels)}, but this model is unconditional (model.num_classes is null); leave them out"
            )
        return None
    labels = [-1] * count if labels is None else labels
    require(
        len(labels) == count, "labels", list(labels), f"there are {count} seeds", "give one label per seed"
    )
    for label in labels:
        require(
            -1 <= label < classes,
            "label",
            label,
            f"this model knows the classes 0 to {classes - 1}",
            "give one of these, or -1 for none",
        )
    return torch.tensor(labels, dtype=torch.int64)


def latent_shape(model: Denoiser, codec: Codec, size: tuple[int, int] | None) -> tuple[int, int, int]:
    """(c, h, w) of the latent of frames of ``size``, or of the model's own when it is None; InputError for one that does not divide."""
    if size is None:
        return (model.config.latent_channels, *model.config.grid_size)
    step = codec.downscale * model.config.patch_size
    for side in size:
        rule = f"the autoencoder and the patches make tokens of {step} x {step} pixels"
        require(
            side > 0 and side % step == 0,
            "size",
            size,
            rule,
            f"the nearest multiple of {side} is {max(round(side / step), 1) * step}",
        )
    return codec.latent_shape(*size)


def autocast(model: Denoiser, device: torch.device, dtype: torch.dtype) -> Callable[..., Tensor]:
    """``model`` with its matrix products in ``dtype``; the model itself for float32."""
    if dtype == torch.float32:
        return model

    def call(z: Tensor, t: Tensor, **condition: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype):
            return model(z, t, **condition)

    return call
