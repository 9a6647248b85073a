# SPDX-License-Identifier: Apache-2.0
"""What is measured of the EMA model while it trains: the loss on held-out clips, and scores; the best step.

Clips, noise and timesteps of the held-out loss are the same at every step, so that its curve shows the model
alone. Each clip gets one timestep in each of RANGES equal ranges, and goes through the model by itself: the
result is a function of (weights, seed), whatever the number of processes or the size of a batch. A step is
measured before its checkpoint is saved, so a resumed run neither misses nor repeats a point.
Axes: r ranges, f frames, f' latent frames, c channels, h height, w width.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from latte.checks import RunError, check
from latte.data.datasets import Clip, Dataset
from latte.data.order import first_items
from latte.distributed import Group
from latte.runtime import generator
from latte.training.condition import CaptionReader
from latte.training.config import TrainConfig
from latte.training.step import Task, condition_for, encode_joint

RANGES = 4  # of timesteps; the first has the least noise
Values = dict[str, float]
Score = Callable[[nn.Module, int], Values]


@dataclass(frozen=True)
class Example:
    """A held-out clip, ready to be measured: z0 (r f' c h w), t (r), eps (r f' c h w), and the condition."""

    z0: Tensor
    t: Tensor
    eps: Tensor
    inputs: Mapping[str, Tensor]


class Validation:
    """The loss of the EMA model on ``config.validate_clips`` held-out clips, which are read once."""

    def __init__(
        self,
        task: Task,
        ema: Any,
        held_out: Dataset,
        captions: CaptionReader | None,
        clips: int,
        group: Group,
    ):
        self.task = replace(task, model=ema, num_images=0)
        self.held_out = held_out
        self.captions = captions
        self.clips = min(clips, len(held_out))
        self.items = first_items(held_out, self.clips)
        self.group = group
        self.examples: dict[int, Example] = {}

    def __call__(self) -> Values:
        """Return validation/loss, validation/mse and the loss of each range of timesteps; every process gets
        the same.
        """
        own = range(self.group.rank, self.clips, self.group.size)
        self._read(own)
        device = self.task.device
        terms = torch.zeros(self.clips, 2, RANGES, device=device)
        for index in own:
            terms[index] = losses(self.task, self.examples[index])  # (2 r)
        self.group.all_reduce([terms])  # every row is 0 in all processes but one, so the sum is exact
        loss, mse = terms.cpu().double().mean(0)  # (r) each
        bounds = range_bounds(self.task.process.num_steps)
        ranges = {
            f"validation/loss_t{low}-{high - 1}": float(value)
            for (low, high), value in zip(bounds, loss, strict=True)
        }
        return {"validation/loss": float(loss.mean()), "validation/mse": float(mse.mean()), **ranges}

    def _read(self, indices: range) -> None:
        """Read the clips that this process has not read yet; RunError in all of them when one fails."""
        error: Exception | None = None
        try:
            for index in indices:
                if index not in self.examples:
                    self.examples[index] = self._example(index)
        except Exception as found:
            error = found
        failed = self.group.max(int(error is not None))
        if error is not None:
            raise error
        if failed:
            raise RunError("another process could not read its held-out clips; see its message")

    @torch.no_grad()
    def _example(self, index: int) -> Example:
        """Return held-out clip ``index`` with its noise and timesteps."""
        task = self.task
        clip = self.held_out.clip(self.items[index], generator(task.seed, "validation", "clip", index))
        video = clip.video[None]  # (1 f c H W)
        if task.codec is not None:
            video = encode_joint(task.codec, video, 0, generator(task.seed, "validation", "encode", index))
        z0 = video.float().cpu()  # (1 f' c h w)
        stream = generator(task.seed, "validation", "noise", index)
        bounds = range_bounds(task.process.num_steps)
        t = torch.cat([torch.randint(low, high, (1,), generator=stream) for low, high in bounds])  # (r)
        eps = torch.randn((RANGES, *z0.shape[1:]), generator=stream)  # (r f' c h w)
        return Example(z0.expand(eps.shape), t, eps, self._condition(clip))

    def _condition(self, clip: Clip) -> dict[str, Tensor]:
        """Return the clip's condition, once for each range; nothing is dropped."""
        given: Any = None if clip.label is None else torch.tensor([clip.label])
        if self.captions:
            given = self.captions([clip.caption])
        inputs = condition_for(self.task.model, given).inputs()
        return {name: tensor.repeat_interleave(RANGES, 0) for name, tensor in inputs.items()}


