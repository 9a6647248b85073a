# SPDX-License-Identifier: Apache-2.0
"""What contact sheets show: clips of the data as training sees them, and which samples have which shape.

Axes: f frames, f' latent frames, c channels, h w latent size, H height, W width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from latte.autoencoder.codec import Codec
from latte.checks import InputError
from latte.data.base import Clip, Dataset
from latte.data.buckets import Buckets
from latte.diffusion.config import DiffusionConfig, build_process
from latte.diffusion.guidance import guidance_window, guided
from latte.diffusion.samplers import sample
from latte.inference.generate import SampleConfig
from latte.runtime import SampleNoise

T = TypeVar("T")


@dataclass(frozen=True)
class SheetPart:
    """The clips of a sheet that have one shape: which of them, and what ``generate`` needs for them.

    ``frames`` and ``size`` (height, width) are None for the model's own shape.
    """

    clips: slice
    config: SampleConfig
    frames: int | None = None
    size: tuple[int, int] | None = None

    @property
    def name(self) -> str:
        """The shape as frames x height x width, "" for the model's own."""
        if self.frames is None or self.size is None:
            return ""
        return "x".join(map(str, (self.frames, *self.size)))


def sheet_parts(buckets: Buckets | None, count: int, config: SampleConfig) -> list[SheetPart]:
    """Return the shapes of a sheet of ``count`` clips; with buckets they are spread over those, by aspect,
    and the clips take them in turn.

    Of buckets with more tokens than the reference fewer clips are generated at a time.
    """
    if buckets is None:
        return [SheetPart(slice(count), config)]
    ordered = sorted(buckets.shapes, key=lambda bucket: (bucket.width / bucket.height, bucket.frames))
    chosen = evenly_spaced(ordered, count)
    parts = []
    for index, bucket in enumerate(chosen):
        batch = config.batch * buckets.reference.tokens // max(bucket.tokens, buckets.reference.tokens)
        clips = slice(index, count, len(chosen))
        parts.append(SheetPart(clips, replace(config, batch=max(batch, 1)), bucket.frames, bucket.size))
    return parts


def row_captions(names: Sequence[str] | None, parts: Sequence[SheetPart], count: int) -> list[str] | None:
    """Return the lines above the clips of a sheet: class or prompt, and the shape if there are several; None
    for neither.
    """
    lines = list(names or [""] * count)
    for part in parts:
        lines[part.clips] = [", ".join(filter(None, (line, part.name))) for line in lines[part.clips]]
    return lines if any(lines) else None


def evenly_spaced(items: Sequence[T], count: int) -> list[T]:
    """Return at most ``count`` of the items, evenly spaced."""
    count = min(count, len(items))
    return [items[index * len(items) // count] for index in range(count)]


def shown(video: Tensor, codec: Codec | None, latents: bool) -> Tensor:
    """Return the frames (f 3 H W) of a clip: latents (f' c h w) decoded, or frames encoded and decoded by
    ``codec`` if there is one.
    """
    if codec is None:
        return video
    z = video[None] if latents else codec.encode(video[None])  # (1 f' c h w)
    return codec.decode(z)[0]


def data_caption(clip: Clip, dataset: Dataset) -> str:
    """Return the line above a clip of the data: its file, its shape if there are several, class and
    caption.
    """
    line = clip.key
    if getattr(dataset, "buckets", None):
        frames, _, height, width = clip.video.shape
        line += f", {frames}x{height}x{width}"
    if clip.label is not None:
        line += f" ({dataset.classes[clip.label]})"
    if clip.caption:
        line += f": {clip.caption}"
    return line


def check_sampling(network: Any, diffusion: DiffusionConfig, settings: SampleConfig, train: Any) -> None:
    """InputError for sample settings that would fail at the first sample sheet: one clip of one pixel is
    sampled without a model.
    """
    channels = 2 * network.latent_channels
    condition = {}
    if network.reads_text or network.num_classes is not None:
        condition["label"] = torch.zeros(1, dtype=torch.int64)

    def predict(z: torch.Tensor, t: torch.Tensor, **condition: torch.Tensor) -> torch.Tensor:
        return z.new_zeros(len(z), z.shape[1], channels, *z.shape[3:])  # (b f 2c h w)

    try:
        process = build_process(diffusion)
        window = guidance_window(process, settings.guidance_interval)
        denoise = guided(predict, condition, condition, settings.guidance, window)
        shape = (1, network.latent_channels, 1, 1)
        noise = SampleNoise([0])
        sample(
            settings.sampler,
            denoise,
            process,
            noise,
            shape,
            settings.steps,
            settings.eta,
            order=settings.order,
        )
    except InputError as error:
        every = f"train.sample_every is {train.sample_every}"
        if not train.sample_every:
            every = f"train.score_every is {train.score_every}"
        raise InputError(f"{every}, but the settings of section sample cannot generate: {error}") from None
