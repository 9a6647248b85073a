# SPDX-License-Identifier: Apache-2.0
"""The autoencoders of LTX-Video, Wan, CogVideoX and HunyuanVideo, over clips, and DC-AE, over frames.

Each network is diffusers' class, its latents are normalised as diffusers' pipeline normalises what it
denoises, and a codec equals that class without tiling. docs/autoencoders.md compares them.
Axes: f frames, f' latent frames, n frames of a chunk, c channels, H W pixels, h w latent size.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor

from latte.autoencoder.base import Compression, FrameCodec
from latte.autoencoder.diffusers_codec import DiffusersCodec, DiffusersVideoCodec
from latte.checks import check

DECODER_SEED = 0


class LTXCodec(DiffusersVideoCodec):
    """diffusers' AutoencoderKLLTXVideo: 32 x 32 pixels and 8 frames to 128 channels.

    Means and deviations are buffers of the weights. The decoder sees the whole clip. Decoders with
    ``timestep_conditioning`` decode at timestep 0 without noise added to the latents, the default of
    LTXPipeline. Those with ``decoder_inject_noise`` add noise to their features, here always the noise of
    seed 0, so that a clip decodes to the same frames every time.
    """

    name = "ltx"
    layout = "AutoencoderKLLTXVideo"
    published: ClassVar = {
        "in_channels": 3,
        "latent_channels": 128,
        "patch_size": 4,
        "patch_size_t": 1,
        "spatio_temporal_scaling": (True, True, True, False),
        "downsample_type": ("conv", "conv", "conv", "conv"),
    }
    compression = Compression(channels=128, spatial_factor=32, temporal_factor=8)
    tileable = True

    @staticmethod
    def network_class() -> Any:
        from diffusers.models.autoencoders.autoencoder_kl_ltx import AutoencoderKLLTXVideo

        return AutoencoderKLLTXVideo

    @classmethod
    def compression_of(cls, config: Mapping[str, Any]) -> Compression:
        """Return the compression: each block of the encoder halves space, time or both."""
        check_rgb(config["in_channels"])
        blocks = zip(config["spatio_temporal_scaling"], config["downsample_type"], strict=False)
        halved = [kind for scaled, kind in blocks if scaled]
        space = sum(kind != "temporal" for kind in halved)
        time = sum(kind != "spatial" for kind in halved)
        return Compression(
            config["latent_channels"], config["patch_size"] * 2**space, config["patch_size_t"] * 2**time
        )

    @classmethod
    def moments_of(cls, network: Any) -> tuple[Tensor, Tensor]:
        """Return the buffers ``latents_mean`` and ``latents_std`` (c)."""
        return network.latents_mean, network.latents_std

    def decode_raw(self, raw: Tensor) -> Tensor:
        """Return frames (1 3 f H W) of raw latents (1 c f' h w), at timestep 0 where there is one."""
        config = self.network.config
        timestep = raw.new_zeros(1) if config["timestep_conditioning"] else None
        if not any(config["decoder_inject_noise"]):
            return self.network.decode(raw, timestep).sample
        with fixed_noise(raw.device):
            return self.network.decode(raw, timestep).sample


class WanCodec(DiffusersVideoCodec):
    """diffusers' AutoencoderKLWan: 4 frames and 8 x 8 pixels to 16 channels (2.1), 16 x 16 to 48 (2.2).

    Both directions go through a clip latent frame by latent frame with cached features, exactly.
    """

    name = "wan"
    layout = "AutoencoderKLWan"
    published: ClassVar = {
        "in_channels": 3,
        "z_dim": 16,
        "dim_mult": [1, 2, 4, 4],
        "temperal_downsample": [False, True, True],
        "patch_size": None,
    }
    compression = Compression(channels=16, spatial_factor=8, temporal_factor=4)
    tileable = True

    @staticmethod
    def network_class() -> Any:
        from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

        return AutoencoderKLWan

    @classmethod
    def compression_of(cls, config: Mapping[str, Any]) -> Compression:
        """Return the compression: every level but the last halves space, those marked also time."""
        patch = config["patch_size"] or 1
        check_rgb(config["in_channels"] / patch**2)
        time = 2 ** sum(config["temperal_downsample"])
        check_time(time, "temperal_downsample")
        return Compression(config["z_dim"], patch * 2 ** (len(config["dim_mult"]) - 1), time)

    @classmethod
    def moments_of(cls, network: Any) -> tuple[Tensor, Tensor]:
        """Return ``latents_mean`` and ``latents_std`` (c) of the configuration."""
        config = network.config
        return torch.tensor(config["latents_mean"]), torch.tensor(config["latents_std"])


class CogVideoXCodec(DiffusersVideoCodec):
    """diffusers' AutoencoderKLCogVideoX: 4 frames and 8 x 8 pixels to 16 channels.

    Both directions go through a clip 8 frames at a time with cached features. The decoder takes latent frames
    in pairs after the first, so clips have 1 + 8 k frames. ``invert_scale_latents`` is not used: it scales
    the first frame that CogVideoX 1.5 is conditioned on, not the latents that it denoises.
    """

    name = "cogvideox"
    layout = "AutoencoderKLCogVideoX"
    published: ClassVar = {
        "in_channels": 3,
        "latent_channels": 16,
        "block_out_channels": (128, 256, 256, 512),
        "temporal_compression_ratio": 4,
    }
    compression = Compression(channels=16, spatial_factor=8, temporal_factor=4, latent_step=2)
    scale = 1.15258426
    tileable = True

    @staticmethod
    def network_class() -> Any:
        from diffusers.models.autoencoders.autoencoder_kl_cogvideox import AutoencoderKLCogVideoX

        return AutoencoderKLCogVideoX

    @classmethod
    def compression_of(cls, config: Mapping[str, Any]) -> Compression:
        """Return the compression: every block but the last halves space."""
        check_rgb(config["in_channels"])
        time = int(config["temporal_compression_ratio"])
        check_time(time, "temporal_compression_ratio")
        unused = [key for key in ("shift_factor", "latents_mean", "latents_std") if config.get(key)]
        check(not unused, f"it sets {', '.join(unused)}, which no pipeline of CogVideoX applies")
        space = 2 ** (len(config["block_out_channels"]) - 1)
        return Compression(config["latent_channels"], space, time, latent_step=2)


class HunyuanCodec(DiffusersVideoCodec):
    """diffusers' AutoencoderKLHunyuanVideo: 4 frames and 8 x 8 pixels to 16 channels.

    The network sees the whole clip. diffusers decodes clips of more than 16 frames in blended pieces of 16 by
    default; here that comes with tiles alone, whose result differs from that of whole clips anyway.
    """

    name = "hunyuan"
    layout = "AutoencoderKLHunyuanVideo"
    published: ClassVar = {
        "in_channels": 3,
        "latent_channels": 16,
        "spatial_compression_ratio": 8,
        "temporal_compression_ratio": 4,
    }
    compression = Compression(channels=16, spatial_factor=8, temporal_factor=4)
    scale = 0.476986
    tileable = True

    def __init__(self, network: Any, chunk: int = 16, device: str | torch.device = "cpu"):
        super().__init__(network, chunk, device)
        self.network.use_framewise_encoding = False
        self.network.use_framewise_decoding = False

    @staticmethod
    def network_class() -> Any:
        from diffusers.models.autoencoders.autoencoder_kl_hunyuan_video import AutoencoderKLHunyuanVideo

        return AutoencoderKLHunyuanVideo

    @classmethod
    def compression_of(cls, config: Mapping[str, Any]) -> Compression:
        """Return the compression that the configuration states."""
        check_rgb(config["in_channels"])
        return Compression(
            config["latent_channels"],
            config["spatial_compression_ratio"],
            config["temporal_compression_ratio"],
        )

    def enable_tiles(self, side: int) -> None:
        """Encode and decode in tiles of ``side`` pixels and, as diffusers does, 16 frames."""
        super().enable_tiles(side)
        self.network.use_framewise_encoding = True
        self.network.use_framewise_decoding = True


class DCCodec(DiffusersCodec, FrameCodec):
    """diffusers' AutoencoderDC, the autoencoder of SANA: 32 x 32 pixels to 32 channels, or 64 x 64 to 128.

    Frames by themselves, without a posterior.
    """

    name = "dc"
    layout = "AutoencoderDC"
    published: ClassVar = {
        "in_channels": 3,
        "latent_channels": 32,
        "encoder_block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
        "decoder_block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
        "encoder_block_out_channels": (128, 256, 512, 512, 1024, 1024),
        "downsample_block_type": "conv",
        "upsample_block_type": "interpolate",
        "scaling_factor": 0.41407,
    }
    compression = Compression(channels=32, spatial_factor=32)
    scale = 0.41407
    tileable = True

    @staticmethod
    def network_class() -> Any:
        from diffusers.models.autoencoders.autoencoder_dc import AutoencoderDC

        return AutoencoderDC

    @classmethod
    def compression_of(cls, config: Mapping[str, Any]) -> Compression:
        """Return the compression: every block but the last halves space."""
        check_rgb(config["in_channels"])
        return Compression(config["latent_channels"], 2 ** (len(config["encoder_block_out_channels"]) - 1))

    def encode_frames(self, frames: Tensor, noise: Tensor | None) -> Tensor:
        return self.normalise(self.network.encode(frames).latent)

    def decode_frames(self, latent: Tensor) -> Tensor:
        return self.network.decode(self.denormalise(latent)).sample


def check_rgb(channels: float) -> None:
    """InputError unless a network encodes 3 channels."""
    check(channels == 3, f"the network encodes {channels:g} channels, but frames have 3")


def check_time(factor: int, key: str) -> None:
    """InputError unless ``factor``, which ``key`` sets, is that of the pieces that diffusers encodes."""
    check(
        factor == 4,
        f"{key} compresses time {factor} times, but diffusers' class encodes pieces of 4 k frames",
    )


@contextmanager
def fixed_noise(device: torch.device) -> Iterator[None]:
    """Seed torch's own random numbers with DECODER_SEED inside, and restore them after.

    For networks that draw noise and take no generator.
    """
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(DECODER_SEED)
        yield
