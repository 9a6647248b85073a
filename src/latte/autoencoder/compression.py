# SPDX-License-Identifier: Apache-2.0
"""What a codec does to the shape of a clip: channels, space and time, known before any weight is read."""

from collections.abc import Callable
from dataclasses import dataclass

from latte.checks import InputError, check


@dataclass(frozen=True)
class Compression:
    """The factors between a clip of frames (f 3 H W) and its latent (f' c h w).

    A causal codec with a temporal factor gives the first frame a latent of its own, so valid clips have
    1 + k ``temporal_factor`` frames and 1 + k latent frames; one that is not causal takes multiples of the
    factor. With temporal factor 1 every length is valid. Where a network decodes ``latent_step`` latent
    frames together, k is a multiple of it.
    """

    channels: int
    """Channels of the latent."""
    spatial_factor: int
    """Pixels per latent row and column."""
    temporal_factor: int = 1
    """Frames per latent frame, after the first one of a causal codec."""
    causal: bool = True
    """Whether latents depend on earlier frames alone, and the first frame has its own."""
    latent_step: int = 1
    """Latent frames by which clips grow."""

    @property
    def encodes_images(self) -> bool:
        """Whether one frame is a valid clip, of one latent frame."""
        return self.causal or self.temporal_factor == 1

    @property
    def lead(self) -> int:
        """Frames that the first latent frame covers."""
        return 1 if self.causal else self.temporal_factor

    @property
    def step(self) -> int:
        """Frames by which clips grow."""
        return self.temporal_factor * self.latent_step

    def latent_frames(self, frames: int, field: str = "frames") -> int:
        """Return the number of latent frames of ``frames`` frames.

        InputError that names ``field`` and the nearest valid numbers when the codec has no such clip.
        """
        whole, rest = divmod(frames - self.lead, self.step)
        if rest or frames < self.lead:
            nearest = " and ".join(map(str, self.nearest_frames(frames)))
            length = f"{self.lead} + {self.step} k" if self.causal else f"{self.step} k"
            raise InputError(
                f"{field} is {frames}, but this codec compresses time {self.temporal_factor} times and takes "
                f"clips of {length} frames; the nearest valid numbers are {nearest}"
            )
        return 1 + whole * self.latent_step

    def frames(self, latent_frames: int) -> int:
        """Return the number of frames that ``latent_frames`` latent frames decode to; 0 for 0."""
        if latent_frames == 0:
            return 0
        return self.lead + (latent_frames - 1) * self.temporal_factor

    def latent_index(self, frame: int) -> int:
        """Return which latent frame covers frame ``frame``, both from 0 on."""
        return max(0, -(-(frame + 1 - self.lead) // self.temporal_factor))

    def span(self, latent_index: int) -> range:
        """Return the frames that latent frame ``latent_index`` covers."""
        return range(self.frames(latent_index), self.frames(latent_index + 1))

    def nearest_frames(self, frames: int) -> list[int]:
        """Return the valid numbers of frames around ``frames``: itself, or the next below and above."""
        steps = max(-1, (frames - self.lead) // self.step)
        below = self.lead + steps * self.step
        if below == frames and steps >= 0:
            return [frames]
        return [length for length in (below, below + self.step) if length >= self.lead]

    def nearest_fitting(self, frames: int, fits: Callable[[int], bool], reach: int) -> list[int]:
        """Return the valid numbers of frames around ``frames``, itself included, whose latent frames ``fits``
        accepts: the next below and above within ``reach`` latent frames, one number if it is ``frames``.
        """
        whole = max(0, (frames - self.lead) // self.temporal_factor + 1)
        least = whole + (self.frames(whole) < frames)

        def valid(latent_frames: int) -> bool:
            length = self.frames(latent_frames)
            return fits(latent_frames) and self.nearest_frames(length) == [length]

        below = next((number for number in range(whole, max(0, whole - reach), -1) if valid(number)), None)
        above = next((number for number in range(max(1, least), least + reach) if valid(number)), None)
        return sorted({self.frames(number) for number in (below, above) if number})

    def latent_size(self, height: int, width: int, codec: str) -> tuple[int, int]:
        """Return (h, w) of frames of height x width; InputError, naming ``codec``, unless the factor divides
        both.
        """
        for field, size in (("frame height", height), ("frame width", width)):
            check(
                size > 0 and size % self.spatial_factor == 0,
                f"{field} is {size}, but codec {codec!r} needs a multiple of {self.spatial_factor}",
            )
        return height // self.spatial_factor, width // self.spatial_factor


def check_images(num_images: int, compression: Compression, codec: str) -> None:
    """InputError when images are wanted of a codec, named ``codec``, that encodes none."""
    check(
        num_images == 0 or compression.encodes_images,
        f"train.num_images is {num_images}, but codec {codec!r} encodes no images: it takes blocks of "
        f"{compression.temporal_factor} frames, and an image is one frame; set train.num_images=0, or use a "
        "causal codec",
    )
