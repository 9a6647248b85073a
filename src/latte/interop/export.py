# SPDX-License-Identifier: Apache-2.0
"""Weights out: our own folder, the released Latte's file, diffusers' transformer or pipeline, peft's
adapters, the hub.

To add a layout: a function (model, place, facts) and one entry in TARGETS.
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch

from latte.checks import InputError, RunError, choose
from latte.files import kind_of
from latte.interop.card import card_text, public
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
    stored as ``dtype`` (float16: half the bytes) and read back as float32. Raises RunError when the disk
    refuses, or a weight is NaN/Inf.
    """
    tensors = {name: tensor.detach().to("cpu", dtype) for name, tensor in model.state_dict().items()}

    def card(digest: str) -> str:
        return card_text(model, {**facts, "weights_sha256": digest})

    write_weights_folder(folder, tensors, {**model.config.stored(), **facts}, card)


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

    facts = {
        **facts,
        **{key: {"path": None, **public(facts[key])} for key in ("codec", "text") if facts.get(key)},
    }
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
