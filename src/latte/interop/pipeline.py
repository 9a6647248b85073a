# SPDX-License-Identifier: Apache-2.0
"""A whole LattePipeline of diffusers from our parts: transformer, autoencoder, text encoder, tokenizer,
scheduler in a folder.

``diffusers.LattePipeline.from_pretrained(folder)`` loads it and, from the same text features, generates
what we generate with ``ddim`` at an integer stride ("ddim50"). From the same prompt it generates another
clip where guidance is not 1: it attends to the padding of the negative prompt, which we never do. In the
other direction ``load_external`` reads the transformer of such a folder, and codec.path its autoencoder.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from latte.autoencoder.codec import Codec, CodecConfig, build_codec
from latte.autoencoder.kl import StableDiffusionCodec
from latte.checkpoint.record import read_fingerprint
from latte.checks import InputError, check
from latte.diffusion.config import DiffusionConfig, build_process
from latte.files import check_replaceable, commit_folder, reported
from latte.interop.diffusers import WEIGHTS, diffusers_state, save_diffusers
from latte.model.text import LatteText
from latte.text.t5 import load_t5

INDEX = "model_index.json"
PARTS = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
ENCODER = "T5EncoderModel"
BETAS = {"linear": "linear", "squared_cosine": "squaredcos_cap_v2"}
PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction", "z0": "sample"}


def scheduler_settings(diffusion: DiffusionConfig, learn_sigma: bool) -> dict[str, Any]:
    """Return keywords of diffusers' DDIMScheduler for a model trained with ``diffusion``: the released
    grid, z_0 not clipped.

    The pipeline takes half of the model's channels for variance unless the scheduler's file has a
    ``variance_type``, which DDIMScheduler itself does not read: a model without learned variance needs it
    there, a model with it must not have it. InputError for a rectified flow.
    """
    process = build_process(diffusion)
    check(
        process.prediction in PREDICTIONS,
        f"a LattePipeline samples with DDIM, which cannot sample diffusion.objective={diffusion.objective}; "
        "use --to latte",
    )
    scale = 1000 / diffusion.num_steps  # of both ends of the linear schedule, see diffusion/process.py
    return {
        "num_train_timesteps": diffusion.num_steps,
        "beta_start": scale * 1e-4,
        "beta_end": scale * 0.02,
        "beta_schedule": BETAS[diffusion.schedule],
        "prediction_type": PREDICTIONS[process.prediction],
        "timestep_spacing": "leading",
        "steps_offset": 0,
        "set_alpha_to_one": True,
        "clip_sample": False,
    } | ({} if learn_sigma else {"variance_type": "learned"})


def save_pipeline(
    model: LatteText,
    codec: Codec,
    text_encoder: Any,
    tokenizer: Any,
    diffusion: DiffusionConfig,
    folder: Path,
) -> None:
    """Write the folder that ``LattePipeline.from_pretrained`` loads; an earlier one is replaced.

    ``text_encoder`` is a T5EncoderModel of transformers, ``tokenizer`` its tokenizer. InputError for parts
    that a LattePipeline cannot hold (another autoencoder or text encoder, a flow) and for other files in
    ``folder``; RunError when the disk refuses.
    """
    check_replaceable(folder, (INDEX, *PARTS))
    check_parts(model, codec, text_encoder, tokenizer)
    import diffusers

    settings = scheduler_settings(diffusion, model.config.learn_sigma)
    index = {
        "_class_name": "LattePipeline",
        "_diffusers_version": diffusers.__version__,
        "transformer": ["diffusers", "LatteTransformer3DModel"],
        "vae": ["diffusers", type(codec.network).__name__],
        "text_encoder": ["transformers", ENCODER],
        "tokenizer": ["transformers", type(tokenizer).__name__],
        "scheduler": ["diffusers", "DDIMScheduler"],
    }
    tensors = {
        name: tensor.detach().cpu().contiguous() for name, tensor in codec.network.state_dict().items()
    }

    def write(place: Path) -> None:
        save_diffusers(model, place / "transformer")
        codec.network.save_config(place / "vae")
        save_file(tensors, place / "vae" / WEIGHTS, metadata={"format": "pt"})
        text_encoder.save_pretrained(place / "text_encoder")
        tokenizer.save_pretrained(place / "tokenizer")
        write_json(
            place / "scheduler" / "scheduler_config.json", {"_class_name": "DDIMScheduler", **settings}
        )
        write_json(place / INDEX, index)
        forget_places(place)

    parts = (model, codec.network, text_encoder)
    needed = sum(tensor.nbytes for part in parts for tensor in part.state_dict().values())
    with reported("the pipeline", folder, needed):
        commit_folder(folder, write)


def forget_places(folder: Path) -> None:
    """Remove from the configurations in ``folder`` where their parts were loaded from: a path of this
    machine.
    """
    for file in folder.rglob("*.json"):
        content = json.loads(file.read_text("utf-8"))
        if isinstance(content, dict) and content.pop("_name_or_path", None) is not None:
            write_json(file, content)


def check_parts(model: LatteText, codec: Codec, text_encoder: Any, tokenizer: Any) -> None:
    """Raise InputError unless diffusers has a class for each part and they match each other."""
    if not isinstance(codec, StableDiffusionCodec):
        raise InputError(
            f"the codec is {codec.name!r}, but a LattePipeline decodes with an autoencoder of Stable "
            "Diffusion; use --to latte"
        )
    found = type(text_encoder).__name__
    check(
        found == ENCODER, f"the text encoder is {found}, but a LattePipeline needs {ENCODER}; use --to latte"
    )
    width = text_encoder.config.d_model
    channels = model.config.caption_channels
    check(
        width == channels,
        f"the text encoder has width {width}, but the model reads captions of {channels} channels; "
        "use the text encoder that it was trained with",
    )
    num_tokens = len(tokenizer)
    vocabulary = text_encoder.config.vocab_size
    check(
        num_tokens <= vocabulary,
        f"the tokenizer has {num_tokens} tokens, but the text encoder has {vocabulary}; use its own "
        "tokenizer",
    )


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write a small file, and create its folder."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def to_pipeline(model: Any, folder: Path, facts: Mapping[str, Any]) -> None:
    """``save_pipeline`` with the codec and text encoder at the paths in ``facts`` (as for
    ``interop.export``).
    """
    if not model.config.reads_text:
        raise InputError(
            "--to pipeline is text to video, but this model reads no captions; use --to official"
        )
    # refuse what diffusers cannot express before a T5 is read
    diffusers_state(model, (facts.get("about") or {}).get("gate_steps"))
    codec = facts.get("codec") or {}
    text = facts.get("text") or {}
    name = text.get("name")
    path = text.get("path")
    check(
        name in (None, "t5"),
        f"the text encoder is {name!r}, but a LattePipeline needs {ENCODER}; use --to latte",
    )
    check(
        path is not None,
        "a pipeline holds its text encoder, and this source has no path of one; "
        "give --text-encoder with the folder or hub id of the T5 that the model was trained with",
    )
    check(
        codec.get("path") is not None,
        "a pipeline holds its autoencoder, and this source has no path of one; "
        "give --codec with the folder or hub id of the one that the model was trained with",
    )
    autoencoder = build_codec(CodecConfig(codec.get("name", "kl"), codec["path"]))
    fingerprint = read_fingerprint(codec)
    check(
        fingerprint in (None, autoencoder.fingerprint),
        f"--codec {codec['path']} is {autoencoder.fingerprint}, but the model learned latents of "
        f"{fingerprint}; use that one",
    )
    save_pipeline(
        model, autoencoder, *load_t5(str(path)), DiffusionConfig(**facts.get("diffusion", {})), folder
    )
