# SPDX-License-Identifier: Apache-2.0
"""What every setting is measured by: METRICS, on data that no run trains on and on generated clips.

Clips, timesteps and noise of the held-out loss are the same for every setting, seed and step, and so are the
seeds and labels of the generated clips. Procedural clips are held out by another data seed; of files, a tenth
is held out by the hash of their keys. Axes: n held-out clips, f frames, c channels, h height, w width.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from latte.ablate.axes import Setting
from latte.autoencoder.codec import Codec
from latte.build import open_data
from latte.checks import check
from latte.config.run import RunConfig
from latte.data.base import SceneSet
from latte.data.clips import to_uint8
from latte.data.datasets import DataConfig, Dataset, ProceduralDataset, build_dataset
from latte.data.hold_out import in_hash_order, keys_of, subset
from latte.data.order import permuted
from latte.data.writers import write_mp4
from latte.diffusion.config import build_process
from latte.diffusion.guidance import conditional
from latte.diffusion.loss import OBJECTIVES
from latte.evaluation.networks.builtin import MIN_FRAMES
from latte.evaluation.scores import builtin_score
from latte.inference.generate import autocast, generate
from latte.model.denoiser import Denoiser
from latte.runtime import generator, resolve_dtype

CLIPS = "clips"  # in the folder of a run: what it generated at its newest point
SHOWN = 4  # clips that are kept
HELD_OUT_FRACTION = 0.1
HELD_OUT_SEED = 9_000_000  # added to data.seed; no recipe uses seeds from there


def held_out_keys(keys: Sequence[str]) -> set[str]:
    """Return HELD_OUT_FRACTION of ``keys``, at least one: those of the smallest hash.

    InputError when none would be left to train on.
    """
    check(
        len(keys) >= 2,
        f"data.root has {len(keys)} clips that all settings can use, but one is held out and the others "
        "train; give a folder with two clips or more",
    )
    count = max(1, round(HELD_OUT_FRACTION * len(keys)))
    return set(in_hash_order(keys)[:count])


@dataclass(frozen=True)
class HeldOut:
    """Latents z0 (n f c h w), labels (n,) or None, timesteps t (n,) and noise eps (n f c h w)."""

    z0: Tensor
    label: Tensor | None
    t: Tensor
    eps: Tensor


@dataclass(frozen=True)
class AblationData:
    """What a setting trains on and is measured by.

    ``codec`` is None for a dataset of latents whose codec is absent. ``real``: clips of the training set,
    uint8 (f H W 3), that generated ones are compared with; empty without a codec.
    """

    dataset: Dataset
    codec: Codec | None
    held_out: HeldOut
    real: Sequence[np.ndarray] = ()


def open_ablation_data(
    configs: Sequence[RunConfig], device: torch.device, clips: int, num_real: int = 0
) -> dict[DataConfig, AblationData]:
    """Return the data of each different ``data`` section: ``clips`` held-out, ``num_real`` real clips.

    All ``configs`` have the same codec. Settings with other intervals can use other videos: all of them train
    on the videos that every one can use, less those held out.
    """
    check(
        not any(config.data.mix for config in configs),
        "data.mix is given, but an ablation trains on one data set; give data.root instead",
    )
    opened = {config.data: (config, *open_data(config, device)) for config in configs}
    keys = [keys_of(dataset) for _, dataset, _ in opened.values()]
    shared = set.intersection(*map(set, keys))
    held = held_out_keys(sorted(shared)) if any(keys) else set()
    found = {}
    for data, (config, dataset, codec) in opened.items():
        if held:
            training = subset(dataset, shared - held)
            others = subset(dataset, held)
        else:
            training = dataset
            others = other_clips(data)
        encoder = None if dataset.latent else codec
        held_out = make_held_out(others, encoder, config.diffusion.num_steps, clips)
        real = real_clips(training, codec, num_real) if codec is not None else ()
        found[data] = AblationData(training, codec, held_out, real)
    return found


def other_clips(data: DataConfig) -> Dataset:
    """Return procedural clips of another seed, without limit."""
    return build_dataset(replace(data.without_buckets(), seed=data.seed + HELD_OUT_SEED, num_clips=None))


@torch.no_grad()
def real_clips(dataset: Dataset, codec: Codec, count: int) -> list[np.ndarray]:
    """Return ``count`` clips, uint8 (f H W 3), from all over the set; latents are decoded."""
    found = []
    for index in range(count):
        epoch, place = divmod(index, len(dataset))
        clip = dataset.clip(permuted(place, len(dataset), 0, epoch), generator("real", "clip", index))
        video = codec.decode(clip.video[None])[0] if dataset.latent else clip.video
        found.append(np.asarray(to_uint8(video)))
    return found


@torch.no_grad()
def make_held_out(dataset: Dataset, codec: Codec | None, num_steps: int, count: int) -> HeldOut:
    """Return ``count`` clips of held-out data (repeated when it has fewer) and evenly spread timesteps."""
    clips = [
        dataset.clip(index % len(dataset), generator("held out", "clip", index)) for index in range(count)
    ]
    videos = [clip.video[None] for clip in clips]  # (1 f c h w) each
    if codec is not None:
        videos = [codec.encode(video).cpu() for video in videos]
    z0 = torch.cat(videos).float()  # (n f c h w)
    labels = [clip.label for clip in clips]
    shuffled = torch.randperm(count, generator=generator("held out", "timesteps"))
    t = ((shuffled + 0.5) * num_steps / count).long()
    noise = [
        torch.randn(z0.shape[1:], generator=generator("held out", "noise", index)) for index in range(count)
    ]
    return HeldOut(z0, None if None in labels else torch.tensor(labels), t, torch.stack(noise))


@torch.no_grad()
def heldout_loss(model: Denoiser, config: RunConfig, held_out: HeldOut) -> float:
    """Return the mean squared error of the predicted noise, or velocity for rectified flow.

    For the paper's objective this is L_simple. The model is in evaluation mode afterwards.
    """
    device = next(model.parameters()).device
    process = build_process(config.diffusion)
    labelled = held_out.label is not None and config.model.num_classes is not None
    model.eval()
    total = 0.0
    size = config.train.micro_batch or config.train.global_batch
    for start in range(0, len(held_out.t), size):
        part = slice(start, start + size)
        z0, t, eps = (tensor[part].to(device) for tensor in (held_out.z0, held_out.t, held_out.eps))
        condition = {}
        if labelled and held_out.label is not None:
            condition["label"] = held_out.label[part].to(device)
        zt = process.add_noise(z0, t, eps)
        denoise = conditional(autocast(model, device, resolve_dtype(config.train.dtype, device)), condition)
        prediction, _ = process.split(denoise(zt, process.original(t)), zt)
        if process.prediction == "flow":
            error = prediction - process.target(z0, t, eps)
        else:
            error = process.estimate(prediction, zt, t)[1] - eps
        total += error.square().flatten(1).mean(1).cpu().double().sum().item()
    return total / len(held_out.t)


def generate_clips(model: Denoiser, config: RunConfig, codec: Codec, count: int) -> list[np.ndarray]:
    """Return ``count`` clips, uint8 (f H W 3), seeds 0, 1, ... and labels in turn, with the run's sampler."""
    num_classes = config.model.num_classes
    labels = None
    if num_classes is not None:
        labels = [index % num_classes for index in range(count)]
    dtype = resolve_dtype(config.train.dtype, next(model.parameters()).device)
    process = build_process(config.diffusion)
    generated = generate(model, process, codec, range(count), labels, config.sample, dtype=dtype)
    return [clip for _, clip in generated]


