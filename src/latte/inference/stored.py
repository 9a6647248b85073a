# SPDX-License-Identifier: Apache-2.0
"""Read a stored model, with everything sampling needs beside its weights, from a weights folder or an
external checkpoint.

A weights folder holds ``model.safetensors`` and ``config.json``: the model's keys at the top level (so
``Latte.from_pretrained`` reads it too), beside them diffusion, codec and text encoder with their
fingerprints, classes, sampling defaults and the hash of the weights. External checkpoints record less; what
the released models have in common fills the gaps.
"""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from latte.autoencoder.codec import Codec, CodecConfig, build_codec, kind_at
from latte.checkpoint.record import read_fingerprint
from latte.checks import InputError, check
from latte.diffusion.config import DiffusionConfig
from latte.diffusion.guidance import Distilled
from latte.files import stamp
from latte.inference.generate import SampleConfig
from latte.inference.prompts import PromptReader, Vocabulary
from latte.interop.coverage import Coverage, build
from latte.interop.load import Loaded, Source, load_external, resolve
from latte.interop.readers import read_tensors
from latte.model.config import OPTIONS
from latte.model.denoiser import Denoiser, DenoiserConfig
from latte.model.pretrained import file_tensors_sha256
from latte.model.text import config_class
from latte.tensors import check_finite, tensors_sha256, without_memory
from latte.text.config import TEXT_ENCODERS
from latte.text.encoders import TextEncoderConfig

LOG = logging.getLogger(__name__)
WEIGHTS = "model.safetensors"
CARD = "config.json"
OURS = ("about", "buckets", "distilled")  # further keys of config.json in our own folders
RELEASED_T2V = SampleConfig(sampler="ddim", steps="ddim50", guidance=7.5, batch=1)
T = TypeVar("T")
Shapes = tuple[tuple[int, int, int], ...]
"""Shapes of clips in frames of video, height and width in pixels."""


@dataclass(frozen=True)
class StoredModel:
    """Describe a model in storage. ``load()`` builds the network on the CPU and returns it with the hash of
    its weights.

    ``diffusion`` and ``codec`` are None where the source does not record them. The fingerprints are those of
    the codec and the text encoder that the model was trained with, None where unknown. ``lacks_text``: the
    model reads text, but where its T5 is stored is unknown. ``about`` is the training metadata for a model
    card, ``buckets`` are the shapes (frames, height, width) that it was trained on, () without buckets,
    ``distilled`` what a student of few steps records.
    """

    name: str
    load: Callable[[], tuple[Denoiser, str]]
    diffusion: DiffusionConfig | None
    codec: CodecConfig | None
    sample: SampleConfig
    classes: list[str] = field(default_factory=list)
    codec_fingerprint: str | None = None
    text: TextEncoderConfig | None = None
    text_fingerprint: str | None = None
    lacks_text: bool = False
    about: Mapping[str, Any] = field(default_factory=dict)
    buckets: Shapes = ()
    distilled: Distilled | None = None


def open_weights_folder(folder: Path, name: str, own_codec: bool = False) -> StoredModel:
    """Read config.json and the weights of ``folder``; InputError for values out of range and for weights with
    another hash.

    Parts that a plain ``Latte.save_pretrained`` leaves out (diffusion, codec, ...) are None or empty in the
    result. ``own_codec``: the caller supplies the codec, so its record is not read.
    """
    try:
        card = json.loads((folder / CARD).read_text("utf-8"))
        kind = config_class(card)
        required = [item.name for item in fields(kind) if item.name not in OPTIONS]
        shape = {name: card[name] for name in required} | {key: card[key] for key in OPTIONS if key in card}
        classes = [str(label) for label in card.get("classes") or ()]
        codec, text = (dict(card.get(part) or {}) for part in ("codec", "text"))
        diffusion = card.get("diffusion")
        sample = card.get("sample") or {}
        about = dict(card.get("about") or {})
        distilled = card.get("distilled")
        buckets = card.get("buckets") or ()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(
            f"{folder / CARD} does not describe a Latte model ({type(error).__name__}: {error}); "
            "give a folder that VideoPipeline.save_pretrained wrote"
        ) from None
    where = str(folder / CARD)
    text_keys = {key: text[key] for key in text if key not in ("fingerprint", "identity")}
    if kind.reads_text and not text_keys:
        text_keys = {"name": "t5"}  # what the released models read, whose files do not record it
    codec_keys = {key: codec[key] for key in ("name", "path") if key in codec and not own_codec}
    config = typed(kind, shape, where)

    return StoredModel(
        name=name,
        load=lambda: load_verified(config, folder, card.get("weights_sha256")),
        diffusion=optional(DiffusionConfig, diffusion, f"{where}: diffusion"),
        codec=optional(CodecConfig, codec_keys, f"{where}: codec"),
        sample=typed(SampleConfig, sample, f"{where}: sample"),
        classes=classes,
        codec_fingerprint=read_fingerprint(codec),
        text=optional(TextEncoderConfig, text_keys, f"{where}: text"),
        text_fingerprint=read_fingerprint(text),
        about=about,
        buckets=typed(Shapes, buckets, f"{where}: buckets"),
        distilled=optional(Distilled, distilled, f"{where}: distilled"),
    )


