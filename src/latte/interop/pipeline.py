# SPDX-License-Identifier: Apache-2.0
"""A whole LattePipeline of diffusers out of our parts: transformer, autoencoder, text encoder, tokenizer and scheduler in one folder.

``diffusers.LattePipeline.from_pretrained(folder)`` loads it and draws what we draw with ``ddim`` at a whole stride ("ddim50"), from the
same features of the text. From the same words it draws another clip where guidance is not 1: it attends to the padding of the negative
prompt, which we never do. The other way, such a folder is a weight source like any other: ``load_external`` finds its transformer,
codec.path its autoencoder.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from latte.autoencoder.codec import Codec, CodecConfig, build_codec
from latte.checkpoint.record import read_fingerprint
from latte.checks import InputError, require
from latte.diffusion.config import DiffusionConfig, build_process
from latte.files import commit_folder, reported
from latte.interop.diffusers import WEIGHTS, diffusers_state, save_diffusers
from latte.model.text import LatteText
from latte.text.t5 import load_t5

INDEX = "model_index.json"
PARTS = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
ENCODER = "T5EncoderModel"
BETAS = {"linear": "linear", "squared_cosine": "squaredcos_cap_v2"}
PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction"}


def scheduler_settings(diffusion: DiffusionConfig, learn_sigma: bool) -> dict[str, Any]:
    """Keywords of diffusers' DDIMScheduler for a model trained with ``diffusion``: the released grid, z_0 not clipped.

    The pipeline takes half of the model's channels for variance unless the scheduler's file speaks of a ``variance_type``, which
    DDIMScheduler itself has not: a model without learned variance needs it there, a model with must not have it. InputError for a
    rectified flow.
    """
    process = build_process(diffusion)
    known = process.prediction in PREDICTIONS
    require(
        known,
        "diffusion.objective",
        diffusion.objective,
        "DDIM, the pipeline's sampler, knows no flows",
        "keep it in our own layout",
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
        **({} if learn_sigma else {"variance_type": "learned"}),
    }


def save_pipeline(
    model: LatteText,
    codec: Codec,
    text_encoder: Any,
    tokenizer: Any,
    diffusion: DiffusionConfig,
    folder: Path,
) -> None:
    """Write the folder that ``LattePipeline.from_pretrained`` loads; an earlier one is replaced.

    ``text_encoder`` is a T5EncoderModel of transformers, ``tokenizer`` its tokenizer. InputError for parts that a LattePipeline does not
    hold (another autoencoder or text encoder, a flow) and for anything else in ``folder``; RunError when the disk refuses.
    """
    others = sorted(file.name for file in folder.glob("*") if file.name not in (INDEX, *PARTS))
    require(
        not others,
        "folder",
        str(folder),
        f"it holds other files ({', '.join(others[:3])})",
        "give a new folder",
    )
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

    parts = (model, codec.network, text_encoder)
    with reported(
        "the pipeline", folder, sum(tensor.nbytes for part in parts for tensor in part.state_dict().values())
    ):
        commit_folder(folder, write)


def check_parts(model: LatteText, codec: Codec, text_encoder: Any, tokenizer: Any) -> None:
    """InputError unless diffusers has a class for each part and they fit each other."""
    if codec.layout is None:
        raise InputError(
            f"the codec is {codec.name!r}, but a LattePipeline decodes with an autoencoder of Stable Diffusion's layout; "
            "keep this model in our own folder (--to latte)"
        )
    found = type(text_encoder).__name__
    require(
        found == ENCODER,
        "the text encoder",
        found,
        f"a LattePipeline reads captions with {ENCODER} of transformers alone",
        "keep this model in our own folder (--to latte)",
    )
    width, channels = text_encoder.config.d_model, model.config.caption_channels
    require(
        width == channels,
        "the text encoder's width",
        width,
        f"the model reads captions of {channels} channels",
        "give the text encoder that it was trained with",
    )
    words, known = len(tokenizer), text_encoder.config.vocab_size
    require(
        words <= known,
        "the tokenizer's size",
        words,
        f"the text encoder knows {known} tokens",
        "give the tokenizer that belongs to it",
    )


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """A small file of its own folder, which is made."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def to_pipeline(model: Any, folder: Path, facts: Mapping[str, Any]) -> None:
    """``save_pipeline`` from the ``facts`` of ``checkpoint.export``: codec and text encoder are read from the paths that stand there."""
    if not model.config.reads_text:
        raise InputError(
            "--to is 'pipeline', which is text to video, but this model reads no captions; give --to official"
        )
    diffusers_state(
        model, (facts.get("about") or {}).get("gate_steps")
    )  # refuse what diffusers cannot express before a T5 is read
    codec, text = facts.get("codec") or {}, facts.get("text") or {}
    name, path = text.get("name"), text.get("path")
    require(
        name in (None, "t5"),
        "the text encoder",
        name,
        f"a LattePipeline reads captions with {ENCODER} of transformers alone",
        "keep this model in our own folder (--to latte)",
    )
    require(
        path is not None,
        "--text-encoder",
        path,
        "a pipeline holds its text encoder, and this source does not say where it is",
        "give the folder or hub id of the T5 that the model was trained with",
    )
    require(
        codec.get("path") is not None,
        "--codec",
        codec.get("path"),
        "a pipeline holds its autoencoder",
        "give the folder or hub id of the one that the model was trained with",
    )
    autoencoder = build_codec(CodecConfig(codec.get("name", "kl"), codec["path"]))
    fingerprint = read_fingerprint(codec)
    require(
        fingerprint in (None, autoencoder.fingerprint),
        "--codec",
        codec["path"],
        f"the model learned latents of {fingerprint}",
        "give that one",
    )
    save_pipeline(
        model, autoencoder, *load_t5(str(path)), DiffusionConfig(**facts.get("diffusion", {})), folder
    )