def label_accuracy(clips: Sequence[np.ndarray], scenes: SceneSet) -> float:
    """Return the fraction of ``generate_clips``'s clips whose pixels show the class of their label."""
    num_classes = len(scenes.classes)
    correct = [scenes.read_label(clip) == index % num_classes for index, clip in enumerate(clips)]
    return sum(correct) / len(clips)


def consistency(clips: Sequence[np.ndarray], scenes: SceneSet) -> float:
    """Return the fraction of ``clips`` whose pixels show one scene that stays the same throughout."""
    return sum(scenes.is_consistent(clip) for clip in clips) / len(clips)


@dataclass(frozen=True)
class Measured:
    """A setting's EMA weights at some step, its data, and clips generated with them."""

    model: Denoiser
    config: RunConfig
    data: AblationData
    clips: Sequence[np.ndarray]


def _always(config: RunConfig, data: AblationData, num_clips: int) -> str:
    return ""


def _no_labels(config: RunConfig, data: AblationData, num_clips: int) -> str:
    if num_clips == 0:
        return "no clips are generated (--generated 0)"
    if data.codec is None:
        return "the codec of the latents is absent"
    dataset = data.dataset
    if config.model.num_classes is None or not isinstance(dataset, ProceduralDataset) or not dataset.classes:
        return "the labels are not those of procedural clips"
    return _too_short(config, dataset)


