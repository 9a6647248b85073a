# SPDX-License-Identifier: Apache-2.0
"""What every codec shares: clips in, clips out, a few frames at a time, and a hash that says which codec it was.

A subclass knows single frames only. Scaling to about unit variance belongs to the codec: callers never see raw latents.
Axes: b batch, f frames, n = b f, c latent channels, H W pixels, h w = H W / downscale.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor, nn

from latte.checks import require


class Codec(ABC):
    """Frames (b f 3 H W) in [-1, 1] <-> latents (b f c h w) of about unit variance, ``chunk`` frames at a time on ``device``.

    The network is frozen and in evaluation mode. Both ways return contiguous float32 on the codec's device.
    """

    name: str
    channels: int
    downscale: int
    scale: float = 1.0
    stochastic: bool = False  # does ``encode`` draw from a posterior when given a generator?

    def __init__(self, network: nn.Module, chunk: int = 16, device: str | torch.device = "cpu"):
        self.device, self.chunk = torch.device(device), chunk
        network = network.eval().requires_grad_(False)
        self.network: Any = nn.Module.to(
            network, self.device, torch.float32
        )  # diffusers' own warns of nothing
        for weight in self.network.parameters():
            if weight.ndim == 4:  # of convolutions over a frame; the format is not defined for others
                weight.data = weight.data.contiguous(memory_format=torch.channels_last)

    @classmethod
    @abstractmethod
    def load(cls, path: str | None, chunk: int, device: str | torch.device) -> Self:
        """The codec with the weights at ``path``, or an InputError in one line saying what is wrong with them."""

    @classmethod
    @abstractmethod
    def skeleton(cls, path: str | None) -> nn.Module:
        """The network of this codec without its weights, on the meta device; of the published one where ``path`` is not a folder here."""

    @abstractmethod
    def encode_frames(self, frames: Tensor, noise: Tensor | None) -> Tensor:
        """(n 3 H W) in [-1, 1] -> (n c h w), scaled; ``noise`` (n c h w) is the posterior's draw, None asks for its mean."""

    @abstractmethod
    def decode_frames(self, latent: Tensor) -> Tensor:
        """(n c h w), scaled -> (n 3 H W), about [-1, 1]."""

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits of SHA-256 over name, scale and weights (as float32): the same from any file name or container."""
        digest = hashlib.sha256(f"{self.name} {self.scale!r}".encode())
        for key, tensor in sorted(self.network.state_dict().items()):
            digest.update(f" {key} {tuple(tensor.shape)} ".encode())
            digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def to(self, device: str | torch.device) -> None:
        """Work on ``device`` from now on."""
        self.device = torch.device(device)
        self.network.to(self.device)

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(c, h, w) of a frame of height x width; InputError unless ``downscale`` divides both."""
        for field, size in (("frame height", height), ("frame width", width)):
            ok = size > 0 and size % self.downscale == 0
            require(
                ok,
                field,
                size,
                f"codec {self.name!r} shrinks {self.downscale} times",
                f"give a multiple of {self.downscale}",
            )
        return self.channels, height // self.downscale, width // self.downscale

    def encode(self, frames: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """(b f 3 H W) float in [-1, 1] -> (b f c h w). With a generator a stochastic codec samples, without it takes the mean.

        The draw is made for the whole call before any chunk, so the result depends on ``generator`` and not on ``chunk``.
        """
        rule = "a codec encodes frames of shape (batch, frames, 3, height, width)"
        require(
            frames.ndim == 5 and frames.shape[2] == 3,
            "shape of frames",
            tuple(frames.shape),
            rule,
            "pass RGB clips, channels third",
        )
        shape = self.latent_shape(*frames.shape[-2:])
        noise = None
        if generator is not None and self.stochastic:
            noise = torch.randn((*frames.shape[:2], *shape), generator=generator).flatten(0, 1)
        return self._in_chunks(self.encode_frames, frames, noise)

    def decode(self, latent: Tensor) -> Tensor:
        """(b f c h w) -> (b f 3 H W) in [-1, 1], clamped."""
        rule = f"codec {self.name!r} decodes latents of shape (batch, frames, {self.channels}, height, width)"
        ok = latent.ndim == 5 and latent.shape[2] == self.channels
        require(
            ok,
            "shape of latent",
            tuple(latent.shape),
            rule,
            "use the codec that the latents or the model were made with",
        )
        return self._in_chunks(lambda part, _: self.decode_frames(part), latent, None).clamp_(-1, 1)

    @torch.no_grad()
    def _in_chunks(
        self, function: Callable[[Tensor, Tensor | None], Tensor], clips: Tensor, noise: Tensor | None
    ) -> Tensor:
        """Apply ``function`` to (b f ...) flattened to frames, ``chunk`` frames at a time."""
        parts = []
        flat = clips.flatten(0, 1)
        for start in range(0, len(flat), self.chunk):
            take = slice(start, start + self.chunk)
            part = flat[take].to(self.device, torch.float32).contiguous(memory_format=torch.channels_last)
            parts.append(function(part, None if noise is None else noise[take].to(self.device)).contiguous())
        return torch.cat(parts).unflatten(0, clips.shape[:2])
