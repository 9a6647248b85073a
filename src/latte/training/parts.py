# SPDX-License-Identifier: Apache-2.0
"""What is checked before a run starts: the parts fit together, and checkpoints fit on the disk."""

import shutil
import sys
from pathlib import Path

from latte.autoencoder.codec import Codec
from latte.checkpoint.run import list_checkpoints
from latte.checks import RunError, check
from latte.data.buckets import check_world
from latte.data.datasets import Dataset
from latte.data.joint import check_images
from latte.distributed import Group
from latte.model.denoiser import Denoiser
from latte.model.sequence import check_sequence
from latte.training.between_blocks import check_network
from latte.training.config import TrainConfig
from latte.training.custom import CustomDataset, check_first_clip
from latte.training.optim import OPTIMIZERS, TrainState, trainable_parameters
from latte.training.trackers import check_trackers

SEQUENCE = "train.sequence_parallel"


def check_parts(
    model: Denoiser, codec: Codec | None, dataset: Dataset, config: TrainConfig, group: Group
) -> None:
    """InputError for parts that cannot be trained together."""
    check_trackers(config.trackers)
    check(len(dataset) > 0, "the dataset is empty; give data.root a folder with readable videos")
    check(
        codec is not None or dataset.latent,
        "codec is missing, but the data are frames; give codec.name, or a folder of encoded latents",
    )
    if codec is not None:
        check_images(config.num_images, codec.compression, codec.name)
    buckets = getattr(dataset, "buckets", None)
    check_world(config.global_batch, config.shares(group.size), buckets)
    shapes = [bucket.latent for bucket in buckets.shapes] if buckets else [None]
    for shape in shapes:
        check_sequence(model.config, config.sequence_parallel, SEQUENCE, shape, config.num_images)
    check_network(config, model.config)
    num_classes = model.config.num_classes
    found = len(dataset.classes)
    check(
        num_classes is None or 0 < found <= num_classes,
        f"model.num_classes is {num_classes}, but the data have {found} classes; give {found or 'null'}, or "
        "other data",
    )
    compressed = codec is not None and codec.temporal_factor > 1
    if isinstance(dataset, CustomDataset) or (compressed and buckets is None):
        check_first_clip(dataset, model, codec)


def check_disk(run_dir: Path, state: TrainState, keep_last: int) -> None:
    """RunError unless a checkpoint fits on the disk of ``run_dir``; a notice if not all that will be kept
    do.
    """
    size_of = OPTIMIZERS[state.optimizer_name].state_bytes
    tensors = state.parts()
    size = sum(
        tensor.numel() * tensor.itemsize
        for group in ("model", *state.emas)
        for tensor in tensors[group].values()
    )
    size += sum(size_of(name, part.shape) for name, part in trainable_parameters(state.model).items())
    try:
        free = shutil.disk_usage(run_dir).free
    except OSError:  # a file system that does not say
        return
    if free < size:
        raise RunError(
            f"the disk of {run_dir} has {free / 1e9:.2f} GB free, but a checkpoint takes {size / 1e9:.2f} "
            "GB; "
            "make room, or give another run.dir"
        )
    most = (keep_last + 1) * size  # the oldest one is removed after the newest has been written
    existing = sum(file.stat().st_size for path in list_checkpoints(run_dir) for file in path.iterdir())
    if free + existing < most:
        print(
            f"notice: the disk of {run_dir} has {free / 1e9:.2f} GB free, but {keep_last + 1} checkpoints "
            "(train.keep_last "
            f"and the one being written) take {most / 1e9:.2f} GB",
            file=sys.stderr,
        )
