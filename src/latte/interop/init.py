# SPDX-License-Identifier: Apache-2.0
"""How a fresh run starts: from pretrained weights, with a report of every tensor.

A class model may start from a DiT (Latte, Sec. 3.3.5), a text model from PixArt-alpha (Sec. 4.4). For fine-
tuning, a model starts from one like itself: a weights folder, another run, or an external Latte checkpoint.
With LoRA adapters these weights are frozen, and they are needed again whenever the run is resumed or
sampled.
"""

import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latte.checkpoint.record import read_fingerprint
from latte.checkpoint.run import Checkpoint, list_checkpoints, load_checkpoint, load_latest
from latte.checks import InputError, check, command_line
from latte.diffusion.config import DiffusionConfig, build_process
from latte.files import commit_file, reported
from latte.interop.config import Start as Start
from latte.interop.coverage import LABELS, Coverage, Understanding, build, compare, relabelled, some
from latte.interop.dit import init_from_dit
from latte.interop.load import Source, load_external, resolve
from latte.interop.lora import LoraConfig, add_lora, lora_state
from latte.interop.pixart import init_from_pixart
from latte.model.denoiser import Denoiser, DenoiserConfig
from latte.model.latte import Latte
from latte.model.text import LatteText, config_class
from latte.tensors import tensors_sha256

LOG = logging.getLogger(__name__)
REPORT = "init.txt"
# Keys of a model that may differ from those of its pretrained weights, or are compared in another way.
FREE = {
    "size",
    "depth",
    "width",
    "heads",
    "num_frames",
    "latent_size",
    "table_size",
    "class_dropout",
    "num_classes",
}


def start_from(
    model: Denoiser, start: Start, run_dir: Path, facts: Mapping[str, Any], adapters: bool = False
) -> None:
    """Load the weights of ``start`` into ``model``; the report goes to the log and to ``run_dir``/init.txt.

    A run with checkpoints resumes from them: then nothing happens, and the weights are not needed, unless
    it trains ``adapters``, whose checkpoints do not hold the rest. ``facts`` of the run (diffusion, codec,
    text) are compared with those recorded with the weights. InputError, before anything is written, for
    weights that do not fit, and for adapters on weights that would stay incomplete: missing tensors, or a
    time gate that is not open.
    """
    if list_checkpoints(run_dir) and not adapters:
        return
    report = fill(model, start, facts)
    random = [*report.missing, *report.mismatched]
    if adapters and start.gaps and random:
        raise InputError(
            f"train.init: {start.source} has nothing for {some(random)}, which adapters would leave "
            "random; train the "
            "whole model first, then adapters on it"
        )
    if adapters:
        check(
            model.opened == 1.0,
            f"train.init: time_gate of {start.source} is {model.opened}, but adapters do not change it, so "
            "the model "
            "would hardly know the order of frames; train the whole model until it is 1, then adapters on it",
        )
    used = "\n".join(f"  used: {name}" for name in report.used)
    LOG.info("%s", used)
    with reported("the report of the pretrained weights", run_dir / REPORT):
        commit_file(run_dir / REPORT, f"{report}\n{used}\n")


def check_source(start: Start) -> None:
    """InputError unless ``start`` exists and is of a known kind: a check before captions are encoded, which
    can take hours.
    """
    source = resolve(start.source, "train.init")
    if source.run is None:
        try:
            source.layout()
        except InputError as error:
            raise InputError(f"train.init: {error}") from None


def fill(model: Denoiser, start: Start, facts: Mapping[str, Any]) -> Coverage:
    """Load weights of any kind into ``model`` and return the report, which is also logged.

    InputError that names train.init for weights that do not fit.
    """
    source = resolve(start.source, "train.init")
    try:
        return load_into(model, start, source, facts)
    except InputError as error:
        raise InputError(f"train.init: {error}") from None


