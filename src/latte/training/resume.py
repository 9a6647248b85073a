# SPDX-License-Identifier: Apache-2.0
"""Resuming a run: what its checkpoint and the new start must have in common, and what may change with a
notice.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from latte.autoencoder.codec import Codec
from latte.checkpoint.run import latest_checkpoint, open_checkpoint
from latte.checks import InputError, printable
from latte.data.datasets import Dataset
from latte.data.fingerprint import changed_files, combined, read_listing
from latte.data.joint import JointDataset
from latte.distributed import Group
from latte.files import sweep_checkpoints
from latte.model.config import OPTIONS
from latte.model.denoiser import Denoiser
from latte.training.config import RECORDED_IF_CHANGED, TrainConfig
from latte.training.optim import TrainState

LATER_FACTS = ("diffusion", "classes")  # runs made from Python by 0.1.0 do not record them
# What changes when files are added, removed or replaced.
DATA_CONTENT = ("data.clips", "data.content", "data.files", "data.part")
MAX_NAMES = 20  # of changed files in a message
ABSENT = "nothing"
# Facts that are only recorded when they are not the default.
DEFAULTS = {
    "train.optimizer": json.dumps(TrainConfig.optimizer),
    "train.ema_widths": json.dumps(TrainConfig.ema_widths),
    **{name: json.dumps(getattr(TrainConfig, name)) for name in RECORDED_IF_CHANGED},
    **{f"model.{name}": json.dumps(value) for name, value in OPTIONS.items()},
}


def run_facts(
    model: Denoiser, codec: Codec | None, dataset: Dataset | JointDataset, config: TrainConfig, seed: int
) -> dict[str, Any]:
    """Return plain data that every start of a run must have in common: model, codec of the latents, data,
    batch, seed.

    InputError when ``codec`` is not the one that made a dataset of latents.
    """
    data = dataset.describe()
    made_with = codec and codec.fingerprint
    if dataset.latent:
        made_with = data.get("codec")
    if codec and made_with not in (None, codec.fingerprint):
        raise InputError(
            f"codec is {codec.name} {codec.fingerprint}, but the latents were made with {made_with}; "
            "give that codec, or encode again"
        )
    train: dict[str, Any] = {"global_batch": config.global_batch}
    if config.optimizer != TrainConfig.optimizer:  # the default is not recorded: 0.1.0 had no other
        train["optimizer"] = config.optimizer
    if config.ema_widths:
        train["ema_widths"] = list(config.ema_widths)
    return {
        "model": model.config.stored(),
        "codec": made_with,
        "data": data,
        "train": train,
        "run": {"seed": seed},
    }


def restore(
    run_dir: Path,
    state: TrainState,
    facts: Mapping[str, Any],
    settings: Mapping[str, object],
    group: Group,
    allow_data_change: bool = False,
    files: Mapping[str, str] | None = None,
) -> tuple[dict[str, Any], Path | None]:
    """Load the newest good checkpoint of ``run_dir`` into ``state``; return what it records and its path,
    or {} and None.

    Leftovers of killed processes are removed, and a damaged newest checkpoint is skipped with a warning.
    InputError, with every difference, when the run has other ``facts``; a change of ``settings``, or with
    ``allow_data_change`` of the data, gives a notice. ``files`` are the content fingerprints of the data;
    those of the run are kept in its folder, so that changed files can be named.
    """

    def find() -> Path | None:
        sweep_checkpoints(run_dir)
        return latest_checkpoint(run_dir)

    path = group.run_on_rank0(find)
    if path is None:
        return {}, None
    checkpoint = group.together(open_checkpoint, path)
    changed = check_facts(run_dir, checkpoint.state["facts"], facts, allow_data_change, files or {})
    if group.rank == 0:
        for key, before, now in changed:
            print(
                f"notice: {key} was {before} up to step {checkpoint.step} and is {now} from here on",
                file=sys.stderr,
            )
        for key, before, now in differences(checkpoint.state["settings"], settings):
            notice = (
                f"notice: train.{key} was {before} up to step {checkpoint.step} and is {now} from here on"
            )
            print(notice, file=sys.stderr)
        print(f"resuming from {path}", file=sys.stderr)
    group.together(state.load, checkpoint.tensors)
    return checkpoint.state, path


def check_same(facts: Mapping[str, Any], group: Group) -> None:
    """InputError, naming the rank, unless every process has the ``facts`` of rank 0: its data, above all."""

    def compare(expected: Mapping[str, Any]) -> None:
        for key, first, own in differences(expected, facts):
            raise InputError(
                f"{key} is {own}, but rank 0 has {first}; give every process the same settings and files"
            )

    group.together(compare, group.run_on_rank0(lambda: facts))


def check_facts(
    run_dir: Path,
    before: Mapping[str, Any],
    now: Mapping[str, Any],
    allow_data_change: bool,
    files: Mapping[str, str],
) -> list[tuple[str, str, str]]:
    """InputError with every difference between the facts of a checkpoint and those of a new start.

    With ``allow_data_change``, differences of the data are returned instead (key, before, now), unless they
    change the classes.
    """
    comparable = {key: value for key, value in now.items() if key in before or key not in LATER_FACTS}
    if "files" not in before.get("data", {}):  # a run of 0.1.0
        comparable["data"] = {key: value for key, value in now["data"].items() if key != "files"}
    found = differences(before, comparable)
    allowed = [item for item in found if allow_data_change and item[0] in DATA_CONTENT]
    refused = [
        f"  {key}: the run has {old}, you gave {new}"
        for key, old, new in found
        if (key, old, new) not in allowed
    ]
    if found and {key for key, _, _ in found} <= set(DATA_CONTENT) and not allow_data_change:
        raise InputError(
            "\n".join(
                [
                    f"the data of the run in {printable(run_dir)} have changed since its last checkpoint:",
                    *(named_changes(run_dir, before, files) or refused),
                    "restore the files, or resume with the data as they are now with "
                    "run.allow_data_change=true",
                ]
            )
        )
    if refused:
        header = f"run.dir {run_dir} holds a run of another configuration; use its own, or another run.dir:"
        raise InputError("\n".join([header, *refused]))
    return allowed


def named_changes(run_dir: Path, before: Mapping[str, Any], files: Mapping[str, str]) -> list[str]:
    """Return a line for each file that differs from the listing in ``run_dir``; [] if that is not of the
    checkpoint.
    """
    listing = read_listing(run_dir)
    if combined(listing) != before.get("data", {}).get("files"):
        return []
    lines = [f"  {printable(line)}" for line in changed_files(listing, files)]
    if len(lines) > MAX_NAMES:
        lines[MAX_NAMES:] = [f"  and {len(lines) - MAX_NAMES} more"]
    return lines


def differences(before: Mapping[str, object], now: Mapping[str, object]) -> list[tuple[str, str, str]]:
    """Return (dotted key, before, now), values as JSON, for every value that differs."""
    old = flatten(before)
    new = flatten(now)
    rows = [
        (key, old.get(key, DEFAULTS.get(key, ABSENT)), new.get(key, DEFAULTS.get(key, ABSENT)))
        for key in {**old, **new}
    ]
    return [row for row in rows if row[1] != row[2]]


def flatten(values: object, prefix: str = "") -> dict[str, str]:
    """Return nested mappings as dotted key -> JSON of the value (a tuple equals a list)."""
    if not isinstance(values, Mapping):
        return {prefix: json.dumps(values)}
    parts = [flatten(value, f"{prefix}.{key}" if prefix else str(key)) for key, value in values.items()]
    return {key: value for part in parts for key, value in part.items()}
