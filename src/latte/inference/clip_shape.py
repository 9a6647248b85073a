# SPDX-License-Identifier: Apache-2.0
"""From what a user asks for, frames of video and pixels, to the shape of a clip's latent, checked before
anything is computed: codec, patches, windows and memory.

Axes: f latent frames, c channels, h height, w width.
"""

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import torch

from latte.autoencoder.base import Codec
from latte.checks import check
from latte.model.denoiser import Denoiser
from latte.runtime import memory_of

Shape = tuple[int, int, int, int]
"""(f c h w) of the latent of one clip."""


def clip_shape(
    model: Denoiser, codec: Codec, frames: int | None, size: tuple[int, int] | None, window: int | None
) -> Shape:
    """Return (f c h w) of the latent of ``frames`` frames of video of ``size`` (height, width) in pixels.

    None: what the model was trained with. ``window`` is how many latent frames the model sees at a time, None
    for all. InputError, with the nearest valid numbers, for a length, a size or a window that codec and
    patches do not divide.
    """
    return count_latent_frames(model, codec, frames, window), *latent_size(model, codec, size)


def count_latent_frames(model: Denoiser, codec: Codec, frames: int | None, window: int | None) -> int:
    """Return the latent frames of ``frames`` frames of video; InputError with the nearest valid numbers.

    Compression patches take several latent frames at once, of what the model sees: the clip, or a window.
    """
    if frames is None:
        return model.config.num_frames
    check(frames >= 1, f"frames must be at least 1, got {frames}")
    tube = model.config.frames_per_token
    compression = codec.compression
    if tube == 1:
        return compression.latent_frames(frames)

    def fits(latent_frames: int) -> bool:
        return min(latent_frames, window or latent_frames) % tube == 0

    check(
        window is None or window < 1 or window % tube == 0,
        f"window is {window} latent frames, but compression patches take {tube} at once; "
        f"the nearest valid numbers are {nearest(window or 0, tube)}",
    )
    valid = compression.nearest_fitting(frames, fits, 4 * tube)
    fault = (
        f"frames is {frames}, but codec {codec.name!r} compresses time {compression.temporal_factor} times "
        f"and compression patches take {tube} latent frames at once"
    )
    check(bool(valid), f"{fault}, which no number nearby divides; use a model with another tube or codec")
    check(frames in valid, f"{fault}; the nearest valid numbers are {' and '.join(map(str, valid))}")
    return compression.latent_frames(frames)


def latent_shapes(codec: Codec, shapes: Iterable[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """Return (f, h, w) of the latents of clips of ``shapes`` (frames, height, width)."""
    return [
        (codec.latent_frames(frames), *codec.latent_shape(height, width)[1:])
        for frames, height, width in shapes
    ]


def nearest(value: int, step: int) -> str:
    """Return the positive multiples of ``step`` next to ``value`` in words: '8 and 12'."""
    below = value // step * step
    return " and ".join(str(number) for number in (below, below + step) if number > 0)


def latent_size(model: Denoiser, codec: Codec, size: tuple[int, int] | None) -> tuple[int, int, int]:
    """Return (c, h, w) of the latent of frames of ``size`` in pixels, None: the model's own; InputError if
    codec and patches do not divide it.
    """
    if size is None:
        return (model.config.latent_channels, *model.config.grid_size)
    step = codec.spatial_factor * model.config.patch_size
    sides = {"height": size[0], "width": size[1]}
    wrong = {name: side for name, side in sides.items() if side < 1 or side % step}
    values = ", ".join(f"{nearest(max(side, 0), step)} for the {name} {side}" for name, side in wrong.items())
    check(
        not wrong,
        f"size is {size[0]} x {size[1]} (height x width), but codec {codec.name!r} and patches make tokens "
        f"of {step} x {step} pixels; the nearest multiples are {values}",
    )
    return codec.latent_shape(*size)


def check_memory(batch: int, shape: Shape, codec: Codec) -> None:
    """Raise InputError when the frames of one batch alone, as float32, exceed this machine's memory."""
    latent_frames, _, height, width = shape
    frames = codec.frames(latent_frames)
    needed = 4 * 3 * batch * frames * height * width * codec.spatial_factor**2
    available = memory_of(torch.device("cpu"))
    if available is None:
        return
    check(
        needed <= available,
        f"one batch of {batch} clips of {frames} frames needs {needed / 2**30:,.0f} GiB for its pixels "
        f"alone, but this machine has {available / 2**30:,.0f} GiB; lower --batch, --frames or --size",
    )


def recorded_extras(model: Any) -> dict[str, Any]:
    """Return what config.json stores of the ``buckets`` and ``distilled`` of a StoredModel or a pipeline."""
    facts: dict[str, Any] = {}
    if model.distilled:
        facts["distilled"] = asdict(model.distilled)
    if model.buckets:
        facts["buckets"] = [list(shape) for shape in model.buckets]
    return facts
