# SPDX-License-Identifier: Apache-2.0
"""The interface of every codec, frames in and latents out a few at a time, its fingerprint; and the codec of
plain pixels.

A subclass handles single frames only. Scaling to about unit variance belongs to the codec: callers never see
raw latents.
Axes: b batch, f frames, n = b f, c latent channels, H W pixels, h w = H W / downscale.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from latte.checks import check


class Codec(ABC):
    """Frames (b f 3 H W) in [-1, 1] <-> latents (b f c h w) of about unit variance.

    ``chunk`` frames are processed at a time on ``device``. The network is frozen and in evaluation mode. Both
    directions return contiguous float32 on the codec's device. A subclass states what others need to know
    before any weight is read.
    """

    name: ClassVar[str]
    """Key of ``codec.CODECS``."""
    channels: ClassVar[int]
    """Channels of the latent."""
    downscale: ClassVar[int]
    """Pixels per latent row and column."""
    path: str | None = None
    """Where ``build_codec`` found the weights."""
    scale: float = 1.0
    """What raw latents are multiplied by."""
    stochastic: ClassVar[bool] = False
    """Whether ``encode`` samples a posterior when given a generator."""
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

    @abstractmethod
    def encode_frames(self, frames: Tensor, noise: Tensor | None) -> Tensor:
        """Return scaled latents (n c h w) of frames (n 3 H W) in [-1, 1].

        ``noise`` (n c h w) standard normal samples the posterior; None takes its mean.
        """

    @abstractmethod
    def decode_frames(self, latent: Tensor) -> Tensor:
        """Return frames (n 3 H W), about [-1, 1], of scaled latents (n c h w)."""

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits of SHA-256 over name, scale and float32 weights, whatever file they are in."""
        digest = hashlib.sha256(f"{self.name} {self.scale!r}".encode())
        for key, tensor in sorted(self.network.state_dict().items()):
            digest.update(f" {key} {tuple(tensor.shape)} ".encode())
            digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def to(self, device: str | torch.device) -> None:
        """Move the network to ``device`` and work there from now on."""
        self.device = torch.device(device)
        self.network.to(self.device)

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Return (c, h, w) of a frame of height x width; InputError unless ``downscale`` divides both."""
        for field, size in (("frame height", height), ("frame width", width)):
            check(
                size > 0 and size % self.downscale == 0,
                f"{field} is {size}, but codec {self.name!r} needs a multiple of {self.downscale}",
            )
        return self.channels, height // self.downscale, width // self.downscale

    def encode(self, frames: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return latents (b f c h w) of frames (b f 3 H W) float in [-1, 1].

        With a generator a stochastic codec samples, without it takes the mean. Noise is drawn for the whole
        call before the first chunk, so the result depends on ``generator`` and not on ``chunk``.
        """
        check(
            frames.ndim == 5 and frames.shape[2] == 3,
            f"frames have shape {tuple(frames.shape)}, but a codec encodes (batch, frames, 3, height, width)",
        )
        shape = self.latent_shape(*frames.shape[-2:])
        noise = None
        if generator is not None and self.stochastic:
            noise = torch.randn((*frames.shape[:2], *shape), generator=generator).flatten(0, 1)  # (n c h w)
        return self._in_chunks(self.encode_frames, frames, noise)

    def decode(self, latent: Tensor) -> Tensor:
        """Return frames (b f 3 H W) in [-1, 1], clamped, of latents (b f c h w)."""
        check(
            latent.ndim == 5 and latent.shape[2] == self.channels,
            f"the latent has shape {tuple(latent.shape)}, but codec {self.name!r} decodes (batch, frames, "
            f"{self.channels}, height, width); use the codec that the latents or the model were made with",
        )
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


class PixelCodec(Codec):
    """No autoencoder: the pixels themselves, for small experiments and exact tests."""

    name = "pixels"
    channels = 3
    downscale = 1

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
