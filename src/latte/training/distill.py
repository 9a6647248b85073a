# SPDX-License-Identifier: Apache-2.0
"""Distillation to few steps by splitting the teacher's trajectories into intervals.

The teacher integrates the guided ODE from noise to data with many small steps and keeps z at the K + 1 ends
of the student's steps. The student, which starts as the teacher, learns to cross each interval in one step:
K = 1 is knowledge distillation (Luhman and Luhman 2021, arXiv 2101.02388); more intervals are a progressive
distillation (Salimans and Ho 2022) without its stages, since every target comes from the teacher itself. No
data are needed, only noise and labels.
Axes: b clips, k intervals, f latent frames, c channels, h height, w width.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from latte.checks import InputError, check
from latte.data.base import Clip
from latte.diffusion.loss import Loss
from latte.diffusion.process import DenoiseFunction, NoisePath
from latte.files import commit_file, reported

SHARD = 64  # trajectories per file
Teach = Callable[[Sequence[int]], Tensor]
"""Numbers of clips -> their trajectories (b 1+k f c h w) float32, from noise to data."""


@dataclass(frozen=True)
class IntervalObjective:
    """The squared error of a student's output, in the units of the output, at a random end of an interval.

    timesteps: where the student's steps begin, ascending.
    """

    timesteps: Sequence[int]

    def __call__(
        self, denoise: DenoiseFunction, process: NoisePath, z0: Tensor, t: Tensor, eps: Tensor
    ) -> Loss:
        """Return the Loss of trajectories ``z0`` (b 1+k f c h w); ``t`` (b,), uniform, chooses the interval.

        With z_t' = signal' z_0 + noise' eps, an error of the output moves z_t' by noise' signal - signal'
        noise times as much, for v and for the velocity of rectified flow. ``eps`` is not used.
        """
        num_steps = len(self.timesteps)
        rows = torch.arange(len(z0), device=z0.device)
        interval = t.to(z0.device) * num_steps // process.num_steps  # (b,), 0: from noise
        start = torch.tensor(self.timesteps, device=z0.device).flip(0)[interval]  # (b,)
        zt = z0[rows, interval]  # (b f c h w)
        prediction, _ = process.split(denoise(zt, process.original(start)), zt)
        data, noise = process.estimate(prediction, zt, start)
        ends = torch.tensor([*reversed(self.timesteps[:-1]), 0], device=z0.device)[interval]
        last = (interval == num_steps - 1).view(-1, 1, 1, 1, 1)
        signal_end = torch.where(last, 1.0, process.at("signal", ends, zt))
        noise_end = torch.where(last, 0.0, process.at("noise", ends, zt))
        scale = noise_end * process.at("signal", start, zt) - signal_end * process.at("noise", start, zt)
        error = (signal_end * data + noise_end * noise - z0[rows, interval + 1]) / scale
        mse = error.square().flatten(1).mean(1)  # (b,)
        return Loss(mse, mse, torch.zeros_like(mse))


class Trajectories:
    """The trajectories in a folder as a dataset of clips, whose ``video`` is (1+k f c h w).

    ``facts`` is the record that ``write_trajectories`` got. The classes take turns.
    """

    latent = True
    skipped: Sequence[dict[str, str]] = ()
    captions: Sequence[str] = ()

    def __init__(self, folder: Path, count: int, classes: Sequence[str], facts: Mapping[str, Any]):
        self.folder = folder
        self.count = count
        self.classes = list(classes)
        self.facts = dict(facts)

    def __len__(self) -> int:
        return self.count

    def clip(self, index: int, generator: torch.Generator) -> Clip:
        """Return trajectory ``index``, whose noise and label are functions of ``index`` and the seed."""
        label = index % len(self.classes) if self.classes else None
        z = read_shard(shard_file(self.folder, index // SHARD))[index % SHARD]
        return Clip(z, label, None, f"trajectory-{index}")

    def image(self, index: int, generator: torch.Generator) -> Clip:
        """InputError: a trajectory has no images."""
        raise InputError("trajectories of a teacher hold no images; set train.num_images=0")

    def describe(self) -> dict[str, Any]:
        """Return what the trajectories depend on, and the fingerprint of the codec of the latents."""
        return {"kind": "trajectories", "clips": self.count, **self.facts}


def shard_file(folder: Path, number: int) -> Path:
    """Return where shard ``number`` is kept."""
    return folder / f"{number:05d}.safetensors"


@lru_cache(maxsize=256)
def read_shard(path: Path) -> Tensor:
    """Return the trajectories of a shard (b 1+k f c h w), mapped into memory."""
    with safe_open(path, "pt") as file:
        return file.get_tensor("z")


def write_trajectories(
    folder: Path,
    count: int,
    facts: Mapping[str, Any],
    teach: Teach,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Make ``folder`` hold ``count`` trajectories; shards that are there already are kept.

    ``facts`` is plain data, everything that decides them. InputError when the folder's are of other facts,
    RunError when the disk refuses.
    """
    record = json.dumps(dict(facts), sort_keys=True)
    folder.mkdir(parents=True, exist_ok=True)
    shards = range(-(-count // SHARD))
    for number in shards:
        path = shard_file(folder, number)
        numbers = range(number * SHARD, min((number + 1) * SHARD, count))
        if path.exists():
            with safe_open(path, "pt") as file:
                written = (file.metadata() or {}).get("facts")
                complete = file.get_slice("z").get_shape()[0] >= len(numbers)
            check(
                written == record,
                f"{folder} holds trajectories of {written}, but {record} were asked for; give another --out",
            )
            if complete:
                continue
        z = teach(numbers).contiguous()  # (b 1+k f c h w)
        with reported("trajectories", path, z.nbytes):
            commit_file(path, lambda file, z=z: save_file({"z": z}, file, metadata={"facts": record}))
        if progress:
            progress(number + 1, len(shards))
    read_shard.cache_clear()
