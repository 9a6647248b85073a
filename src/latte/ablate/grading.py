# SPDX-License-Identifier: Apache-2.0
"""What every arm is measured by: the loss on clips that no training saw, and what generated clips look like.

Clips, timesteps and noise of the held-out loss are the same for every arm, seed and step of training, and so are the seeds and labels of
the generated clips: do they move where their label says, and how far are they from the training set's by the built-in score?
Procedural clips are held out by another data seed; of files, a tenth is held out by the hash of their keys.
Axes: n held-out clips, f frames, c channels, h height, w width.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latte.autoencoder.codec import Codec
from latte.build import open_data
from latte.checks import require
from latte.config.run import RunConfig
from latte.data.clips import to_uint8
from latte.data.datasets import Clip, DataConfig, Dataset, FolderDataset, ProceduralDataset, build_dataset
from latte.data.latents import LatentDataset
from latte.data.loader import permuted
from latte.data.procedural import DIRECTIONS, read_motion
from latte.diffusion.config import build_process
from latte.diffusion.guidance import conditional
from latte.inference.generate import autocast, generate
from latte.model.latte import Latte
from latte.runtime import generator, resolve_dtype

HELD_SHARE = 0.1
HELD_SEED = 9_000_000  # added to data.seed; no recipe draws from there


class Part:
    """The clips ``indices`` of ``dataset``, in that order, as a data set of their own."""

    def __init__(self, dataset: Dataset, indices: Sequence[int], keys: Sequence[str]):
        self.dataset, self.indices = dataset, indices
        self.classes, self.latent = dataset.classes, dataset.latent
        self.digest = hashlib.sha256("\n".join(keys).encode()).hexdigest()

    @property
    def skipped(self) -> Sequence[dict[str, str]]:
        """What the whole data set left out."""
        return self.dataset.skipped

    def __len__(self) -> int:
        return len(self.indices)

    def clip(self, index: int, generator: torch.Generator) -> Clip:
        """Clip ``index`` of the part."""
        return self.dataset.clip(self.indices[index], generator)

    def image(self, index: int, generator: torch.Generator) -> Clip:
        """One frame of clip ``index`` of the part."""
        return self.dataset.image(self.indices[index], generator)

    def describe(self) -> dict[str, Any]:
        """The whole data set's description, and which clips of it these are."""
        return {**self.dataset.describe(), "clips": len(self), "part": self.digest}


def keys_of(dataset: Dataset) -> list[str]:
    """The key of every clip of a data set made of files, nothing of which is read; none for procedural clips."""
    if isinstance(dataset, FolderDataset):
        return [clip.key for clip in dataset.clips]
    return [record.key for record in dataset.videos] if isinstance(dataset, LatentDataset) else []


def held_out(keys: Sequence[str]) -> set[str]:
    """HELD_SHARE of ``keys``, at least one: those of the smallest hash. InputError when none would be left to train on."""
    require(
        len(keys) >= 2,
        "data.root",
        f"a set of {len(keys)} clips",
        "one is held out and the others are trained on",
        "give two clips or more that fit every arm",
    )
    count = max(1, round(HELD_SHARE * len(keys)))
    return set(sorted(keys, key=lambda key: hashlib.sha256(key.encode()).digest())[:count])


@dataclass(frozen=True)
class Exam:
    """Held-out latents z0 (n f c h w) with their labels (n,) or None, a timestep t (n,) and noise eps (n f c h w) for each."""

    z0: Tensor
    label: Tensor | None
    t: Tensor
    eps: Tensor


@dataclass(frozen=True)
class Material:
    """What an arm is trained on and measured by. ``codec`` is None for a data set of latents whose codec is not there.

    ``real`` are clips of the training set, uint8 (f H W 3), that generated ones are compared with; none without a codec.
    """

    dataset: Dataset
    codec: Codec | None
    exam: Exam
    real: Sequence[np.ndarray] = ()


def open_material(
    configs: Sequence[RunConfig], device: torch.device, clips: int, graded: int = 0
) -> dict[DataConfig, Material]:
    """The material of each different ``data`` among ``configs``, whose codec is the same: ``clips`` held out, ``graded`` real ones.

    Arms with other intervals can use other videos: all of them train on the videos that every one of them can use, less those held out.
    """
    opened = {config.data: (config, *open_data(config, device)) for config in configs}
    keys = [keys_of(dataset) for _, dataset, _ in opened.values()]
    shared = set.intersection(*map(set, keys))
    held = held_out(sorted(shared)) if any(keys) else set()
    materials = {}
    for data, (config, dataset, codec) in opened.items():
        kept, rest = (
            (pick(dataset, wanted) for wanted in (shared - held, held))
            if held
            else (dataset, other_clips(data))
        )
        encoder = None if dataset.latent else codec
        real = real_clips(kept, codec, graded) if codec is not None else ()
        materials[data] = Material(
            kept, codec, make_exam(rest, encoder, config.diffusion.num_steps, clips), real
        )
    return materials


