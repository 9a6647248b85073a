# SPDX-License-Identifier: Apache-2.0
"""RunConfig -> a run that is ready to train: data, codec, model, caption features, sample sheets.

``latte.config.run`` has checked that the settings fit together. The checks here need the data or the weights.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from latte.autoencoder.codec import Codec, build_codec
from latte.autoencoder.config import compression_at
from latte.checkpoint.run import list_checkpoints
from latte.checks import InputError, check, printable
from latte.config.describe import changed_settings
from latte.config.run import RunConfig, as_record
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
from latte.data.hold_out import Subset, split
from latte.data.latents import LatentDataset
from latte.data.media import contact_sheet
from latte.data.mix import MixDataset, single_sets
from latte.data.selection import report
from latte.data.skipped import reasons, write_skipped
from latte.data.writers import write_mp4
from latte.diffusion.config import build_process
from latte.files import reported
from latte.inference.generate import generate
from latte.inference.prompts import Prompts
from latte.inference.requests import sheet_requests
from latte.inference.sheets import check_sampling, evenly_spaced, row_captions, sheet_parts
from latte.interop.coverage import build as build_network
from latte.interop.init import check_source
from latte.model.denoiser import Denoiser, DenoiserConfig
from latte.runtime import rank, resolve_device, resolve_dtype
from latte.text.encoders import TEXT_ENCODERS, build_text_encoder
from latte.training.callbacks import Callback
from latte.training.condition import CaptionReader
from latte.training.config import check_decay
from latte.training.report import RunReport
from latte.training.step import with_dtype
from latte.training.trackers import check_trackers
from latte.training.train import train
from latte.training.validation import Score, check_held_out

LOG = logging.getLogger(__name__)
SHEET_CLIPS = 4
SHEET_PROMPTS = 8
LARGE_FEATURES = (
    8 << 30
)  # bytes of caption features in memory from which on reading them from disk is suggested
DEFAULT_DIR = "runs/unnamed"


@dataclass(frozen=True)
class Job:
    """A run that is ready to train: its configuration and the objects made from it."""

    config: RunConfig
    model: Denoiser
    dataset: Dataset
    codec: Codec | None  # None when nothing needs one: latents, and no samples
    device: torch.device
    captions: CaptionFeatures | None = None  # of the data and of the sample sheets; None for a class model
    held_out: Dataset | None = None  # clips that are not trained on

    def train(
        self, until: int | None = None, callbacks: Sequence[Callback] = (), score: Score | None = None
    ) -> dict[str, Any]:
        """Train or resume in ``run.dir``, to step ``until`` at most; return what ``latte.train`` returns.

        Files that cannot be used are listed in the run's skipped.jsonl.
        """
        config = self.config
        folder = Path(config.run.dir or DEFAULT_DIR)
        if config.train.report:
            callbacks = [*callbacks, RunReport(changed_settings)]
        if self.dataset.skipped and rank() == 0:
            write_skipped(folder / "skipped.jsonl", self.dataset.skipped)
            LOG.info(
                "%d files cannot be used (%s), see %s",
                len(self.dataset.skipped),
                reasons(self.dataset.skipped),
                folder / "skipped.jsonl",
            )
        if rank() == 0:
            for line in data_lines(self.dataset, config.train.global_batch):
                LOG.info("%s", line)
        return train(
            model=self.model,
            dataset=self.dataset,
            config=config.train,
            run_dir=folder,
            codec=self.codec,
            diffusion=config.diffusion,
            seed=config.run.seed,
            device=self.device,
            callbacks=callbacks,
            captions=self.captions and CaptionReader(self.captions, config.text.dropout),
            lora=config.lora,
            held_out=self.held_out,
            score=score,
            sample=self.codec and sample_sheets(self, self.codec, folder / "samples"),
            record=as_record(config),
            until=until,
            allow_data_change=config.run.allow_data_change,
            workers=config.data.workers,
        )


def data_lines(dataset: Dataset, global_batch: int) -> list[str]:
    """Return what was decided about the clips, for people: how frames are chosen, and the buckets."""
    if isinstance(dataset, Subset):
        held = len(dataset.dataset) - len(dataset)
        return [
            *data_lines(dataset.dataset, global_batch),
            f"held out: {held:,} of {len(dataset.dataset):,} videos",
        ]
    if isinstance(dataset, MixDataset):
        return mix_lines(dataset, global_batch)
    if isinstance(dataset, FolderDataset):
        return report(dataset.selection, global_batch)
    if isinstance(dataset, LatentDataset) and dataset.rules.notice:
        return [dataset.rules.notice]
    return []


def mix_lines(dataset: MixDataset, global_batch: int) -> list[str]:
    """Return a line for each set of a mix with its share, and what was decided about its clips."""
    lines = []
    for part in dataset.all_sets:
        group = dataset.images if part in dataset.images else dataset.sets
        share = part.weight / sum(other.weight for other in group)
        what = "images" if part in dataset.images else "clips"
        lines.append(f"set {part.name}: {len(part.dataset):,} clips, {share:.2%} of the {what} of training")
        if part not in dataset.images:
            lines += [f"set {part.name}: {line}" for line in data_lines(part.dataset, global_batch)]
    return lines


def build(config: RunConfig, device: str = "auto") -> Job:
    """Make what ``config`` names; InputError for parts that do not fit together.

    The initial weights are a function of ``run.seed`` alone. Cheap checks come before captions are encoded,
    which can take hours.
    """
    resolved = resolve_device(device)
    check_trackers(config.train.trackers)
    fresh = not list_checkpoints(Path(config.run.dir or DEFAULT_DIR))
    if fresh:
        check_decay(config.train)
    if config.train.sample_every or config.train.score_every:
        check_sampling(config.network, config.diffusion, config.sample, config.train)
    dataset, codec = open_data(config, resolved)
    check_classes(config.model.num_classes, dataset.classes)
    if fresh and config.model.num_classes is not None:
        check_empty_classes(dataset)
    if config.train.start and fresh:
        check_source(config.train.start)
    training, held_out = split(dataset, config.data.hold_out)
    check_held_out(config.train, held_out)
    captions = read_captions(config, dataset, resolved)
    model = build_model(config.network, config.run.seed)
    if rank() == 0:  # training passes it to the other processes
        folder = Path(config.run.dir or DEFAULT_DIR)
        config = replace(config, train=with_dtype(config.train, config.network, resolved, folder))
    return Job(config, model, training, codec, resolved, captions, held_out)


def open_data(config: RunConfig, device: torch.device) -> tuple[Dataset, Codec | None]:
    """Return dataset and codec. A run on latents has a codec only when its path is given, or to decode
    samples.
    """
    needed = config.data.kind != "latents" or config.train.sample_every > 0 or config.codec.path is not None
    needed = needed or config.train.score_every > 0
    codec = build_codec(config.codec, device) if needed else None
    dataset = build_dataset(
        config.data, codec_fingerprint=codec and codec.fingerprint, buckets=config.buckets
    )
    for part in single_sets(dataset):
        if isinstance(part, LatentDataset):
            check_latents(config, part)
    if isinstance(dataset, LatentDataset | MixDataset):
        dataset.check_images(config.train.num_images)
    return dataset, codec


def check_latents(config: RunConfig, dataset: LatentDataset) -> None:
    """InputError for latents of another codec than the run's."""
    name = dataset.settings["codec"]["name"]
    check(
        config.codec.name == name,
        f"codec.name is {config.codec.name!r}, but the latents in {dataset.root} were made with "
        f"codec {name!r}; give codec.name={name}, or encode again",
    )
    made = dataset.compression
    given = compression_at(name, config.codec.path)
    check(
        (made.channels, made.spatial_factor, made.temporal_factor)
        == (given.channels, given.spatial_factor, given.temporal_factor),
        f"the latents in {dataset.root} are of another codec {name!r} ({made}) than this run's "
        f"({given}); give codec.path, the weights that they were made with",
    )


