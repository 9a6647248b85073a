# SPDX-License-Identifier: Apache-2.0
"""RunConfig -> live objects: a run to train.

That the parts fit together in number is settled in ``latte.config.run``; here meet those that only the data
and the weights can tell.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from latte.autoencoder.codec import Codec, build_codec
from latte.checkpoint.run import list_checkpoints
from latte.checks import InputError, require
from latte.config.run import RunConfig
from latte.data.captions import (
    EMPTY,
    CaptionFeatures,
    StoredFeatures,
    check_lengths,
    encode_captions,
    stored_captions,
    warn_of_sides,
)
from latte.data.datasets import Dataset, FolderDataset, build_dataset
from latte.data.latents import LatentDataset
from latte.data.loader import default_workers
from latte.data.media import contact_sheet
from latte.data.procedural import caption_of, split_combinations
from latte.data.skipped import write_skipped
from latte.diffusion.config import build_process
from latte.diffusion.loss import OBJECTIVES
from latte.files import reported
from latte.inference.generate import generate
from latte.inference.prompts import Prompts
from latte.interop.coverage import build as build_network
from latte.model.denoiser import Denoiser, DenoiserConfig
from latte.runtime import rank, resolve_device, resolve_dtype, world_size
from latte.text.encoders import TEXT_ENCODERS, build_text_encoder
from latte.training.condition import CaptionReader
from latte.training.init import look_at
from latte.training.train import train

LOG = logging.getLogger(__name__)
SHEET_CLIPS = 4
SHEET_PROMPTS = 8
HELD = 8 << 30  # bytes of captions' features in memory, from which on training says how to do without


@dataclass(frozen=True)
class Job:
    """A run, ready to train: the configuration and the objects made from it. ``codec`` is None when nothing
    needs one.

    ``captions`` are the features of the data's captions, and of those on the sample sheets; None for a model
    that reads no text.
    """

    config: RunConfig
    model: Denoiser
    dataset: Dataset
    codec: Codec | None
    device: torch.device
    captions: CaptionFeatures | None = None

    def train(self, until: int | None = None) -> dict[str, Any]:
        """Train or resume in ``run.dir``, to step ``until`` at most; what ``latte.training.train.train``
        returns.

        Unusable files are noted in its skipped.jsonl.
        """
        config, dataset = self.config, self.dataset
        folder = Path(config.run.dir or "runs/unnamed")
        if dataset.skipped and rank() == 0:
            write_skipped(folder / "skipped.jsonl", dataset.skipped)
            LOG.info("%d files cannot be used, see %s", len(dataset.skipped), folder / "skipped.jsonl")
        fingerprint = self.codec.fingerprint if self.codec else dataset.describe()["codec"]
        text = (
            {"text": {"encoder": self.captions.fingerprint, "dropout": config.text.dropout}}
            if self.captions
            else {}
        )
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
            facts={
                "diffusion": asdict(config.diffusion),
                "classes": list(dataset.classes),
                "codec": fingerprint,
                **text,
            },
            record=asdict(config),
            sample=self.sheets(self.codec, folder / "samples") if self.codec else None,
            captions=CaptionReader(self.captions, config.text.dropout) if self.captions else None,
            until=until,
            lora=config.lora,
            workers=self.workers,
        )

    @property
    def workers(self) -> int:
        """Return the number of worker processes that load the data."""
        if self.config.data.workers is not None:
            return self.config.data.workers
        return default_workers(self.device, world_size())

    def sheets(self, codec: Codec, folder: Path) -> Callable[[nn.Module, int], None]:
        """What training calls now and then to draw the same few clips."""
        if self.captions is None:
            return sheets(self.config, codec, self.dataset.classes, self.device, folder)
        return text_sheets(
            self.config, codec, self.captions, sheet_prompts(self.config, self.dataset), self.device, folder
        )


def build(config: RunConfig, device: str = "auto") -> Job:
    """Make what ``config`` names; InputError for parts that do not fit together.

    The fresh weights are a function of ``run.seed`` alone.
    """
    where = resolve_device(device)
    dataset, codec = open_data(config, where)
    check_classes(config.model.num_classes, dataset.classes)
    if config.train.start and not list_checkpoints(Path(config.run.dir or "runs/unnamed")):
        look_at(config.train.start)
    captions = read_captions(config, dataset, where)
    return Job(config, build_model(config.network, config.run.seed), dataset, codec, where, captions)


def open_data(config: RunConfig, device: torch.device) -> tuple[Dataset, Codec | None]:
    """The data set and the codec. A run on latents has one only when its path is given, or when it will draw
    samples.
    """
    needed = config.data.kind != "latents" or config.train.sample_every > 0 or config.codec.path is not None
    codec = build_codec(config.codec, device) if needed else None
    dataset = build_dataset(config.data, codec_fingerprint=codec.fingerprint if codec else None)
    if isinstance(dataset, LatentDataset):
        name = dataset.settings["codec"]["name"]
        rule = f"the latents in {config.data.root} were made with codec {name!r}"
        require(
            config.codec.name == name,
            "codec.name",
            config.codec.name,
            rule,
            f"give codec.name={name}, or encode again",
        )
    return dataset, codec


def check_classes(num_classes: int | None, classes: list[str]) -> None:
    """InputError unless the model is unconditional or has exactly the data's classes."""
    if num_classes is None or num_classes == len(classes):
        return
    if not classes:
        raise InputError(
            f"model.num_classes is {num_classes}, but the data have no classes; "
            "set model.num_classes=null, or give data with a folder per class"
        )
    names = ", ".join(classes[:8]) + (", ..." if len(classes) > 8 else "")
    raise InputError(
        f"model.num_classes is {num_classes}, but the data have {len(classes)} classes ({names}); "
        f"set model.num_classes={len(classes)}, or null for an unconditional model"
    )


