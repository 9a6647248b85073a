# SPDX-License-Identifier: Apache-2.0
"""The KL autoencoders of Stable Diffusion, 8x smaller each way, 4 channels: the paper's codec, and the one
with temporal decoder.

Encoding samples the posterior; scale 0.18215 unless the weights' own config.json has another (Latte, Sec.
4.1). The networks are diffusers' AutoencoderKL (layout of 1.4) and AutoencoderKLTemporalDecoder (of Stable
Video Diffusion), imported when used; their files are read here, strictly.
Axes: b clips, f frames, n frames of a chunk, c channels, h height, w width.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from latte.autoencoder.base import Compression, FrameCodec
from latte.autoencoder.diffusers_codec import DiffusersCodec
from latte.checks import InputError, check

STABLE_DIFFUSION = {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 4}
OLD_NAMES = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


class StableDiffusionCodec(DiffusersCodec, FrameCodec):
    """An autoencoder of Stable Diffusion. Abstract: KLCodec and TemporalCodec."""

    compression = Compression(channels=4, spatial_factor=8)
    scale = 0.18215
    stochastic = True

    @classmethod
    def compression_of(cls, config: Mapping[str, Any]) -> Compression:
        """Return 4 channels, 8 times smaller; InputError for another network, or one with a shift."""
        downscale = 2 ** (len(config["block_out_channels"]) - 1)
        found = (config["latent_channels"], downscale, config.get("shift_factor") or 0)
        check(
            found == (4, 8, 0),
            f"(channels, downscale, shift) is {found}, but codec {cls.name!r} is an {cls.layout} of 4 "
            "channels, 8 times smaller, without shift; give another folder, or codec.name=diffusers",
        )
        return cls.compression

    @classmethod
    def compression_at(cls, path: str | None) -> Compression:
        """Return the one compression that both codecs have; nothing is read."""
        return cls.compression

    @classmethod
    def skeleton(cls, path: str | None) -> nn.Module:
        """Return Stable Diffusion's network, unless ``path`` is a folder with another config.json."""
        try:
            return super().skeleton(path)
        except InputError:
            return super().skeleton(None)

    @classmethod
    def current_name(cls, name: str) -> str:
        """Return a tensor's name in diffusers since 0.18, which renamed the projections of attention."""
        for old, new in OLD_NAMES.items():
            name = name.replace(old, new)
        return name

    def encode_frames(self, frames: Tensor, noise: Tensor | None) -> Tensor:
        posterior = self.network.encode(frames).latent_dist
        sample = posterior.mean
        if noise is not None:
            sample = sample + posterior.std * noise
        return self.normalise(sample)


class KLCodec(StableDiffusionCodec):
    """diffusers' AutoencoderKL as a codec: every frame by itself."""

    name = "kl"
    layout = "AutoencoderKL"
    tileable = True
    published: ClassVar = {
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        **STABLE_DIFFUSION,
    }

    @staticmethod
    def network_class() -> Any:
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

        return AutoencoderKL

    def decode_frames(self, latent: Tensor) -> Tensor:
        return self.network.decode(self.denormalise(latent)).sample


class TemporalCodec(StableDiffusionCodec):
    """diffusers' AutoencoderKLTemporalDecoder as a codec: KLCodec's encoder, and a decoder across frames.

    The release keeps it in ``vae_temporal_decoder`` and decodes 14 frames at a time. Frames of a chunk
    influence each other, so ``chunk`` is part of the result: 14 is what the release does, a chunk of the
    whole clip is seamless. Chunks start again at every clip (the release's cross the clips of a batch), so a
    clip does not depend on its batch.
    """

    name = "kl_temporal"
    layout = "AutoencoderKLTemporalDecoder"
    places = ("vae_temporal_decoder/", "vae/", "")
    published: ClassVar = {"down_block_types": ["DownEncoderBlock2D"] * 4, **STABLE_DIFFUSION}

    @staticmethod
    def network_class() -> Any:
        from diffusers.models.autoencoders.autoencoder_kl_temporal_decoder import AutoencoderKLTemporalDecoder

        return AutoencoderKLTemporalDecoder

    def decode(self, latent: Tensor) -> Tensor:
        """Return frames (b f 3 H W) in [-1, 1], clamped, of latents (b f c h w), clip by clip."""
        if len(latent) <= 1 or latent.ndim != 5:  # the latter is refused there
            return super().decode(latent)
        return torch.cat([super(TemporalCodec, self).decode(clip[None]) for clip in latent])

    def decode_frames(self, latent: Tensor) -> Tensor:
        return self.network.decode(self.denormalise(latent), num_frames=len(latent)).sample