def pick(dataset: Dataset, wanted: set[str]) -> Part:
    """The clips of ``dataset`` whose keys are wanted, in its order."""
    found = [(index, key) for index, key in enumerate(keys_of(dataset)) if key in wanted]
    return Part(dataset, [index for index, _ in found], [key for _, key in found])


def other_clips(data: DataConfig) -> Dataset:
    """Procedural clips of another seed, without an end."""
    return build_dataset(replace(data, seed=data.seed + HELD_SEED, num_clips=None))


@torch.no_grad()
def real_clips(dataset: Dataset, codec: Codec, count: int) -> list[np.ndarray]:
    """``count`` clips, uint8 (f H W 3), from all over the set; latents are decoded, as generated ones are."""
    found = []
    for index in range(count):
        epoch, place = divmod(index, len(dataset))
        clip = dataset.clip(permuted(place, len(dataset), 0, epoch), generator("real", "clip", index))
        found.append(
            np.asarray(to_uint8(codec.decode(clip.video[None])[0] if dataset.latent else clip.video))
        )
    return found


@torch.no_grad()
def make_exam(dataset: Dataset, codec: Codec | None, num_steps: int, clips: int) -> Exam:
    """``clips`` clips drawn from held-out data (again and again when it holds fewer), their timesteps spread evenly over all."""
    drawn = [
        dataset.clip(index % len(dataset), generator("held out", "clip", index)) for index in range(clips)
    ]
    z0 = torch.cat(
        [clip.video[None] if codec is None else codec.encode(clip.video[None]).cpu() for clip in drawn]
    ).float()
    labels = [clip.label for clip in drawn]
    shuffled = torch.randperm(clips, generator=generator("held out", "timesteps"))
    t = ((shuffled + 0.5) * num_steps / clips).long()
    eps = torch.stack(
        [torch.randn(z0.shape[1:], generator=generator("held out", "noise", index)) for index in range(clips)]
    )
    return Exam(z0, None if None in labels else torch.tensor(labels), t, eps)


@torch.no_grad()
def heldout_loss(model: Latte, config: RunConfig, exam: Exam) -> float:
    """Mean squared error of the noise that the model's prediction stands for; of the velocity for rectified flow, whose path is another.

    For the paper's objective this is L_simple. The model is in evaluation mode afterwards.
    """
    device, process = next(model.parameters()).device, build_process(config.diffusion)
    model.eval()
    total, size = 0.0, config.train.micro_batch or config.train.global_batch
    for start in range(0, len(exam.t), size):
        part = slice(start, start + size)
        z0, t, eps = (tensor[part].to(device) for tensor in (exam.z0, exam.t, exam.eps))
        known = exam.label is not None and config.model.num_classes is not None
        condition = {"label": exam.label[part].to(device)} if known and exam.label is not None else {}
        zt = process.add_noise(z0, t, eps)
        denoise = conditional(autocast(model, device, resolve_dtype(config.train.dtype, device)), condition)
        prediction, _ = process.split(denoise(zt, process.original(t)), zt)
        if process.prediction == "flow":
            error = prediction - process.target(z0, t, eps)
        else:
            error = process.estimate(prediction, zt, t)[1] - eps
        total += error.square().flatten(1).mean(1).cpu().double().sum().item()
    return total / len(exam.t)


def can_grade(config: RunConfig, dataset: Dataset) -> bool:
    """Does the model learn procedural clips with their directions as labels?"""
    return (
        isinstance(dataset, ProceduralDataset)
        and dataset.classes == list(DIRECTIONS)
        and config.model.num_classes is not None
    )


def draw_clips(model: Latte, config: RunConfig, codec: Codec, count: int) -> list[np.ndarray]:
    """``count`` clips, uint8 (f H W 3), of seeds 0, 1, ... and labels in turn, drawn by the run's own sampler."""
    classes = config.model.num_classes
    labels = None if classes is None else [index % classes for index in range(count)]
    dtype = resolve_dtype(config.train.dtype, next(model.parameters()).device)
    drawn = generate(
        model, build_process(config.diffusion), codec, range(count), labels, config.sample, dtype=dtype
    )
    return [clip for _, clip in drawn]


def label_accuracy(clips: Sequence[np.ndarray]) -> float:
    """Share of ``draw_clips``'s clips that move where their label says."""
    names = list(DIRECTIONS)
    return sum(
        read_motion(clip).direction == names[index % len(names)] for index, clip in enumerate(clips)
    ) / len(clips)
