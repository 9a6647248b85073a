# SPDX-License-Identifier: Apache-2.0
"""Step caching (EasyCache, Zhou et al. 2025, arXiv 2507.02860): skip the model while it hardly changes.

At most steps a model's output v changes in proportion to its input z: |dv| = k |dz| with a k that changes
slowly. k is measured at every evaluation. From then on the relative changes k |dz| / |v| are summed; while
the sum stays below the threshold, v is not computed but set to z + (v - z of the last evaluation). The first
steps, where k is not stable yet, and the last are always evaluated.
Axes: b batch, r rows (b clips, or 2b with guidance), f frames, c channels, h height, w width.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from latte.checks import check
from latte.diffusion.config import check_cache
from latte.diffusion.guidance import Model

LOG = logging.getLogger(__name__)
WARM_UP = 0.1  # share of the steps that are evaluated first: 5 of 50, as in the authors' code


@dataclass
class Memory:
    """What is known of the calls with one part of the video: the whole, or one of its windows."""

    z: Tensor
    """Input of the latest call (r f c h w)."""
    evaluated_z: Tensor
    """Input of each row's latest evaluation (r f c h w)."""
    output: Tensor
    """Output of each row's latest evaluation (r f c|2c h w)."""
    rate: Tensor
    """k of each clip (b,); NaN before the second evaluation."""
    change: Tensor
    """Sum of the relative changes since the latest evaluation (b,)."""


class StepCache:
    """A model, called as the original is, that evaluates the original only where the output changes enough.

    Each clip decides by itself, by its conditional half, which comes first; with guidance both halves are
    evaluated or both repeated. So a clip is the same in any batch. Calls at a later timestep than the one
    before begin a new sample; several calls at one timestep are the windows of a long video, in order.
    ``num_evaluated`` and ``num_calls`` count rows: model calls of one clip.
    """

    def __init__(self, model: Model, threshold: float, timesteps: Sequence[int], num_clips: int):
        """timesteps: the original timesteps that the sampler visits.

        InputError for a threshold outside (0, MAX_THRESHOLD] and for fewer than MIN_STEPS steps.
        """
        steps = sorted(timesteps, reverse=True)
        check_cache(threshold, len(steps))
        num_first = max(2, round(WARM_UP * len(steps)))
        self.always = {*steps[:num_first], steps[-1]}
        self.model = model
        self.threshold = threshold
        self.num_clips = num_clips
        self.timestep: int | None = None
        self.part = 0
        self.memories: list[Memory] = []
        self.num_evaluated = 0
        self.num_calls = 0

    def __call__(self, z: Tensor, t: Tensor, **condition: Tensor) -> Tensor:
        """Return the output (r f c|2c h w) for z (r f c h w) at t (r,), which are all equal."""
        check(
            not z.requires_grad,
            "cache cannot be used with guidance by conditioning frames, which needs the gradient of the "
            "model; leave it out, or set the guidance strength to 0",
        )
        timestep = int(t[0])
        if self.timestep is None or timestep > self.timestep:
            self.memories = []
        self.part = self.part + 1 if timestep == self.timestep else 0
        self.timestep = timestep
        self.num_calls += len(z)
        memory = self.memories[self.part] if self.part < len(self.memories) else None
        if memory is None or len(memory.output) < len(z):  # the first call, or guidance begins
            output = self.model(z, t, **condition)
            self.num_evaluated += len(z)
            self.store(z, output)
            return output
        return self.update(memory, z, t, condition)

    def store(self, z: Tensor, output: Tensor) -> None:
        """Remember a first call of this part."""
        unknown = torch.full((self.num_clips,), math.nan, device=z.device)
        memory = Memory(z, z, output, unknown, torch.zeros_like(unknown))
        self.memories[self.part : self.part + 1] = [memory]

    def update(self, memory: Memory, z: Tensor, t: Tensor, condition: dict[str, Tensor]) -> Tensor:
        """Return the output (r f c|2c h w) for z (r f c h w), evaluated for the clips that need it."""
        clips = self.num_clips
        branches = len(z) // clips
        channels = z.shape[2]
        before = memory.output[: len(z)]
        moved = z - memory.evaluated_z[: len(z)]
        output = torch.cat([before[:, :, :channels] + moved, before[:, :, channels:]], dim=2)
        step = magnitude(z[:clips] - memory.z[:clips])
        memory.change = memory.change + memory.rate * step / magnitude(before[:clips, :, :channels])
        evaluate = ~(memory.change < self.threshold)  # (b,), True for NaN
        if self.timestep in self.always:
            evaluate = torch.ones_like(evaluate)
        own = evaluate.nonzero().flatten()  # the clips, which are the rows of the conditional half
        rows = evaluate.repeat(branches).nonzero().flatten()
        memory.output = before
        memory.evaluated_z = memory.evaluated_z[: len(z)]
        if len(rows):
            new = self.model(z[rows], t[rows], **{key: value[rows] for key, value in condition.items()})
            self.num_evaluated += len(rows)
            gain = magnitude(new[: len(own), :, :channels] - before[own, :, :channels])
            memory.rate = memory.rate.index_copy(0, own, gain / magnitude(moved[own]))
            memory.change = memory.change.index_fill(0, own, 0.0)
            output = output.index_copy(0, rows, new.to(output.dtype))
            memory.output = before.index_copy(0, rows, new)
            memory.evaluated_z = memory.evaluated_z.index_copy(0, rows, z[rows])
        memory.z = z
        return output


class StepCaches:
    """(model, number of clips) -> the model with a StepCache of its own, itself without a threshold."""

    def __init__(self, threshold: float | None, timesteps: Sequence[int]):
        self.threshold = threshold
        self.timesteps = timesteps
        self.made: list[StepCache] = []

    def __call__(self, model: Model, num_clips: int) -> Model:
        if self.threshold is None:
            return model
        self.made.append(StepCache(model, self.threshold, self.timesteps, num_clips))
        return self.made[-1]

    def log(self) -> None:
        """Log how many evaluations of the model, each of one clip, were made of those asked for."""
        evaluated = sum(cache.num_evaluated for cache in self.made)
        calls = sum(cache.num_calls for cache in self.made)
        if evaluated:
            LOG.info(
                "step cache: %d of %d evaluations, %.2f times fewer", evaluated, calls, calls / evaluated
            )


def magnitude(values: Tensor) -> Tensor:
    """Return the mean absolute value of each clip (b ...), as (b,) float32."""
    return values.float().abs().flatten(1).mean(1)
