# SPDX-License-Identifier: Apache-2.0
"""The order of the blocks: the four variants of the paper (Latte, Sec. 3.2 and Fig. 2), and the joint
attention they factorise.

A variant is a list of blocks and the index of the block before which absolute time is added. To add one: a
function that returns the blocks (with new kinds of branches beside it, see ``blocks.Branch``), and one entry
in VARIANTS.
Axes: b batch, f clip frames, n tokens of a frame, d width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from latte.checks import check

# The configuration reads this table, so the blocks, and with them torch, are imported when they are built.
if TYPE_CHECKING:
    from latte.model.blocks import Block, Branch, SpaceAttention, TimeAttention
    from latte.model.conditioning import Conditioning
    from latte.model.config import BlockOptions
    from latte.model.positions import TemporalPosition

STANDARD_BLOCK = 18  # width^2 parameters of attention (4), MLP (8) and modulation (6)


@dataclass(frozen=True)
class Parts:
    """What blocks are made of."""

    width: int
    heads: int
    conditioning: type["Conditioning"]
    position: "TemporalPosition"
    options: "BlockOptions"

    def block(self, video_only: bool = False, **attentions: "Branch") -> "Block":
        """Return a block of the given attentions and an MLP."""
        from latte.model.blocks import Block
        from latte.model.config import MLPS

        branches = {**attentions, "mlp": MLPS[self.options.mlp](self.width)}
        return Block(branches, self.width, self.conditioning, video_only, self.options.value_residual)

    def space(self) -> "SpaceAttention":
        """Return attention among the tokens of a frame."""
        from latte.model.blocks import SpaceAttention

        return SpaceAttention(self.width, self.heads, self.options)

    def time(self) -> "TimeAttention":
        """Return attention among the frames of a clip."""
        from latte.model.blocks import TimeAttention

        return TimeAttention(self.width, self.heads, self.position, self.options)


@dataclass(frozen=True)
class Variant:
    """One variant of the backbone."""

    name: str
    blocks: Callable[[Parts, int], list["Block"]]  # (parts, depth) -> the blocks in order
    time_enters: Callable[[int], int]  # depth -> index of the block before which absolute time is added
    weight: int = STANDARD_BLOCK  # parameters of one block in units of width^2
    depth_multiple: int = 1  # depth must be divisible by it
    heads_multiple: int = 1  # heads must be divisible by it: attentions that share the heads

    def depth(self, budget: int) -> int:
        """Return the depth with the parameters of ``budget`` standard blocks.

        Table 3 compares equal budgets (28 -> 23).
        """
        return round(budget * STANDARD_BLOCK / self.weight)

    def check(self, depth: int, heads: int) -> None:
        """Raise InputError for a depth or a number of heads that the variant cannot split."""
        multiple = self.depth_multiple
        check(
            depth % multiple == 0,
            f"model.depth is {depth}, but variant {self.name!r} needs a multiple of {multiple}; the nearest "
            f"is {max(round(depth / multiple), 1) * multiple}",
        )
        multiple = self.heads_multiple
        check(
            heads % multiple == 0,
            f"model.heads is {heads}, but variant {self.name!r} splits the heads between space and time; the "
            f"nearest valid number is {max(round(heads / multiple), 1) * multiple}",
        )


def interleaved(parts: Parts, depth: int) -> list["Block"]:
    """Return variant 1: a spatial block, then a temporal block, and again."""
    blocks = []
    for _ in range(depth // 2):
        blocks.append(parts.block(space=parts.space()))
        blocks.append(parts.block(time=parts.time(), video_only=True))
    return blocks


def late_fusion(parts: Parts, depth: int) -> list["Block"]:
    """Return variant 2: all spatial blocks first, then as many temporal ones."""
    spatial = [parts.block(space=parts.space()) for _ in range(depth // 2)]
    return spatial + [parts.block(time=parts.time(), video_only=True) for _ in range(depth // 2)]


def sequential_attention(parts: Parts, depth: int) -> list["Block"]:
    """Return variant 3: space, then time, then the MLP inside every block."""
    return [parts.block(space=parts.space(), time=parts.time()) for _ in range(depth)]


def parallel_attention(parts: Parts, depth: int) -> list["Block"]:
    """Return variant 4: half of the heads over space and half over time, side by side, added."""
    from latte.model.blocks import SpaceAndTimeAttention

    return [
        parts.block(both=SpaceAndTimeAttention(parts.width, parts.heads, parts.position, parts.options))
        for _ in range(depth)
    ]


def joint_attention(parts: Parts, depth: int) -> list["Block"]:
    """Return blocks without factorisation: every token of the clip attends to every other."""
    from latte.model.blocks import JointAttention

    return [
        parts.block(joint=JointAttention(parts.width, parts.heads, parts.position, parts.options))
        for _ in range(depth)
    ]


VARIANTS: dict[int | str, Variant] = {
    1: Variant("interleaved", interleaved, lambda depth: 1, depth_multiple=2),
    2: Variant("late fusion", late_fusion, lambda depth: depth // 2, depth_multiple=2),
    3: Variant("sequential attention", sequential_attention, lambda depth: 0, weight=22),
    4: Variant("parallel attention", parallel_attention, lambda depth: 0, weight=22, heads_multiple=2),
    "joint": Variant("joint attention", joint_attention, lambda depth: 0),
}
