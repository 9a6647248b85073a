# SPDX-License-Identifier: Apache-2.0
"""The model card: README.md of a weights folder or a hub repository, made of the configuration and the
training facts.

``facts`` are what ``interop.export`` writes into config.json beside the model's keys: diffusion, codec,
classes, text, sample, and ``about`` {"data", "licence", "step", "clips_seen", "source", "scores":
[{"protocol", "metric", "value", "interval", "manifest_hash"}]}. Each may be missing, and the card lists
which: nothing is guessed, least of all a licence.
"""

import html
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from latte.autoencoder.codec import CODECS
from latte.checkpoint.record import read_fingerprint
from latte.checks import InputError
from latte.model.denoiser import Denoiser

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


def card_text(model: Denoiser, facts: Mapping[str, Any]) -> str:
    """Return README.md of ``model``, with the YAML header that the hub reads."""
    name = type(model).__name__
    config = model.config.stored()
    text = model.config.reads_text
    about = facts.get("about") or {}
    header: dict[str, Any] = {
        "library_name": "latte",
        "tags": ["text-to-video" if text else "video-generation", "latte"],
    }
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
        "| | |",
        "|---|---|",
        *rows,
        "",
    ]
    if unknown:
        lines += [f"Not recorded: {', '.join(unknown)}.", ""]
    return "\n".join([*lines, *usage(name, facts)])


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