def open_external(
    source: str | Path,
    heads: int | None = None,
    allow_missing: Sequence[str] = (),
    allow_unexpected: Sequence[str] = (),
) -> tuple[Loaded, dict[str, Any]]:
    """Load an external checkpoint; return it with the facts that our config.json stores beside the model's
    keys.

    A folder of ours supplies its own facts, other layouts get the released models' settings. Paths of codec
    and text encoder are None unless ``source`` is a whole pipeline.
    """
    loaded = load_external(source, heads, allow_missing, allow_unexpected)
    found = resolve(source, "weights")
    place = found.name if found.kind == "pipeline" else None
    codec = kind_at(place).name if place else CodecConfig().name
    text = loaded.config.reads_text
    facts = {
        "diffusion": asdict(DiffusionConfig()),
        "codec": {"name": codec, "path": place, "fingerprint": None},
        "classes": [],
        "sample": (RELEASED_T2V if text else SampleConfig()).recorded(),
    }
    if text:
        facts["text"] = {**asdict(TextEncoderConfig(name="t5", path=place)), "fingerprint": None}
    return loaded, {**facts, **{key: loaded.card[key] for key in (*facts, *OURS) if key in loaded.card}}


def open_external_model(source: Source, codec_path: str | None, text_encoder_path: str | None) -> StoredModel:
    """Describe an external checkpoint with the codec and the T5 at these paths.

    A model alone in our own layout, as ``Latte.save_pretrained`` writes it, may have learned any diffusion
    process: None in the result.
    """
    loaded, facts = open_external(source.name)
    place = codec_path or facts["codec"]["path"]
    text = facts.get("text")
    text_path = text_encoder_path or (text or {}).get("path")

    def load() -> tuple[Denoiser, str]:
        network = loaded.model()
        return network, tensors_sha256(network.state_dict())

    own_layout = loaded.layout in ("Latte", "LatteText")
    return StoredModel(
        name=source.name,
        load=load,
        diffusion=None
        if own_layout and "diffusion" not in loaded.card
        else DiffusionConfig(**facts["diffusion"]),
        codec=CodecConfig(kind_at(place).name, place) if place else None,
        sample=SampleConfig(**facts["sample"]),
        classes=list(facts["classes"]),
        text=TextEncoderConfig(name=text["name"], path=text_path) if text and text_path else None,
        lacks_text=bool(text) and not text_path,
    )


def load_verified(config: DenoiserConfig, folder: Path, recorded: str | None) -> tuple[Denoiser, str]:
    """Return the network of ``config`` with the weights in ``folder``, and their hash, which must be the
    ``recorded`` one. A file that was verified before and has not changed is not hashed again.
    """
    file = folder / WEIGHTS
    before = stamp(file)
    tensors, _ = read_tensors(file)
    network = load_network(config, tensors, str(file), checked=True)
    found = file_tensors_sha256(file, before, tensors)
    check(
        recorded in (None, found),
        f"{file} has the hash {found[:16]}, but {CARD} records {str(recorded)[:16]}: "
        "the weights were altered; download or write the folder again",
    )
    return network, found


