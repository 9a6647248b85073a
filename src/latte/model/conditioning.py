# SPDX-License-Identifier: Apache-2.0
"""Timestep and label, and how they reach the blocks (Latte, Sec. 3.3.2).

The condition is computed once per clip, as (b 1 d), and broadcast; only stills with labels of their own have a row each, (b i d).
Scalable adaptive layer norm (S-AdaLN) modulates every residual branch; all-tokens lays the condition beside the tokens, once.
Axes: b batch, f frames (or stills), i stills, n tokens of a frame, d width.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latte.checks import InputError


class TimestepEmbedding(nn.Module):
    """t in 0...999 -> d: 256 frequencies as [cos, sin] in float32, then two linear layers."""

    def __init__(self, width: int, frequencies: int = 256):
        super().__init__()
        self.frequencies = frequencies
        self.fc1, self.fc2 = nn.Linear(frequencies, width), nn.Linear(width, width)

    def forward(self, t: Tensor) -> Tensor:
        """(b,) -> (b d)."""
        half = self.frequencies // 2
        omega = torch.exp(
            -math.log(10000.0) / half * torch.arange(half, device=t.device, dtype=torch.float32)
        )
        angle = t.float()[:, None] * omega
        features = torch.cat([angle.cos(), angle.sin()], dim=1).to(self.fc1.weight.dtype)
        return self.fc2(F.silu(self.fc1(features)))


class LabelEmbedding(nn.Module):
    """A table of classes + 1 rows; the last row is the null class that guidance subtracts. Label -1 names it, too."""

    def __init__(self, num_classes: int, width: int):
        super().__init__()
        self.num_classes = num_classes
        self.table = nn.Embedding(num_classes + 1, width)

    def forward(self, label: Tensor) -> Tensor:
        """(b,) or (b 1+i) int64 in -1...num_classes -> (..., d); InputError outside that range (looked at on the CPU only)."""
        if (
            label.device.type == "cpu"
            and label.numel()
            and (int(label.min()) < -1 or int(label.max()) > self.num_classes)
        ):
            bad = label[(label < -1) | (label > self.num_classes)].flatten()[0]
            raise InputError(
                f"label is {int(bad)}, but this model has classes 0 to {self.num_classes - 1}; -1 is the null class"
            )
        return self.table(torch.where(label < 0, self.num_classes, label))


def drop_labels(label: Tensor, p: float, generator: torch.Generator) -> Tensor:
    """Labels (b,) or (b 1+i) with a share ``p`` of the clips (and their stills, all or none) set to the null class -1."""
    drop = torch.rand(label.shape[0], generator=generator) < p
    return label.masked_fill(drop.to(label.device).reshape(-1, *[1] * (label.ndim - 1)), -1)


class Modulation(nn.Module):
    """c -> ``num_chunks`` vectors that shift, scale and gate: one SiLU and one zero-started linear layer (adaLN-Zero)."""

    def __init__(self, width: int, num_chunks: int):
        super().__init__()
        self.num_chunks = num_chunks
        self.linear = nn.Linear(width, num_chunks * width)

    def forward(self, c: Tensor) -> tuple[Tensor, ...]:
        """(b f|1 d) -> chunks (b f|1 1 d)."""
        return self.linear(F.silu(c))[:, :, None].chunk(self.num_chunks, dim=-1)


class Unmodulated(nn.Module):
    """Stands where a modulation would: every branch is a plain residual."""

    def __init__(self, num_chunks: int):
        super().__init__()
        self.num_chunks = num_chunks

    def forward(self, c: Tensor) -> tuple[None, ...]:
        """(b f|1 d) -> nothing to modulate with."""
        return (None,) * self.num_chunks


class SAdaLN:
    """gamma and beta for every norm and alpha before every residual sum, regressed from the condition, starting at zero."""

    affine_norm = False

    @staticmethod
    def block_modulation(width: int) -> nn.Module:
        """Six chunks: a triple for the attentions of the block and one for its MLP."""
        return Modulation(width, 6)

    @staticmethod
    def final_modulation(width: int) -> nn.Module:
        """Two chunks: shift and scale of the last norm."""
        return Modulation(width, 2)

    @staticmethod
    def enter(x: Tensor, c: Tensor) -> Tensor:
        """Tokens (b f n d) unchanged: the condition comes in through the blocks."""
        return x

    @staticmethod
    def leave(x: Tensor) -> Tensor:
        """Tokens (b f n d) unchanged."""
        return x


class AllTokens:
    """The condition is one more token of every frame, at the input only; the blocks are plain pre-norm transformer blocks."""

    affine_norm = True

    @staticmethod
    def block_modulation(width: int) -> nn.Module:
        """None."""
        return Unmodulated(6)

    @staticmethod
    def final_modulation(width: int) -> nn.Module:
        """None."""
        return Unmodulated(2)

    @staticmethod
    def enter(x: Tensor, c: Tensor) -> Tensor:
        """(b f n d), (b f|1 d) -> (b f n+1 d)."""
        return torch.cat([x, c[:, :, None].expand(-1, x.shape[1], -1, -1)], dim=2)

    @staticmethod
    def leave(x: Tensor) -> Tensor:
        """(b f n+1 d) -> (b f n d)."""
        return x[:, :, :-1]


CONDITIONINGS = {"s_adaln": SAdaLN, "all_tokens": AllTokens}