def check_classes(num_classes: int | None, classes: list[str]) -> None:
    """InputError unless the model is unconditional or has exactly the classes of the data."""
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


def check_empty_classes(dataset: Dataset) -> None:
    """InputError for a class that has no usable clip: the model would offer it without having seen it."""
    empty = getattr(dataset, "empty_classes", [])
    if not empty:
        return
    reasons = [
        entry["reason"]
        for entry in dataset.skipped
        if f"/{empty[0]}/" in f"/{entry['path']}".replace("\\", "/")
    ]
    why = f" ({reasons[0]})" if reasons else ""
    raise InputError(
        f"class {printable(empty[0])} has no usable clip{why}; repair its clips, or remove the folder and "
        "count one "
        "class less in model.num_classes"
    )


def build_model(config: DenoiserConfig, seed: int) -> Denoiser:
    """Return a new model whose weights are a function of ``seed``, whatever was drawn before."""
    return build_network(config, seed)


def read_captions(config: RunConfig, dataset: Dataset, device: torch.device) -> CaptionFeatures | None:
    """Return the features of all captions that training and its sample sheets need; None without
    ``text.name``.

    Those of latents are read from their folder if they are there. Otherwise the encoder reads each caption
    once and is freed before the denoiser is built. InputError for data without captions, for captions that
    are too long (before the encoder's weights are read), and for features of another encoder.
    """
    if config.text.name is None:
        return None
    if not dataset.captions:
        raise InputError(
            f"text.name is {config.text.name}, but the data have no captions; "
            "give data.captions=auto, encode again with them, or set text.name=null"
        )
    if isinstance(dataset, MixDataset):
        dataset.check_captions()
    if config.data.flip and rank() == 0:
        warn_of_sides(dataset.captions)
    if isinstance(dataset, LatentDataset):
        written = dataset.manifest.get("captions", {})
        stored = stored_captions(dataset.root, written, dataset.captions, config.text.tokens)
        if stored:
            check_captions(stored, config, dataset.root, device)
            return stored
    encoder = build_text_encoder(config.text, device)
    captions = list(dict.fromkeys([*dataset.captions, *sheet_prompts(config, dataset)]))
    num_tokens = check_lengths(encoder, captions, caption_owners(dataset))
    num_bytes = num_tokens * encoder.channels * encoder.feature_bytes
    if num_bytes > LARGE_FEATURES and rank() == 0:
        LOG.warning(
            "the features of %d captions will take %.1f GiB of memory in every process; to read them from "
            "disk, "
            "encode once: latte data encode, then data.kind=latents",
            len(captions),
            num_bytes / 2**30,
        )
    features = encode_captions(encoder, captions)
    encoder.free()
    return features