def build_model(config: DenoiserConfig, seed: int) -> Denoiser:
    """A fresh model whose weights are a function of ``seed``, whatever was drawn before."""
    return build_network(config, seed)


def read_captions(config: RunConfig, dataset: Dataset, device: torch.device) -> CaptionFeatures | None:
    """The features of all captions that training and its sample sheets need; None without ``text.name``.

    Those of latents are taken from their folder if they are there, otherwise the encoder reads each caption
    once, and is gone again before the denoiser is made. InputError for data without captions, for captions
    too long (before the encoder's weights are read), and for features of another encoder.
    """
    if config.text.name is None:
        return None
    if not dataset.captions:
        raise InputError(
            f"text.name is {config.text.name}, but the data have no captions; "
            "give data.captions=auto, encode again with them, or set text.name=null"
        )
    if config.data.flip and rank() == 0:
        warn_of_sides(dataset.captions)
    if isinstance(dataset, LatentDataset):
        stored = stored_captions(
            dataset.root, dataset.manifest.get("captions", {}), dataset.captions, config.text.tokens
        )
        if stored:
            return check_captions(stored, config, dataset.root, device)
    encoder, wanted = (
        build_text_encoder(config.text, device),
        list(dict.fromkeys([*dataset.captions, *sheet_prompts(config, dataset)])),
    )
    need = check_lengths(encoder, wanted, owners(dataset)) * encoder.channels * encoder.feature_bytes
    if need > HELD and rank() == 0:
        LOG.warning(
            "the features of %d captions will take %.1f GiB of memory in every process; to read them from "
            "the disk instead, encode "
            "once: latte data encode, then data.kind=latents",
            len(wanted),
            need / 2**30,
        )
    features = encode_captions(encoder, wanted)
    encoder.free()
    return features


def owners(dataset: Dataset) -> dict[str, str]:
    """Caption -> a video that has it, where captions belong to videos."""
    if isinstance(dataset, FolderDataset):
        return {caption: key for key, caption in dataset.caption_of.items()}
    records = dataset.videos if isinstance(dataset, LatentDataset) else []
    return {record.caption: record.key for record in records if record.caption is not None}


