# SPDX-License-Identifier: Apache-2.0
"""Going on with a run: what a checkpoint and a new start must have in common, and what may change with a notice."""

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from latte.autoencoder.codec import Codec
from latte.checkpoint.run import latest_checkpoint, load_checkpoint
from latte.checks import InputError
from latte.data.datasets import Dataset
from latte.data.joint import JointDataset
from latte.files import sweep_checkpoints
from latte.model.denoiser import Denoiser
from latte.training.distributed import Group
from latte.training.optim import TrainState


def run_facts(
    model: Denoiser, codec: Codec | None, dataset: Dataset | JointDataset, global_batch: int, seed: int
) -> dict[str, object]:
    """What makes a run this run, as plain data: model, the codec that made the latents, data, global batch, seed.

    InputError when ``codec`` is not the one that made a dataset of latents.
    """
    data = dataset.describe()
    made_with = data.get("codec") if dataset.latent else codec and codec.fingerprint
    if codec and made_with not in (None, codec.fingerprint):
        raise InputError(
            f"codec is {codec.name} {codec.fingerprint}, but the latents were made with {made_with}; "
            "give that codec, or encode again"
        )
    return {
        "model": asdict(model.config),
        "codec": made_with,
        "data": data,
        "train": {"global_batch": global_batch},
        "run": {"seed": seed},
    }


def restore(
    run_dir: Path,
    learner: TrainState,
    facts: Mapping[str, object],
    settings: Mapping[str, object],
    group: Group,
) -> tuple[dict, Path | None]:
    """Put the newest good checkpoint of ``run_dir`` into ``learner``; its state and path, or {} and None when there is none.

    Leftovers of killed saves are removed, and a damaged newest checkpoint is passed over with a warning. InputError, with every
    difference, when the run was made with other ``facts``; a change of ``settings`` is announced.
    """

    def find() -> Path | None:
        sweep_checkpoints(run_dir)
        return latest_checkpoint(run_dir)

    path = group.run_on_rank0(find)
    if path is None:
        return {}, None
    found = load_checkpoint(path)
    lines = [
        f"  {key}: the run has {before}, you gave {now}"
        for key, before, now in differences(found.state["facts"], facts)
    ]
    if lines:
        raise InputError(
            "\n".join(
                [
                    f"run.dir {run_dir} holds a run of another configuration; give its own, or another run.dir:",
                    *lines,
                ]
            )
        )
    if group.rank == 0:
        for key, before, now in differences(found.state["settings"], settings):
            print(
                f"notice: train.{key} was {before} up to step {found.step} and is {now} from here on",
                file=sys.stderr,
            )
        print(f"going on from {path}", file=sys.stderr)
    learner.load(found.tensors)
    return found.state, path


def differences(before: Mapping[str, object], now: Mapping[str, object]) -> list[tuple[str, str, str]]:
    """(dotted key, before, now), as JSON, of every value that differs."""
    old, new = flatten(before), flatten(now)
    return [
        (key, old.get(key, "nothing"), new.get(key, "nothing"))
        for key in {**old, **new}
        if old.get(key) != new.get(key)
    ]


def flatten(values: object, prefix: str = "") -> dict[str, str]:
    """Nested mappings -> dotted key -> JSON of the value (a tuple and a list are the same)."""
    if not isinstance(values, Mapping):
        return {prefix: json.dumps(values)}
    parts = [flatten(value, f"{prefix}.{key}" if prefix else str(key)) for key, value in values.items()]
    return {key: value for part in parts for key, value in part.items()}
