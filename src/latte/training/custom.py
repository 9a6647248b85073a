# SPDX-License-Identifier: Apache-2.0
"""Training on any map-style dataset from Python: the items as clips, and a run folder that can be sampled
from and resumed.

Axes: f frames, c channels, h height, w width; H W in pixels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from typing import Any

import torch
from torch import Tensor

from latte.autoencoder.codec import Codec
from latte.checks import InputError
from latte.data.clips import to_float
from latte.data.datasets import Clip, Dataset
from latte.diffusion.config import DiffusionConfig
from latte.interop.lora import LoraConfig
from latte.model.denoiser import Denoiser
from latte.model.latte import ModelConfig
from latte.training.config import TrainConfig

KIND = "custom"  # data.kind in config.yaml


class CustomDataset:
    """A map-style dataset (``len`` and indexing, such as torch.utils.data.Dataset) as a dataset of clips.

    An item is a video, (video, label), (video, label, caption), or a mapping with the keys video, label and
    caption. A video is uint8 (f H W 3), float (f 3 H W) in [-1, 1], or with ``latent`` a latent (f c h w).
    Class names are ``dataset.classes`` if it has them, otherwise the numbers from 0 on. Each item is read
    with torch's global generator seeded from the clip's own random stream, so that random augmentation that
    uses it is reproducible. InputError for other datasets and items.
    """

    def __init__(self, dataset: Any, num_classes: int | None, latent: bool):
        if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
            raise InputError(
                f"dataset is a {type(dataset).__name__} without length or indexing; give a map-style dataset "
                "(__len__ and __getitem__), since the batch of a step must not depend on earlier steps"
            )
        self.dataset = dataset
        self.latent = latent
        self.classes = class_names(dataset, num_classes)
        self.captions: list[str] = list(getattr(dataset, "captions", ()))
        self.skipped: tuple[dict[str, str], ...] = ()

    def __len__(self) -> int:
        return len(self.dataset)

    def clip(self, index: int, generator: torch.Generator) -> Clip:
        """Return item ``index``; its random augmentation is drawn from ``generator``."""
        seed = int(torch.randint(2**62, (), generator=generator))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            item = self.dataset[index]
        video, label, caption = item_parts(item)
        video = as_clip(video, self.latent, f"item {index} of dataset")
        return Clip(video, None if label is None else int(label), caption, f"item-{index}")

    def image(self, index: int, generator: torch.Generator) -> Clip:
        """Return one frame of item ``index``, drawn from ``generator``: video (1 c h w)."""
        clip = self.clip(index, generator)
        frame = int(torch.randint(len(clip.video), (), generator=generator))
        return replace(clip, video=clip.video[frame : frame + 1])

    def describe(self) -> dict[str, Any]:
        """Return ``dataset.describe()`` if it has that; otherwise only length and classes, since reading
        all items takes long.
        """
        described = self.dataset.describe() if hasattr(self.dataset, "describe") else {}
        return {"kind": KIND, "clips": len(self), "classes": self.classes, **described}


def class_names(dataset: Any, num_classes: int | None) -> list[str]:
    """Return the names of the dataset's classes; the numbers from 0 on where it has none, [] without
    classes.
    """
    names = getattr(dataset, "classes", None)
    if names is None:
        names = range(num_classes or 0)
    return [str(name) for name in names]


def item_parts(item: Any) -> tuple[Any, Any, str | None]:
    """Return (video, label, caption) of an item of any of the forms that CustomDataset takes."""
    if isinstance(item, Clip):
        return item.video, item.label, item.caption
    if isinstance(item, Mapping):
        return item.get("video"), item.get("label"), item.get("caption")
    if isinstance(item, Sequence) and not isinstance(item, str):
        video, label, caption = [*item, None, None, None][:3]
        return video, label, caption
    return item, None, None


def as_clip(video: Any, latent: bool, name: str) -> Tensor:
    """Return a video as float (f c h w), frames in [-1, 1]; InputError naming what was found instead."""
    try:
        tensor = torch.as_tensor(video)
    except (TypeError, ValueError, RuntimeError):
        raise InputError(
            f"{name} is a {type(video).__name__}; give a video, (video, label), (video, label, caption) or a "
            "mapping of these"
        ) from None
    if tensor.dtype == torch.uint8 and tensor.ndim == 4 and tensor.shape[-1] == 3 and not latent:
        return to_float(tensor.numpy())  # (f 3 H W)
    if tensor.is_floating_point() and tensor.ndim == 4 and (latent or tensor.shape[1] == 3):
        return tensor.float()
    forms = "a float latent (frames, channels, height, width)"
    if not latent:
        forms = "uint8 (frames, height, width, 3) or float (frames, 3, height, width) in [-1, 1]"
    raise InputError(f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}; give {forms}")


def as_dataset(dataset: Any, model: Denoiser, codec: Codec | None) -> Dataset:
    """Return one of our datasets as it is, and any other as a CustomDataset; without a codec its items are
    latents.
    """
    if hasattr(dataset, "clip") and hasattr(dataset, "describe"):
        return dataset
    latent = getattr(dataset, "latent", codec is None)
    return CustomDataset(dataset, model.config.num_classes, latent)


def check_first_clip(dataset: Dataset, model: Denoiser, codec: Codec | None) -> None:
    """InputError unless the first clip has the frames and the size that ``model`` takes, with values in
    [-1, 1].
    """
    clip = dataset.clip(0, torch.Generator().manual_seed(0)).video
    config = model.config
    expected = (config.num_frames, config.latent_channels, *config.grid_size)
    found = tuple(clip.shape)
    fix = ""
    if not dataset.latent and codec is not None:
        num_frames = codec.compression.latent_frames(len(clip), "the number of frames of the first clip")
        found = (num_frames, *codec.latent_shape(*clip.shape[-2:]))
        if codec.temporal_factor > 1 and num_frames != config.num_frames:
            fix = f" (to {codec.frames(config.num_frames)} frames)"
    if found != expected:
        raise InputError(
            f"the first clip {tuple(clip.shape)} has latents of {found} (frames, channels, height, width), "
            "but the "
            f"model takes {expected}; change the clips{fix}, or num_frames, latent_channels and latent_size "
            "of ModelConfig"
        )
    if not dataset.latent and float(clip.abs().max()) > 1.001:
        raise InputError(
            f"the first clip has values up to {float(clip.abs().max()):g}, but float frames must be in "
            "[-1, 1]; scale them, or give uint8 frames"
        )


def run_record(
    model: Denoiser,
    codec: Codec | None,
    diffusion: DiffusionConfig,
    config: TrainConfig,
    lora: LoraConfig | None,
    seed: int,
) -> dict[str, Any]:
    """Return the sections of config.yaml for a run made from Python, from which ``latte sample`` builds
    model and codec.

    Text models get only the sections that are known here: their text encoder is built by the caller.
    """
    record: dict[str, Any] = {"train": asdict(config), "diffusion": asdict(diffusion), "run": {"seed": seed}}
    if lora is not None:
        record["lora"] = asdict(lora)
    if not isinstance(model.config, ModelConfig):
        return {"model": model.config.stored(), **record}
    known = {item.name for item in fields(ModelConfig)}
    height, width = model.config.grid_size
    frames = model.config.num_frames
    factor = 8  # of the default codec
    if codec is not None:
        factor = codec.spatial_factor
        frames = codec.frames(model.config.num_frames)
        settings = {"name": codec.name, "path": codec.path, "chunk": codec.chunk, "tile": codec.tile}
        record["codec"] = {key: value for key, value in settings.items() if value is not None}
    data = {"kind": KIND, "frames": frames, "resolution": [height * factor, width * factor]}
    return {
        "model": {key: value for key, value in model.config.stored().items() if key in known},
        "data": data,
        **record,
    }