def load_into(model: Denoiser, start: Start, source: Source, facts: Mapping[str, Any]) -> Coverage:
    """Load the weights according to the kind of ``source``; see ``fill``."""
    if source.run is not None:
        tensors, config, recorded = read_run(source)
    else:
        layout = source.layout()
        if layout in IMAGE_MODELS:
            return IMAGE_MODELS[layout](model, start)
        loaded = load_external(start.source, heads=model.config.dimensions[2])
        tensors = loaded.state_dict
        config = loaded.config
        recorded = read_card(loaded.card)
    check_same(model, config, start.source)
    check_recorded(recorded, facts, start.source)
    tensors = sort_classes(tensors, recorded.get("classes") or [], facts.get("classes") or [], start.source)
    found = Understanding(config, {name: name for name in tensors})
    state, report = compare(start.source, type(model).__name__, tensors, found, model.state_dict())
    LOG.info("%s", report)
    report.refuse(start.gaps, (), "to start without them, name them in train.init_gaps")
    model.load_state_dict(state, strict=False)
    return report


def from_dit(model: Denoiser, start: Start) -> Coverage:
    """Load a DiT into a class model."""
    if not isinstance(model, Latte):
        raise InputError(
            f"{start.source} is a DiT, which reads no captions; give a PixArt-alpha, or leave text.name out"
        )
    return init_from_dit(model, start.source, start.mapping)


def from_pixart(model: Denoiser, start: Start) -> Coverage:
    """Load a PixArt-alpha into a text model; InputError for one without a gate, which would not start as
    PixArt.
    """
    if not isinstance(model, LatteText):
        raise InputError(
            f"{start.source} is a PixArt-alpha, which reads captions; give a DiT, or set text.name"
        )
    check(
        start.mapping == "all",
        f"train.init_mapping is {start.mapping!r}, but blocks of PixArt fit only one block each; leave it "
        "out",
    )
    check(
        model.config.gated_time,
        f"text.gated_time is False, but {start.source} is a PixArt-alpha, whose images the temporal table "
        "would "
        "disturb from the start without a gate; set text.gated_time=true",
    )
    return init_from_pixart(model, start.source)


IMAGE_MODELS: dict[str, Callable[[Denoiser, Start], Coverage]] = {
    "DiT": from_dit,
    "PixArt-alpha": from_pixart,
}


def read_run(source: Source) -> tuple[dict[str, Tensor], DenoiserConfig, dict[str, Any]]:
    """Return the EMA weights of a run's newest checkpoint, or of the one given, its model's configuration,
    and its facts.
    """
    folder = source.run
    if source.kind == "checkpoint":
        checkpoint = load_checkpoint(source.path, only={"ema"})
    else:
        checkpoint = load_latest(source.path, only={"ema"})
    if checkpoint is None:
        raise InputError(
            f"{folder} is a run without a checkpoint; train it first: {command_line('train', folder)}"
        )
    facts = checkpoint.state["facts"]
    if "lora" in facts:
        command = command_line("convert", folder, "NEW_FOLDER")
        raise InputError(f"{folder} is a run of adapters alone; merge them first: {command}")
    recorded = {
        "diffusion": facts.get("diffusion"),
        "codec": facts.get("codec"),
        "text": facts.get("text", {}).get("encoder"),
        "classes": facts.get("classes"),
    }
    return checkpoint.tensors["ema"], config_class(facts["model"])(**facts["model"]), recorded


