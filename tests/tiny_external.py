# SPDX-License-Identifier: Apache-2.0
"""diffusers' autoencoders of LTX-Video, Wan, CogVideoX, HunyuanVideo and DC-AE with random weights.

Each has the layout of the published one, in few channels. ``saved`` writes one as diffusers does.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support import noise, wake

from tiny_pipeline import seeded


@dataclass(frozen=True)
class Case:
    """A tiny autoencoder, and what its codec must say of it."""

    codec: str
    layout: str
    arguments: dict[str, Any]
    channels: int
    space: int
    time: int = 1
    step: int = 1
    """Frames by which clips grow."""


LTX = {
    "latent_channels": 8,
    "block_out_channels": (8, 8, 8, 8),
    "decoder_block_out_channels": (8, 8, 8, 8),
    "layers_per_block": (1, 1, 1, 1, 1),
    "decoder_layers_per_block": (1, 1, 1, 1, 1),
    "patch_size": 1,
    "scaling_factor": 0.7,
}
# The blocks of 0.9.5, whose factors do not follow from ``spatio_temporal_scaling`` alone; the noise of 0.9.1.
LTX_TIMESTEP = {
    "latent_channels": 6,
    "block_out_channels": (8, 8, 8, 8, 8),
    "down_block_types": ("LTXVideo095DownBlock3D",) * 4,
    "spatio_temporal_scaling": (True, True, True, True),
    "downsample_type": ("spatial", "temporal", "spatiotemporal", "spatiotemporal"),
    "layers_per_block": (1, 1, 1, 1, 1),
    "decoder_block_out_channels": (8, 16, 32),
    "decoder_spatio_temporal_scaling": (True, True, True),
    "decoder_layers_per_block": (1, 1, 1, 1),
    "decoder_inject_noise": (True, True, True, False),
    "upsample_residual": (True, True, True),
    "upsample_factor": (2, 2, 2),
    "timestep_conditioning": True,
    "patch_size": 1,
    "spatial_compression_ratio": 8,
    "temporal_compression_ratio": 8,
}
WAN = {
    "base_dim": 4,
    "z_dim": 4,
    "num_res_blocks": 1,
    "latents_mean": [0.3, -0.2, 0.5, 1.0],
    "latents_std": [1.5, 2.0, 0.7, 3.0],
}
WAN_22 = {
    "base_dim": 4,
    "decoder_base_dim": 8,
    "z_dim": 6,
    "num_res_blocks": 1,
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
    "latents_mean": [0.3, -0.2, 0.5, 1.0, 0.0, -1.0],
    "latents_std": [1.5, 2.0, 0.7, 3.0, 1.0, 0.5],
}
COGVIDEOX = {
    "block_out_channels": (4, 4, 4, 8),
    "latent_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "scaling_factor": 0.7,
    "invert_scale_latents": True,
}
HUNYUAN = {
    "block_out_channels": (4, 4, 8, 8),
    "latent_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 2,
}
DC = {
    "latent_channels": 8,
    "attention_head_dim": 4,
    "encoder_block_types": ("ResBlock", "ResBlock", "EfficientViTBlock"),
    "decoder_block_types": ("ResBlock", "ResBlock", "EfficientViTBlock"),
    "encoder_block_out_channels": (8, 8, 16),
    "decoder_block_out_channels": (8, 8, 16),
    "encoder_layers_per_block": (1, 1, 1),
    "decoder_layers_per_block": (1, 1, 1),
    "encoder_qkv_multiscales": ((), (), (5,)),
    "decoder_qkv_multiscales": ((), (), (5,)),
    "downsample_block_type": "conv",
    "upsample_block_type": "interpolate",
    "scaling_factor": 0.41407,
}
CASES = {
    "ltx": Case("ltx", "AutoencoderKLLTXVideo", LTX, 8, 8, 8, 8),
    "ltx_timestep": Case("ltx", "AutoencoderKLLTXVideo", LTX_TIMESTEP, 6, 8, 8, 8),
    "wan": Case("wan", "AutoencoderKLWan", WAN, 4, 8, 4, 4),
    "wan_22": Case("wan", "AutoencoderKLWan", WAN_22, 6, 16, 4, 4),
    "cogvideox": Case("cogvideox", "AutoencoderKLCogVideoX", COGVIDEOX, 4, 8, 4, 8),
    "hunyuan": Case("hunyuan", "AutoencoderKLHunyuanVideo", HUNYUAN, 4, 8, 4, 4),
    "dc": Case("dc", "AutoencoderDC", DC, 8, 4),
}


def tiny_external(layout: str, arguments: dict[str, Any]) -> Any:
    """Return diffusers' network of class ``layout``, every parameter and the moments of LTX random."""
    import diffusers

    network = seeded(lambda: wake(getattr(diffusers, layout)(**arguments)))
    for name, buffer in network.named_buffers():  # the moments of LTX-Video
        if name == "latents_mean":
            buffer.copy_(noise(*buffer.shape, seed=1))
        elif name == "latents_std":
            buffer.copy_(noise(*buffer.shape, seed=2).abs() + 0.5)
    return network


def save_external(name: str, folder: Path) -> Any:
    """Save the case ``name`` in ``folder``/vae and return its network."""
    case = CASES[name]
    network = tiny_external(case.layout, case.arguments)
    network.save_pretrained(folder / "vae")
    return network.requires_grad_(False)
