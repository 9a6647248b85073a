# SPDX-License-Identifier: Apache-2.0
"""A trained model with all that is needed to draw clips from it, out of a run folder, a weights folder, the hub or the package.

A weights folder is ``model.safetensors`` and ``config.json``: the model's keys at the top (so ``Latte.from_pretrained`` reads it
too), beside them diffusion, codec with its identity, classes, for a text model the text encoder with its identity, sampling defaults
and the weights' hash. Weights are verified by hash, codec and text encoder by their identities, so that latents are never decoded by
another autoencoder than the one the model learned, and prompts are read as its captions were.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from latte.autoencoder.codec import Codec, CodecConfig, build_codec
from latte.checkpoint.export import save_ours
from latte.checkpoint.layout import build as build_network
from latte.checkpoint.lora import folded, load_lora, lora_state
from latte.checkpoint.reading import fetch, read_tensors
from latte.checkpoint.run import Checkpoint, load_checkpoint, load_latest, tensors_sha256
from latte.checks import InputError, choose, require
from latte.config import RUN_FILE, RunConfig, load_run
from latte.diffusion.process import DiffusionConfig, build_process
from latte.generate import SampleConfig, generate
from latte.model.latte import ModelConfig
from latte.model.text import Network, TextConfig
from latte.prompts import PromptReader
from latte.runtime import resolve_device
from latte.text_encoder import TextEncoderConfig
from latte.train.start import rebuild

BUILTIN = Path(__file__).with_name("builtin")
WEIGHTS, CARD = "model.safetensors", "config.json"
T = TypeVar("T")


@dataclass(frozen=True)
class Trained:
    """``name`` is where it came from, in words; ``weights`` the hash of the weights; ``classes`` their names, in label order.

    ``reader`` turns prompts into what a text model reads; None for other models. ``about`` is what its model card says of the training.
    """

    name: str
    model: Network
    diffusion: DiffusionConfig
    codec_config: CodecConfig
    codec: Codec
    classes: list[str]
    sample: SampleConfig
    weights: str
    reader: PromptReader | None = None
    about: Mapping[str, Any] = field(default_factory=dict)

    def generate(
        self,
        seeds: Sequence[int],
        labels: Sequence[int | str] | None = None,
        prompts: Sequence[str] | None = None,
        negative: str = "",
        **options: Any,
    ) -> Iterator[tuple[int, np.ndarray]]:
        """(seed, uint8 (t h w c)) for every seed; labels are names or numbers. ``options`` are those of ``latte.generate.generate``.

        A text model wants ``prompts``, one per seed, and is led away from ``negative``. InputError for prompts to another model, and for
        none to this one.
        """
        options.setdefault("config", self.sample)
        numbers = None if labels is None else [self.label(label) for label in labels]
        self.check_prompts(prompts is not None)
        told = self.reader(prompts, negative) if self.reader and prompts is not None else None
        return generate(self.model, build_process(self.diffusion), self.codec, seeds, numbers, prompts=told, **options)

    def check_prompts(self, given: bool) -> None:
        """InputError unless prompts are ``given`` to a text model, and to no other."""
        if given and self.reader is None:
            raise InputError(
                f"a prompt was given, but {self.name} reads no text; leave it out, or give a model that was trained on captions"
            )
        if self.reader and not given:
            raise InputError(
                f"{self.name} reads text, but no prompt was given; say what it is to show, e.g. --prompt 'a red square moves left'"
            )

    def label(self, word: int | str) -> int:
        """A class's name, or its number, as a number; 'none' and -1 are the null class. InputError that lists the classes for any other."""
        count = self.model.config.num_classes
        if self.reader:
            raise InputError(f"label {word!r} was given, but {self.name} reads text; give a prompt instead")
        if count is None:
            raise InputError(f"label {word!r} was given, but {self.name} is unconditional; leave the labels out")
        names: dict[int | str, int] = {"none": -1, **{name: number for number, name in enumerate(self.classes)}}
        if isinstance(word, str) and word not in names and not re.fullmatch(r"-?\d{1,9}", word):
            return choose("label", word, names)
        number = names.get(word, word)
        require(-1 <= int(number) < count, "label", word, f"{self.name} has the classes {self.describe_classes()}", "give one of them")
        return int(number)

    def frame_size(self, size: tuple[int, int] | None = None) -> tuple[int, int]:
        """(height, width) in pixels of the clips: ``size``, or what the model was made for."""
        height, width = self.model.config.grid_size
        return size or (height * self.codec.downscale, width * self.codec.downscale)

    def word(self, label: int) -> str:
        """The name of a class's number, or the number as a word where classes have no names; 'none' for -1."""
        return "none" if label < 0 else self.classes[label] if self.classes else str(label)

    def describe_classes(self) -> str:
        """'0 to 3 (up, down, left, right)'."""
        count = self.model.config.num_classes or 0
        return f"0 to {count - 1}" + (f" ({', '.join(self.classes)})" if self.classes else "")


