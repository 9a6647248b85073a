# SPDX-License-Identifier: Apache-2.0
"""How a fresh run starts: from random weights or from given ones, with a report of what became of every
tensor.

From an image model: a class model from a DiT (Latte, Sec. 3.3.5), a text model from PixArt-alpha (Sec.
4.4). Or from a model like the run's own, to train it further on other data: a weights folder, another run,
or anybody's Latte that the one door knows. With adapters (LoRA) the given weights are frozen, and are
needed again whenever the run goes on or is sampled.
"""

import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from latte.checkpoint.record import read_fingerprint
from latte.checkpoint.run import Checkpoint, list_checkpoints, load_checkpoint, load_latest
from latte.checks import InputError, require
from latte.diffusion.config import DiffusionConfig, build_process
from latte.files import commit_file, reported
from latte.interop.coverage import LABELS, Coverage, Understanding, build, compare, relabelled, some
from latte.interop.dit import init_from_dit
from latte.interop.load import load_external
from latte.interop.lora import LoraConfig, add_lora, lora_state
from latte.interop.pixart import init_from_pixart
from latte.interop.resolve import Source, resolve
from latte.model.denoiser import Denoiser, DenoiserConfig
from latte.model.text import config_class
from latte.tensors import tensors_sha256

LOG = logging.getLogger(__name__)
REPORT = "init.txt"
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
"""Keys of a model that may differ from those of the weights it starts from, or are compared otherwise."""


class Start(NamedTuple):
    """``source``: file, folder, hub id, run or one of its checkpoints, or builtin. ``mapping`` is for a DiT.

    ``gaps`` are patterns of our names that the source may lack.
    """

    source: str
    mapping: str = "all"
    gaps: tuple[str, ...] = ()


def start_from(
    model: Denoiser, start: Start, run_dir: Path, facts: Mapping[str, Any], again: bool = False
) -> None:
    """Fill ``model``; the report goes to the log and to ``run_dir``/init.txt.

    Nothing happens, and the weights are not needed, when the run has checkpoints: it goes on from them,
    unless ``again`` says that they do not hold everything. ``facts`` of the run (diffusion, codec, text)
    are compared with what the weights say of themselves. InputError for weights that do not fit, before
    anything is written, and for adapters (``again``) on weights whose gate is not open: they would leave it
    so.
    """
    if list_checkpoints(run_dir) and not again:
        return
    report = fill(model, start, facts)
    random = [*report.missing, *report.mismatched]
    if again and start.gaps and random:
        raise InputError(
            f"train.init: {start.source} has nothing for {some(random)}, which adapters would leave random; train the whole "
            "model first, then adapters on it"
        )
    if again:
        rule = "adapters leave it as it is, and so frames would hardly know their order"
        require(
            model.opened == 1.0,
            f"train.init: time_gate of {start.source}",
            model.opened,
            rule,
            "train the whole model until it is 1, then adapters on it",
        )
    used = "\n".join(f"  used: {name}" for name in report.used)
    LOG.info("%s", used)
    with reported("the report of the start", run_dir / REPORT):
        commit_file(run_dir / REPORT, f"{report}\n{used}\n")


def check_source(start: Start) -> None:
    """InputError unless there is something known at ``start``: for before the hours that captions can take."""
    source = resolve(start.source, "train.init")
    if source.run is None:
        try:
            source.layout()
        except InputError as error:
            raise InputError(f"train.init: {error}") from None


def fill(model: Denoiser, start: Start, facts: Mapping[str, Any]) -> Coverage:
    """Weights of any kind -> ``model``; the report, which is logged, too. InputError that says train.init
    for weights that do not fit.
    """
    source = resolve(start.source, "train.init")
    try:
        return filled(model, start, source, facts)
    except InputError as error:
        raise InputError(f"train.init: {error}") from None


