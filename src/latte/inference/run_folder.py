# SPDX-License-Identifier: Apache-2.0
"""Read the model of a run folder: the EMA weights of a checkpoint, checked against the run's config.yaml.

The checkpoint records what the weights depend on (model, diffusion, fingerprints, classes); config.yaml adds
where the codec and the text encoder are stored and the sampling defaults. It is read section by section, so a
run made from Python may leave sections out.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import yaml

from latte.autoencoder.codec import CodecConfig
from latte.checkpoint.ema import read_ema
from latte.checkpoint.record import RENAMED_KEYS
from latte.checkpoint.run import Checkpoint, load_checkpoint, load_latest
from latte.checks import InputError, check, command_line
from latte.diffusion.config import DiffusionConfig
from latte.diffusion.guidance import Distilled
from latte.inference.clip_shape import recorded_extras
from latte.inference.generate import SampleConfig
from latte.inference.stored import (
    StoredModel,
    check_complete,
    load_network,
    open_external_model,
    open_weights_folder,
    optional,
    typed,
)
from latte.interop.coverage import Coverage
from latte.interop.init import Start, rebuild
from latte.interop.load import resolve
from latte.interop.lora import LoraConfig, merged
from latte.model.config import OPTIONS
from latte.model.denoiser import Denoiser
from latte.model.text import config_class
from latte.tensors import tensors_sha256
from latte.text.encoders import TextEncoderConfig

RUN_FILE = "config.yaml"
MAX_CONFIG_BYTES = 1 << 20
LOG = logging.getLogger(__name__)


def run_of(path: Path) -> Path | None:
    """Return the run folder that ``path`` is, or that it is a checkpoint of; None for any other path."""
    run = path.parents[1] if path.parent.name == "checkpoints" else path
    if (run / RUN_FILE).is_file():
        return run
    return None


def open_source(
    source: str | Path,
    codec_path: str | None = None,
    text_encoder_path: str | None = None,
    own_codec: bool = False,
    ema: float | None = None,
) -> StoredModel:
    """Describe the model at any source that ``from_pretrained`` accepts; InputError for anything else.

    ``own_codec``: the caller supplies the codec, so its record is not read. ``ema``: see ``read_ema``.
    """
    found = resolve(source)
    if found.run is not None:
        return open_run(found.path, own_codec, ema)
    check(ema is None, f"--ema chooses EMA weights of a run, but {source} is none; leave it out")
    if found.kind == "weights":
        return open_weights_folder(found.path, found.name, own_codec)
    return open_external_model(found, codec_path, text_encoder_path)


def open_run(path: Path, own_codec: bool = False, ema: float | None = None) -> StoredModel:
    """Describe the model of a run folder (its newest good checkpoint) or of one of its checkpoints.

    ``own_codec``: the caller supplies the codec, so its section is not read. InputError for a run without a
    checkpoint, and for a config.yaml that contradicts the checkpoint.
    """
    folder, sections, checkpoint = read_run(path)
    if ema is not None:
        checkpoint.tensors["ema"], error = read_ema(checkpoint.path, ema)
        if error:
            LOG.info("EMA weights of width %g, combined from stored ones; error %.1f %%", ema, 100 * error)
    return stored_run(folder, sections, checkpoint, own_codec)


def stored_run(
    folder: Path, sections: Mapping[str, Any], checkpoint: Checkpoint, own_codec: bool = False
) -> StoredModel:
    """Describe the model of a run that ``read_run`` has read."""
    facts = checkpoint.state["facts"]
    text = section(folder, sections, "text", TextEncoderConfig)
    codec = None
    if "codec" in sections and not own_codec:
        codec = section(folder, sections, "codec", CodecConfig)

    def load() -> tuple[Denoiser, str]:
        network = load_run_network(folder, sections, checkpoint)
        if "lora" not in facts:
            return network, tensors_sha256(checkpoint.tensors["ema"])
        network = merged(network)
        return network, tensors_sha256(network.state_dict())

    return StoredModel(
        name=str(folder),
        load=load,
        diffusion=diffusion_of(folder, sections, facts),
        codec=codec,
        sample=section(folder, sections, "sample", SampleConfig),
        classes=list(facts.get("classes", [])),
        codec_fingerprint=facts.get("codec"),
        text=text if text.name else None,
        text_fingerprint=(facts.get("text") or {}).get("encoder"),
        about=about_run(sections, checkpoint),
        buckets=tuple(map(tuple, facts.get("data", {}).get("buckets", ()))),
        distilled=optional(Distilled, facts.get("distilled"), f"{checkpoint.path}: distilled"),
    )


def read_run(path: Path) -> tuple[Path, dict[str, Any], Checkpoint]:
    """Return (run folder, sections of its config.yaml, checkpoint with the EMA weights), checked against
    each other.
    """
    folder = run_of(path)
    check(
        folder is not None,
        f"{path} is not a run folder: it has no {RUN_FILE}; give a folder that latte train wrote",
    )
    assert folder is not None
    only = {"ema"}
    checkpoint = load_latest(folder, only=only) if path == folder else load_checkpoint(path, only=only)
    sections = read_sections(folder / RUN_FILE)
    if checkpoint is None:
        raise InputError(
            f"run {folder} has no checkpoint yet; train it first: {command_line('train', folder)}"
        )
    check_unchanged(folder, sections, checkpoint)
    return folder, sections, checkpoint


def read_sections(file: Path) -> dict[str, Any]:
    """Return the YAML mapping in ``file`` as nested plain data; InputError for anything else."""
    check(
        file.stat().st_size <= MAX_CONFIG_BYTES, f"{file} is larger than 1 MB; give the config.yaml of a run"
    )
    try:
        sections = yaml.safe_load(file.read_text("utf-8"))
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        reason = str(getattr(error, "problem", None) or type(error).__name__)
        raise InputError(
            f"{file} is not YAML ({reason}); restore the config.yaml that training wrote"
        ) from None
    check(
        isinstance(sections, dict), f"{file} holds no sections; restore the config.yaml that training wrote"
    )
    for name, values in sections.items():
        check(
            values is None or name == "version" or isinstance(values, dict),
            f"{file}: {name} is {str(values)[:40]!r}, but it must be a section of keys",
        )
    for old, new in RENAMED_KEYS.items():
        part, _, key = old.partition(".")
        if key in (sections.get(part) or {}):
            target, _, name = new.partition(".")
            value = sections[part].pop(key)
            sections[target] = {**(sections.get(target) or {}), name: value}
    return {name: values for name, values in sections.items() if values}


def section(folder: Path, sections: Mapping[str, Any], name: str, kind: type) -> Any:
    """Return a section of config.yaml as its configuration class, defaults where it is absent."""
    return typed(kind, sections.get(name, {}), f"{folder / RUN_FILE}: {name}")


def check_unchanged(folder: Path, sections: Mapping[str, Any], checkpoint: Checkpoint) -> None:
    """Raise InputError where config.yaml differs from what the checkpoint was trained with; absent keys
    are not compared.
    """
    facts = checkpoint.state["facts"]
    kind = config_class(facts["model"])
    text = section(folder, sections, "text", TextEncoderConfig)
    if "text" in sections:
        check(
            bool(text.name) == (kind.reads_text),
            f"text.name is {text.name!r}, but {checkpoint.path} is a model of another kind; "
            f"restore text.name in {folder / RUN_FILE}",
        )
    model = {key: value for key, value in sections.get("model", {}).items() if key in field_names(kind)}
    if text.name:
        model |= {
            "gated_time": text.gated_time,
            "table_size": text.table_size,
            "pooled_caption": text.pooled_caption,
            "caption_channels": text.channels,
        }
    given = {"model": (kind, model), "diffusion": (DiffusionConfig, sections.get("diffusion", {}))}
    if "lora" in facts or sections.get("lora", {}).get("rank"):
        given["lora"] = (LoraConfig, sections.get("lora", {}))
    for part, (config, values) in given.items():
        if part != "lora" and part not in facts:
            continue
        recorded = {key: value for key, value in facts.get(part, {}).items() if key in field_names(config)}
        now = json.loads(
            json.dumps(asdict(typed(config, {**recorded, **values}, f"{folder / RUN_FILE}: {part}")))
        )
        for key in values:
            before = recorded.get(key, OPTIONS.get(key))
            check(
                before == now[key],
                f"{part}.{key} is {now[key]}, but {checkpoint.path} was trained with {before}; "
                f"restore it in {folder / RUN_FILE}",
            )


def load_run_network(folder: Path, sections: Mapping[str, Any], checkpoint: Checkpoint) -> Denoiser:
    """Build the network with the checkpoint's EMA weights on the CPU; a LoRA run's adapters stay separate,
    not merged.
    """
    facts = checkpoint.state["facts"]
    config = typed(config_class(facts["model"]), facts["model"], str(checkpoint.path))
    if "lora" not in facts:
        return load_network(config, checkpoint.tensors["ema"], str(checkpoint.path))
    train = sections.get("train", {})
    check(
        bool(train.get("init")),
        f"{checkpoint.path} holds LoRA adapters, but {folder / RUN_FILE} has no train.init; restore it there",
    )
    start = Start(train["init"], train.get("init_mapping", "all"), tuple(train.get("init_gaps") or ()))
    lora = typed(
        LoraConfig, {key: facts["lora"][key] for key in field_names(LoraConfig)}, str(checkpoint.path)
    )
    return rebuild(config, facts["run"]["seed"], start, lora, checkpoint)


def run_facts(path: Path) -> tuple[Denoiser, Coverage, dict[str, Any]]:
    """Return a run's network (adapters separate), its report, and the facts that config.json stores beside
    the model's keys.
    """
    folder, sections, checkpoint = read_run(path)
    stored = stored_run(folder, sections, checkpoint)
    check_complete(stored, stored.diffusion, None)
    assert stored.codec
    assert stored.diffusion
    facts = {
        "diffusion": asdict(stored.diffusion),
        "classes": stored.classes,
        "sample": stored.sample.recorded(),
        "codec": {
            "name": stored.codec.name,
            "path": stored.codec.path,
            "fingerprint": stored.codec_fingerprint,
        },
        "about": dict(stored.about),
    }
    if stored.text:
        facts["text"] = {**asdict(stored.text), "fingerprint": stored.text_fingerprint}
    facts |= recorded_extras(stored)
    report = Coverage(str(path), f"run, step {checkpoint.step}", list(checkpoint.tensors["ema"]), [], [])
    return load_run_network(folder, sections, checkpoint), report, facts


def diffusion_of(
    folder: Path, sections: Mapping[str, Any], facts: Mapping[str, Any]
) -> DiffusionConfig | None:
    """Return the run's diffusion process, from config.yaml or else from the checkpoint; None where neither
    records it.
    """
    values = sections.get("diffusion") or facts.get("diffusion")
    return optional(DiffusionConfig, values, f"{folder / RUN_FILE}: diffusion")


def about_run(sections: Mapping[str, Any], checkpoint: Checkpoint) -> dict[str, Any]:
    """Return a model card's training metadata: data by name (never its path), step, clips seen, and origin
    of the weights.
    """
    facts = checkpoint.state["facts"]
    data = sections.get("data", {})
    train = sections.get("train", {})
    about: dict[str, Any] = {}
    clips = {key: data[key] for key in ("kind", "resolution", "frames", "interval") if key in data}
    if clips.get("kind") == "procedural":
        clips |= {key: data[key] for key in ("scenes", "language", "hold_out") if data.get(key)}
    if data.get("root"):
        clips = {"name": Path(data["root"]).name, **clips}
    if clips:
        about["data"] = clips
    about["step"] = checkpoint.step
    about["clips_seen"] = checkpoint.step * facts["train"]["global_batch"]
    about["source"] = "EMA weights of a run"
    if "lora" in facts:
        about["source"] = f"EMA LoRA adapters of rank {facts['lora']['rank']} of a run"
    if train.get("init"):
        about["source"] += f", started from {Path(train['init']).name}"
    if facts["model"].get("gated_time") and "gate_steps" in train:
        about["gate_steps"] = train["gate_steps"]
    return about


def field_names(kind: type) -> list[str]:
    """Return the keys of a configuration class."""
    return [item.name for item in fields(kind)]
