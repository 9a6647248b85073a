# SPDX-License-Identifier: Apache-2.0
"""Conditioning frames as latents: which latent frames are given, and what is encoded for them.

Frames are numbered in the video. A codec that does not compress time encodes every one by itself. One that
does has a latent frame for each span of frames, so conditioning frames give their whole spans:

- The first frame is a span of its own, and frames 0 to n, where n ends a span, are encoded as the clip that
  they are: both are exact.
- Where a span is given in part, its other frames repeat the nearest given one, so a last frame is held still
  for the last span.
- What precedes a given span is part of its encoding. Frames that are not given repeat the nearest given one.

Axes: b batch, f latent frames, t frames, c channels, h height, w width.
"""

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from latte.autoencoder.base import Codec, Compression
from latte.checks import check
from latte.data.clips import to_float
from latte.inference.clip_shape import Shape
from latte.runtime import borrowed


def check_conditioning_frames(
    conditioning_frames: Mapping[int, np.ndarray], codec: Codec, shape: Shape
) -> None:
    """Raise InputError for a frame that a clip of latent ``shape`` (f c h w) does not have, for images of
    another size, and for a codec that encodes no image.
    """
    if not conditioning_frames:
        return
    factor = codec.temporal_factor
    check(
        codec.encodes_images,
        f"conditioning frames were given (--first, --last, image), but codec {codec.name!r} is not causal: "
        f"a latent frame depends on {factor} frames and on what follows, so no frame is given alone; leave "
        "them out, or use a model with a causal codec",
    )
    frames = codec.frames(shape[0])
    size = shape[2] * codec.spatial_factor, shape[3] * codec.spatial_factor
    for frame, image in conditioning_frames.items():
        check(
            -frames <= frame < frames,
            f"conditioning frame {frame} is out of range: a clip has the frames 0 to {frames - 1}",
        )
        check(
            image.shape[:2] == size,
            f"conditioning frame {frame} has the size {image.shape[:2]}, but clips have {size}; resize it",
        )


@torch.no_grad()
def encode_frames(
    conditioning_frames: Mapping[int, np.ndarray],
    codec: Codec,
    shape: Shape,
    offload: torch.device | None = None,
) -> tuple[Tensor, Tensor]:
    """Encode {frame of the video: uint8 (h w c)}; return latents (1 f c h w) of ``shape`` (f c h w), 0
    elsewhere, and a bool mask (f,). With ``offload`` the codec visits that device.
    """
    mask = torch.zeros(shape[0], dtype=torch.bool)
    if not conditioning_frames:
        return torch.zeros(1, *shape, device=codec.device), mask
    frames = codec.frames(shape[0])
    given = {frame % frames: image for frame, image in conditioning_frames.items()}
    with borrowed(codec, offload or codec.device, codec.device):
        latents = torch.zeros(1, *shape, device=codec.device)
        for places, clip in given_clips(given, codec.compression):
            z = codec.encode(to_float(clip)[None])  # (1 f c h w)
            latents[:, places] = z[:, places] if codec.temporal_factor > 1 else z
            mask[places] = True
    return latents, mask


def given_clips(
    given: Mapping[int, np.ndarray], compression: Compression
) -> Iterator[tuple[list[int], np.ndarray]]:
    """Yield (latent frames, uint8 (t h w c)): clips from the first frame on that hold those latent frames.

    One per run of adjacent latent frames, so that a run is the same whatever is given after it. Where frames
    are encoded by themselves each is a clip, of that frame alone.
    """
    if compression.temporal_factor == 1:
        for frame, image in given.items():
            yield [frame], image[None]
        return
    runs: list[list[int]] = []
    for place in sorted({compression.latent_index(frame) for frame in given}):
        if runs and runs[-1][-1] == place - 1:
            runs[-1].append(place)
        else:
            runs.append([place])
    for run in runs:
        length = compression.nearest_frames(compression.frames(run[-1] + 1))[-1]
        frames = (source(frame, sorted(given), compression) for frame in range(length))
        yield run, np.stack([given[frame] for frame in frames])


def source(frame: int, given: list[int], compression: Compression) -> int:
    """Return which ``given`` frame stands for ``frame``: the nearest of its span, or else of all; of two the
    earlier one.
    """
    span = compression.span(compression.latent_index(frame))
    own = [number for number in given if number in span]
    return min(own or given, key=lambda number: abs(number - frame))