def filled(model: Denoiser, start: Start, source: Source, facts: Mapping[str, Any]) -> Coverage:
    """``fill`` by kind."""
    if source.run is not None:
        tensors, config, said = of_run(source)
    else:
        layout = source.layout()
        if layout in IMAGE_MODELS:
            return IMAGE_MODELS[layout](model, start)
        loaded = load_external(start.source, heads=model.config.dimensions[2])
        tensors, config, said = loaded.state_dict, loaded.config, told(loaded.card)
    check_same(model, config, start.source)
    check_told(said, facts, start.source)
    tensors = in_order(tensors, said.get("classes") or [], facts.get("classes") or [], start.source)
    found = Understanding(config, {name: name for name in tensors})
    state, report = compare(start.source, type(model).__name__, tensors, found, model.state_dict())
    LOG.info("%s", report)
    report.refuse(start.gaps, (), "to start without them, name them in train.init_gaps")
    model.load_state_dict(state, strict=False)
    return report


def from_dit(model: Denoiser, start: Start) -> Coverage:
    """A class model from a DiT."""
    if model.config.reads_text:
        raise InputError(
            f"{start.source} is a DiT, which reads no captions; give a PixArt-alpha, or leave text.name out"
        )
    return init_from_dit(model, start.source, start.mapping)


def from_pixart(model: Denoiser, start: Start) -> Coverage:
    """A text model from a PixArt-alpha; InputError for one without a gate, which would not start as PixArt."""
    if not model.config.reads_text:
        raise InputError(
            f"{start.source} is a PixArt-alpha, which reads captions; give a DiT, or set text.name"
        )
    rule = "PixArt's blocks have one place each in a text model"
    require(start.mapping == "all", "train.init_mapping", start.mapping, rule, "leave it out")
    rule = f"{start.source} is a PixArt-alpha, and without a gate the temporal table disturbs its pictures from the start"
    require(
        model.config.gated_time, "text.gated_time", model.config.gated_time, rule, "set text.gated_time=true"
    )
    return init_from_pixart(model, start.source)


IMAGE_MODELS: dict[str, Callable[[Denoiser, Start], Coverage]] = {
    "DiT": from_dit,
    "PixArt-alpha": from_pixart,
}


def of_run(source: Source) -> tuple[dict[str, Tensor], DenoiserConfig, dict[str, Any]]:
    """The averaged weights of a run's newest checkpoint, or of this one, its model's configuration, and
    what it says of itself.
    """
    folder = source.run
    if source.kind == "checkpoint":
        checkpoint = load_checkpoint(source.path, only={"ema"})
    else:
        checkpoint = load_latest(source.path, only={"ema"})
    if checkpoint is None:
        raise InputError(f"{folder} is a run without a checkpoint yet; train it first: latte train {folder}")
    facts = checkpoint.state["facts"]
    if "lora" in facts:
        raise InputError(
            f"{folder} is a run of adapters alone; fold them in first: latte convert {folder} NEW_FOLDER"
        )
    kind = config_class(facts["model"])
    said = {
        "diffusion": facts.get("diffusion"),
        "codec": facts.get("codec"),
        "text": facts.get("text", {}).get("encoder"),
        "classes": facts.get("classes"),
    }
    return checkpoint.tensors["ema"], kind(**facts["model"]), said


def told(card: Mapping[str, Any]) -> dict[str, Any]:
    """What a weights folder's config.json says beside the model's keys; nothing for other people's."""
    parts = {key: card.get(key) for key in ("diffusion", "codec", "text")}
    said = {
        key: part if key == "diffusion" else read_fingerprint(part)
        for key, part in parts.items()
        if isinstance(part, dict)
    }
    return {**said, "classes": [str(name) for name in card.get("classes") or ()]}


