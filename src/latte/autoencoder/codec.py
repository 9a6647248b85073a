# SPDX-License-Identifier: Apache-2.0
"""The table of codecs, and codecs from a configuration.

A model is tied to the codec whose latents it learned; ``Codec.fingerprint`` is written into checkpoints and
latent shards, and checked when they are used again. To add a codec: a subclass of ``base.Codec``, and one
entry in CODECS.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from latte.autoencoder.any_diffusers import AnyDiffusersCodec
from latte.autoencoder.base import Codec, PixelCodec
from latte.autoencoder.builtin import BuiltinCodec
from latte.autoencoder.builtin_temporal import BuiltinTemporalCodec
from latte.autoencoder.diffusers_codec import layout_at
from latte.autoencoder.external import CogVideoXCodec, DCCodec, HunyuanCodec, LTXCodec, WanCodec
from latte.autoencoder.kl import KLCodec, TemporalCodec
from latte.autoencoder.taef2 import Taef2Codec
from latte.checks import check, choose

__all__ = ["CODECS", "Codec", "CodecConfig", "build_codec", "decoder_for", "kind_at"]
TEMPORAL_CHUNK = 14  # frames that the released pipeline decodes at once
MAX_CHUNK = 10_000

CODECS: dict[str, type[Codec]] = {
    "kl": KLCodec,
    "kl_temporal": TemporalCodec,
    "taef2": Taef2Codec,
    "pixels": PixelCodec,
    "builtin": BuiltinCodec,
    "builtin_temporal": BuiltinTemporalCodec,
    "ltx": LTXCodec,
    "wan": WanCodec,
    "cogvideox": CogVideoXCodec,
    "hunyuan": HunyuanCodec,
    "dc": DCCodec,
    "diffusers": AnyDiffusersCodec,
}


@dataclass(frozen=True)
class CodecConfig:
    """Which codec, and where its weights are."""

    name: str = "kl"  # key of CODECS
    path: str | None = (
        None  # folder, file or hub id, as the codec needs it; null: the packaged weights or none
    )
    chunk: int = 16  # frames in memory at a time, for codecs of single frames; codecs of whole clips use tile
    tile: int | None = None  # side in pixels of the tiles of frames too large for memory; null: whole frames

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        choose("codec.name", self.name, CODECS)
        check(
            type(self.chunk) is int and 1 <= self.chunk <= MAX_CHUNK,
            f"codec.chunk must be an integer from 1 to {MAX_CHUNK} frames, got {self.chunk!r}",
        )
        check(
            self.tile is None or (type(self.tile) is int and self.tile >= 1),
            f"codec.tile must be null or a side in pixels, at least 1, got {self.tile!r}",
        )
        tileable = [name for name, kind in CODECS.items() if kind.tileable]
        check(
            self.tile is None or self.name in tileable,
            f"codec.tile is {self.tile}, but codec {self.name!r} has no tiles; the codecs that have are "
            f"{', '.join(tileable)}, and for others codec.tile must be null",
        )


def kind_at(path: str) -> type[Codec]:
    """Return the codec class of the folder, pipeline or hub id ``path``, by its config.json.

    Without one it is KLCodec; for a class without a codec of its own AnyDiffusersCodec.
    """
    layout = layout_at(path)
    kinds = {kind.layout: kind for kind in CODECS.values()}
    return kinds.get(layout, AnyDiffusersCodec) if layout else KLCodec


def decoder_for(codec: Codec, path: str) -> Codec:
    """Return the KL autoencoder at ``path`` as a decoder of ``codec``'s latents.

    InputError for one whose latents have other channels, size or scale.
    """
    found = build_codec(CodecConfig(kind_at(path).name, path, TEMPORAL_CHUNK), codec.device)
    same_moments = (found.moments is None) == (codec.moments is None) and all(
        torch.equal(one.cpu(), other.cpu())
        for one, other in zip(found.moments or (), codec.moments or (), strict=True)
    )
    check(
        (found.compression, found.scale) == (codec.compression, codec.scale) and same_moments,
        f"--decoder {path}: its latents are {latents_of(found)}, but the model's are {latents_of(codec)}; "
        "give another decoder of the same autoencoder",
    )
    return found


def latents_of(codec: Codec) -> str:
    """Return the kind of a codec's latents in words."""
    shape = codec.compression
    return (
        f"{shape.channels} channels, {shape.spatial_factor} times smaller each way, {shape.temporal_factor} "
        f"times in time, scale {codec.scale:g}{', own means and deviations' if codec.moments else ''}"
    )


def build_codec(config: CodecConfig, device: str | torch.device = "cpu") -> Codec:
    """Return the codec of ``config`` on ``device``; InputError for missing or wrong weights."""
    codec = CODECS[config.name].load(config.path, config.chunk, device)
    codec.path = config.path
    if config.tile is not None:
        codec.enable_tiles(config.tile)
        codec.tile = config.tile
    return codec
