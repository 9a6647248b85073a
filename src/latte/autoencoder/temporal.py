# SPDX-License-Identifier: Apache-2.0
"""The autoencoder of Stable Video Diffusion: the encoder of ``kl.py``, and a decoder whose frames look at their neighbours.

Latte's release keeps it in ``vae_temporal_decoder`` and decodes 14 frames at a time. Unlike with every other codec the frames of a chunk
change each other, so ``chunk`` is part of the result: 14 is what the release does, a chunk of the whole clip is seamless. Chunks start
anew at every clip (the release's run on across the clips of a batch), so a clip does not depend on the clips beside it.
Axes: b clips, f frames, n frames of a chunk, c channels, h height, w width.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor

from latte.autoencoder.kl import STABLE_DIFFUSION, Posterior


class TemporalCodec(Posterior):
    """diffusers' AutoencoderKLTemporalDecoder as a codec: ``decode_frames`` takes its frames for a piece of one clip."""

    name, layout, places = (
        "kl_temporal",
        "AutoencoderKLTemporalDecoder",
        ("vae_temporal_decoder/", "vae/", ""),
    )
    published: ClassVar = {"down_block_types": ["DownEncoderBlock2D"] * 4, **STABLE_DIFFUSION}

    @staticmethod
    def network_class() -> Any:
        from diffusers.models.autoencoders.autoencoder_kl_temporal_decoder import AutoencoderKLTemporalDecoder

        return AutoencoderKLTemporalDecoder

    def decode(self, latent: Tensor) -> Tensor:
        """(b f c h w) -> (b f 3 H W) in [-1, 1], clamped, clip by clip."""
        if len(latent) <= 1 or latent.ndim != 5:  # the latter is refused there
            return super().decode(latent)
        return torch.cat([super(TemporalCodec, self).decode(clip[None]) for clip in latent])

    def decode_frames(self, latent: Tensor) -> Tensor:
        return self.network.decode(latent / self.scale, num_frames=len(latent)).sample
