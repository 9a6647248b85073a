# SPDX-License-Identifier: Apache-2.0
"""A block is a row of residual branches: attention over space, attention over time, an MLP.

The variant chooses the branches, the conditioning decides how a branch is wrapped, and neither knows the other. All attentions of
a block share one (shift, scale, gate) triple of its modulation and the MLP has the other (Latte, Sec. 3.2: 6 d outputs per block).
Stills pass through the same blocks with attention over time left out, so a still never leaks into motion (Sec. 3.3.4).
Axes: b batch, f frames (or stills), n tokens of a frame, d width, h heads, k head width, l sequence.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latte.model.positions import AbsoluteTime, RotaryTime


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """The one attention function: (b h l k) queries, keys, values -> (b h l k), softmax(q k' / sqrt(k)) v.

    ``mask`` is bool, True where a key may be seen, and broadcasts to (b h l l).
    """
    return F.scaled_dot_product_attention(q, k, v, mask)


class Attention(nn.Module):
    """Multi-head self-attention's weights: qkv and output projection, with bias."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def split(self, x: Tensor) -> Tensor:
        """(b f n d) -> (b f n 3 h k)."""
        return self.qkv(x).unflatten(-1, (3, self.heads, -1))


class SpaceAttention(Attention):
    """Every frame by itself."""

    video_only = False

    def forward(self, x: Tensor, stills: bool = False) -> Tensor:
        """(b f n d) -> (b f n d)."""
        q, k, v = self.split(x).flatten(0, 1).permute(2, 0, 3, 1, 4)  # each (bf h n k)
        return self.proj(attend(q, k, v).transpose(1, 2).flatten(2)).view(x.shape)


class TimeAttention(Attention):
    """Every position of the frame by itself, along the clip."""

    video_only = True

    def __init__(self, width: int, heads: int, position: AbsoluteTime | RotaryTime):
        super().__init__(width, heads)
        self.position = position

    def forward(self, x: Tensor, stills: bool = False) -> Tensor:
        """(b f n d) -> (b f n d)."""
        b, f, n, d = x.shape
        q, k, v = self.split(x).permute(3, 0, 2, 4, 1, 5).flatten(1, 2)  # each (bn h f k)
        y = attend(*self.position.rotate(q, k), v)
        return self.proj(y.unflatten(0, (b, n)).permute(0, 3, 1, 2, 4).reshape(b, f, n, d))


class SpaceAndTimeAttention(nn.Module):
    """Variant 4's pair: both attentions read the same normed tokens, each with half of the heads, and their results are added."""

    video_only = False

    def __init__(self, width: int, heads: int, position: AbsoluteTime | RotaryTime):
        super().__init__()
        self.space, self.time = SpaceAttention(width, heads // 2), TimeAttention(width, heads // 2, position)

    def forward(self, x: Tensor, stills: bool = False) -> Tensor:
        """(b f n d) -> (b f n d); stills get the spatial half alone."""
        return self.space(x) if stills else self.space(x) + self.time(x)


class JointAttention(Attention):
    """Every token of the clip sees every other: the costly baseline that the four variants factorise. A still sees itself."""

    video_only = False

    def __init__(self, width: int, heads: int, position: AbsoluteTime | RotaryTime):
        super().__init__(width, heads)
        self.position = position

    def forward(self, x: Tensor, stills: bool = False) -> Tensor:
        """(b f n d) -> (b f n d)."""
        q, k, v = self.split(x).permute(3, 0, 1, 4, 2, 5)  # each (b f h n k)
        if stills:
            return self.proj(attend(q, k, v).transpose(2, 3).flatten(3))
        q, k, v = (y.permute(0, 2, 3, 1, 4) for y in (q, k, v))  # each (b h n f k)
        q, k = self.position.rotate(q, k)
        y = attend(q.flatten(2, 3), k.flatten(2, 3), v.flatten(2, 3)).unflatten(2, (x.shape[2], x.shape[1]))
        return self.proj(y.permute(0, 3, 2, 1, 4).flatten(3))


class MLP(nn.Module):
    """Two linear layers around a tanh-GELU, four times as wide inside."""

    video_only = False

    def __init__(self, width: int, ratio: int = 4):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, ratio * width), nn.Linear(ratio * width, width)

    def forward(self, x: Tensor, stills: bool = False) -> Tensor:
        """(b f n d) -> (b f n d)."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    """x + gate * branch(norm(x) * (1 + scale) + shift), branch after branch.

    Stills skip the branches marked ``video_only``, and with ``video_only`` the whole block (the temporal blocks of variants 1 and 2).
    """

    def __init__(
        self,
        branches: dict[str, nn.Module],
        width: int,
        modulation: nn.Module,
        affine_norm: bool,
        video_only: bool = False,
    ):
        super().__init__()
        self.branches = nn.ModuleDict(branches)
        self.norms = nn.ModuleDict(
            {name: nn.LayerNorm(width, eps=1e-6, elementwise_affine=affine_norm) for name in branches}
        )
        self.modulation, self.video_only = modulation, video_only

    def forward(self, x: Tensor, c: Tensor, stills: bool = False) -> Tensor:
        """Tokens (b f n d), condition (b f|1 d) -> tokens (b f n d)."""
        if stills and self.video_only:
            return x
        chunks = self.modulation(c)
        for name, branch in self.branches.items():
            if stills and branch.video_only:
                continue
            shift, scale, gate = chunks[3:] if name == "mlp" else chunks[:3]
            y = branch(modulate(self.norms[name](x), shift, scale), stills)
            x = x + y if gate is None else torch.addcmul(x, gate, y)
        return x


def modulate(x: Tensor, shift: Tensor | None, scale: Tensor | None) -> Tensor:
    """x (1 + scale) + shift over tokens (b f n d); unchanged when there is nothing to modulate with."""
    return x if scale is None else torch.addcmul(shift, x, 1 + scale)
