# SPDX-License-Identifier: Apache-2.0
"""What sampling holds in memory, stage by stage, counted before any weight is read: text encoder, denoiser, decoder.

The stages follow each other as ``latte sample`` runs them: prompts are read first and the encoder is gone before the denoiser comes;
denoiser and autoencoder stay together, unless ``--offload`` has on the device only the one that is at work. Weights are counted exactly;
``working`` is the most that the tensors of one call take at a time, found by running the true code on the meta device
(model/memory.py). Kernels' own buffers and the allocator's slack come on top. Clips of the model's own size, without given frames: these,
and chained windows, need the gradient through the model as well, which is several times as much.
Axes: b clips, f frames, c channels, h w latent size, l tokens of a caption, k its channels.
"""

from dataclasses import dataclass
from typing import Any

import torch

from latte.autoencoder.codec import CODECS, CodecConfig
from latte.checks import require
from latte.diffusion.guidance import guided
from latte.inference.generate import SampleConfig
from latte.model.denoiser import DenoiserConfig
from latte.profile.memory import LiveBytes, OnDevice
from latte.text.encoders import TextEncoderConfig, weights_bytes


@dataclass(frozen=True)
class Stage:
    """Bytes: the weights of the part at work, and the most that its work needs beside them."""

    weights: int
    working: int


@dataclass(frozen=True)
class Staging:
    """``batch`` clips at a time with matrix products in ``dtype``. ``text_encoder`` is None for a model that reads no captions.

    ``peak`` is what ``latte sample`` holds on the device at the most, ``offloaded`` what it holds with ``--offload``, and ``together``
    what holding all parts at once would take.
    """

    batch: int
    dtype: str
    text_encoder: Stage | None
    denoiser: Stage
    decoder: Stage

    @property
    def peak(self) -> int:
        """The encoder alone, then the denoiser and the decoder beside each other."""
        resident = self.denoiser.weights + self.decoder.weights
        return max(self.text, resident + max(self.denoiser.working, self.decoder.working))

    @property
    def offloaded(self) -> int:
        """One part at a time."""
        return max(self.text, *(stage.weights + stage.working for stage in (self.denoiser, self.decoder)))

    @property
    def together(self) -> int:
        """All parts all the time."""
        encoder = self.text_encoder.weights if self.text_encoder else 0
        return (
            encoder
            + self.denoiser.weights
            + self.decoder.weights
            + max(self.denoiser.working, self.decoder.working)
        )

    @property
    def text(self) -> int:
        """The stage of the text encoder, 0 without one."""
        return self.text_encoder.weights + self.text_encoder.working if self.text_encoder else 0

    def facts(self) -> dict[str, Any]:
        """Everything as plain data."""
        parts = {
            name: stage and {"weights": stage.weights, "working": stage.working}
            for name in ("text_encoder", "denoiser", "decoder")
            for stage in [getattr(self, name)]
        }
        sums = {name: getattr(self, name) for name in ("peak", "offloaded", "together")}
        return {"batch": self.batch, "dtype": self.dtype, **parts, **sums}


def staging(
    model: DenoiserConfig,
    codec: CodecConfig,
    text: TextEncoderConfig,
    sample: SampleConfig,
    device: torch.device,
    dtype: torch.dtype,
) -> Staging:
    """What drawing ``sample.batch`` clips of the model's own size takes on ``device``, with matrix products in ``dtype``."""
    encoder = reading(text, device) if text.name else None
    denoiser, decoder = denoising(model, text.tokens, sample, dtype), decoding(model, codec, sample.batch)
    return Staging(sample.batch, str(dtype).removeprefix("torch."), encoder, denoiser, decoder)


@torch.no_grad()
def reading(text: TextEncoderConfig, device: torch.device) -> Stage:
    """One prompt of the maximum number of tokens."""
    forward = text.encoder.meta_forward(text.path, text.tokens, device)
    with LiveBytes() as live:
        forward()
    return Stage(weights_bytes(text, device), live.peak)


@torch.no_grad()
def denoising(config: DenoiserConfig, tokens: int, sample: SampleConfig, dtype: torch.dtype) -> Stage:
    """One guided call of the denoiser."""
    with torch.device("meta"):
        model = config.build().requires_grad_(False)
        z = torch.empty(sample.batch, config.num_frames, config.latent_channels, *config.grid_size)
        t = torch.zeros(sample.batch, dtype=torch.long)
        condition = model.example_condition(sample.batch, tokens=tokens)
        denoise = guided(model, condition, condition, sample.guidance if condition else 1.0)
    with OnDevice(dtype), LiveBytes() as live:
        denoise(z, t)
    return Stage(sum(weight.nbytes for weight in model.parameters()), live.peak)


@torch.no_grad()
def decoding(config: DenoiserConfig, codec: CodecConfig, clips: int) -> Stage:
    """The frames of ``clips`` clips, ``codec.chunk`` at a time."""
    kind = CODECS[codec.name]
    decoder = kind(kind.skeleton(codec.path), codec.chunk, "meta")
    require(
        config.latent_channels == kind.channels,
        "model.latent_channels",
        config.latent_channels,
        f"codec {codec.name!r} has {kind.channels}",
        "give the codec that the model learned",
    )
    z = torch.empty(clips, config.num_frames, config.latent_channels, *config.grid_size, device="meta")
    with OnDevice(torch.float32), LiveBytes() as live:
        decoder.decode(z)
    return Stage(sum(weight.nbytes for weight in decoder.network.parameters()), live.peak)
