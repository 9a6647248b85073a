# SPDX-License-Identifier: Apache-2.0
"""What an attention may have beyond the paper's: normed queries and keys, values of the first attention.

Axes: b batch, f frames, n tokens of a frame, h heads, k head width.
"""

import torch
from torch import Tensor, nn

from latte.model.config import BlockOptions


class HeadNorm(nn.RMSNorm):
    """RMS norm of the last axis with a weight per channel, in the weight's precision."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x (... k) normed, in its own dtype."""
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


class QueryKeyNorm(nn.Module):
    """RMS norms of the queries and keys of every head, so that attention logits stay bounded.

    Dehghani et al. 2023 (arXiv 2302.05442), Sec. 2, with RMS in the place of layer norm.
    """

    def __init__(self, head_width: int):
        super().__init__()
        self.query = HeadNorm(head_width, eps=1e-6)
        self.key = HeadNorm(head_width, eps=1e-6)

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Return queries and keys (... k) normed."""
        return self.query(q), self.key(k)


class ValueResidual(nn.Module):
    """Values mixed with those of the first attention, by a learned share that starts at a half.

    Zhou et al. 2024 (arXiv 2410.17897), with learned shares.
    """

    share: nn.Parameter | None  # (1,); None in the first attention

    def __init__(self) -> None:
        super().__init__()
        self.share = nn.Parameter(torch.full((1,), 0.5))

    def forward(self, v: Tensor, values: list[Tensor]) -> Tensor:
        """Return v mixed with ``values[0]``, in its shape; the first attention puts v there."""
        if self.share is None:
            values.append(v)
            return v
        return torch.lerp(v, values[0], self.share.to(v.dtype))


def attention_options(
    options: BlockOptions, head_width: int
) -> tuple[QueryKeyNorm | None, ValueResidual | None]:
    """Return what an attention with ``options`` has: norm of queries and keys, value residual."""
    norm = None
    residual = None
    if options.qk_norm:
        norm = QueryKeyNorm(head_width)
    if options.value_residual:
        residual = ValueResidual()
    return norm, residual
