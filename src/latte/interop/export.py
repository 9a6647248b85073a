# SPDX-License-Identifier: Apache-2.0
"""Weights out: our own folder, the released Latte's file, diffusers' transformer or pipeline, peft's
adapters, the hub.

To add a layout: a function (model, place, facts) and one entry in TARGETS. ``facts`` are what goes into
config.json beside the model's keys: diffusion, codec, classes, text, sample, and ``about`` {"data",
"licence", "step", "clips_seen", "source", "scores": [{"protocol", "metric", "value", "interval",
"manifest_hash"}]}. Each may be missing, and the model card, README.md of a weights folder or a hub
repository, lists which: nothing is guessed, least of all a licence.
"""

import html
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch

from latte.autoencoder.codec import CODECS
from latte.checkpoint.record import read_fingerprint
from latte.checks import InputError, RunError, choose
from latte.files import kind_of
from latte.interop.diffusers import save_diffusers
from latte.interop.lora import save_lora
from latte.interop.official import save_official
from latte.interop.pipeline import to_pipeline
from latte.model.denoiser import Denoiser
from latte.model.latte import Latte
from latte.model.pretrained import write_weights_folder
from latte.model.text import LatteText


def export(model: Denoiser, place: str | Path, target: str, facts: Mapping[str, Any]) -> None:
    """Write ``model`` to the new file or folder ``place`` in the layout ``target`` of TARGETS.

    ``facts`` (diffusion, codec, classes, about, ...) go beside the configuration in our own layout. Raises
    InputError when ``place`` exists, or the layout cannot express this model; RunError when the disk
    refuses.
    """
    write, place = choose("--to", target, TARGETS), Path(place)
    check_place(place)
    write(model, place, facts)


def check_place(place: str | Path) -> None:
    """Raise InputError unless ``place`` is a new file or folder, or an empty folder other than the current
    one.
    """
    path = Path(place)
    if not str(place).strip() or path.resolve() == Path.cwd():
        raise InputError(
            f"the destination is {str(place)!r}, the current folder; choose a new folder, e.g. ./weights"
        )
    if os.path.lexists(path) and not path.is_dir():
        raise InputError(f"{path} already exists ({kind_of(path)}); choose a new name, or remove it first")
    if path.is_dir() and any(path.iterdir()):
        raise InputError(
            f"folder {path} already exists and is not empty; choose a new name, or remove it first"
        )


def save_ours(
    model: Denoiser, folder: Path, facts: Mapping[str, Any], dtype: torch.dtype = torch.float32
) -> None:
    """Write a weights folder: model.safetensors, config.json and a model card.

    ``from_pretrained`` of the model's class and ``VideoPipeline.from_pretrained`` read it. Tensors are
    stored as ``dtype`` (float16: half the bytes) and read back as float32. ``facts`` may hold "clip", the
    content of a WebP that plays, which goes beside the card. No path of this machine is written: an
    autoencoder or text encoder that is neither packaged nor on the hub is given again where the folder is
    used. Raises RunError when the disk refuses, or a weight is NaN/Inf.
    """
    facts = dict(facts)
    clip = facts.pop("clip", None)
    for part in ("codec", "text"):
        if facts.get(part):
            facts[part] = public(facts[part])
            facts[part].setdefault("path", None)
    tensors = {name: tensor.detach().to("cpu", dtype) for name, tensor in model.state_dict().items()}

    def card(digest: str) -> str:
        return card_text(model, {**facts, "weights_sha256": digest}, CLIP if clip else None)

    write_weights_folder(folder, tensors, {**model.config.stored(), **facts}, card, {CLIP: clip})


def publish(
    model: Denoiser,
    repository: str,
    facts: Mapping[str, Any],
    private: bool | None = None,
    token: str | None = None,
) -> str:
    """Push what ``save_ours`` writes to the hub as owner/name, without paths of this machine; return the
    commit's URL.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    with TemporaryDirectory() as scratch:
        folder = Path(scratch) / "weights"
        save_ours(model, folder, facts)
        repository = api.create_repo(repository, private=private, exist_ok=True).repo_id
        return str(
            api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Push a Latte model")
        )


def score_of(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a model card needs of a manifest.json of ``latte evaluate``."""
    return {key: report[key] for key in ("protocol", "metric", "value", "interval", "manifest_hash")}


def to_official(model: Denoiser, path: Path, facts: Mapping[str, Any]) -> None:
    """Write the file that the released Latte code loads."""
    if model.config.reads_text:
        raise InputError(
            "--to official cannot hold a text-to-video model: the released layout is class-conditional or "
            "unconditional; use --to diffusers"
        )
    save_official(cast(Latte, model), path)


