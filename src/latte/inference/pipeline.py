# SPDX-License-Identifier: Apache-2.0
"""A trained model with all that is needed to draw clips from it, out of a run folder, a weights folder, the hub or the package.

A weights folder is ``model.safetensors`` and ``config.json``: the model's keys at the top (so ``Latte.from_pretrained`` reads it
too), beside them diffusion, codec with its fingerprint, classes, for a text model the text encoder with its fingerprint, sampling defaults
and the weights' hash. Weights are verified by hash, codec and text encoder by their fingerprints, so that latents are never decoded by
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

from latte.autoencoder.codec import Codec, CodecConfig, build_codec, decoder_for, kind_at
from latte.checkpoint.record import read_fingerprint
from latte.checkpoint.run import Checkpoint, load_checkpoint, load_latest
from latte.checks import InputError, choose, require
from latte.config.run import RUN_FILE, load_run
from latte.diffusion.config import DiffusionConfig, build_process
from latte.inference.external import open_foreign
from latte.inference.generate import SampleConfig, generate
from latte.inference.prompts import PromptReader
from latte.inference.run_folder import about_run, fill, run_model, trained_run
from latte.interop.export import save_ours
from latte.interop.lora import CLIPS, load_lora, merged
from latte.interop.readers import BUILTIN, fetch, read_tensors
from latte.model.denoiser import Denoiser
from latte.model.text import config_class
from latte.runtime import resolve_device
from latte.tensors import tensors_sha256
from latte.text.encoders import TextEncoderConfig, same_weights

WEIGHTS, CARD = "model.safetensors", "config.json"
T = TypeVar("T")


@dataclass(frozen=True)
class Trained:
    """``name`` is where it came from, in words; ``weights`` the hash of the weights; ``classes`` their names, in label order.

    ``reader`` turns prompts into what a text model reads; None for other models. ``about`` is what its model card says of the training.
    ``decoder`` draws the frames in the codec's place, if there is one; ``offload`` is the device that parts visit while they are at work.
    """

    name: str
    model: Denoiser
    diffusion: DiffusionConfig
    codec_config: CodecConfig
    codec: Codec
    classes: list[str]
    sample: SampleConfig
    weights: str
    reader: PromptReader | None = None
    about: Mapping[str, Any] = field(default_factory=dict)
    decoder: Codec | None = None
    offload: torch.device | None = None

    def generate(
        self,
        seeds: Sequence[int],
        labels: Sequence[int | str] | None = None,
        prompts: Sequence[str] | None = None,
        negative: str = "",
        **options: Any,
    ) -> Iterator[tuple[int, np.ndarray]]:
        """(seed, uint8 (t h w c)) for every seed; labels are names or numbers. ``options`` are those of ``latte.inference.generate.generate``.

        A text model wants ``prompts``, one per seed, and is led away from ``negative``. InputError for prompts to another model, and for
        none to this one.
        """
        options = {"config": self.sample, "decoder": self.decoder, "offload": self.offload, **options}
        numbers = None if labels is None else [self.label(label) for label in labels]
        self.check_prompts(prompts is not None)
        told = self.reader(prompts, negative) if self.reader and prompts is not None else None
        return generate(
            self.model, build_process(self.diffusion), self.codec, seeds, numbers, prompts=told, **options
        )

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
            raise InputError(
                f"label {word!r} was given, but {self.name} is unconditional; leave the labels out"
            )
        names: dict[int | str, int] = {
            "none": -1,
            **{name: number for number, name in enumerate(self.classes)},
        }
        if isinstance(word, str) and word not in names and not re.fullmatch(r"-?\d{1,9}", word):
            return choose("label", word, names)
        number = names.get(word, word)
        require(
            -1 <= int(number) < count,
            "label",
            word,
            f"{self.name} has the classes {self.describe_classes()}",
            "give one of them",
        )
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
    """Where the parts of a model go, and where they are when they have moved. ``prompts`` are read before the denoiser is.

    ``device`` is for work, ``home`` for rest: the same unless parts are to visit ``device`` only while they are at work.
    """

    device: torch.device
    home: torch.device
    codec: str | None
    text_encoder: str | None
    prompts: Sequence[str]
    bits: int | None


def load_trained(
    source: str | Path = "builtin",
    device: str = "auto",
    codec_path: str | None = None,
    text_encoder_path: str | None = None,
    prompts: Sequence[str] = (),
    lora: str | Path | None = None,
    decoder: str | None = None,
    text_bits: int | None = None,
    offload: bool = False,
) -> Trained:
    """'builtin', a run folder, a checkpoint folder of one, a weights folder, foreign weights or a hub id -> Trained, on ``device``.

    A run gives its averaged (EMA) weights. ``codec_path`` and ``text_encoder_path`` say where their weights are when they have moved.
    A text model's ``prompts`` are read here, before the denoiser takes its memory; others can still be read later. ``lora`` is a folder of
    adapters that are folded into the weights, ``decoder`` a folder or hub id of a KL autoencoder (such as the one with a temporal decoder)
    that draws the frames. ``text_bits`` 8 holds a T5 in eight bits. With ``offload`` the parts stay in the host's memory and visit
    ``device`` one at a time. InputError when anything is missing, altered, of another configuration, or belongs to another codec, text
    encoder or base model.
    """
    work = resolve_device(device)
    rule = "parts visit a GPU from the host's memory, where they are already"
    require(not offload or work.type != "cpu", "device", str(work), rule, "leave --offload out")
    home = torch.device("cpu") if offload else work
    trained = open_trained(source, Places(work, home, codec_path, text_encoder_path, prompts, text_bits))
    if lora is not None:
        trained = with_lora(trained, lora)
    if decoder is not None:
        trained = replace(trained, decoder=decoder_for(trained.codec, decoder))
    return replace(trained, offload=work) if offload else trained


def open_trained(source: str | Path, where: Places) -> Trained:
    """``load_trained`` without adapters of its own."""
    path = BUILTIN if str(source) == "builtin" else Path(source)
    if (path / RUN_FILE).is_file():
        return _from_run(path, load_latest(path, only={"ema"}), where)
    if path.parent.name == "checkpoints" and (path.parents[1] / RUN_FILE).is_file():
        return _from_run(path.parents[1], load_checkpoint(path, only={"ema"}), where)
    if str(source) == "builtin" and not (path / CARD).is_file():
        raise InputError(
            f"MODEL is 'builtin', but this installation has no {BUILTIN / CARD}; install latte again, or give a run folder"
        )
    if not path.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+(/[\w./-]+)?", str(source)):
        path = fetch(source)
    path = path.parent if path.name == WEIGHTS and is_ours(path.parent) else path
    if is_ours(path):
        return _from_folder(path, str(source), where)
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        return _from_foreign(source, where)
    kinds = f"a run folder ({RUN_FILE}), a weights folder ({CARD}), weights that latte convert knows, a hub id (owner/name) or builtin"
    raise InputError(f"MODEL is {str(source)!r}, which is not {kinds}; give one of these")


def is_ours(folder: Path) -> bool:
    """Does ``folder`` hold the weights and the card of one that ``save_trained`` wrote?"""
    return (folder / CARD).is_file() and (folder / WEIGHTS).is_file()


def with_lora(trained: Trained, folder: str | Path) -> Trained:
    """``trained`` with the adapters of ``folder`` folded in, for clips of the size that these were trained for.

    Its own model is changed, too. InputError for adapters of another model, and for those that learned the latents or the captions of
    another codec or text encoder.
    """
    told = load_lora(trained.model, folder, trained.classes)
    here = {
        "codec": trained.codec.fingerprint,
        "text": trained.reader.fingerprint if trained.reader else None,
    }
    for part, fingerprint in here.items():
        same = None in (fingerprint, told.get(part)) or same_weights(str(told[part]), fingerprint)
        require(
            same,
            f"the {part} of {trained.name}",
            fingerprint,
            f"the adapters of {folder} learned with {told.get(part)}",
            "give that one",
        )
    model = merged(trained.model).to(next(trained.model.parameters()).device)
    size = {
        key: tuple(told[key]) if isinstance(told[key], list) else told[key] for key in CLIPS if told.get(key)
    }
    model.config = replace(model.config, **size)
    name, weights = f"{trained.name}+{Path(folder).name}", tensors_sha256(model.state_dict())
    return replace(trained, name=name, model=model, classes=told["classes"], weights=weights)


def _from_run(folder: Path, checkpoint: Checkpoint | None, where: Places) -> Trained:
    config, _ = load_run(folder)
    checkpoint = trained_run(folder, config, checkpoint)
    facts = checkpoint.state["facts"]
    reader = (
        _open_reader(config.text, facts.get("text", {}).get("encoder"), where) if config.text.name else None
    )
    model = run_model(config, checkpoint)
    weights = checkpoint.tensors["ema"]
    if config.lora.rank:
        model = merged(model)
        weights = model.state_dict()
    model = model.to(where.home)
    codec = _open_codec(config.codec, facts.get("codec"), where)
    return Trained(
        str(folder),
        model,
        config.diffusion,
        config.codec,
        codec,
        facts.get("classes", []),
        config.sample,
        tensors_sha256(weights),
        reader,
        about_run(config, checkpoint),
    )


def _from_folder(folder: Path, name: str, where: Places) -> Trained:
    try:
        card = json.loads((folder / CARD).read_text("utf-8"))
        kind = config_class(card)
        shape = {field.name: card[field.name] for field in fields(kind)}
        text = card.get("text") or {"name": "t5"}  # what the released models read, whose files do not say
        text_keys, text_fingerprint = (
            {key: value for key, value in text.items() if key not in ("fingerprint", "identity")},
            read_fingerprint(text),
        )
        fingerprint, wanted, classes = (
            read_fingerprint(card["codec"]),
            card["weights_sha256"],
            [str(name) for name in card["classes"]],
        )
        codec_keys = {key: card["codec"][key] for key in ("name", "path")}
        parts, about = (card["diffusion"], card["sample"]), dict(card.get("about") or {})
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(
            f"{folder / CARD} is not the card of a Latte model ({type(error).__name__}: {error}); give a folder that "
            "latte wrote"
        ) from None
    model_config, codec_config = _checked(kind, shape, folder), _checked(CodecConfig, codec_keys, folder)
    reader = (
        _open_reader(_checked(TextEncoderConfig, text_keys, folder), text_fingerprint, where)
        if kind.reads_text
        else None
    )
    tensors, _ = read_tensors(folder / WEIGHTS)
    model = fill(model_config, tensors, str(folder / WEIGHTS))
    found = tensors_sha256(tensors)
    require(
        found == wanted,
        str(folder / WEIGHTS),
        found[:16],
        f"{CARD} says {str(wanted)[:16]}",
        "fetch the folder again: it was altered",
    )
    codec = _open_codec(codec_config, fingerprint, where)
    return Trained(
        name,
        model.to(where.home),
        _checked(DiffusionConfig, parts[0], folder),
        codec_config,
        codec,
        classes,
        _checked(SampleConfig, parts[1], folder),
        found,
        reader,
        about,
    )


def _from_foreign(source: str | Path, where: Places) -> Trained:
    """Weights of any other layout that is known, with the released models' settings."""
    loaded, facts = open_foreign(source)
    codec, text = {**facts["codec"], "path": where.codec or facts["codec"]["path"]}, facts.get("text")
    require(
        codec["path"] is not None,
        "MODEL",
        str(source),
        "it holds a denoiser alone, which draws latents",
        "say where its autoencoder is by --codec-path",
    )
    if text is not None:
        path = where.text_encoder or text["path"]
        require(
            path is not None,
            "MODEL",
            str(source),
            "it holds a denoiser alone, which reads features of words",
            "say where its T5 is by --text-encoder",
        )
        text = TextEncoderConfig(name=text["name"], path=path)
    reader = _open_reader(text, None, where) if text else None
    codec_config = CodecConfig(kind_at(codec["path"]).name, codec["path"])
    model = loaded.model()
    return Trained(
        str(source),
        model.to(where.home),
        DiffusionConfig(**facts["diffusion"]),
        codec_config,
        _open_codec(codec_config, None, where),
        list(facts["classes"]),
        SampleConfig(**facts["sample"]),
        tensors_sha256(model.state_dict()),
        reader,
    )