def range_bounds(num_steps: int) -> list[tuple[int, int]]:
    """Return (first, last + 1) of RANGES ranges of timesteps."""
    edges = [number * num_steps // RANGES for number in range(RANGES + 1)]
    return list(pairwise(edges))


@torch.no_grad()
def losses(task: Task, example: Example) -> Tensor:
    """Return (loss, mse) of each range, (2 r), with the precision of a training step."""
    device = task.device
    inputs = {name: tensor.to(device) for name, tensor in example.inputs.items()}

    def denoise(zt: Tensor, t: Tensor) -> Tensor:
        with torch.autocast(device.type, task.dtype, enabled=task.dtype != torch.float32):
            return task.model(zt, t, **inputs).float()

    z0, t, eps = (tensor.to(device) for tensor in (example.z0, example.t, example.eps))
    found = task.objective(denoise, task.process, z0, t, eps)
    return torch.stack([found.total, found.mse]).float()  # (2 r)


@dataclass
class Watch:
    """What is measured when, and which step was the best by ``config.keep_best``."""

    config: TrainConfig
    validation: Validation | None
    score: Score | None
    ema: nn.Module
    group: Group
    best: dict[str, Any] = field(default_factory=dict)  # step, value and name of the best so far

    def measure(self, step: int) -> tuple[list[Values], bool]:
        """Return what is due after ``step``, and whether this step is now the best."""
        found = []
        if self.validation and self.due(step, self.config.validate_every):
            found.append(self.validation())
        if self.score and self.due(step, self.config.score_every):
            found.append(self.group.run_on_rank0(self.score, self.ema, step))
        return found, self._is_best(step, found)

    def anything_due(self, step: int) -> bool:
        """Return whether ``measure`` has something to do after ``step``."""
        return self.due(step, self.config.validate_every) or self.due(step, self.config.score_every)

    def due(self, step: int, every: int) -> bool:
        """Return whether something that happens ``every`` so many steps, and at the end, happens now."""
        return every > 0 and (step % every == 0 or step == self.config.steps)

    def _is_best(self, step: int, found: list[Values]) -> bool:
        """Note ``step`` if no earlier one was as good."""
        prefix = {"loss": "validation/loss", "score": "score/"}.get(self.config.keep_best or "")
        for values in found:
            name = next((name for name in values if prefix and name.startswith(prefix)), None)
            if name is None:
                continue
            sign = 1
            if self.config.keep_best == "score" and getattr(self.score, "higher_is_better", False):
                sign = -1
            if not self.best or sign * values[name] < sign * self.best["value"]:
                self.best = {"step": step, "value": values[name], "by": name}
                return True
        return False

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint records of the best step; {} without one."""
        return {"best": self.best} if self.best else {}

    @property
    def protected(self) -> tuple[int, ...]:
        """The step whose checkpoint is kept beside the newest ones."""
        return (self.best["step"],) if self.best else ()


def check_watching(config: TrainConfig, held_out: Dataset | None, score: Score | None) -> None:
    """InputError for measurements that lack what they need."""
    check_held_out(config, held_out)
    check(
        config.score_every == 0 or score is not None,
        f"train.score_every is {config.score_every}, but there is nothing to score with; from Python give "
        "score=function, or set train.score_every=0",
    )


def check_held_out(config: TrainConfig, held_out: Dataset | None) -> None:
    """InputError for a held-out loss without held-out clips."""
    check(
        config.validate_every == 0 or (held_out is not None and len(held_out) > 0),
        f"train.validate_every is {config.validate_every}, but no clips are held out; give data.hold_out, "
        "e.g. data.hold_out=0.1 (from Python: held_out=dataset), or set train.validate_every=0",
    )