def check_captions(
    stored: CaptionFeatures, config: RunConfig, root: Path, device: torch.device
) -> CaptionFeatures:
    """``stored``; InputError unless the run's encoder made them, whose weights are asked only where
    ``text.path`` says where they are.
    """
    way_out = "give the text encoder they were made with, or encode again"
    made = stored.features
    assert isinstance(made, StoredFeatures)
    require(
        config.text.name == made.encoder,
        "text.name",
        config.text.name,
        f"the captions in {root} were read by {made.encoder!r}",
        way_out,
    )
    if config.text.path is not None or not TEXT_ENCODERS[made.encoder].has_weights:
        encoder = build_text_encoder(config.text, device)
        require(
            encoder.fingerprint == stored.fingerprint,
            "the text encoder",
            encoder.fingerprint,
            f"the captions in {root} were read by {stored.fingerprint}",
            way_out,
        )
        encoder.free()
    width = made[EMPTY].shape[1]
    require(
        width == config.text.channels,
        "the text encoder",
        f"{config.text.channels} channels",
        f"the captions in {root} have {width}",
        "give text.path, the folder of the encoder they were made with",
    )
    return stored


def sheet_prompts(config: RunConfig, dataset: Dataset) -> list[str]:
    """Captions for a sample sheet, spread over those of the data; the second half of them held out from
    training, if any are.
    """
    held = sorted(caption_of(*combination) for combination in split_combinations(config.data.hold_out)[1])
    room = SHEET_PROMPTS // 2 if held else SHEET_PROMPTS
    return [*spread(dataset.captions, room), *spread(held, room)]


def spread(items: Sequence[str], count: int) -> list[str]:
    """At most ``count`` of the items, evenly spaced."""
    count = min(count, len(items))
    return [items[index * len(items) // count] for index in range(count)]


def sheets(
    config: RunConfig, codec: Codec, classes: list[str], device: torch.device, folder: Path
) -> Callable[[nn.Module, int], None]:
    """What training calls now and then: the same few seeds and labels drawn into ``folder``/step-N.png, a row
    a clip.
    """
    process, dtype = build_process(config.diffusion), resolve_dtype(config.train.dtype, device)
    count = config.model.num_classes
    labels = (
        None
        if count is None
        else [index % count for index in range(max(SHEET_CLIPS, min(count, 2 * SHEET_CLIPS)))]
    )
    names = None if labels is None else [classes[label] for label in labels]

    def draw(model: nn.Module, step: int) -> None:
        seeds = range(len(labels) if labels else SHEET_CLIPS)
        clips = [
            clip for _, clip in generate(model, process, codec, seeds, labels, config.sample, dtype=dtype)
        ]
        save_sheet(folder, step, clips, names)

    return draw


def text_sheets(
    config: RunConfig,
    codec: Codec,
    captions: CaptionFeatures,
    prompts: Sequence[str],
    device: torch.device,
    folder: Path,
) -> Callable[[nn.Module, int], None]:
    """As ``sheets``, with a prompt a row."""
    process, dtype = build_process(config.diffusion), resolve_dtype(config.train.dtype, device)
    told = Prompts(*captions(prompts), *captions([EMPTY] * len(prompts)))

    def draw(model: nn.Module, step: int) -> None:
        clips = [
            clip
            for _, clip in generate(
                model, process, codec, range(len(prompts)), None, config.sample, dtype=dtype, prompts=told
            )
        ]
        save_sheet(folder, step, clips, prompts)

    return draw


def save_sheet(folder: Path, step: int, clips: Sequence[np.ndarray], names: Sequence[str] | None) -> None:
    """``folder``/step-N.png; RunError when it cannot be written."""
    with reported("samples", folder):
        folder.mkdir(parents=True, exist_ok=True)
        contact_sheet(clips, captions=names).save(folder / f"step-{step:07d}.png")