def _not_consistent(config: RunConfig, data: AblationData, num_clips: int) -> str:
    if num_clips == 0:
        return "no clips are generated (--generated 0)"
    if not isinstance(data.dataset, ProceduralDataset):
        return "the data are not procedural clips, whose colours and outlines are known"
    return _too_short(config, data.dataset)


def _too_short(config: RunConfig, dataset: ProceduralDataset) -> str:
    needed = dataset.scenes.min_graded_frames
    if config.data.frames < needed:
        return (
            f"clips of data.frames={config.data.frames} are too short to be graded; give "
            f"data.frames={needed} or more"
        )
    return ""


def _no_score(config: RunConfig, data: AblationData, num_clips: int) -> str:
    if num_clips < 2:
        return "it needs two generated clips (--generated 2)"
    if data.codec is None:
        return "the codec of the latents is absent"
    if config.data.frames < MIN_FRAMES:
        return f"the built-in detector needs {MIN_FRAMES} frames, but data.frames is {config.data.frames}"
    return ""


def _clips_and_path(setting: Setting) -> Hashable:
    """Held-out losses are comparable for the same clips, and the same path along which noise is added."""
    return setting.config.data, OBJECTIVES[setting.config.diffusion.objective].straight_path


def _nothing(setting: Setting) -> Hashable:
    return None


@dataclass(frozen=True)
class Metric:
    """One measured value of a setting; an entry of METRICS is all that a new one needs.

    ``unavailable(config, data, num_clips)`` is the reason why it cannot be measured, '' if it can.
    ``comparable``: two settings whose keys differ are not compared by it. ``range_key`` names its range over
    seeds in ``--json``.
    """

    title: str
    measure: Callable[[Measured], float]
    range_key: str
    lower_is_better: bool = True
    unavailable: Callable[[RunConfig, AblationData, int], str] = _always
    comparable: Callable[[Setting], Hashable] = _nothing
    number_format: str = ".4g"
    unit: str = ""
    log_scale: bool = True
    difference: bool = False  # its difference from the baseline is plotted too
    explanation: str = ""  # a sentence of the report, with {count} generated clips

    @property
    def sign(self) -> int:
        """1 when lower values are better, -1 when higher ones are."""
        return 1 if self.lower_is_better else -1


METRICS: dict[str, Metric] = {
    "heldout_loss": Metric(
        "held-out loss",
        lambda found: heldout_loss(found.model, found.config, found.data.held_out),
        "heldout_range",
        comparable=_clips_and_path,
        number_format=".4f",
        difference=True,
    ),
    "label_accuracy": Metric(
        "label accuracy",
        lambda found: label_accuracy(found.clips, found.config.data.scene_set),
        "label_range",
        lower_is_better=False,
        unavailable=_no_labels,
        number_format=".1%",
        unit="fraction of clips",
        log_scale=False,
        explanation="Label accuracy: the fraction of {count} generated clips that show what their label "
        "says.",
    ),
    "consistency": Metric(
        "consistency",
        lambda found: consistency(found.clips, found.config.data.scene_set),
        "consistency_range",
        lower_is_better=False,
        unavailable=_not_consistent,
        number_format=".1%",
        unit="fraction of clips",
        log_scale=False,
        explanation="Consistency: the fraction of {count} generated clips that show one scene throughout, "
        "whose colours, outlines and sizes stay.",
    ),
    "score": Metric(
        "built-in score",
        lambda found: builtin_score(found.data.real, found.clips),
        "score_range",
        unavailable=_no_score,
        explanation="Built-in score: Frechet distance between the built-in detector's features of {count} "
        "generated clips and as many training clips; with so few it is high for perfect "
        "clips, too, and is comparable only within this page.",
    ),
}


def measure(
    model: Denoiser, config: RunConfig, data: AblationData, num_clips: int, folder: Path | None = None
) -> dict[str, float | None]:
    """Return every metric of METRICS, None for what cannot be measured here; the first SHOWN clips are
    written into ``folder``.
    """
    clips: list[np.ndarray] = []
    if num_clips and data.codec is not None:
        clips = generate_clips(model, config, data.codec, num_clips)
    if folder:
        for index, clip in enumerate(clips[:SHOWN]):
            write_mp4(folder / f"{index}.mp4", clip, config.sample.fps)
    found = Measured(model, config, data, clips)
    return {
        name: None if metric.unavailable(config, data, num_clips) else metric.measure(found)
        for name, metric in METRICS.items()
    }
