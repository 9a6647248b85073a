# SPDX-License-Identifier: Apache-2.0
"""Where a token is: the spatial table, and the two ways of telling time (Latte, Sec. 3.3.3).

Tables are functions of the size asked for, computed in float64 and never stored, so any frame count and any size can be had at
call time. Trap of the released layout: in the spatial table columns come first, and every half is [sin, cos].
Axes: b batch, f frames, n tokens of a frame, d width, h heads, k head width.
"""

from functools import lru_cache

import torch
from torch import Tensor, nn

from latte.checks import require

BASE = 10000.0


def sincos(positions: Tensor, width: int) -> Tensor:
    """(l,) positions -> (l, width) as [sin, cos] of width/2 frequencies, float64."""
    omega = BASE ** -(torch.arange(width // 2, dtype=torch.float64, device="cpu") / (width // 2))
    angle = positions.double()[:, None] * omega
    return torch.cat([angle.sin(), angle.cos()], dim=1)


@lru_cache(maxsize=32)
def spatial_table(rows: int, columns: int, width: int) -> Tensor:
    """(rows columns, width) float32, row by row: the first half of the width codes the column, the second the row."""
    y, x = torch.meshgrid(
        torch.arange(rows, device="cpu"), torch.arange(columns, device="cpu"), indexing="ij"
    )
    return torch.cat([sincos(x.flatten(), width // 2), sincos(y.flatten(), width // 2)], dim=1).float()


@lru_cache(maxsize=32)
def temporal_table(frames: int, width: int) -> Tensor:
    """(frames, width) float32, [sin, cos] of the frame index."""
    return sincos(torch.arange(frames, device="cpu"), width).float()


class AbsoluteTime(nn.Module):
    """Sine and cosine of the frame index, added once where time enters the backbone."""

    free_length = False

    def __init__(self, head_width: int):
        super().__init__()

    def add(self, x: Tensor) -> Tensor:
        """Tokens (b f n d) plus the table of their frame."""
        return x + temporal_table(x.shape[1], x.shape[-1]).to(x)[:, None]

    def rotate(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Leaves (b h f k) queries and keys alone."""
        return q, k


class RotaryTime(nn.Module):
    """Rotary embedding (RoPE, arXiv 2104.09864) of queries and keys of temporal attention: base 10000, all of the head width.

    Channel j is paired with channel j + k/2. The scores depend on differences of frame indices only, so the frame count is free.
    """

    free_length = True

    def __init__(self, head_width: int):
        super().__init__()
        require(
            head_width % 2 == 0,
            "head width (model.width / model.heads)",
            head_width,
            "rotary positions turn pairs of channels",
            f"choose heads so that it is even, e.g. {head_width + 1}",
        )

    def add(self, x: Tensor) -> Tensor:
        """Leaves the tokens alone."""
        return x

    def rotate(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys (b h f k), each turned by its frame index."""
        sin, cos = temporal_table(q.shape[-2], q.shape[-1]).to(q).chunk(2, dim=-1)
        return turn(q, sin, cos), turn(k, sin, cos)


def turn(x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
    """Rotate the pairs (j, j + k/2) of x (... f k) by the angles whose sine and cosine (f, k/2) are given."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


TEMPORAL_POSITIONS = {"absolute": AbsoluteTime, "rotary": RotaryTime}