def caption_owners(dataset: Dataset) -> dict[str, str]:
    """Return caption -> one video that has it, where captions belong to videos."""
    if isinstance(dataset, MixDataset):
        owners = [(part.name, caption_owners(part.dataset)) for part in dataset.all_sets]
        return {caption: f"{name}/{key}" for name, found in owners for caption, key in found.items()}
    if isinstance(dataset, FolderDataset):
        return {caption: key for key, caption in dataset.caption_of.items()}
    if isinstance(dataset, LatentDataset):
        return {record.caption: record.key for record in dataset.videos if record.caption is not None}
    return {}


def check_captions(stored: CaptionFeatures, config: RunConfig, root: Path, device: torch.device) -> None:
    """InputError unless the run's encoder made ``stored``.

    Its weights are compared only where ``text.path`` says where they are, or it has none.
    """
    fix = "give the text encoder they were made with, or encode again"
    made = stored.features
    assert isinstance(made, StoredFeatures)
    check(
        config.text.name == made.encoder,
        f"text.name is {config.text.name!r}, but the captions in {root} were encoded by {made.encoder!r}; "
        f"{fix}",
    )
    if config.text.path is not None or not TEXT_ENCODERS[made.encoder].has_weights:
        encoder = build_text_encoder(config.text, device)
        check(
            encoder.fingerprint == stored.fingerprint,
            f"the text encoder is {encoder.fingerprint}, but the captions in {root} were encoded by "
            f"{stored.fingerprint}; {fix}",
        )
        encoder.free()
    width = made[EMPTY].shape[1]
    check(
        width == config.text.channels,
        f"the text encoder has {config.text.channels} channels, but the captions in {root} have {width}; "
        "give text.path, the folder of the encoder they were made with",
    )


def sheet_prompts(config: RunConfig, dataset: Dataset) -> list[str]:
    """Return captions for a sample sheet, spread over those of the data; the second half held out from
    training, if any are.
    """
    held_out = config.data.scene_set.held_out_captions
    room = SHEET_PROMPTS // 2 if held_out else SHEET_PROMPTS
    return [*evenly_spaced(dataset.captions, room), *evenly_spaced(held_out, room)]


def sample_sheets(job: Job, codec: Codec, folder: Path) -> Callable[..., list[Path]]:
    """Return what training calls now and then: the same few clips, generated into ``folder``/step-N.png,
    one row per clip, and as videos into ``folder``/step-N/; with the name of other EMA weights that is
    step-N-NAME. With buckets the rows take their shapes in turn.

    RunError when a sheet cannot be written.
    """
    config = job.config
    process = build_process(config.diffusion)
    dtype = resolve_dtype(config.train.dtype, job.device)
    labels = names = prompts = None
    num_clips = SHEET_CLIPS
    if job.captions is not None:
        names = sheet_prompts(config, job.dataset)
        prompts = Prompts(*job.captions(names), *job.captions([EMPTY] * len(names)))
        num_clips = len(names)
    elif (num_classes := config.model.num_classes) is not None:
        num_clips = max(SHEET_CLIPS, min(num_classes, 2 * SHEET_CLIPS))
        labels = [index % num_classes for index in range(num_clips)]
        names = [job.dataset.classes[label] for label in labels]
    parts = sheet_parts(getattr(job.dataset, "buckets", None), num_clips, config.sample)
    captions = row_captions(names, parts, num_clips)
    requests = sheet_requests(labels, names, num_clips)

    def write_sheet(model: Any, step: int, name: str | None = None) -> list[Path]:
        found: dict[int, Any] = {}
        for part in parts:
            found |= generate(
                model,
                process,
                codec,
                range(num_clips)[part.clips],
                labels and labels[part.clips],
                part.config,
                frames=part.frames,
                size=part.size,
                dtype=dtype,
                prompts=prompts and prompts.select(part.clips),
            )
        clips = [found[seed] for seed in range(num_clips)]
        stem = "-".join(filter(None, [f"step-{step:07d}", name]))
        path = folder / f"{stem}.png"
        with reported("samples", folder):
            folder.mkdir(parents=True, exist_ok=True)
            contact_sheet(clips, captions=captions).save(path)
            paths = [path.with_suffix("") / request.file for request in requests]
            path.with_suffix("").mkdir(exist_ok=True)
            for file, clip in zip(paths, clips, strict=True):
                write_mp4(file, clip, config.sample.fps)
        return [path, *paths]

    return write_sheet
