# SPDX-License-Identifier: Apache-2.0
"""Latent frames to tokens and back (Latte, Sec. 3.3.1).

Uniform patches cut every frame by itself; compression patches cut tubes of s frames and undo it with a 3-D transposed convolution.
Axes: b batch, f frames (or stills), i stills, c channels, h w latent size, n tokens of a frame, d width, p patch side, s tube,
o output channels.
"""

from typing import Protocol

from torch import Tensor, nn

from latte.checks import require


class PatchSpec(Protocol):
    """The part of ModelConfig that patching reads."""

    patch_size: int
    tube: int
    latent_channels: int
    learn_sigma: bool


class UniformPatch(nn.Module):
    """One token per p x p square of every frame."""

    tube = 1

    def __init__(self, config: PatchSpec, width: int):
        super().__init__()
        self.p, self.out_channels = (
            config.patch_size,
            config.latent_channels * (2 if config.learn_sigma else 1),
        )
        self.proj = nn.Conv2d(config.latent_channels, width, self.p, stride=self.p)

    @property
    def out_features(self) -> int:
        """Numbers that the last linear layer gives per token: p p o."""
        return self.p * self.p * self.out_channels

    def embed(self, z: Tensor, stills: bool = False) -> Tensor:
        """(b f c h w) -> tokens (b f n d)."""
        b = z.shape[0]
        return self.proj(z.flatten(0, 1)).flatten(2).mT.unflatten(0, (b, -1))

    def unembed(self, x: Tensor, grid: tuple[int, int], stills: bool = False) -> Tensor:
        """(b f n ppo) on a grid of h/p x w/p tokens -> (b f o h w)."""
        return fold(x, grid, self.p)


class CompressionPatch(nn.Module):
    """One token per tube of s frames x p x p; the output is brought back to f frames by a transposed convolution of (s, 1, 1).

    A still counts as a tube of s equal frames, and its output is the mean over the tube.
    """

    def __init__(self, config: PatchSpec, width: int):
        super().__init__()
        self.p, self.tube, self.out_channels = (
            config.patch_size,
            config.tube,
            config.latent_channels * (2 if config.learn_sigma else 1),
        )
        self.proj = nn.Conv3d(
            config.latent_channels, width, (self.tube, self.p, self.p), stride=(self.tube, self.p, self.p)
        )
        self.expand = nn.ConvTranspose3d(
            self.out_channels, self.out_channels, (self.tube, 1, 1), stride=(self.tube, 1, 1)
        )

    @property
    def out_features(self) -> int:
        """Numbers that the last linear layer gives per token: p p o."""
        return self.p * self.p * self.out_channels

    def embed(self, z: Tensor, stills: bool = False) -> Tensor:
        """(b f c h w) -> tokens (b f/s n d); stills (b i c h w) -> (b i n d)."""
        z = z.repeat_interleave(self.tube, dim=1) if stills else z
        require(
            z.shape[1] % self.tube == 0,
            "num_frames",
            z.shape[1],
            f"compression patches need a multiple of tube = {self.tube}",
            f"the nearest is {max(round(z.shape[1] / self.tube), 1) * self.tube}",
        )
        return self.proj(z.transpose(1, 2)).flatten(3).permute(0, 2, 3, 1)

    def unembed(self, x: Tensor, grid: tuple[int, int], stills: bool = False) -> Tensor:
        """(b f/s n ppo) -> (b f o h w); stills (b i n ppo) -> (b i o h w)."""
        out = self.expand(fold(x, grid, self.p).transpose(1, 2)).transpose(1, 2)
        return out.unflatten(1, (-1, self.tube)).mean(2) if stills else out


def fold(x: Tensor, grid: tuple[int, int], p: int) -> Tensor:
    """Tokens (b f n ppo), n row by row over ``grid``, to frames (b f o h w)."""
    b, f = x.shape[:2]
    x = x.reshape(b, f, *grid, p, p, -1)
    return x.permute(0, 1, 6, 2, 4, 3, 5).reshape(b, f, -1, grid[0] * p, grid[1] * p)


PATCHES = {"uniform": UniformPatch, "compression": CompressionPatch}