def to_diffusers(model: Denoiser, folder: Path, facts: Mapping[str, Any]) -> None:
    """Write the transformer folder of a LattePipeline."""
    if not model.config.reads_text:
        raise InputError(
            "--to diffusers holds text-to-video models only, but this model reads no captions; "
            "use --to official"
        )
    save_diffusers(cast(LatteText, model), folder, (facts.get("about") or {}).get("gate_steps"))


def to_hub(model: Denoiser, place: Path, facts: Mapping[str, Any]) -> None:
    """``publish`` to owner/name with the token of ``hf auth login``; RunError when the hub refuses."""
    try:
        publish(model, place.as_posix(), facts)
    except (InputError, RunError):
        raise
    except Exception as error:  # of the hub, and of the HTTP client that it uses
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RunError(
            f"could not push to the hub as {place} ({reason}); use OWNER/NAME, and log in first: hf auth "
            "login"
        ) from error


def to_lora(model: Denoiser, folder: Path, facts: Mapping[str, Any]) -> None:
    """Write the adapters alone."""
    save_lora(model, folder, facts)


TARGETS: dict[str, Callable[[Denoiser, Path, Mapping[str, Any]], None]] = {
    "latte": save_ours,
    "official": to_official,
    "diffusers": to_diffusers,
    "pipeline": to_pipeline,
    "lora": to_lora,
    "hub": to_hub,
}


CLIP = "clip.webp"  # beside the card
TAGS = ("latte", "video-generation", "diffusion", "arxiv:2401.03048")
QUESTIONS = ("data", "licence", "step", "scores")  # what a reader asks first
PARTS = {
    "diffusion": "diffusion",
    "codec": "autoencoder",
    "text": "text encoder",
    "classes": "classes",
    "sample": "sampling",
    "weights_sha256": "weights, sha256",
}
TRAINING = {
    "data": "data",
    "licence": "licence",
    "step": "step",
    "clips_seen": "clips seen",
    "source": "source",
}
MARKUP = re.compile(r"[\\`*\[\]|~]|(?<![^\W_])_|_(?![^\W_])")  # an underscore inside a word is plain text


def card_text(model: Denoiser, facts: Mapping[str, Any], clip: str | None = None) -> str:
    """Return README.md of ``model``, with the YAML header that the hub reads, and the file ``clip``."""
    name = type(model).__name__
    config = model.config.stored()
    text = model.config.reads_text
    about = facts.get("about") or {}
    header: dict[str, Any] = {"library_name": "latte", "tags": [*TAGS, condition_tag(config)]}
    if text:
        header["pipeline_tag"] = "text-to-video"
    if about.get("licence"):
        header["license"] = str(about["licence"])
    rows = [f"| {label} | {cell(value)} |" for label, value in table_rows(config, facts).items()]
    rows += [score_row(score) for score in about.get("scores") or ()]
    unknown = [key for key in QUESTIONS if not about.get(key)]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    lines = [
        "---",
        *(f"{key}: {json.dumps(value)}" for key, value in header.items()),
        "---",
        "",
        f"# {name}, {conditioning(config)}",
        "",
        f"A latent diffusion transformer for video (Latte, arXiv 2401.03048) with {parameters:,} parameters.",
        "",
        *([f"![a generated clip]({clip})", ""] if clip else ()),
        *uses(config, facts),
        "## Facts",
        "",
        "| | |",
        "|---|---|",
        *rows,
        "",
    ]
    if unknown:
        lines += [f"Not recorded: {', '.join(unknown)}.", ""]
    return "\n".join([*lines, "## Use", "", *usage(name, facts)])


def uses(config: Mapping[str, Any], facts: Mapping[str, Any]) -> list[str]:
    """Return the sections on intended use and limits; what is not known of the data is said to be unknown."""
    shape = f"{config['num_frames']} latent frames of {size_text(config)}"
    quality = "No score is recorded, so the quality is not known."
    if (facts.get("about") or {}).get("scores"):
        quality = "Scores hold for the protocol that is named with them, and for no other."
    limits = [
        "Clips resemble the training data and repeat its gaps and biases; nothing filters the output.",
        f"Trained on clips of {shape}; other lengths and sizes come out less well.",
        quality,
    ]
    if "caption_channels" in config:
        limits.append("Words that the captions of the training data lack have no reliable effect.")
    return [
        "## Intended use",
        "",
        "Research on video generation, and fine-tuning on data of one's own. Not for passing off generated "
        "clips as recordings of real people or events, nor for decisions about people.",
        "",
        "## Limits",
        "",
        *(f"- {limit}" for limit in limits),
        "",
    ]


