# SPDX-License-Identifier: Apache-2.0
"""The blocks of the text-to-video model (Latte, Sec. 4.4): PixArt's spatial block with cross-attention, and
the temporal one.

All blocks share one modulation of the timestep; each adds a small table of its own to it (adaLN-single,
PixArt-alpha, arXiv 2310.00426, Sec. 2.3).
Axes: b batch, f frames (or images), n tokens of a frame, d width, s l sequences, k channels of the text
encoder's features, g captions of a clip.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latte.model.attention_options import attention_options
from latte.model.blocks import PLAIN, attend, modulate, saves_less
from latte.model.config import MLPS, BlockOptions
from latte.model.fused import Modulated, gated_linear
from latte.model.sequence import SequenceParallel


class SplitAttention(nn.Module):
    """Attention with a matrix each for queries, keys, values and output, as in PixArt.

    An adapter can so address one of them.
    """

    def __init__(self, width: int, heads: int, options: BlockOptions = PLAIN):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width)
        self.v = nn.Linear(width, width)
        self.proj = nn.Linear(width, width)
        self.norm, self.value_residual = attention_options(options, width // heads)

    def forward(
        self,
        x: Tensor,
        source: Tensor | None = None,
        mask: Tensor | None = None,
        values: list[Tensor] | None = None,
    ) -> Tensor:
        """Return (b s d): tokens x (b s d) attend to ``source`` (b l d), or to themselves.

        ``mask`` (b l) is True at valid keys, None when all are. ``values`` (b l d), see ``ValueResidual``.
        """
        if source is None:
            source = x
        if mask is not None:
            mask = mask[:, None, None]  # (b 1 1 l)
        q = self.split_heads(self.q(x))  # (b h s d/h)
        k = self.split_heads(self.k(source))  # (b h l d/h)
        v = self.v(source)  # (b l d)
        if self.value_residual is not None and values is not None:
            v = self.value_residual(v, values)
        v = self.split_heads(v)  # (b h l d/h)
        if self.norm is not None:
            q, k = self.norm(q, k)
        y = attend(q, k, v, mask)
        return self.proj(y.transpose(1, 2).flatten(2))  # (b s d)

    def split_heads(self, x: Tensor) -> Tensor:
        """Return (b h s d/h) of (b s d)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (b h s d/h)


class ModulatedBlock(nn.Module):
    """What both blocks have.

    Attention, MLP, a norm without weights, and a table (6 d) added to the shared modulation. Abstract.
    """

    recompute: bool = False
    """Whether the backward pass recomputes what is cheap of the MLP, see ``latte.model.fused``."""

    def __init__(self, width: int, heads: int, options: BlockOptions = PLAIN):
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.attention = SplitAttention(width, heads, options)
        self.mlp = MLPS[options.mlp](width)
        self.table = nn.Parameter(torch.zeros(6, width))

    def chunks(self, shared: tuple[Tensor, ...]) -> list[Tensor]:
        """Return shift, scale and gate of the attention, then of the MLP: six (b 1 1 d)."""
        return [chunk + row for chunk, row in zip(shared, self.table, strict=True)]

    def add_mlp(self, x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor) -> Tensor:
        """Return tokens (b f n d) plus the gated MLP."""
        if self.recompute and saves_less(self.mlp, gate):
            inner = self.mlp.inner(Modulated(x, shift, scale, self.norm.eps))
            return gated_linear(x, gate, self.mlp.fc2, inner, self.mlp.gelu)
        return torch.addcmul(x, gate, self.mlp(modulate(self.norm(x), shift, scale)))


class SpaceBlock(ModulatedBlock):
    """Attention within a frame, cross-attention to the caption (neither normed nor gated), MLP."""

    def __init__(self, width: int, heads: int, options: BlockOptions = PLAIN):
        super().__init__(width, heads, options)
        self.cross = SplitAttention(width, heads, replace(options, value_residual=False))

    def forward(
        self,
        x: Tensor,
        shared: tuple[Tensor, ...],
        text: Tensor,
        mask: Tensor | None,
        first: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return tokens (b f n d) from tokens (b f n d) and captions (b g l d).

        ``mask`` (b g l) is True at the captions' valid tokens. With value residuals, return the values of
        the model's first attention, too: ``first`` (b f n d), or those of the attention here.
        """
        shift, scale, gate, *mlp_chunks = self.chunks(shared)
        values = [tensor.flatten(0, 1) for tensor in (first,) if tensor is not None]  # (bf n d)
        y = modulate(self.norm(x), shift, scale).flatten(0, 1)  # (bf n d)
        x = torch.addcmul(x, gate, self.attention(y, values=values).view(x.shape))
        # all frames of one caption in one sequence
        queries = x.reshape(text.shape[0] * text.shape[1], -1, x.shape[-1])  # (bg f/g*n d)
        caption_mask = None if mask is None else mask.flatten(0, 1)  # (bg l)
        x = x + self.cross(queries, text.flatten(0, 1), caption_mask).view(x.shape)
        x = self.add_mlp(x, *mlp_chunks)
        if not values:
            return x
        return x, values[0].view(x.shape)


class TimeBlock(ModulatedBlock):
    """Attention of every position along the clip, MLP."""

    sequence: SequenceParallel | None = None
    """The processes that share each clip."""

    def forward(
        self, x: Tensor, shared: tuple[Tensor, ...], first: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return tokens (b f n d) from tokens (b f n d); with ``first`` (b f n d), that behind them."""
        shift, scale, gate, *mlp_chunks = self.chunks(shared)
        given = [part for part in (first,) if part is not None]
        tokens = [modulate(self.norm(x), shift, scale), *given]  # each (b f n d)
        if self.sequence:
            tokens = [self.sequence.to_all_frames(part) for part in tokens]
        y, *values = (part.transpose(1, 2).flatten(0, 1) for part in tokens)  # each (bn f d)
        y = self.attention(y, values=values)  # (bn f d)
        y = y.unflatten(0, (x.shape[0], -1)).transpose(1, 2)  # (b f n d)
        if self.sequence:
            y = self.sequence.to_own_frames(y, x.shape[2])
        x = self.add_mlp(torch.addcmul(x, gate, y), *mlp_chunks)
        if first is None:
            return x
        return x, first


class CaptionProjection(nn.Module):
    """Features of the text encoder to the model's width: two linear layers around a tanh-GELU."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.fc1 = nn.Linear(channels, width)
        self.fc2 = nn.Linear(width, width)

    def forward(self, text: Tensor) -> Tensor:
        """Return (... d) of features (... k)."""
        return self.fc2(F.gelu(self.fc1(text), approximate="tanh"))


class PooledCaption(nn.Module):
    """The mean of a caption's tokens, to be added to the timestep's embedding, which modulates every block:
    temporal blocks have no cross-attention, and without it know no word, such as a direction, themselves.
    """

    def __init__(self, width: int):
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, text: Tensor, mask: Tensor | None) -> Tensor:
        """Return (b g d) of tokens (b g l d); ``mask`` (b g l) is True at valid ones, None when all are."""
        if mask is None:
            return self.linear(text.mean(2))
        valid = mask[..., None].to(text)  # (b g l 1)
        return self.linear((text * valid).sum(2) / valid.sum(2))