def load_network(
    config: DenoiserConfig, tensors: Mapping[str, Tensor], where: str, checked: bool = False
) -> Denoiser:
    """Build the network of ``config`` with these weights in float32, for inference, and log the coverage
    report. ``checked``: the tensors were found finite when they were read.

    InputError names the first tensor that is missing, unexpected or of another shape.
    """
    with without_memory():
        network = build(config)
    expected = network.state_dict()
    faults = [f"lacks {key}" for key in expected if key not in tensors]
    faults += [f"has the unexpected tensor {key}" for key in tensors if key not in expected]
    faults += [
        f"has {key} of shape {tuple(tensors[key].shape)} instead of {tuple(tensor.shape)}"
        for key, tensor in expected.items()
        if key in tensors and tensors[key].shape != tensor.shape
    ]
    if faults:
        raise InputError(
            f"{where} {faults[0]} ({len(faults)} faults in total): they belong to another configuration"
        )
    LOG.info("%s", Coverage(where, type(network).__name__, list(tensors), [], []))
    if not checked:
        check_finite(tensors, where)
    network.load_state_dict({key: tensor.float() for key, tensor in tensors.items()}, assign=True)
    return network.requires_grad_(False).eval()


def optional(kind: type[T], values: object, where: str) -> T | None:
    """Return ``typed`` of ``values``, None where there are none."""
    return typed(kind, values, where) if values else None


def typed(kind: type[T], values: object, where: str) -> T:
    """Validate plain ``values`` as a configuration of ``kind``; InputError with ``where`` and the first
    fault.
    """
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        raise InputError(f"{where}: {key}{': ' * bool(key)}{first['msg']}; correct it there") from None


def check_complete(stored: StoredModel, diffusion: DiffusionConfig | None, codec: Codec | None) -> None:
    """Raise InputError that lists what a source with the denoiser alone needs beside it."""
    actions = {
        "give its autoencoder with --codec-path or codec=": codec is None and stored.codec is None,
        "give its T5 with --text-encoder": stored.lacks_text,
        "pass the diffusion process that it was trained with as diffusion=": diffusion is None,
    }
    missing = "; ".join(action for action, needed in actions.items() if needed)
    check(
        not missing,
        f"{stored.name} holds only the denoiser, which generates latents: {missing} "
        "(VideoPipeline.save_pretrained records all of this)",
    )


def open_reader(
    stored: StoredModel, device: torch.device, path: str | None, bits: int | None, prompts: Sequence[str]
) -> PromptReader | None:
    """Return the prompt reader of a text model, after it has encoded ``prompts``; None for other models."""
    if stored.text is None:
        return None
    config: TextEncoderConfig = replace(
        stored.text, path=path or stored.text.path, bits=bits or stored.text.bits
    )
    vocabulary = None
    if not TEXT_ENCODERS.fact(config.name or "", "has_weights"):  # a new word is noise to such an encoder
        vocabulary = Vocabulary.of(dict(stored.about.get("data") or {}))
    reader = PromptReader(config, device, stored.text_fingerprint, vocabulary)
    if prompts:
        reader.learn(prompts)
    return reader


def open_codec(stored: StoredModel, codec: Codec | None, path: str | None, device: torch.device) -> Codec:
    """Return ``codec``, or the one that ``stored`` records; InputError unless the model was trained on its
    latents.
    """
    if codec is None:
        assert stored.codec is not None
        codec = build_codec(replace(stored.codec, path=path or stored.codec.path), device)
    check(
        stored.codec_fingerprint in (None, codec.fingerprint),
        f"codec is {codec.name} {codec.fingerprint}, but the model was trained on the latents of "
        f"{stored.codec_fingerprint}; give the weights it was trained with by --codec-path",
    )
    return codec


def offload_home(work: torch.device) -> torch.device:
    """Return where parts rest when they visit ``work`` only to compute; InputError when that is no GPU."""
    check(work.type != "cpu", f"CPU offload needs a GPU, but device is {str(work)!r}; leave --offload out")
    return torch.device("cpu")
