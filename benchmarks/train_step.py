# SPDX-License-Identifier: Apache-2.0
"""Seconds of a training step on latents, EMA included: python benchmarks/train_step.py --size S --batch 1."""

import argparse
from collections.abc import Sequence

import measure
import torch

from latte.diffusion.config import DiffusionConfig, build_process
from latte.diffusion.loss import OBJECTIVES
from latte.distributed import Group
from latte.model.latte import Latte
from latte.profile.flops import count
from latte.training.optim import TrainState
from latte.training.step import Task, backward


def train_step(
    model: Latte, options: argparse.Namespace, device: torch.device, dtype: torch.dtype
) -> measure.Task:
    """Return the step of the training loop on fixed random latents; counted as three forward passes."""
    config = model.config
    process, objective = build_process(DiffusionConfig()), OBJECTIVES["paper"]
    task = Task(
        model.train(), model, process, objective, None, 0, options.batch, options.micro_batch, device, dtype
    )
    state, group, positions = TrainState(model, 1e-4, 0.0, 0.9999), Group(), list(range(options.batch))
    video = torch.randn(options.batch, config.num_frames, config.latent_channels, *config.grid_size)
    label = None if config.num_classes is None else torch.zeros(options.batch, dtype=torch.int64)

    def step() -> None:
        state.update(1, backward(task, 1, positions, video, label), 1e-4, 0.1, group)

    return measure.Task("train_step", step, 3.0 * count(config).operations * options.batch)


def main(argv: Sequence[str] | None = None) -> dict:
    """Measure, print one JSON line, return it."""
    parser = argparse.ArgumentParser(description=__doc__)
    measure.add_arguments(parser)
    measure.add_model_arguments(parser)
    parser.add_argument("--micro-batch", type=int, help="clips at once; all of them without it")
    parser.add_argument(
        "--recompute", action="store_true", help="recompute norms, modulation, GELU and gates in backward"
    )
    parser.add_argument(
        "--checkpointing", action="store_true", help="recompute each block in the backward pass"
    )
    options = parser.parse_args(argv)
    device, dtype = measure.prepare(options)
    config = measure.model_config(options)
    model = measure.busy_model(config, device, options.compile)
    model.gradient_checkpointing = options.checkpointing
    model.recompute(options.recompute)
    step, yard = train_step(model, options, device, dtype), measure.matmul(device, dtype)
    times = measure.timed(options, [step, yard], device)
    settings = measure.settings_of(config, options) | {
        "micro_batch": options.micro_batch,
        "checkpointing": options.checkpointing,
        "recompute": options.recompute,
    }
    rate = options.batch / measure.median(times.seconds["train_step"]) if times.seconds["train_step"] else 0.0
    return measure.report("train_step", step, yard, times, device, settings, clips_per_second=round(rate, 4))


if __name__ == "__main__":
    main()
