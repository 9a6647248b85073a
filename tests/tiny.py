# SPDX-License-Identifier: Apache-2.0
"""The smallest run that does everything: procedural clips of 3 frames of 16 x 16, pixels as latents, a
model of two blocks.
"""

import os
import subprocess
import sys
from pathlib import Path

import torch
from support import wake

from latte.autoencoder.codec import CodecConfig, build_codec
from latte.diffusion.config import DiffusionConfig
from latte.inference.generate import SampleConfig
from latte.inference.pipeline import VideoPipeline
from latte.inference.prompts import PromptReader
from latte.model.latte import Latte, ModelConfig
from latte.model.text import LatteText, TextConfig
from latte.text.encoders import TextEncoderConfig

ROOT = Path(__file__).parents[1]
WORDS = [
    "codec.name=pixels",
    "model.depth=2",
    "model.width=16",
    "model.heads=2",
    "model.patch_size=4",
    "data.frames=3",
    "data.resolution=16",
    "train.global_batch=4",
    "train.decay_steps=0",
    "train.checkpoint_every=2",
    "train.sample_every=0",
    "train.dtype=fp32",
    "sample.steps=3",
    "sample.batch=2",
]
MODEL = ModelConfig(
    depth=2, width=16, heads=2, patch_size=4, num_frames=3, latent_size=16, latent_channels=3, num_classes=4
)
CLASSES = ["up", "down", "left", "right"]


def tiny_trained(**changes: object) -> VideoPipeline:
    """A model with random weights (not the zeros of a fresh one), in pixels, with four classes unless
    ``changes`` say otherwise.
    """
    config = ModelConfig(**{**MODEL.__dict__, **changes})
    torch.manual_seed(0)
    model = wake(Latte(config)).eval()
    codec_config = CodecConfig(name="pixels")
    classes = CLASSES if config.num_classes else []
    sample = SampleConfig(sampler="ddim", steps=3, batch=2)
    return VideoPipeline(
        "tiny", model, DiffusionConfig(), codec_config, build_codec(codec_config), classes, sample, "none"
    )


def tiny_text(depth: int = 1) -> VideoPipeline:
    """A text model with random weights, in pixels, with the built-in text encoder."""
    torch.manual_seed(0)
    config = TextConfig(
        depth=depth,
        width=16,
        heads=2,
        patch_size=4,
        num_frames=3,
        latent_size=16,
        latent_channels=3,
        caption_channels=64,
    )
    codec_config, reader = CodecConfig(name="pixels"), PromptReader(TextEncoderConfig(name="builtin"), "cpu")
    return VideoPipeline(
        "tiny",
        wake(LatteText(config), scale=0.2).eval(),
        DiffusionConfig(),
        codec_config,
        build_codec(codec_config),
        [],
        SampleConfig(sampler="ddim", steps=3, batch=2),
        "none",
        reader,
    )


def latte(*words: object, **environment: str) -> subprocess.CompletedProcess:
    """Run the program in a process of its own."""
    paths = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    env, command = (
        {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **environment},
        [sys.executable, "-m", "latte"],
    )
    return subprocess.run(
        [*command, *map(str, words)], capture_output=True, text=True, env=env, timeout=120, check=False
    )
