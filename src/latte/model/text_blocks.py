# SPDX-License-Identifier: Apache-2.0
"""The blocks of the text-to-video model: PixArt's spatial block, which also looks at the caption, and its temporal twin, which does not.

All blocks share one modulation of the timestep; each adds a small table of its own to it (adaLN-single, PixArt-alpha, arXiv 2310.00426).
Axes: b batch, f frames (or stills), g captions of a clip (1, or f), n tokens of a frame, l tokens of a caption, d width, s sequence.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latte.model.blocks import MLP, attend, modulate


class SplitAttention(nn.Module):
    """Queries, keys, values and output, a matrix and a bias each, as PixArt keeps them: an adapter can take hold of one of them."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor, source: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Tokens x (b s d) look at ``source`` (b l d), or at themselves -> (b s d); ``mask`` (b l) is True where they may look."""
        source = x if source is None else source
        q, k, v = (
            y.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for y in (self.q(x), self.k(source), self.v(source))
        )
        y = attend(q, k, v, None if mask is None else mask[:, None, None])
        return self.proj(y.transpose(1, 2).flatten(2))


class Modulated(nn.Module):
    """What both blocks have: attention and MLP behind norms without weights, and the block's table (6 d) of the shared modulation."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.attention, self.mlp = SplitAttention(width, heads), MLP(width)
        self.table = nn.Parameter(torch.zeros(6, width))

    def chunks(self, shared: tuple[Tensor, ...]) -> list[Tensor]:
        """Shift, scale, gate of the attention, then of the MLP: six (b 1 1 d)."""
        return [chunk + row for chunk, row in zip(shared, self.table, strict=True)]


class SpaceBlock(Modulated):
    """Attention within a frame, cross-attention to the caption (neither normed nor gated), MLP."""

    def __init__(self, width: int, heads: int):
        super().__init__(width, heads)
        self.cross = SplitAttention(width, heads)

    def forward(self, x: Tensor, shared: tuple[Tensor, ...], text: Tensor, mask: Tensor | None) -> Tensor:
        """Tokens (b f n d), captions (b g l d) and where they are not padding (b g l) -> tokens (b f n d)."""
        shift, scale, gate, *of_mlp = self.chunks(shared)
        y = self.attention(modulate(self.norm(x), shift, scale).flatten(0, 1)).view(x.shape)
        x = torch.addcmul(x, gate, y)
        queries = x.reshape(
            text.shape[0] * text.shape[1], -1, x.shape[-1]
        )  # the frames of one caption side by side
        x = x + self.cross(queries, text.flatten(0, 1), None if mask is None else mask.flatten(0, 1)).view(
            x.shape
        )
        return torch.addcmul(x, of_mlp[2], self.mlp(modulate(self.norm(x), *of_mlp[:2])))


class TimeBlock(Modulated):
    """Attention of every position along the clip, MLP."""

    def forward(self, x: Tensor, shared: tuple[Tensor, ...]) -> Tensor:
        """Tokens (b f n d) -> tokens (b f n d)."""
        shift, scale, gate, *of_mlp = self.chunks(shared)
        y = self.attention(modulate(self.norm(x), shift, scale).transpose(1, 2).flatten(0, 1))
        x = torch.addcmul(x, gate, y.unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2))
        return torch.addcmul(x, of_mlp[2], self.mlp(modulate(self.norm(x), *of_mlp[:2])))


class CaptionProjection(nn.Module):
    """Features of the text encoder to the model's width: two linear layers around a tanh-GELU."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(channels, width), nn.Linear(width, width)

    def forward(self, text: Tensor) -> Tensor:
        """(... k) -> (... d)."""
        return self.fc2(F.gelu(self.fc1(text), approximate="tanh"))
