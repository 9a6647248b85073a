# SPDX-License-Identifier: Apache-2.0
"""Position tables, and the two temporal encodings (Latte, Sec. 3.3.3).

Tables are functions of the requested size, computed in float64 and never stored, so any frame count and any
latent size work at call time. They are extended, never interpolated: frame, row and column i have the same
position in clips of every shape, so a model that is trained on several shapes learns one table. (LatteText
scales rows and columns instead, as PixArt does.)
As in the released layout, the spatial table has columns first, and every half is [sin, cos].
Axes: b batch, f frames, n tokens of a frame, d width, h heads, k head width.
"""

from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor, nn

from latte.checks import check
from latte.model.config import TEMPORAL_POSITIONS as TEMPORAL_POSITIONS

BASE = 10000.0


def sincos(positions: Tensor, width: int) -> Tensor:
    """Return (l, width) float64 for positions (l,): [sin, cos] of width/2 frequencies."""
    exponents = torch.arange(width // 2, dtype=torch.float64, device="cpu") / (width // 2)
    angles = positions.double()[:, None] * BASE**-exponents  # (l width/2)
    return torch.cat([angles.sin(), angles.cos()], dim=1)  # (l width)


@lru_cache(maxsize=32)
def spatial_table(rows: int, columns: int, width: int) -> Tensor:
    """Return (rows columns, width) float32, row by row.

    Half the width encodes the column, the other half the row.
    """
    y, x = torch.meshgrid(
        torch.arange(rows, device="cpu"), torch.arange(columns, device="cpu"), indexing="ij"
    )
    return torch.cat([sincos(x.flatten(), width // 2), sincos(y.flatten(), width // 2)], dim=1).float()


@lru_cache(maxsize=32)
def temporal_table(frames: int, width: int) -> Tensor:
    """Return (frames, width) float32: [sin, cos] of the frame index."""
    return sincos(torch.arange(frames, device="cpu"), width).float()


class TemporalPosition(Protocol):
    """How a model knows the order of frames; made from the width of one head."""

    free_length: bool
    """Whether more frames than in training need no warning."""

    def add(self, x: Tensor, start: int = 0) -> Tensor:
        """Return tokens (b f n d) of frames from ``start`` with their position, before the first block that
        mixes time.
        """
        ...

    def rotate(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Return queries and keys (b h f k) of temporal attention with their position."""
        ...


class AbsoluteTime(nn.Module):
    """Sine and cosine of the frame index, added to the tokens once."""

    free_length = False

    def __init__(self, head_width: int):
        super().__init__()

    def add(self, x: Tensor, start: int = 0) -> Tensor:
        """Return tokens (b f n d) plus the table of their frame."""
        return x + temporal_table(start + x.shape[1], x.shape[-1]).to(x)[start:, None]

    def rotate(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Return queries and keys (b h f k) unchanged."""
        return q, k


class RotaryTime(nn.Module):
    """Rotary embedding (RoPE, arXiv 2104.09864) of temporal queries and keys, base 10000.

    Channel j is paired with channel j + k/2, over the whole head width k. Attention depends on differences of
    frame indices only, so any length works.
    """

    free_length = True

    def __init__(self, head_width: int):
        super().__init__()
        check(
            head_width % 2 == 0,
            f"the head width (model.width / model.heads) is {head_width}, but rotary positions need an even "
            f"one; change model.heads, e.g. for a head width of {head_width + 1}",
        )

    def add(self, x: Tensor, start: int = 0) -> Tensor:
        """Return the tokens unchanged."""
        return x

    def rotate(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Return queries and keys (b h f k), each rotated by its frame index."""
        sin, cos = temporal_table(q.shape[-2], q.shape[-1]).to(q).chunk(2, dim=-1)  # each (f k/2)
        return rotate_pairs(q, sin, cos), rotate_pairs(k, sin, cos)


def rotate_pairs(x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
    """Rotate the pairs (j, j + k/2) of x (... f k) by the angles whose sine and cosine (f, k/2) are given."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
