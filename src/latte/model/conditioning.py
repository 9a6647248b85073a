# SPDX-License-Identifier: Apache-2.0
"""Timestep and label embeddings, and how they reach the blocks (Latte, Sec. 3.3.2).

The condition is computed once per clip, as (b 1 d), and broadcast; only images with labels of their own have
a row each, (b i d). Scalable adaptive layer norm (S-AdaLN) modulates every residual branch; all-tokens puts
the condition beside the tokens, once.
Axes: b batch, f frames (or images), i images, n tokens of a frame, d width.
"""

import math
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latte.checks import InputError
from latte.model.config import CONDITIONINGS as CONDITIONINGS

NULL_LABEL = -1
"""The label of the null (unconditional) class."""


class TimestepEmbedding(nn.Module):
    """t in 0...999 -> d: 256 frequencies as [cos, sin] in float32, then two linear layers."""

    def __init__(self, width: int, frequencies: int = 256):
        super().__init__()
        self.frequencies = frequencies
        self.fc1 = nn.Linear(frequencies, width)
        self.fc2 = nn.Linear(width, width)

    def forward(self, t: Tensor) -> Tensor:
        """Return (b d) for timesteps t (b,)."""
        half = self.frequencies // 2
        index = torch.arange(half, device=t.device, dtype=torch.float32)
        angles = t.float()[:, None] * torch.exp(-math.log(10000.0) / half * index)  # (b 128)
        features = torch.cat([angles.cos(), angles.sin()], dim=1).to(self.fc1.weight.dtype)  # (b 256)
        return self.fc2(F.silu(self.fc1(features)))


class LabelEmbedding(nn.Module):
    """A table of classes + 1 rows; the last row is the null class, which NULL_LABEL names, too."""

    def __init__(self, num_classes: int, width: int):
        super().__init__()
        self.num_classes = num_classes
        self.table = nn.Embedding(num_classes + 1, width)

    def forward(self, label: Tensor) -> Tensor:
        """Return (..., d) for labels (b,) or (b 1+i) int64 in -1...num_classes.

        InputError outside that range, on the CPU only: on a GPU the check would wait for the device. Inside
        a compiled graph it is an assertion of the graph, RuntimeError, since reading a value would end it.
        """
        if torch.compiler.is_compiling():
            inside = ((label >= NULL_LABEL) & (label <= self.num_classes)).all()
            torch.ops.aten._assert_async.msg(inside, f"a label is not in {NULL_LABEL} to {self.num_classes}")
        elif label.device.type == "cpu":
            wrong = label[(label < NULL_LABEL) | (label > self.num_classes)]
            if wrong.numel():
                raise InputError(
                    f"label is {int(wrong[0])}, but this model has classes 0 to {self.num_classes - 1}; "
                    f"{NULL_LABEL} is the null class"
                )
        return self.table(torch.where(label < 0, self.num_classes, label))


def drop_labels(label: Tensor, p: float, generator: torch.Generator) -> Tensor:
    """Return labels (b,) or (b 1+i), each clip's row replaced by the null class with probability ``p``."""
    drop = torch.rand(label.shape[0], generator=generator) < p
    return label.masked_fill(drop.to(label.device).view(-1, *[1] * (label.ndim - 1)), NULL_LABEL)


class Modulation(nn.Module):
    """c -> ``num_chunks`` vectors that shift, scale and gate.

    SiLU and one zero-initialised linear layer (adaLN-Zero).
    """

    def __init__(self, width: int, num_chunks: int):
        super().__init__()
        self.num_chunks = num_chunks
        self.linear = nn.Linear(width, num_chunks * width)

    def forward(self, c: Tensor) -> tuple[Tensor, ...]:
        """Return ``num_chunks`` chunks (b f|1 1 d) of the condition (b f|1 d)."""
        return self.linear(F.silu(c))[:, :, None].chunk(self.num_chunks, dim=-1)


class NoModulation(nn.Module):
    """Takes the place of a modulation: every branch is a plain residual."""

    def __init__(self, num_chunks: int):
        super().__init__()
        self.num_chunks = num_chunks

    def forward(self, c: Tensor) -> tuple[None, ...]:
        """Return nothing to modulate with, ``num_chunks`` times."""
        return (None,) * self.num_chunks


class Conditioning(Protocol):
    """How the condition reaches the blocks; to add one: such a class, and one entry in CONDITIONINGS."""

    affine_norm: bool
    """Whether layer norms have weights of their own."""

    @staticmethod
    def block_modulation(width: int, num_slots: int) -> nn.Module:
        """Return the modulation of a block: shift, scale and gate for each slot."""
        ...

    @staticmethod
    def final_modulation(width: int) -> nn.Module:
        """Return the modulation of the last norm: shift and scale."""
        ...

    @staticmethod
    def enter(x: Tensor, c: Tensor) -> Tensor:
        """Return what the first block gets, from tokens (b f n d) and condition (b f|1 d)."""
        ...

    @staticmethod
    def leave(x: Tensor) -> Tensor:
        """Return tokens (b f n d) from what the last block gives."""
        ...


class SAdaLN:
    """gamma and beta for every norm and alpha before every residual sum, regressed from the condition.

    All start at zero, so that every block is the identity.
    """

    affine_norm = False

    @staticmethod
    def block_modulation(width: int, num_slots: int) -> nn.Module:
        """Return a zero-initialised layer of 3 chunks per slot.

        The attentions share one slot, the MLP has the other.
        """
        return Modulation(width, 3 * num_slots)

    @staticmethod
    def final_modulation(width: int) -> nn.Module:
        """Return two chunks: shift and scale of the last norm."""
        return Modulation(width, 2)

    @staticmethod
    def enter(x: Tensor, c: Tensor) -> Tensor:
        """Return tokens (b f n d) unchanged: the condition enters in the blocks."""
        return x

    @staticmethod
    def leave(x: Tensor) -> Tensor:
        """Return tokens (b f n d) unchanged."""
        return x


class AllTokens:
    """The condition is one more token of every frame, at the input only.

    Blocks are plain pre-norm transformer blocks.
    """

    affine_norm = True

    @staticmethod
    def block_modulation(width: int, num_slots: int) -> nn.Module:
        """Return no modulation."""
        return NoModulation(3 * num_slots)

    @staticmethod
    def final_modulation(width: int) -> nn.Module:
        """Return no modulation."""
        return NoModulation(2)

    @staticmethod
    def enter(x: Tensor, c: Tensor) -> Tensor:
        """Return (b f n+1 d): the tokens and the condition (b f|1 d) behind them."""
        condition = c[:, :, None].expand(-1, x.shape[1], -1, -1)  # (b f 1 d)
        return torch.cat([x, condition], dim=2)  # (b f n+1 d)

    @staticmethod
    def leave(x: Tensor) -> Tensor:
        """Return tokens (b f n d) without the condition's."""
        return x[:, :, :-1]