@dataclass(frozen=True)
class Places:
    """Where the parts of a model go, and where they are when they have moved. ``prompts`` are read before the denoiser is."""

    device: torch.device
    codec: str | None
    text_encoder: str | None
    prompts: Sequence[str]


def load_trained(
    source: str | Path = "builtin",
    device: str = "auto",
    codec_path: str | None = None,
    text_encoder_path: str | None = None,
    prompts: Sequence[str] = (),
    lora: str | Path | None = None,
) -> Trained:
    """'builtin', a run folder, a checkpoint folder of one, a weights folder or a hub id -> Trained, on ``device``.

    A run gives its averaged (EMA) weights. ``codec_path`` and ``text_encoder_path`` say where their weights are when they have moved.
    A text model's ``prompts`` are read here, before the denoiser takes its memory; others can still be read later. ``lora`` is a folder of
    adapters that are folded into the weights. InputError when anything is missing, altered, of another configuration, or belongs to another
    codec, text encoder or base model.
    """
    trained = open_trained(source, Places(resolve_device(device), codec_path, text_encoder_path, prompts))
    return trained if lora is None else with_lora(trained, lora)


def open_trained(source: str | Path, where: Places) -> Trained:
    """``load_trained`` without adapters of its own."""
    path = BUILTIN if str(source) == "builtin" else Path(source)
    if (path / RUN_FILE).is_file():
        return _from_run(path, load_latest(path, only={"ema"}), where)
    if path.parent.name == "checkpoints" and (path.parents[1] / RUN_FILE).is_file():
        return _from_run(path.parents[1], load_checkpoint(path, only={"ema"}), where)
    if (path / CARD).is_file():
        return _from_folder(path, str(source), where)
    if not path.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        return _from_folder(fetch(source), str(source), where)
    if str(source) == "builtin":
        raise InputError(f"MODEL is 'builtin', but this installation has no {BUILTIN / CARD}; install latte again, or give a run folder")
    kinds = f"a run folder ({RUN_FILE}), a weights folder ({CARD}), a hub id (owner/name) or builtin"
    raise InputError(f"MODEL is {str(source)!r}, which is not {kinds}; give one of these")


def with_lora(trained: Trained, folder: str | Path) -> Trained:
    """``trained`` with the adapters of ``folder`` folded in; its own model is changed, too. ``weights`` is the adapters' hash."""
    device = next(trained.model.parameters()).device
    load_lora(trained.model, folder)
    weights = tensors_sha256(lora_state(trained.model))
    return replace(trained, name=f"{trained.name}+{Path(folder).name}", model=folded(trained.model).to(device), weights=weights)


def _from_run(folder: Path, checkpoint: Checkpoint | None, where: Places) -> Trained:
    config, _ = load_run(folder)
    checkpoint = trained_run(folder, config, checkpoint)
    facts = checkpoint.state["facts"]
    reader = _open_reader(config.text, facts.get("text", {}).get("encoder"), where) if config.text.name else None
    model = run_model(config, checkpoint)
    model = (folded(model) if config.lora.rank else model).to(where.device)
    codec = _open_codec(config.codec, facts.get("codec"), where)
    return Trained(str(folder), model, config.diffusion, config.codec, codec, facts.get("classes", []), config.sample,
                   tensors_sha256(checkpoint.tensors["ema"]), reader, about_run(config, checkpoint))  # fmt: skip


def trained_run(folder: Path, config: RunConfig, checkpoint: Checkpoint | None) -> Checkpoint:
    """``checkpoint``; InputError unless there is one and it is of this configuration."""
    if checkpoint is None:
        raise InputError(f"run {folder} has no checkpoint yet; train it first: latte train {folder}")
    facts, parts = checkpoint.state["facts"], {"model": asdict(config.network), "diffusion": asdict(config.diffusion)}
    if config.lora.rank or "lora" in facts:
        parts["lora"] = asdict(config.lora)
    for part, now in parts.items():
        before = facts.get(part, {})
        for key, value in json.loads(json.dumps(now)).items():
            rule = f"{checkpoint.path} was trained with {before.get(key)!r}"
            require(before.get(key) == value, f"{part}.{key}", value, rule, f"put that back into {folder / RUN_FILE}")
    return checkpoint


def run_model(config: RunConfig, checkpoint: Checkpoint) -> Network:
    """The model with the averaged weights of a run's checkpoint, on the CPU; for a run of adapters with these in it, not folded in."""
    if config.lora.rank and config.train.start:
        return rebuild(config.network, config.run.seed, config.train.start, config.lora, checkpoint)
    return _fill(config.network, checkpoint.tensors["ema"], str(checkpoint.path))


