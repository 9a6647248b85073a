# SPDX-License-Identifier: Apache-2.0
"""The order of the blocks: the four variants of the paper (Latte, Sec. 3.2 and Fig. 2), and the joint attention they factorise.

A variant is a list of blocks and the index of the block before which absolute time is added. To add one: a function that gives the
blocks, and one line in VARIANTS.
Axes: b batch, f clip frames, i stills, n tokens of a frame, d width.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from latte.checks import require
from latte.model.blocks import (
    MLP,
    Block,
    JointAttention,
    SpaceAndTimeAttention,
    SpaceAttention,
    TimeAttention,
)
from latte.model.conditioning import AllTokens, SAdaLN
from latte.model.positions import AbsoluteTime, RotaryTime


@dataclass(frozen=True)
class Parts:
    """What blocks are made of: width, heads, the way of conditioning and of telling time."""

    width: int
    heads: int
    conditioning: type[SAdaLN] | type[AllTokens]
    position: AbsoluteTime | RotaryTime

    def block(self, video_only: bool = False, **attentions: nn.Module) -> Block:
        """A block of the given attentions and an MLP, wrapped as the conditioning says."""
        return Block(
            {**attentions, "mlp": MLP(self.width)},
            self.width,
            self.conditioning.block_modulation(self.width),
            self.conditioning.affine_norm,
            video_only,
        )

    def space(self) -> SpaceAttention:
        """Attention over the tokens of a frame."""
        return SpaceAttention(self.width, self.heads)

    def time(self) -> TimeAttention:
        """Attention over the frames of a clip."""
        return TimeAttention(self.width, self.heads, self.position)


@dataclass(frozen=True)
class Variant:
    """``blocks(parts, depth)`` and ``time_enters(depth)``; ``weight`` is a block's matrices in units of d^2, 18 for the standard one.

    ``depth_multiple`` and ``heads_multiple`` are what depth and heads must be divisible by.
    """

    name: str
    blocks: Callable[[Parts, int], list[Block]]
    time_enters: Callable[[int], int]
    weight: int = 18
    depth_multiple: int = 1
    heads_multiple: int = 1

    def depth(self, budget: int) -> int:
        """Blocks that fit the parameters of ``budget`` standard blocks: Table 3 compares variants at an equal budget (28 -> 23)."""
        return round(budget * 18 / self.weight)

    def check(self, depth: int, heads: int) -> None:
        """InputError when the blocks cannot be dealt out or the heads cannot be split."""
        m = self.depth_multiple
        require(
            depth % m == 0 and depth > 0,
            "model.depth",
            depth,
            f"variant {self.name!r} needs a multiple of {m}",
            f"the nearest is {max(round(depth / m), 1) * m}",
        )
        m = self.heads_multiple
        require(
            heads % m == 0,
            "model.heads",
            heads,
            f"variant {self.name!r} splits the heads between space and time",
            f"the nearest valid number is {max(round(heads / m), 1) * m}",
        )


def interleaved(parts: Parts, depth: int) -> list[Block]:
    """Variant 1: a spatial block, then a temporal block, and again."""
    pairs = [
        (parts.block(space=parts.space()), parts.block(time=parts.time(), video_only=True))
        for _ in range(depth // 2)
    ]
    return [block for pair in pairs for block in pair]


def late_fusion(parts: Parts, depth: int) -> list[Block]:
    """Variant 2: all spatial blocks first, then as many temporal ones."""
    spatial = [parts.block(space=parts.space()) for _ in range(depth // 2)]
    return spatial + [parts.block(time=parts.time(), video_only=True) for _ in range(depth // 2)]


def sequential_attention(parts: Parts, depth: int) -> list[Block]:
    """Variant 3: space, then time, then the MLP inside every block."""
    return [parts.block(space=parts.space(), time=parts.time()) for _ in range(depth)]


def parallel_attention(parts: Parts, depth: int) -> list[Block]:
    """Variant 4: half of the heads over space and half over time, side by side, added."""
    return [
        parts.block(both=SpaceAndTimeAttention(parts.width, parts.heads, parts.position))
        for _ in range(depth)
    ]


def joint_attention(parts: Parts, depth: int) -> list[Block]:
    """No factorisation: every token of the clip attends to every other."""
    return [parts.block(joint=JointAttention(parts.width, parts.heads, parts.position)) for _ in range(depth)]


VARIANTS = {
    1: Variant("interleaved", interleaved, lambda depth: 1, depth_multiple=2),
    2: Variant("late fusion", late_fusion, lambda depth: depth // 2, depth_multiple=2),
    3: Variant("sequential attention", sequential_attention, lambda depth: 0, weight=22),
    4: Variant("parallel attention", parallel_attention, lambda depth: 0, weight=22, heads_multiple=2),
    "joint": Variant("joint attention", joint_attention, lambda depth: 0),
}