def save_trained(trained: Trained, folder: Path, half: bool = False) -> None:
    """Write a weights folder that ``load_trained`` and ``from_pretrained`` of the model's class read; RunError when the disk refuses.

    ``half`` stores float16, half the bytes; it is read back as float32.
    """
    facts = {
        "diffusion": asdict(trained.diffusion),
        "codec": {
            "name": trained.codec.name,
            "path": trained.codec_config.path,
            "fingerprint": trained.codec.fingerprint,
        },
        "classes": trained.classes,
        "sample": asdict(trained.sample),
        "about": dict(trained.about),
        **(
            {"text": {**asdict(trained.reader.config), "fingerprint": trained.reader.fingerprint}}
            if trained.reader
            else {}
        ),
    }
    save_ours(trained.model, folder, facts, torch.float16 if half else torch.float32)


def _checked(kind: type[T], values: object, folder: Path) -> T:
    """A configuration of ``kind`` from the card's values; InputError with the first thing that is wrong."""
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        what = ".".join(str(part) for part in first["loc"])
        raise InputError(
            f"{folder / CARD}: {what + ': ' if what else ''}{first['msg']}; give a folder that latte wrote"
        ) from None


def _open_reader(config: TextEncoderConfig, fingerprint: str | None, where: Places) -> PromptReader:
    """The reader of prompts, which has read those that are known."""
    config = replace(config, path=where.text_encoder or config.path, bits=where.bits or config.bits)
    reader = PromptReader(config, where.device, fingerprint)
    if where.prompts:
        reader.learn(where.prompts)
    return reader


def _open_codec(config: CodecConfig, fingerprint: str | None, where: Places) -> Codec:
    """The codec, refused unless it is the one whose latents the model learned."""
    codec = build_codec(replace(config, path=where.codec or config.path), where.home)
    require(
        fingerprint in (None, codec.fingerprint),
        "codec",
        f"{codec.name} {codec.fingerprint}",
        f"the model learned the latents of {fingerprint}",
        "give the weights it was trained with by --codec-path",
    )
    return codec
