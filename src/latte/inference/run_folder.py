# SPDX-License-Identifier: Apache-2.0
"""The model of a run folder: its checkpoint held against its configuration, averaged weights, adapters if it has any, and its story."""

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latte.checkpoint.run import Checkpoint
from latte.checks import InputError, require
from latte.config.run import RUN_FILE, RunConfig
from latte.interop.coverage import Coverage, build
from latte.model.denoiser import Denoiser, DenoiserConfig
from latte.training.init import rebuild

LOG = logging.getLogger(__name__)


def trained_run(folder: Path, config: RunConfig, checkpoint: Checkpoint | None) -> Checkpoint:
    """``checkpoint``; InputError unless there is one and it is of this configuration."""
    if checkpoint is None:
        raise InputError(f"run {folder} has no checkpoint yet; train it first: latte train {folder}")
    facts, parts = (
        checkpoint.state["facts"],
        {"model": asdict(config.network), "diffusion": asdict(config.diffusion)},
    )
    if config.lora.rank or "lora" in facts:
        parts["lora"] = asdict(config.lora)
    for part, now in parts.items():
        before = facts.get(part, {})
        for key, value in json.loads(json.dumps(now)).items():
            rule = f"{checkpoint.path} was trained with {before.get(key)!r}"
            require(
                before.get(key) == value,
                f"{part}.{key}",
                value,
                rule,
                f"put that back into {folder / RUN_FILE}",
            )
    return checkpoint


def run_model(config: RunConfig, checkpoint: Checkpoint) -> Denoiser:
    """The model with the averaged weights of a run's checkpoint, on the CPU; for a run of adapters with these in it, not folded in."""
    if config.lora.rank and config.train.start:
        return rebuild(config.network, config.run.seed, config.train.start, config.lora, checkpoint)
    return fill(config.network, checkpoint.tensors["ema"], str(checkpoint.path))


def about_run(config: RunConfig, checkpoint: Checkpoint) -> dict[str, Any]:
    """What a model card can say of a run: its data by name (where they lie is nobody's business), step, clips seen, and its origin."""
    clips = {key: getattr(config.data, key) for key in ("kind", "resolution", "frames", "interval")}
    name = {} if config.data.root is None else {"name": Path(config.data.root).name}
    start = f", started from {Path(config.train.init).name}" if config.train.init else ""
    how = f"adapters of rank {config.lora.rank}" if config.lora.rank else "weights"
    gate = {"gate_steps": config.train.gate_steps} if config.text.gated_time else {}
    return {
        "data": {**name, **clips},
        "step": checkpoint.step,
        "clips_seen": checkpoint.step * config.train.global_batch,
        "source": f"averaged {how} of a run{start}",
        **gate,
    }


def fill(config: DenoiserConfig, tensors: Mapping[str, Tensor], where: str) -> Denoiser:
    """The model of ``config`` with these weights, which a report in the log says, too.

    InputError naming the first tensor that is missing, too many or of another shape.
    """
    with torch.device("meta"):
        model = build(config)
    wanted = model.state_dict()
    faults = [f"lacks {key}" for key in wanted if key not in tensors] + [
        f"has {key} too many" for key in tensors if key not in wanted
    ]
    faults += [
        f"has {key} of shape {tuple(tensors[key].shape)} instead of {tuple(tensor.shape)}"
        for key, tensor in wanted.items()
        if key in tensors and tensors[key].shape != tensor.shape
    ]
    if faults:
        raise InputError(
            f"{where} {faults[0]} ({len(faults)} faults in all); its weights belong to another configuration of the model"
        )
    LOG.info("%s", Coverage(where, type(model).__name__, list(tensors), [], []))
    model.load_state_dict({key: tensor.float() for key, tensor in tensors.items()}, assign=True)
    return model.requires_grad_(False).eval()
