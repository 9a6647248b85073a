# SPDX-License-Identifier: Apache-2.0
"""Which codec: frames <-> latents by name.

A model is tied to the codec whose latents it learned; ``Codec.fingerprint`` is written into checkpoints and latent shards, and
checked when they are used again.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from latte.autoencoder.base import Codec
from latte.autoencoder.builtin import BuiltinCodec
from latte.autoencoder.kl import KLCodec, Posterior, layout_at
from latte.autoencoder.pixels import PixelCodec
from latte.autoencoder.taef2 import Taef2Codec
from latte.autoencoder.temporal import TemporalCodec
from latte.checks import choose, require

__all__ = ["CODECS", "Codec", "CodecConfig", "build_codec", "decoder_for", "kind_at"]
TEMPORAL_CHUNK = 14  # frames that the released pipeline decodes at once


@dataclass(frozen=True)
class CodecConfig:
    """``path`` is a folder, a file or a hub id, as the codec wants it; ``chunk`` is how many frames go through at a time."""

    name: str = "kl"
    path: str | None = None
    chunk: int = 16

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    def __post_init__(self):
        choose("codec.name", self.name, CODECS)
        require(
            self.chunk >= 1,
            "codec.chunk",
            self.chunk,
            "at least one frame must go through at a time",
            "give 1 or more",
        )


def kind_at(path: str) -> type[Posterior]:
    """Which of Stable Diffusion's codecs is in the folder, pipeline or hub id ``path``, by its config.json; without one the plain one."""
    kinds = {kind.layout: kind for kind in CODECS.values() if issubclass(kind, Posterior)}
    return kinds.get(layout_at(path) or "", KLCodec)


def decoder_for(codec: Codec, path: str) -> Codec:
    """The KL autoencoder at ``path`` as a decoder of ``codec``'s latents; InputError for one whose latents have another form or scale."""
    found = build_codec(CodecConfig(kind_at(path).name, path, TEMPORAL_CHUNK), codec.device)
    ours, theirs = ((one.channels, one.downscale, one.scale) for one in (codec, found))
    require(
        ours == theirs,
        "--decoder",
        path,
        f"its latents (channels, times, scale) are {theirs}, the model's are {ours}",
        "give another decoder of the same autoencoder",
    )
    return found


def build_codec(config: CodecConfig, device: str | torch.device = "cpu") -> Codec:
    """The codec of ``config`` with its weights on ``device``; InputError when they are missing, broken or of another layout."""
    return CODECS[config.name].load(config.path, config.chunk, device)


CODECS: dict[str, type[Codec]] = {
    codec.name: codec for codec in (KLCodec, TemporalCodec, Taef2Codec, PixelCodec, BuiltinCodec)
}
