# SPDX-License-Identifier: Apache-2.0
"""Weights out: our own folder, the released Latte's file, diffusers' transformer or pipeline, adapters in peft's layout, the hub.

To add a layout: a function (model, place, facts) and one line in TARGETS.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from latte.checkpoint.run import tensors_sha256
from latte.checks import InputError, RunError, choose
from latte.files import commit_folder, reported
from latte.interop.diffusers import save_diffusers
from latte.interop.lora import save_lora
from latte.interop.official import save_official
from latte.interop.pipeline import to_pipeline
from latte.model.card import public
from latte.model.latte import Latte
from latte.model.text import LatteText

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
Model = Latte | LatteText


def export(model: Model, place: str | Path, target: str, facts: Mapping[str, Any]) -> None:
    """Write ``model`` to the new file or folder ``place`` in the layout ``target`` of TARGETS.

    ``facts`` (diffusion, codec, classes, about, ...) stand beside the configuration in our own layout. InputError when ``place`` is taken,
    or the layout cannot hold this model; RunError when the disk refuses.
    """
    write, place = choose("--to", target, TARGETS), Path(place)
    check_place(place)
    write(model, place, facts)


def check_place(place: Path) -> None:
    """InputError when something is at ``place`` already."""
    if place.is_file() or (place.is_dir() and any(place.iterdir())):
        raise InputError(f"{place} is there already; give a new place, or remove it first")


def save_ours(
    model: Model, folder: Path, facts: Mapping[str, Any], dtype: torch.dtype = torch.float32
) -> None:
    """model.safetensors, config.json and a model card, which ``from_pretrained`` of the model's class and ``load_trained`` read.

    Tensors are stored as ``dtype`` (float16: half the bytes) and read back as float32. RunError when the disk refuses.
    """
    tensors = {
        name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in model.state_dict().items()
    }
    facts = {**facts, "weights_sha256": tensors_sha256(tensors)}
    config, card = (
        json.dumps({**asdict(model.config), **facts}, indent=2) + "\n",
        str(model.generate_model_card(facts)),
    )

    def write(place: Path) -> None:
        save_file(tensors, place / WEIGHTS)
        (place / CONFIG).write_text(config, encoding="utf-8")
        (place / CARD).write_text(card, encoding="utf-8")

    with reported("the weights", folder, sum(tensor.nbytes for tensor in tensors.values())):
        commit_folder(folder, write)


def publish(
    model: Model,
    repository: str,
    facts: Mapping[str, Any],
    private: bool | None = None,
    token: str | None = None,
) -> str:
    """Push what ``save_ours`` writes to the hub, as owner/name -> the commit's address. The model's own ``push_to_hub`` knows no facts.

    Paths of this machine stay here.
    """
    facts = {**facts, "weights_sha256": tensors_sha256(model.state_dict())}
    facts |= {part: {"path": None, **public(facts[part])} for part in ("codec", "text") if facts.get(part)}
    config, kwargs = {**asdict(model.config), **facts}, {"facts": facts}
    return str(
        model.push_to_hub(repository, config=config, model_card_kwargs=kwargs, private=private, token=token)
    )


def score_of(report: Mapping[str, Any]) -> dict[str, Any]:
    """What a card says of a manifest.json of ``latte evaluate``."""
    return {key: report[key] for key in ("protocol", "metric", "value", "interval", "manifest_hash")}


def to_official(model: Model, path: Path, facts: Mapping[str, Any]) -> None:
    """The released Latte's file."""
    if not isinstance(model, Latte):
        raise InputError(
            "--to is 'official', which holds models of classes or of nothing, but this is a text-to-video model; "
            "give --to diffusers"
        )
    save_official(model, path)


def to_diffusers(model: Model, folder: Path, facts: Mapping[str, Any]) -> None:
    """The transformer folder of a LattePipeline."""
    if not isinstance(model, LatteText):
        raise InputError(
            "--to is 'diffusers', which knows Latte as a text-to-video model only, but this one reads no captions; "
            "give --to official"
        )
    save_diffusers(model, folder, (facts.get("about") or {}).get("gate_steps"))


def to_hub(model: Model, place: Path, facts: Mapping[str, Any]) -> None:
    """``publish`` to owner/name, with the token that ``hf auth login`` left; RunError when the hub does not take it."""
    try:
        publish(model, place.as_posix(), facts)
    except Exception as error:  # of the hub, and of whichever HTTP client carries it
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RunError(
            f"the hub does not take {place} ({said}); give OWNER/NAME, and log in first: hf auth login"
        ) from error


def to_lora(model: Model, folder: Path, facts: Mapping[str, Any]) -> None:
    """The adapters alone."""
    save_lora(model, folder, facts)


TARGETS: dict[str, Callable[[Model, Path, Mapping[str, Any]], None]] = {
    "latte": save_ours,
    "official": to_official,
    "diffusers": to_diffusers,
    "pipeline": to_pipeline,
    "lora": to_lora,
    "hub": to_hub,
}