def about_run(config: RunConfig, checkpoint: Checkpoint) -> dict[str, Any]:
    """What a model card can say of a run: its data by name (where they lie is nobody's business), step, clips seen, and its origin."""
    clips = {key: getattr(config.data, key) for key in ("kind", "resolution", "frames", "interval")}
    name = {} if config.data.root is None else {"name": Path(config.data.root).name}
    start = f", started from {Path(config.train.init).name}" if config.train.init else ""
    how = f"adapters of rank {config.lora.rank}" if config.lora.rank else "weights"
    return {"data": {**name, **clips}, "step": checkpoint.step, "clips_seen": checkpoint.step * config.train.global_batch,
            "source": f"averaged {how} of a run{start}"}  # fmt: skip


def _from_folder(folder: Path, name: str, where: Places) -> Trained:
    try:
        card = json.loads((folder / CARD).read_text("utf-8"))
        kind = TextConfig if "caption_channels" in card else ModelConfig
        shape = {field.name: card[field.name] for field in fields(kind)}
        text = card.get("text") or {"name": "t5"}  # what the released models read, whose files do not say
        text_keys, text_identity = {key: value for key, value in text.items() if key != "identity"}, text.get("identity")
        identity, wanted, classes = card["codec"]["identity"], card["weights_sha256"], [str(name) for name in card["classes"]]
        codec_keys = {key: card["codec"][key] for key in ("name", "path")}
        parts, about = (card["diffusion"], card["sample"]), dict(card.get("about") or {})
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{folder / CARD} is not the card of a Latte model ({type(error).__name__}: {error}); give a folder that "
                         "latte wrote") from None  # fmt: skip
    model_config, codec_config = _checked(kind, shape, folder), _checked(CodecConfig, codec_keys, folder)
    reader = _open_reader(_checked(TextEncoderConfig, text_keys, folder), text_identity, where) if kind is TextConfig else None
    tensors, _ = read_tensors(folder / WEIGHTS)
    model = _fill(model_config, tensors, str(folder / WEIGHTS))
    found = tensors_sha256(tensors)
    require(found == wanted, str(folder / WEIGHTS), found[:16], f"{CARD} says {str(wanted)[:16]}", "fetch the folder again: it was altered")
    codec = _open_codec(codec_config, identity, where)
    return Trained(name, model.to(where.device), _checked(DiffusionConfig, parts[0], folder), codec_config, codec, classes,
                   _checked(SampleConfig, parts[1], folder), found, reader, about)  # fmt: skip


def save_trained(trained: Trained, folder: Path, half: bool = False) -> None:
    """Write a weights folder that ``load_trained`` and ``from_pretrained`` of the model's class read; RunError when the disk refuses.

    ``half`` stores float16, half the bytes; it is read back as float32.
    """
    facts = {
        "diffusion": asdict(trained.diffusion),
        "codec": {"name": trained.codec.name, "path": trained.codec_config.path, "identity": trained.codec.identity},
        "classes": trained.classes,
        "sample": asdict(trained.sample),
        "about": dict(trained.about),
        **({"text": {**asdict(trained.reader.config), "identity": trained.reader.identity}} if trained.reader else {}),
    }
    save_ours(trained.model, folder, facts, torch.float16 if half else torch.float32)


def _checked(kind: type[T], values: object, folder: Path) -> T:
    """A configuration of ``kind`` from the card's values; InputError with the first thing that is wrong."""
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        what = ".".join(str(part) for part in first["loc"])
        raise InputError(f"{folder / CARD}: {what + ': ' if what else ''}{first['msg']}; give a folder that latte wrote") from None


def _fill(config: ModelConfig | TextConfig, tensors: Mapping[str, Tensor], where: str) -> Network:
    """The model of ``config`` with these weights; InputError naming the first tensor that is missing, too many or of another shape."""
    with torch.device("meta"):
        model = build_network(config)
    wanted = model.state_dict()
    faults = [f"lacks {key}" for key in wanted if key not in tensors] + [f"has {key} too many" for key in tensors if key not in wanted]
    faults += [f"has {key} of shape {tuple(tensors[key].shape)} instead of {tuple(tensor.shape)}" for key, tensor in wanted.items()
               if key in tensors and tensors[key].shape != tensor.shape]  # fmt: skip
    if faults:
        raise InputError(f"{where} {faults[0]} ({len(faults)} faults in all); its weights belong to another configuration of the model")
    model.load_state_dict({key: tensor.float() for key, tensor in tensors.items()}, assign=True)
    return model.requires_grad_(False).eval()


def _open_reader(config: TextEncoderConfig, identity: str | None, where: Places) -> PromptReader:
    """The reader of prompts, which has read those that are known."""
    reader = PromptReader(replace(config, path=where.text_encoder or config.path), where.device, identity)
    if where.prompts:
        reader.learn(where.prompts)
    return reader


def _open_codec(config: CodecConfig, identity: str | None, where: Places) -> Codec:
    """The codec, refused unless it is the one whose latents the model learned."""
    codec = build_codec(replace(config, path=where.codec or config.path), where.device)
    require(identity in (None, codec.identity), "codec", f"{codec.name} {codec.identity}", f"the model learned the latents of {identity}",
            "give the weights it was trained with by --codec-path")  # fmt: skip
    return codec