def check_same(model: Denoiser, config: DenoiserConfig, source: str) -> None:
    """InputError unless ``config`` means the same computation as the model's own, on clips of any size."""
    mine = model.config
    kinds = {False: "a class-conditional or unconditional model", True: "a text-to-video model"}
    rule = f"the weights at {source} are {kinds[config.reads_text]}"
    require(
        mine.reads_text == config.reads_text,
        "the run's model",
        kinds[mine.reads_text],
        rule,
        "set text.name accordingly, or give others",
    )
    for what, ours, theirs in zip(
        ("depth", "width", "heads"), mine.dimensions, config.dimensions, strict=True
    ):
        require(
            ours == theirs,
            f"model.{what}",
            ours,
            f"the weights at {source} have {theirs}",
            f"set model.{what}={theirs}",
        )
    for item in fields(mine):
        ours, theirs = getattr(mine, item.name), getattr(config, item.name)
        if item.name not in FREE:
            require(
                ours == theirs,
                f"model.{item.name}",
                ours,
                f"the weights at {source} have {theirs}",
                "make them the same",
            )
    if mine.reads_text:
        side = config.table_grid[0]
        require(
            mine.spans == config.spans,
            "the grid of positions",
            mine.table_grid,
            f"the weights at {source} have {config.table_grid}",
            f"set text.table_size={side}",
        )


def check_told(said: Mapping[str, Any], facts: Mapping[str, Any], source: str) -> None:
    """InputError for another diffusion process than the weights learned; a notice for another codec or text
    encoder.
    """
    if said.get("diffusion") and facts.get("diffusion"):
        before, now = DiffusionConfig(**said["diffusion"]), DiffusionConfig(**facts["diffusion"])
        rows = [
            (
                "prediction of diffusion.objective",
                build_process(before).prediction,
                build_process(now).prediction,
            )
        ]
        rows += [
            (f"diffusion.{key}", getattr(before, key), getattr(now, key)) for key in ("schedule", "num_steps")
        ]
        for what, theirs, ours in rows:
            require(
                theirs == ours,
                what,
                ours,
                f"the weights at {source} learned with {theirs}",
                "give diffusion's keys as they were",
            )
    for part, now in (("codec", facts.get("codec")), ("text", (facts.get("text") or {}).get("encoder"))):
        if said.get(part) and now and said[part] != now:
            print(
                f"notice: the weights at {source} learned with {part} {said[part]}, this run has {now}",
                file=sys.stderr,
            )


def in_order(
    tensors: dict[str, Tensor], theirs: Sequence[str], ours: Sequence[str], source: str
) -> dict[str, Tensor]:
    """``tensors`` with the rows of the label table in the order of this run's classes, by name.

    Where the names differ the rows stay as they are, which a notice says: a class then starts as the one
    with its number.
    """
    if LABELS not in tensors or not theirs or not ours:
        return tensors
    if sorted(theirs) != sorted(ours):
        print(
            f"notice: the classes of the weights at {source} are {', '.join(theirs)}, this run's are {', '.join(ours)}: each starts as "
            "the one with its number",
            file=sys.stderr,
        )
        return tensors
    return {**tensors, LABELS: relabelled(tensors[LABELS], theirs, ours)}


def adapt(model: Denoiser, lora: LoraConfig, seed: int) -> dict[str, Any]:
    """Freeze ``model`` and put fresh adapters into it; what a run with them has to have in common with
    itself: their kind and the base.
    """
    base = tensors_sha256(model.state_dict())
    add_lora(model, lora, seed)
    return {**asdict(lora), "base": base}


def rebuild(
    config: DenoiserConfig, seed: int, start: Start, lora: LoraConfig, checkpoint: Checkpoint
) -> Denoiser:
    """The model of a run of adapters, on the CPU: its base from where the run had it, its averaged adapters
    from ``checkpoint``.

    InputError when the weights are gone or altered.
    """
    model, facts = build(config, seed), checkpoint.state["facts"]
    fill(model, start, facts)
    now, wanted = adapt(model, lora, seed)["base"], facts["lora"]["base"]
    require(
        now == wanted,
        "the weights at train.init",
        now[:16],
        f"the adapters of {checkpoint.path} belong to {wanted[:16]}",
        f"put the right ones at {start.source}",
    )
    tensors, adapters = checkpoint.tensors["ema"], lora_state(model)
    require(
        tensors.keys() == adapters.keys(),
        "lora",
        asdict(lora),
        f"{checkpoint.path} holds others",
        "give the run's own config.yaml",
    )
    with torch.no_grad():
        for name, tensor in adapters.items():
            tensor.copy_(tensors[name])
    return model