def read_card(card: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a weights folder's config.json records beside the model's keys; nothing for external
    checkpoints.
    """
    recorded: dict[str, Any] = {"classes": [str(name) for name in card.get("classes") or ()]}
    for key in ("diffusion", "codec", "text"):
        part = card.get(key)
        if isinstance(part, dict):
            recorded[key] = part if key == "diffusion" else read_fingerprint(part)
    return recorded


def check_same(model: Denoiser, config: DenoiserConfig, source: str) -> None:
    """InputError unless ``config`` means the same computation as the model's own, on clips of any size."""
    own: Any = model.config
    other: Any = config
    kinds = {False: "a class-conditional or unconditional model", True: "a text-to-video model"}
    check(
        own.reads_text == other.reads_text,
        f"the run trains {kinds[own.reads_text]}, but the weights at {source} are {kinds[other.reads_text]}; "
        "set text.name accordingly, or give other weights",
    )
    for name, value, external in zip(
        ("depth", "width", "heads"), own.dimensions, other.dimensions, strict=True
    ):
        check(
            value == external,
            f"model.{name} is {value}, but the weights at {source} have {external}; "
            f"set model.{name}={external}",
        )
    for item in fields(own):
        value = getattr(own, item.name)
        external = getattr(other, item.name)
        added = item.name == "pooled_caption" and not external  # a missing layer that starts at 0
        check(
            item.name in FREE or added or value == external,
            f"model.{item.name} is {value!r}, but the weights at {source} have {external}; make them the "
            "same",
        )
    check(
        not own.reads_text or own.spans == other.spans,
        f"the grid of positions is {own.reads_text and own.table_grid}, but the weights at {source} have "
        f"{other.reads_text and other.table_grid}; set "
        f"text.table_size={other.reads_text and other.table_grid[0]}",
    )


def check_recorded(recorded: Mapping[str, Any], facts: Mapping[str, Any], source: str) -> None:
    """InputError for another diffusion process than that of the weights; a notice for another codec or text
    encoder.
    """
    if recorded.get("diffusion") and facts.get("diffusion"):
        before = DiffusionConfig(**recorded["diffusion"])
        now = DiffusionConfig(**facts["diffusion"])
        rows = [
            (
                "prediction of diffusion.objective",
                build_process(before).prediction,
                build_process(now).prediction,
            ),
            ("diffusion.schedule", before.schedule, now.schedule),
            ("diffusion.num_steps", before.num_steps, now.num_steps),
        ]
        for name, trained_with, given in rows:
            check(
                trained_with == given,
                f"{name} is {given!r}, but the weights at {source} learned with {trained_with}; "
                "use the diffusion settings of their training",
            )
    for part, now in (("codec", facts.get("codec")), ("text", (facts.get("text") or {}).get("encoder"))):
        if recorded.get(part) and now and recorded[part] != now:
            print(
                f"notice: the weights at {source} learned with {part} {recorded[part]}, this run has {now}",
                file=sys.stderr,
            )


def sort_classes(
    tensors: dict[str, Tensor], before: Sequence[str], now: Sequence[str], source: str
) -> dict[str, Tensor]:
    """Return ``tensors`` with the rows of the label table in the order of this run's classes ``now``, by
    name.

    Where the names differ the rows stay as they are, with a notice: a class then starts as the one with its
    number.
    """
    if LABELS not in tensors or not before or not now:
        return tensors
    if sorted(before) != sorted(now):
        print(
            f"notice: the classes of the weights at {source} are {', '.join(before)}, this run's are "
            f"{', '.join(now)}: "
            "each starts as the one with its number",
            file=sys.stderr,
        )
        return tensors
    return {**tensors, LABELS: relabelled(tensors[LABELS], before, now)}


def adapt(model: Denoiser, lora: LoraConfig, seed: int) -> dict[str, Any]:
    """Freeze ``model`` and add fresh adapters; return their settings and the hash of the base, which a
    resumed run must share.
    """
    base = tensors_sha256(model.state_dict())
    add_lora(model, lora, seed)
    return {**asdict(lora), "base": base}


def rebuild(
    config: DenoiserConfig, seed: int, start: Start, lora: LoraConfig, checkpoint: Checkpoint
) -> Denoiser:
    """Return the model of a run of adapters on the CPU: pretrained base, and the EMA adapters of
    ``checkpoint``.

    InputError when the base is missing or altered.
    """
    model = build(config, seed)
    facts = checkpoint.state["facts"]
    fill(model, start, facts)
    found = adapt(model, lora, seed)["base"]
    expected = facts["lora"]["base"]
    check(
        found == expected,
        f"the weights at train.init are {found[:16]!r}, but the adapters of {checkpoint.path} belong to "
        f"{expected[:16]}; "
        f"put the right ones at {start.source}",
    )
    tensors = checkpoint.tensors["ema"]
    adapters = lora_state(model)
    check(
        tensors.keys() == adapters.keys(),
        f"lora is {asdict(lora)}, but {checkpoint.path} holds other adapters; restore the run's own "
        "config.yaml",
    )
    with torch.no_grad():
        for name, tensor in adapters.items():
            tensor.copy_(tensors[name])
    return model
