# SPDX-License-Identifier: Apache-2.0
"""Memory of sampling by stage (text encoder, denoiser, decoder), counted before any weights are read.

``latte sample`` encodes the prompts first and frees the text encoder before the denoiser is loaded. Denoiser
and autoencoder stay on the device together, unless ``--offload`` keeps only the part at work there. Weights
are counted exactly; ``working`` is the peak of the tensors of one call, found by running the real code on the
meta device (latte.profile.memory). Buffers of kernels and of the allocator come on top. The plan is for clips
of the model's own size without conditioning frames: conditioning frames and chained windows also need the
gradient through the model, which takes several times as much. Axes: b clips, f frames, c channels, h w latent
size, l tokens of a caption, k its channels.
"""

from dataclasses import dataclass
from typing import Any

import torch

from latte.autoencoder.codec import CODECS, CodecConfig
from latte.autoencoder.config import compression_at
from latte.checks import check
from latte.diffusion.guidance import guided
from latte.inference.generate import SampleConfig
from latte.model.denoiser import DenoiserConfig
from latte.profile.memory import LiveBytes, OnDevice
from latte.tensors import without_memory
from latte.text.encoders import TextEncoderConfig, weights_bytes


@dataclass(frozen=True)
class Stage:
    """Bytes of a part's weights, and the peak of the tensors that its work needs besides."""

    weights: int
    working: int


@dataclass(frozen=True)
class Staging:
    """The stages of sampling ``batch`` clips at a time with matrix products in ``dtype``.

    ``text_encoder`` is None for a model that reads no captions. ``peak`` is the most that ``latte sample``
    holds on the device, ``offloaded`` the most with ``--offload``, and ``together`` what all parts at once
    would take.
    """

    batch: int
    dtype: str
    text_encoder: Stage | None
    denoiser: Stage
    decoder: Stage

    @property
    def peak(self) -> int:
        """Peak without offload: the text encoder alone, then denoiser and decoder together."""
        resident = self.denoiser.weights + self.decoder.weights
        return max(self.text, resident + max(self.denoiser.working, self.decoder.working))

    @property
    def offloaded(self) -> int:
        """Peak with CPU offload."""
        return max(self.text, *(stage.weights + stage.working for stage in (self.denoiser, self.decoder)))

    @property
    def together(self) -> int:
        """Peak if no part were freed."""
        parts = (self.text_encoder, self.denoiser, self.decoder)
        weights = sum(part.weights for part in parts if part)
        return weights + max(self.denoiser.working, self.decoder.working)

    @property
    def text(self) -> int:
        """Bytes of the stage of the text encoder, 0 without one."""
        if self.text_encoder is None:
            return 0
        return self.text_encoder.weights + self.text_encoder.working

    def facts(self) -> dict[str, Any]:
        """Return everything as plain data."""
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
    """Return the memory of sampling ``sample.batch`` clips of the model's own size on ``device``."""
    encoder = reading(text, device) if text.name else None
    return Staging(
        batch=sample.batch,
        dtype=str(dtype).removeprefix("torch."),
        text_encoder=encoder,
        denoiser=denoising(model, text.tokens, sample, dtype),
        decoder=decoding(model, codec, sample.batch),
    )


@torch.no_grad()
def reading(text: TextEncoderConfig, device: torch.device) -> Stage:
    """Return the memory of encoding one prompt of the maximum number of tokens."""
    forward = text.encoder.meta_forward(text.path, text.tokens, device)
    with LiveBytes() as live:
        forward()
    return Stage(weights_bytes(text, device), live.peak)


@torch.no_grad()
def denoising(config: DenoiserConfig, tokens: int, sample: SampleConfig, dtype: torch.dtype) -> Stage:
    """Return the memory of one guided call of the denoiser."""
    with without_memory():
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
    """Return the memory of decoding ``clips`` clips, ``codec.chunk`` frames at a time."""
    kind = CODECS[codec.name]
    decoder = kind(kind.skeleton(codec.path), codec.chunk, "meta")
    if codec.tile is not None:
        decoder.enable_tiles(codec.tile)
    channels = compression_at(codec.name, codec.path).channels
    check(
        config.latent_channels == channels,
        f"model.latent_channels is {config.latent_channels}, but the latents of codec {codec.name!r} have "
        f"{channels}; "
        "give the codec that the model was trained with",
    )
    z = torch.empty(clips, config.num_frames, config.latent_channels, *config.grid_size, device="meta")
    with OnDevice(torch.float32), LiveBytes() as live:
        decoder.decode(z)
    return Stage(sum(weight.nbytes for weight in decoder.network.parameters()), live.peak)
