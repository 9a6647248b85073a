# SPDX-License-Identifier: Apache-2.0
"""The interface of every codec, frames in and latents out, its fingerprint; the codec of plain pixels; and
weight files into networks, strictly: every tensor, of its shape, finite.

A subclass of FrameCodec handles single frames, one of VideoCodec whole clips whose time it may compress.
Scaling to about unit variance belongs to the codec: callers never see raw latents.
Axes: b batch, f frames, f' latent frames, n = b f, c channels, H W pixels, h w latent size.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from latte.autoencoder.compression import Compression
from latte.checks import InputError, check
from latte.tensors import find_nonfinite

__all__ = ["Codec", "Compression", "FrameCodec", "PixelCodec", "VideoCodec"]


class Codec(ABC):
    """Frames (b f 3 H W) in [-1, 1] <-> latents (b f' c h w) of about unit variance.

    The network is frozen, in evaluation mode and on ``device``. Both directions return contiguous float32 on
    the codec's device. ``compression`` states what others need to know before any weight is read, and
    everything that counts frames asks it. Abstract: subclass FrameCodec or VideoCodec.
    """

    name: ClassVar[str]
    """Key of ``codec.CODECS``."""
    compression: Compression
    """Channels, spatial and temporal factor; the class's own for codecs whose weights all have one shape."""
    path: str | None = None
    """Where ``build_codec`` found the weights."""
    tile: int | None = None
    """Side in pixels of the tiles that ``build_codec`` turned on; None for whole frames."""
    scale: float = 1.0
    """What raw latents are multiplied by, one number; 1 where the codec normalises channel by channel."""
    moments: tuple[Tensor, Tensor] | None = None
    """Means and deviations (c) of raw latents, where the codec normalises channel by channel."""
    stochastic: bool = False
    """Whether ``encode`` samples a posterior when given a generator."""
    tileable: ClassVar[bool] = False
    """Whether ``enable_tiles`` works."""
    layout: ClassVar[str | None] = None
    """Class of the network in diffusers, whose folders name it in config.json; None for other networks."""

    def __init__(self, network: nn.Module, chunk: int = 16, device: str | torch.device = "cpu"):
        self.device = torch.device(device)
        self.chunk = chunk
        network = network.eval().requires_grad_(False)
        # nn.Module's own ``to``: diffusers' would warn about the dtype
        self.network: Any = nn.Module.to(network, self.device, torch.float32)
        for weight in self.network.parameters():
            if weight.ndim == 4:  # convolutions over a frame; the format is not defined for others
                weight.data = weight.data.contiguous(memory_format=torch.channels_last)

    @classmethod
    @abstractmethod
    def load(cls, path: str | None, chunk: int, device: str | torch.device) -> Self:
        """Return the codec with the weights at ``path``; InputError for missing or wrong ones."""

    @classmethod
    @abstractmethod
    def skeleton(cls, path: str | None) -> nn.Module:
        """Return the network without its weights, on the meta device.

        It is the published network unless ``path`` is a local folder with another configuration.
        """

    @classmethod
    def compression_at(cls, path: str | None) -> Compression:
        """Return the compression of the weights at ``path`` without reading them.

        A codec whose configuration decides it reads the config.json there; InputError when there is none.
        """
        return cls.compression

    @abstractmethod
    def encode(self, frames: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return latents (b f' c h w) of frames (b f 3 H W) float in [-1, 1].

        With a generator a stochastic codec samples, without it takes the mean. Noise is drawn for the whole
        call before anything is encoded, so the result depends on ``generator`` and not on ``chunk``.
        InputError for a size or a number of frames that the codec does not take.
        """

    @abstractmethod
    def decode(self, latent: Tensor) -> Tensor:
        """Return frames (b f 3 H W) in [-1, 1], clamped, of latents (b f' c h w)."""

    @property
    def channels(self) -> int:
        """Channels of the latent."""
        return self.compression.channels

    @property
    def spatial_factor(self) -> int:
        """Pixels per latent row and column."""
        return self.compression.spatial_factor

    @property
    def temporal_factor(self) -> int:
        """Frames per latent frame, see ``Compression``."""
        return self.compression.temporal_factor

    @property
    def encodes_images(self) -> bool:
        """Whether an image becomes one latent frame."""
        return self.compression.encodes_images

    def latent_frames(self, frames: int) -> int:
        """Return the latent frames of a clip of ``frames``; InputError with the nearest valid numbers."""
        return self.compression.latent_frames(frames)

    def frames(self, latent_frames: int) -> int:
        """Return how many frames ``latent_frames`` latent frames decode to."""
        return self.compression.frames(latent_frames)

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits of SHA-256 over name, scale, moments and float32 weights, whatever their file."""
        digest = hashlib.sha256(f"{self.name} {self.scale!r}".encode())
        for moment in self.moments or ():
            digest.update(moment.float().cpu().numpy().tobytes())
        for key, tensor in sorted(self.network.state_dict().items()):
            digest.update(f" {key} {tuple(tensor.shape)} ".encode())
            digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def enable_tiles(self, side: int) -> None:
        """Encode and decode in overlapping square tiles of ``side`` pixels, blended, to bound the memory.

        Results differ from those of whole frames. InputError for a side that the codec cannot use.
        """
        check(False, f"codec.tile is {side}, but codec {self.name!r} has no tiles; set codec.tile=null")

    def to(self, device: str | torch.device) -> None:
        """Move the network to ``device`` and work there from now on."""
        self.device = torch.device(device)
        self.network.to(self.device)

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Return (c, h, w) of a latent frame of height x width; InputError unless ``spatial_factor`` divides
        both.
        """
        return self.channels, *self.compression.latent_size(height, width, self.name)

    def check_clips(self, frames: Tensor) -> tuple[int, int, int, int, int]:
        """Return (b, f', c, h, w) of the latents of frames (b f 3 H W); InputError for another shape."""
        check(
            frames.ndim == 5 and frames.shape[2] == 3,
            f"frames have shape {tuple(frames.shape)}, but a codec encodes (batch, frames, 3, height, width)",
        )
        shape = self.latent_shape(*frames.shape[-2:])
        return len(frames), self.latent_frames(frames.shape[1]), *shape

    def check_latents(self, latent: Tensor) -> None:
        """InputError unless ``latent`` is (b f' c h w) with the codec's channels."""
        check(
            latent.ndim == 5 and latent.shape[2] == self.channels,
            f"the latent has shape {tuple(latent.shape)}, but codec {self.name!r} decodes (batch, frames, "
            f"{self.channels}, height, width); use the codec that the latents or the model were made with",
        )
        self.latent_frames(self.frames(latent.shape[1]))  # refuses a number that no clip has

    def draw_noise(self, shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor | None:
        """Return standard normal noise of ``shape`` for a stochastic codec with a generator, else None."""
        if generator is None or not self.stochastic:
            return None
        return torch.randn(shape, generator=generator)


class FrameCodec(Codec):
    """A codec of single frames, ``chunk`` of them at a time: f' = f."""

    @abstractmethod
    def encode_frames(self, frames: Tensor, noise: Tensor | None) -> Tensor:
        """Return scaled latents (n c h w) of frames (n 3 H W) in [-1, 1].

        ``noise`` (n c h w) standard normal samples the posterior; None takes its mean.
        """

    @abstractmethod
    def decode_frames(self, latent: Tensor) -> Tensor:
        """Return frames (n 3 H W), about [-1, 1], of scaled latents (n c h w)."""

    def encode(self, frames: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return latents (b f c h w) of frames (b f 3 H W) float in [-1, 1], see ``Codec.encode``."""
        noise = self.draw_noise(self.check_clips(frames), generator)
        return self._in_chunks(self.encode_frames, frames, noise if noise is None else noise.flatten(0, 1))

    def decode(self, latent: Tensor) -> Tensor:
        """Return frames (b f 3 H W) in [-1, 1], clamped, of latents (b f c h w)."""
        self.check_latents(latent)
        return self._in_chunks(lambda part, _: self.decode_frames(part), latent, None).clamp_(-1, 1)

    @torch.no_grad()
    def _in_chunks(
        self, function: Callable[[Tensor, Tensor | None], Tensor], clips: Tensor, noise: Tensor | None
    ) -> Tensor:
        """Apply ``function`` to (b f ...) flattened to frames, ``chunk`` frames at a time."""
        parts = []
        flat = clips.flatten(0, 1)  # (n ...)
        for start in range(0, len(flat), self.chunk):
            part = slice(start, start + self.chunk)
            frames = flat[part].to(self.device, torch.float32).contiguous(memory_format=torch.channels_last)
            part_noise = None if noise is None else noise[part].to(self.device)
            parts.append(function(frames, part_noise).contiguous())
        return torch.cat(parts).unflatten(0, clips.shape[:2])  # (b f ...)


class VideoCodec(Codec):
    """A codec of whole clips, one clip at a time, so that a clip never depends on its batch."""

    @abstractmethod
    def encode_clip(self, frames: Tensor, noise: Tensor | None) -> Tensor:
        """Return scaled latents (1 f' c h w) of the frames (1 f 3 H W) of one clip, in [-1, 1].

        ``noise`` (1 f' c h w) standard normal samples the posterior; None takes its mean.
        """

    @abstractmethod
    def decode_clip(self, latent: Tensor) -> Tensor:
        """Return the frames (1 f 3 H W), about [-1, 1], of one clip's scaled latents (1 f' c h w)."""

    @torch.no_grad()
    def encode(self, frames: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return latents (b f' c h w) of frames (b f 3 H W) float in [-1, 1], see ``Codec.encode``."""
        noise = self.draw_noise(self.check_clips(frames), generator)
        parts = []
        for index, clip in enumerate(frames):
            part_noise = None if noise is None else noise[index : index + 1].to(self.device)
            parts.append(self.encode_clip(clip[None].to(self.device, torch.float32), part_noise))
        return torch.cat(parts).contiguous()  # (b f' c h w)

    @torch.no_grad()
    def decode(self, latent: Tensor) -> Tensor:
        """Return frames (b f 3 H W) in [-1, 1], clamped, of latents (b f' c h w)."""
        self.check_latents(latent)
        clips = [self.decode_clip(clip[None].to(self.device, torch.float32)) for clip in latent]
        return torch.cat(clips).contiguous().clamp_(-1, 1)  # (b f 3 H W)


class PixelCodec(FrameCodec):
    """No autoencoder: the pixels themselves, for small experiments and exact tests."""

    name = "pixels"
    compression = Compression(channels=3, spatial_factor=1)

    @classmethod
    def load(cls, path: str | None, chunk: int, device: str | torch.device) -> Self:
        """Return the codec; ``path`` must be None: there are no weights."""
        check(path is None, f"codec.path is {path!r}, but codec 'pixels' has no weights; leave it out")
        return cls(nn.Identity(), chunk, device)

    @classmethod
    def skeleton(cls, path: str | None) -> nn.Module:
        return nn.Identity()

    def encode_frames(self, frames: Tensor, noise: Tensor | None) -> Tensor:
        return frames

    def decode_frames(self, latent: Tensor) -> Tensor:
        return latent


Network = TypeVar("Network", bound=nn.Module)


def located(path: str | Path) -> str:
    """Return ``path`` for an error message; a relative one with the absolute path that was looked at."""
    path = Path(path)
    if path.is_absolute():
        return str(path)
    return f"{path} ({path.absolute()})"


def read_tensors(path: str | Path, field: str) -> dict[str, Tensor]:
    """Return the tensors of a .safetensors or .pth file by name, as stored.

    A .pth is read with ``weights_only=True``: it can hold nothing but tensors. InputError, naming ``field``,
    for a missing or broken file.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(
            f"{field}: the weight file {located(path)} does not exist; give its absolute path, or start "
            "latte where the relative one is valid"
        )
    try:
        if path.suffix == ".safetensors":
            stored = load_file(path)
        else:
            stored = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken archive raises almost anything
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(
            f"{field}: {path} is truncated or holds something other than weights ({reason}); fetch it again"
        ) from error
    if not isinstance(stored, dict) or not all(isinstance(tensor, Tensor) for tensor in stored.values()):
        raise InputError(f"{field}: {path} holds something other than named tensors; give the weights alone")
    return stored


def load_network(network: Network, path: str | Path, field: str) -> Network:
    """Return ``network`` filled from the file at ``path``."""
    return fill_network(network, read_tensors(path, field), path, field)


def fill_network(network: Network, stored: dict[str, Tensor], path: str | Path, field: str) -> Network:
    """Return ``network`` filled with ``stored``: every tensor, no other, each of its shape and finite.

    InputError with the first fault in ``path`` otherwise.
    """
    expected = network.state_dict()
    faults = [f"lacks {name}" for name in sorted(expected.keys() - stored.keys())]
    faults += [f"has the unknown tensor {name}" for name in sorted(stored.keys() - expected.keys())]
    for name in sorted(expected.keys() & stored.keys()):
        shape = tuple(stored[name].shape)
        if expected[name].shape != shape:
            faults.append(f"has {name} of shape {shape} instead of {tuple(expected[name].shape)}")
        elif expected[name].is_floating_point() and not is_plain_float(stored[name]):
            faults.append(f"has {name} quantized as {stored[name].dtype}")
    if faults:
        raise InputError(
            f"{field}: {path} {faults[0]} ({len(faults)} faults in all); it belongs to another autoencoder, "
            "use this codec's weights"
        )
    nonfinite = find_nonfinite(stored)
    if nonfinite:
        raise InputError(
            f"{field}: {path}: tensor {nonfinite} (NaN or Inf); fetch it again, or use earlier weights"
        )
    network.load_state_dict(stored)
    return network


def is_plain_float(tensor: Tensor) -> bool:
    """Return whether a tensor is a float of 16 bits or more: int8 and float8 would need scales."""
    return tensor.is_floating_point() and tensor.element_size() >= 2
