# SPDX-License-Identifier: Apache-2.0
"""The trajectories of a teacher, from noise to data, at the ends of a student's steps.

Axes: b clips, k steps of the student, f latent frames, c channels, h height, w width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from latte.checks import check
from latte.diffusion.config import build_process
from latte.diffusion.guidance import STUDENT_SAMPLERS, Distilled
from latte.diffusion.samplers import SAMPLERS, indices, sample
from latte.inference.generate import condition
from latte.inference.pipeline import VideoPipeline
from latte.runtime import SampleNoise

TEACHER_SAMPLER = "dpmpp"


@dataclass(frozen=True)
class Teacher:
    """A model whose guided steps a student of ``distilled.steps`` learns, ``split`` steps in each of its own.

    The classes take turns; clip i has the seed ``first_seed`` + i. InputError on construction for a model
    that cannot be distilled.
    """

    pipe: VideoPipeline
    distilled: Distilled
    split: int
    first_seed: int
    batch: int = 32

    def __post_init__(self) -> None:
        pipe = self.pipe
        kinds = " or ".join(STUDENT_SAMPLERS)
        check(
            self.pipe.prediction in STUDENT_SAMPLERS,
            f"{pipe.name} predicts {self.pipe.prediction}, but only models that predict {kinds} can be "
            "distilled (at pure noise the others' z_0 is not defined); train with diffusion.objective=v or "
            "rectified_flow",
        )
        check(
            pipe.reader is None,
            f"{pipe.name} reads text, but latte distill has class-conditional and unconditional models alone",
        )
        check(
            pipe.distilled is None,
            f"{pipe.name} is distilled itself; give the model that it was distilled from",
        )
        check(
            self.distilled.guidance == 1 or bool(pipe.classes),
            f"--guidance is {self.distilled.guidance:g}, but {pipe.name} is unconditional; give --guidance 1",
        )
        check(self.split >= 1, f"--split must be at least 1, got {self.split}")
        num_steps = self.pipe.diffusion.num_steps
        indices(SAMPLERS[TEACHER_SAMPLER], num_steps, self.distilled.steps * self.split)

    @property
    def timesteps(self) -> list[int]:
        """Return where the student's steps begin, ascending (k,)."""
        sampler = SAMPLERS[STUDENT_SAMPLERS[self.pipe.prediction]]
        return indices(sampler, self.pipe.diffusion.num_steps, self.distilled.steps)

    def __call__(self, numbers: Sequence[int]) -> Tensor:
        """Return the trajectories of clips ``numbers``, (b 1+k f c h w) float32 on the CPU."""
        parts = [numbers[first : first + self.batch] for first in range(0, len(numbers), self.batch)]
        return torch.cat([self.run(part) for part in parts])

    def run(self, numbers: Sequence[int]) -> Tensor:
        """Return the trajectories of one batch."""
        pipe = self.pipe
        model = pipe.model.eval()
        config = model.config
        labels = [number % len(pipe.classes) for number in numbers] if pipe.classes else None
        guided = condition(model, labels, None, len(numbers), self.distilled.guidance, pipe.dtype)(
            slice(None)
        )
        starts = set(self.timesteps)
        kept: list[Tensor] = []

        def denoise(z: Tensor, t: Tensor) -> Tensor:
            if int(t[0]) in starts:
                kept.append(z)
            return guided(z, t)

        z = sample(
            TEACHER_SAMPLER,
            denoise,
            build_process(pipe.diffusion),
            SampleNoise([self.first_seed + number for number in numbers]),
            (config.num_frames, config.latent_channels, *config.grid_size),
            self.distilled.steps * self.split,
            device=pipe.device,
        )
        assert len(kept) == self.distilled.steps
        return torch.stack([*kept, z], dim=1).float().cpu()  # (b 1+k f c h w)