def size_text(config: Mapping[str, Any]) -> str:
    """Return the latent's rows and columns: '32 x 32'."""
    size = config["latent_size"]
    rows, columns = (size, size) if isinstance(size, int) else size
    return f"{rows} x {columns}"


def usage(name: str, facts: Mapping[str, Any]) -> list[str]:
    """Return the lines of the example: the pipeline where the facts suffice for it, else the bare model."""
    if "diffusion" in facts and "codec" in facts:
        condition = "num_videos_per_prompt=4"
        if "text" in facts:
            condition = 'prompt="..."'
        elif facts.get("classes"):
            condition = "class_labels=[0]"
        code = [
            "from latte import VideoPipeline",
            "",
            'pipe = VideoPipeline.from_pretrained("FOLDER or OWNER/NAME")',
            f"video = pipe({condition}).frames",
        ]
    else:
        code = [f"from latte import {name}", "", f'{name}.from_pretrained("FOLDER")']
    return ["```python", *code, "```", ""]


def condition_tag(config: Mapping[str, Any]) -> str:
    """Return the hub's tag for what the model takes besides the timestep."""
    if "caption_channels" in config:
        return "text-to-video"
    if config.get("num_classes") is None:
        return "unconditional"
    return "class-conditional"


def conditioning(config: Mapping[str, Any]) -> str:
    """Name the condition that the model takes besides the timestep."""
    if "caption_channels" in config:
        return "text to video"
    if config.get("num_classes") is None:
        return "unconditional"
    return f"{config['num_classes']} classes"


def table_rows(config: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return label -> value of every row: model, diffusion, the parts that it works with, and the
    training.
    """
    about = facts.get("about") or {}
    rows: dict[str, Any] = {"model": config}
    rows |= {label: public(facts[key]) for key, label in PARTS.items() if facts.get(key)}
    if length := clip_length(config, facts.get("codec") or {}):
        rows["clips"] = length
    return rows | {label: about[key] for key, label in TRAINING.items() if about.get(key)}


def clip_length(config: Mapping[str, Any], codec: Mapping[str, Any]) -> str | None:
    """Return '17 frames of video, 5 latent frames'; None where they are the same, and for a codec that is not
    available here.
    """
    kind = CODECS.get(str(codec.get("name")))
    try:
        compression = kind and kind.compression_at(codec.get("path"))
    except InputError:
        return None
    if compression is None or compression.temporal_factor == 1:
        return None
    latent_frames = config["num_frames"]
    return f"{compression.frames(latent_frames)} frames of video, {latent_frames} latent frames"


def public(part: Any) -> Any:
    """Return the description of a codec or text encoder without a path of this machine; a hub id stays."""
    if not isinstance(part, Mapping):
        return part
    path = str(part.get("path") or "")
    is_hub_id = bool(re.fullmatch(r"[\w.-]+/[\w.-]+", path)) and not Path(path).exists()
    shown = {key: value for key, value in part.items() if key != "identity" and (key != "path" or is_hub_id)}
    fingerprint = read_fingerprint(part)
    if fingerprint is not None:
        shown["fingerprint"] = fingerprint
    return shown


def score_row(score: Mapping[str, Any]) -> str:
    """Return the row of a metric: value, interval, protocol and manifest hash, without which it cannot be
    compared.
    """
    interval = ""
    if score.get("interval"):
        interval = " (90 % interval {:.4g} to {:.4g})".format(*score["interval"])
    source = f"protocol {cell(score['protocol'])}, manifest {cell(score['manifest_hash'])}"
    return f"| {cell(score['metric'])} | {float(score['value']):.6g}{interval}, {source} |"


def cell(value: Any) -> str:
    """Return a value as one table cell: plain text whatever it contains; 'key value, key value' for
    several.
    """
    if isinstance(value, Mapping):
        parts = {key: part for key, part in value.items() if part is not None}
        return ", ".join(f"{cell(key)} {cell(part)}" for key, part in parts.items())
    if isinstance(value, list | tuple):
        return ", ".join(cell(part) for part in value)
    text = "".join(character if character.isprintable() else " " for character in str(value))
    return MARKUP.sub(r"\\\g<0>", html.escape(text, quote=False))
