# SPDX-License-Identifier: Apache-2.0
"""A block is a list of residual branches: attention over space, attention over time, an MLP.

The variant chooses the branches, the conditioning decides how a branch is modulated, and neither knows the
other. A branch states which (shift, scale, gate) of the block's modulation it uses, whether it mixes time,
and its cost by Table 3's rule; so a new kind of branch is one class. Images pass through the same blocks
without attention over time (Latte, Sec. 3.3.4).
Axes: b batch, f frames (or images), n tokens of a frame, d width, h heads, k head width, l sequence.
"""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latte.model.attention_options import attention_options
from latte.model.conditioning import Conditioning
from latte.model.config import BlockOptions, nearest_multiple
from latte.model.fused import Modulated, activated, again, gated_linear, is_plain, modulated_linear
from latte.model.positions import TemporalPosition
from latte.model.sequence import SequenceParallel

ATTENTION_SLOT = 0  # all attentions of a block share one (shift, scale, gate), Latte, Sec. 3.2
MLP_SLOT = 1
PLAIN = BlockOptions()


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return softmax(q k' / sqrt(k)) v of queries, keys and values, each (b h l k).

    ``mask`` is bool, True where a key may be attended to, and broadcasts to (b h l l).
    """
    return F.scaled_dot_product_attention(q, k, v, mask)


class Branch(nn.Module):
    """One residual branch of a block, (b f n d) -> (b f n d). Abstract.

    Override ``forward`` and whatever differs from the defaults.
    """

    modulation_slot: ClassVar[int] = ATTENTION_SLOT
    """Which (shift, scale, gate) of the block's modulation it uses.

    A block has as many as its branches ask for.
    """
    mixes_time: ClassVar[bool] = False
    """Whether frames of a clip influence each other in it."""
    reads_values: ClassVar[bool] = False
    """Whether ``forward`` and ``inner`` also take a list of values, see ``ValueResidual``."""

    @property
    def skips_images(self) -> bool:
        """Whether images leave it out.

        One that mixes time but accepts ``images=True`` overrides this with False.
        """
        return self.mixes_time

    def table3_rows(self, frames: int, positions: int) -> int:
        """Return how often Table 3 counts the block's modulation for this branch.

        That is once per sequence that it attends over. ``frames`` and ``positions`` are those of a clip's
        tokens; a branch without attention counts 0.
        """
        return 0

    @property
    def ends(self) -> tuple[nn.Module, nn.Module] | None:
        """The first and the last linear layer of a branch that has ``inner``; None for any other."""
        return None

    @property
    def gelu(self) -> bool:
        """Whether a GELU stands between ``inner`` and the last linear layer."""
        return False

    def inner(self, x: Tensor | Modulated, images: bool = False) -> Tensor:
        """Return what the last linear layer takes, before a GELU: (b f n k) from modulated tokens."""
        raise NotImplementedError

    def forward(self, x: Tensor, images: bool = False) -> Tensor:
        """Return (b f n d) from modulated tokens (b f n d).

        With ``images`` every frame must be treated by itself.
        """
        raise NotImplementedError


def project(layer: nn.Module, x: Tensor | Modulated) -> Tensor:
    """Return layer(x) of modulated tokens, or of what they will be computed from."""
    return modulated_linear(layer, x) if isinstance(x, Modulated) else layer(x)


class Attention(Branch):
    """Weights of multi-head self-attention: qkv and output projection, with bias. Abstract."""

    reads_values = True

    def __init__(self, width: int, heads: int, options: BlockOptions = PLAIN):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm, self.value_residual = attention_options(options, width // heads)

    @property
    def ends(self) -> tuple[nn.Module, nn.Module]:
        """qkv and the output projection."""
        return self.qkv, self.proj

    def split(self, x: Tensor | Modulated, values: list[Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values, each (b f n h k), of tokens (b f n d)."""
        q, k, v = project(self.qkv, x).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        if self.norm is not None:
            q, k = self.norm(q, k)
        if self.value_residual is not None and values is not None:
            v = self.value_residual(v, values)
        return q, k, v

    def inner(
        self, x: Tensor | Modulated, images: bool = False, values: list[Tensor] | None = None
    ) -> Tensor:
        """Return what the output projection takes: (b f n d) from tokens (b f n d)."""
        raise NotImplementedError

    def forward(self, x: Tensor, images: bool = False, values: list[Tensor] | None = None) -> Tensor:
        """Return (b f n d) from tokens (b f n d)."""
        return self.proj(self.inner(x, images, values))


class SpaceAttention(Attention):
    """Attention among the tokens of each frame."""

    def table3_rows(self, frames: int, positions: int) -> int:
        """Return one row per frame."""
        return frames

    def inner(
        self, x: Tensor | Modulated, images: bool = False, values: list[Tensor] | None = None
    ) -> Tensor:
        """Return (b f n d) from tokens (b f n d)."""
        q, k, v = (y.flatten(0, 1).transpose(1, 2) for y in self.split(x, values))  # each (bf h n k)
        return attend(q, k, v).transpose(1, 2).reshape(x.shape)  # (b f n d)


class TimeAttention(Attention):
    """Attention among the frames of a clip, at each position by itself."""

    mixes_time = True
    sequence: SequenceParallel | None = None

    def __init__(self, width: int, heads: int, position: TemporalPosition, options: BlockOptions = PLAIN):
        super().__init__(width, heads, options)
        self.position = position

    def table3_rows(self, frames: int, positions: int) -> int:
        """Return one row per position."""
        return positions

    def inner(
        self, x: Tensor | Modulated, images: bool = False, values: list[Tensor] | None = None
    ) -> Tensor:
        """Return (b f n d) from tokens (b f n d)."""
        num_tokens = x.shape[2]
        if self.sequence and not isinstance(x, Modulated):
            x = self.sequence.to_all_frames(x)
            values = values and [self.sequence.to_all_frames(value) for value in values]
        b, f, n, d = x.shape
        split = self.split(x, values)  # each (b f n h k)
        q, k, v = (y.permute(0, 2, 3, 1, 4).flatten(0, 1) for y in split)  # each (bn h f k)
        y = attend(*self.position.rotate(q, k), v)  # (bn h f k)
        y = y.unflatten(0, (b, n)).permute(0, 3, 1, 2, 4)  # (b f n h k)
        y = y.reshape(b, f, n, d)  # (b f n d)
        if self.sequence:
            y = self.sequence.to_own_frames(y, num_tokens)
        return y


class SpaceAndTimeAttention(Branch):
    """Variant 4's pair.

    Both attentions read the same normed tokens, each with half of the heads, and their results are added.
    """

    mixes_time = True
    reads_values = True

    def __init__(self, width: int, heads: int, position: TemporalPosition, options: BlockOptions = PLAIN):
        super().__init__()
        self.space = SpaceAttention(width, heads // 2, options)
        self.time = TimeAttention(width, heads // 2, position, options)

    @property
    def skips_images(self) -> bool:
        """False: images use the spatial half."""
        return False

    def table3_rows(self, frames: int, positions: int) -> int:
        """Return the rows of both."""
        return frames + positions

    def forward(self, x: Tensor, images: bool = False, values: list[Tensor] | None = None) -> Tensor:
        """Return (b f n d) from tokens (b f n d); images get the spatial half alone."""
        space = self.space(x, values=values)
        if images:
            return space
        return space + self.time(x, values=values)


class JointAttention(Attention):
    """Attention among all tokens of a clip: the costly baseline that the four variants factorise.

    An image attends to its own tokens only.
    """

    mixes_time = True
    sequence: SequenceParallel | None = None

    def __init__(self, width: int, heads: int, position: TemporalPosition, options: BlockOptions = PLAIN):
        super().__init__(width, heads, options)
        self.position = position

    @property
    def skips_images(self) -> bool:
        """False: an image attends to itself."""
        return False

    def table3_rows(self, frames: int, positions: int) -> int:
        """Return a single row: one sequence per clip."""
        return 1

    def inner(
        self, x: Tensor | Modulated, images: bool = False, values: list[Tensor] | None = None
    ) -> Tensor:
        """Return (b f n d) from tokens (b f n d)."""
        q, k, v = (y.transpose(2, 3) for y in self.split(x, values))  # each (b f h n k)
        if images:
            return attend(q, k, v).transpose(2, 3).flatten(3)  # (b f n d)
        if self.sequence:
            heads = torch.stack((q, k, v), -1)  # (b f h n k 3)
            q, k, v = self.sequence.to_all_frames(heads).unbind(-1)  # each (b f h n k), some heads
        q, k, v = (y.permute(0, 2, 3, 1, 4) for y in (q, k, v))  # each (b h n f k)
        n, f = q.shape[2:4]
        q, k = self.position.rotate(q, k)
        y = attend(q.flatten(2, 3), k.flatten(2, 3), v.flatten(2, 3))  # (b h nf k)
        y = y.unflatten(2, (n, f)).permute(0, 3, 2, 1, 4)  # (b f n h k)
        if self.sequence:
            y = self.sequence.to_own_frames(y, self.heads, axis=3)
        return y.flatten(3)  # (b f n d)


class MLP(Branch):
    """Two linear layers around a tanh-GELU, four times as wide inside."""

    modulation_slot = MLP_SLOT

    def __init__(self, width: int, ratio: int = 4):
        super().__init__()
        self.fc1 = nn.Linear(width, ratio * width)
        self.fc2 = nn.Linear(ratio * width, width)

    @property
    def ends(self) -> tuple[nn.Module, nn.Module]:
        """Both linear layers."""
        return self.fc1, self.fc2

    @property
    def gelu(self) -> bool:
        """True."""
        return True

    def inner(self, x: Tensor | Modulated, images: bool = False) -> Tensor:
        """Return (b f n 4d) from tokens (b f n d), before the GELU."""
        return project(self.fc1, x)

    def forward(self, x: Tensor, images: bool = False) -> Tensor:
        """Return (b f n d) from tokens (b f n d)."""
        return self.fc2(activated(self.inner(x), gelu=True))


class SwiGLU(Branch):
    """fc2(silu(a) * b) with a and b from fc1 (Shazeer 2020, arXiv 2002.05202).

    8/3 times as wide inside, to a multiple of 16: as many weights as ``MLP``.
    """

    modulation_slot = MLP_SLOT

    def __init__(self, width: int):
        super().__init__()
        hidden = nearest_multiple(8 * width // 3, 16)
        self.fc1 = nn.Linear(width, 2 * hidden)
        self.fc2 = nn.Linear(hidden, width)

    @property
    def ends(self) -> tuple[nn.Module, nn.Module]:
        """Both linear layers."""
        return self.fc1, self.fc2

    def inner(self, x: Tensor | Modulated, images: bool = False) -> Tensor:
        """Return (b f n k) from tokens (b f n d)."""
        a, b = project(self.fc1, x).chunk(2, dim=-1)
        return F.silu(a) * b

    def forward(self, x: Tensor, images: bool = False) -> Tensor:
        """Return (b f n d) from tokens (b f n d)."""
        return self.fc2(self.inner(x))


class Block(nn.Module):
    """x + gate * branch(norm(x) * (1 + scale) + shift), branch after branch.

    Images skip branches with ``skips_images``, and the whole block with ``video_only`` (temporal blocks of
    variants 1 and 2).
    """

    branches: Any  # nn.ModuleDict of Branch
    recompute: bool = False
    """Whether the backward pass recomputes what is cheap, see ``latte.model.fused``."""

    def __init__(
        self,
        branches: dict[str, Branch],
        width: int,
        conditioning: type[Conditioning],
        video_only: bool = False,
        value_residual: bool = False,
    ):
        super().__init__()
        self.branches = nn.ModuleDict(branches)
        affine = conditioning.affine_norm
        self.norms = nn.ModuleDict(
            {name: nn.LayerNorm(width, eps=1e-6, elementwise_affine=affine) for name in branches}
        )
        num_slots = 1 + max(branch.modulation_slot for branch in branches.values())
        self.modulation = conditioning.block_modulation(width, num_slots)
        self.video_only = video_only
        self.value_residual = value_residual

    @property
    def mixes_time(self) -> bool:
        """Whether any branch mixes time."""
        return any(branch.mixes_time for branch in self.branches.values())

    def table3_rows(self, frames: int, positions: int) -> int:
        """Return how often Table 3 counts the block's modulation."""
        return sum(branch.table3_rows(frames, positions) for branch in self.branches.values())

    def forward(
        self, x: Tensor, c: Tensor, images: bool = False, first: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor | None]:
        """Return tokens (b f n d) from tokens (b f n d) and condition (b f|1 d).

        With ``value_residual``, return the values of the model's first attention, too: ``first``, or those
        of the first attention here.
        """
        values = [tensor for tensor in (first,) if tensor is not None]
        if not (images and self.video_only):
            x = self.add_branches(x, c, images, values)
        if not self.value_residual:
            return x
        return x, next(iter(values), None)

    def add_branches(self, x: Tensor, c: Tensor, images: bool, values: list[Tensor]) -> Tensor:
        """Return tokens (b f n d) after all branches."""
        modulation = again(self.modulation) if self.recompute else self.modulation
        chunks = modulation(c)  # 3 per slot, each (b f|1 1 d) or None
        for name, branch in self.branches.items():
            if images and branch.skips_images:
                continue
            extra = (values,) * (self.value_residual and branch.reads_values)
            slot = 3 * branch.modulation_slot
            shift, scale, gate = chunks[slot : slot + 3]
            if self.recompute and saves_less(branch, gate):
                tokens = Modulated(x, shift, scale, self.norms[name].eps)
                inner = branch.inner(tokens, images, *extra)
                x = gated_linear(x, gate, branch.ends[1], inner, branch.gelu)
                continue
            y = branch(modulate(self.norms[name](x), shift, scale), images, *extra)
            x = x + y if gate is None else torch.addcmul(x, gate, y)
        return x


def saves_less(branch: Branch, gate: Tensor | None) -> bool:
    """Return whether the memory-saving form of ``branch`` exists and has an effect here."""
    if gate is None or branch.ends is None or not torch.is_grad_enabled():
        return False
    if getattr(branch, "sequence", None) is not None:  # tokens are computed before they are exchanged
        return False
    return all(is_plain(layer) for layer in branch.ends)


def modulate(x: Tensor, shift: Tensor | None, scale: Tensor | None) -> Tensor:
    """Return x (1 + scale) + shift over tokens (b f n d); x itself when there is nothing to modulate with."""
    if shift is None or scale is None:
        return x
    return torch.addcmul(shift, x, 1 + scale)
