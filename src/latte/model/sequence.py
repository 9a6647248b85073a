# SPDX-License-Identifier: Apache-2.0
"""Sequence parallelism: several processes share the tokens of a clip, after DeepSpeed-Ulysses (Jacobs et al.
2023, arXiv 2309.14509).

Each process holds some frames with all their tokens: attention within frames, MLPs and norms need no other.
Before attention over time an all-to-all exchange gives each process all frames of some tokens, and another
one takes them back; attention over all tokens exchanges its heads instead. Frames, tokens and heads are
divided as evenly as possible, and need not be divisible. Outside the model every process has whole clips.
What a process adds to the gradient of a weight is that of its tokens: the sum over the processes is the
gradient.
Axes: b batch, f frames, n tokens of a frame, d width, h heads, k head width.
"""

from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function

from latte.checks import check


class SequenceParallel:
    """The processes that share a clip: this one is ``rank`` of ``size``, and ``group`` is that of torch.

    ``frames`` are those of the clip at hand, in tokens; the model sets it, also for the backward pass.
    """

    def __init__(self, rank: int, size: int, group: Any):
        self.rank = rank
        self.size = size
        self.group = group
        self.frames = 0

    def __deepcopy__(self, memo: Any) -> "SequenceParallel":
        return self  # a copy of a model shares clips with the same processes

    def parts(self, count: int) -> list[int]:
        """Return how many of ``count`` frames, tokens or heads each process has."""
        least, more = divmod(count, self.size)
        return [least + (rank < more) for rank in range(self.size)]

    def part(self, count: int) -> slice:
        """Return which of ``count`` frames, tokens or heads this process has."""
        bounds = [0, *accumulate(self.parts(count))]
        return slice(bounds[self.rank], bounds[self.rank + 1])

    @property
    def first_frame(self) -> int:
        """The number of this process's first frame."""
        return self.part(self.frames).start

    def to_all_frames(self, x: Tensor, axis: int = 2) -> Tensor:
        """Return (b f n' ...), all frames of this process's tokens, of (b f' n ...), its frames.

        ``axis`` is what is divided in the place of the frames: 2 the tokens, 3 the heads.
        """
        return Exchange.apply(x, axis, 1, self.parts(x.shape[axis]), self.parts(self.frames), self)

    def to_own_frames(self, x: Tensor, count: int, axis: int = 2) -> Tensor:
        """Return (b f' n ...) of (b f n' ...), the reverse; ``count`` is the length of ``axis`` there."""
        return Exchange.apply(x, 1, axis, self.parts(self.frames), self.parts(count), self)

    def gathered(self, x: Tensor, count: int, tube: int) -> Tensor:
        """Return all latents (b f ...) of those (b f' ...) of this process: ``count`` tokens of ``tube``
        frames each.
        """
        return Gather.apply(x, [tube * part for part in self.parts(count)], self)


def exchange(
    x: Tensor, split: int, joined: int, sizes: list[int], lengths: list[int], to: SequenceParallel
) -> Tensor:
    """Send each process its part of ``x`` along axis ``split``, of ``sizes``, and join what comes from each
    along axis ``joined``, of ``lengths``.
    """
    pieces = [piece.contiguous() for piece in x.split(sizes, split)]
    shapes = []
    for length in lengths:
        shape = list(pieces[to.rank].shape)
        shape[joined] = length
        shapes.append(shape)
    sent = torch.cat([piece.flatten() for piece in pieces])
    numbers = [torch.Size(shape).numel() for shape in shapes]
    received = sent.new_empty(sum(numbers))
    dist.all_to_all_single(received, sent, numbers, [piece.numel() for piece in pieces], group=to.group)
    found = [part.view(shape) for part, shape in zip(received.split(numbers), shapes, strict=True)]
    return torch.cat(found, dim=joined)


class Exchange(Function):
    """``exchange``, whose gradient goes the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, split: int, joined: int, sizes: Any, lengths: Any, to: Any) -> Tensor:
        """Return the exchanged tensor."""
        ctx.way = (joined, split, lengths, sizes, to)
        return exchange(x, split, joined, sizes, lengths, to)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """Return the gradient of ``x``."""
        return exchange(gradients[0], *ctx.way), None, None, None, None, None


class Gather(Function):
    """All frames of all processes. The loss is the same everywhere, so each keeps its own gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, lengths: list[int], to: SequenceParallel) -> Tensor:
        """Return (b f ...) of (b f' ...)."""
        ctx.lengths = lengths
        ctx.rank = to.rank
        padded = x.new_zeros(x.shape[0], max(lengths), *x.shape[2:])
        padded[:, : x.shape[1]] = x
        parts = [torch.empty_like(padded) for _ in lengths]
        dist.all_gather(parts, padded, group=to.group)
        return torch.cat([part[:, :length] for part, length in zip(parts, lengths, strict=True)], dim=1)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """Return the gradient of this process's frames."""
        bounds = list(pairwise([0, *accumulate(ctx.lengths)]))
        start, stop = bounds[ctx.rank]
        return gradients[0][:, start:stop].contiguous(), None, None


def share_sequence(model: nn.Module, team: Any) -> Any:
    """Make ``model`` share each clip among the processes of ``team`` (a ``latte.distributed.Team``), None for
    this one alone; return ``team``.
    """
    sequence = team and SequenceParallel(team.rank, team.size, team.data)
    for module in model.modules():
        if hasattr(module, "sequence"):
            module.sequence = sequence
    return team


def check_sequence(
    config: Any, size: int, field: str, shape: tuple[int, ...] | None = None, images: int = 0
) -> None:
    """InputError unless ``size`` processes can share the clips of a model with ``config``, of latent
    ``shape`` (f, h, w), None for that of training, and with ``images`` behind each.
    """
    frames, height, width = shape or (config.num_frames, *config.grid_size)
    tokens = height // config.patch_size * (width // config.patch_size)
    limits = {"frames (in tokens)": frames // config.frames_per_token, "tokens of a frame": tokens}
    if images:
        limits["images behind each clip"] = images
    if getattr(config, "variant", None) == "joint":
        limits["heads"] = config.dimensions[2]
    for name, most in limits.items():
        check(
            size <= most,
            f"{field} is {size}, but there are only {most} {name}; give a number from 1 to "
            f"{min(limits.values())}",
        )
