# SPDX-License-Identifier: Apache-2.0
"""RunConfig -> live objects: a run to train.

That the parts fit together in number is settled in ``latte.config``; here meet those that only the data and the weights can tell.
"""

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from latte.autoencoder.codec import Codec, build_codec
from latte.checkpoint.atomic import reported
from latte.checks import InputError, require
from latte.config import RunConfig
from latte.data.datasets import Dataset, build_dataset, write_quarantine
from latte.data.latents import LatentDataset
from latte.data.media import contact_sheet
from latte.diffusion.loss import OBJECTIVES
from latte.diffusion.process import build_process
from latte.generate import generate
from latte.model.latte import Latte, ModelConfig
from latte.runtime import generator, rank, resolve_device, resolve_dtype
from latte.train.loop import train

LOG = logging.getLogger(__name__)
SHEET_CLIPS = 4


@dataclass(frozen=True)
class Job:
    """A run, ready to train: the configuration and the objects made from it. ``codec`` is None when nothing needs one."""

    config: RunConfig
    model: Latte
    dataset: Dataset
    codec: Codec | None
    device: torch.device

    def train(self) -> dict[str, Any]:
        """Train or resume in ``run.dir``; what ``latte.train.loop.train`` returns. Unusable files are noted in its quarantine.jsonl."""
        config, dataset = self.config, self.dataset
        folder = Path(config.run.dir or "runs/unnamed")
        if dataset.quarantined and rank() == 0:
            write_quarantine(folder / "quarantine.jsonl", dataset.quarantined)
            LOG.info("%d files cannot be used, see %s", len(dataset.quarantined), folder / "quarantine.jsonl")
        identity = self.codec.identity if self.codec else dataset.describe()["codec"]
        return train(
            self.model,
            build_process(config.diffusion),
            OBJECTIVES[config.diffusion.objective],
            self.codec,
            dataset,
            config.train,
            folder,
            seed=config.run.seed,
            device=self.device,
            facts={"diffusion": asdict(config.diffusion), "classes": list(dataset.classes), "codec": identity},
            record=asdict(config),
            sample=sheets(config, self.codec, dataset.classes, self.device, folder / "samples") if self.codec else None,
        )


def build(config: RunConfig, device: str = "auto") -> Job:
    """Make what ``config`` names; InputError for parts that do not fit together.

    The fresh weights are a function of ``run.seed`` alone.
    """
    where = resolve_device(device)
    dataset, codec = open_data(config, where)
    check_classes(config.model.num_classes, dataset.classes)
    return Job(config, build_model(config.model, config.run.seed), dataset, codec, where)


def open_data(config: RunConfig, device: torch.device) -> tuple[Dataset, Codec | None]:
    """The data set and the codec. A run on latents has one only when its path is given, or when it will draw samples."""
    needed = config.data.kind != "latents" or config.train.sample_every > 0 or config.codec.path is not None
    codec = build_codec(config.codec, device) if needed else None
    dataset = build_dataset(config.data, codec_identity=codec.identity if codec else None)
    if isinstance(dataset, LatentDataset):
        name = dataset.settings["codec"]["name"]
        rule = f"the latents in {config.data.root} were made with codec {name!r}"
        require(config.codec.name == name, "codec.name", config.codec.name, rule, f"give codec.name={name}, or encode again")
    return dataset, codec


def check_classes(num_classes: int | None, classes: list[str]) -> None:
    """InputError unless the model is unconditional or has exactly the data's classes."""
    if num_classes is None or num_classes == len(classes):
        return
    if not classes:
        raise InputError(f"model.num_classes is {num_classes}, but the data have no classes; "
                         "set model.num_classes=null, or give data with a folder per class")  # fmt: skip
    names = ", ".join(classes[:8]) + (", ..." if len(classes) > 8 else "")
    raise InputError(f"model.num_classes is {num_classes}, but the data have {len(classes)} classes ({names}); "
                     f"set model.num_classes={len(classes)}, or null for an unconditional model")  # fmt: skip


def build_model(config: ModelConfig, seed: int) -> Latte:
    """A fresh model whose weights are a function of ``seed``, whatever was drawn before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator(seed, "weights").initial_seed())
        return Latte(config)


def sheets(config: RunConfig, codec: Codec, classes: list[str], device: torch.device, folder: Path) -> Callable[[nn.Module, int], None]:
    """What training calls now and then: the same few seeds and labels drawn into ``folder``/step-N.png, a row a clip."""
    process, dtype = build_process(config.diffusion), resolve_dtype(config.train.dtype, device)
    count = config.model.num_classes
    labels = None if count is None else [index % count for index in range(max(SHEET_CLIPS, min(count, 2 * SHEET_CLIPS)))]
    names = None if labels is None else [classes[label] for label in labels]

    def draw(model: nn.Module, step: int) -> None:
        assert isinstance(model, Latte)
        seeds = range(len(labels) if labels else SHEET_CLIPS)
        clips = [clip for _, clip in generate(model, process, codec, seeds, labels, config.sample, dtype=dtype)]
        with reported("samples", folder):
            folder.mkdir(parents=True, exist_ok=True)
            contact_sheet(clips, captions=names).save(folder / f"step-{step:07d}.png")

    return draw
