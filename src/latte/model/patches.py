# SPDX-License-Identifier: Apache-2.0
"""Latent frames to tokens and back (Latte, Sec. 3.3.1).

Uniform patches cut every frame by itself; compression patches cut tubes of s frames, and a 3-D transposed
convolution brings the frames back. To add a patch embedding: one class with the members of ``Patch``, and one
entry in ``config.PATCHES``.
Axes: b batch, f frames (or images), i images, c channels, h w latent size, n tokens of a frame, d width, p
patch side, s tube, o output channels.
"""

from typing import Any, Protocol

from torch import Tensor, nn

from latte.checks import check
from latte.model.config import PATCHES as PATCHES
from latte.model.config import one_frame, tube_frames


class Patch(Protocol):
    """A patch embedding: an nn.Module made from a model's configuration and its width."""

    tube: int
    """Latent frames of one token."""
    out_features: int
    """Outputs of the last linear layer per token."""

    @staticmethod
    def frames_per_token(config: Any) -> int:
        """Return latent frames of one token, before anything is built."""
        ...

    def initialise(self) -> None:
        """Initialise the weights."""
        ...

    def embed(self, z: Tensor, images: bool = False) -> Tensor:
        """Return tokens (b f/s n d) of latents (b f c h w); of images (b i c h w): (b i n d)."""
        ...

    def unembed(self, x: Tensor, grid: tuple[int, int], images: bool = False) -> Tensor:
        """Return latents (b f o h w) of tokens (b f/s n out_features) on a grid of h/p x w/p."""
        ...


class UniformPatch(nn.Module):
    """One token per p x p square of every frame."""

    tube = 1
    proj: Any  # nn.Conv2d

    def __init__(self, config: Any, width: int):
        super().__init__()
        self.p = config.patch_size
        self.out_channels = config.latent_channels * (2 if config.learn_sigma else 1)
        self.out_features = self.p * self.p * self.out_channels
        self.proj = nn.Conv2d(config.latent_channels, width, self.p, stride=self.p)

    frames_per_token = staticmethod(one_frame)

    def initialise(self) -> None:
        """Initialise the convolution as the linear layer on flattened patches that it is."""
        nn.init.xavier_uniform_(self.proj.weight.view(self.proj.out_channels, -1))
        nn.init.zeros_(self.proj.bias)

    def embed(self, z: Tensor, images: bool = False) -> Tensor:
        """Return tokens (b f n d) of latents (b f c h w)."""
        x = self.proj(z.flatten(0, 1))  # (bf d h/p w/p)
        return x.flatten(2).mT.unflatten(0, (z.shape[0], -1))  # (b f n d)

    def unembed(self, x: Tensor, grid: tuple[int, int], images: bool = False) -> Tensor:
        """Return latents (b f o h w) of tokens (b f n ppo) on a grid of h/p x w/p."""
        return unpatchify(x, grid, self.p)


class CompressionPatch(nn.Module):
    """One token per tube of s frames x p x p; a transposed convolution of (s, 1, 1) restores the f frames.

    An image counts as a tube of s equal frames, and its output is the mean over the tube.
    """

    proj: Any  # nn.Conv3d
    expand: Any  # nn.ConvTranspose3d

    def __init__(self, config: Any, width: int):
        super().__init__()
        self.p = config.patch_size
        self.tube = config.tube
        self.out_channels = config.latent_channels * (2 if config.learn_sigma else 1)
        self.out_features = self.p * self.p * self.out_channels
        kernel = (self.tube, self.p, self.p)
        self.proj = nn.Conv3d(config.latent_channels, width, kernel, stride=kernel)
        kernel = (self.tube, 1, 1)
        self.expand = nn.ConvTranspose3d(self.out_channels, self.out_channels, kernel, stride=kernel)

    frames_per_token = staticmethod(tube_frames)

    def initialise(self) -> None:
        """Initialise the convolution as a linear layer on flattened tubes.

        The transposed one repeats every frame of the tube.
        """
        nn.init.xavier_uniform_(self.proj.weight.view(self.proj.out_channels, -1))
        nn.init.zeros_(self.proj.bias)
        nn.init.zeros_(self.expand.weight)
        nn.init.zeros_(self.expand.bias)
        for channel in range(self.out_channels):
            nn.init.ones_(self.expand.weight[channel, channel])

    def embed(self, z: Tensor, images: bool = False) -> Tensor:
        """Return tokens (b f/s n d) of latents (b f c h w); of images (b i c h w): (b i n d)."""
        if images:
            z = z.repeat_interleave(self.tube, dim=1)  # (b is c h w)
        frames = z.shape[1]
        check(
            frames % self.tube == 0,
            f"the clip has {frames} latent frames, but compression patches need a multiple of model.tube = "
            f"{self.tube}; the nearest is {max(round(frames / self.tube), 1) * self.tube}",
        )
        x = self.proj(z.transpose(1, 2))  # (b d f/s h/p w/p)
        return x.flatten(3).permute(0, 2, 3, 1)  # (b f/s n d)

    def unembed(self, x: Tensor, grid: tuple[int, int], images: bool = False) -> Tensor:
        """Return latents (b f o h w) of tokens (b f/s n ppo); of images (b i n ppo): (b i o h w)."""
        z = unpatchify(x, grid, self.p).transpose(1, 2)  # (b o f/s h w)
        z = self.expand(z).transpose(1, 2)  # (b f o h w)
        if images:
            return z.unflatten(1, (-1, self.tube)).mean(2)  # (b i o h w)
        return z


def unpatchify(x: Tensor, grid: tuple[int, int], p: int) -> Tensor:
    """Return frames (b f o h w) of tokens (b f n ppo), n row by row over ``grid``."""
    b, f = x.shape[:2]
    rows, columns = grid
    x = x.reshape(b, f, rows, columns, p, p, -1)  # (b f h/p w/p p p o)
    x = x.permute(0, 1, 6, 2, 4, 3, 5)  # (b f o h/p p w/p p)
    return x.reshape(b, f, -1, rows * p, columns * p)  # (b f o h w)
