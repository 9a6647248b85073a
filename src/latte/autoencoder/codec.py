# SPDX-License-Identifier: Apache-2.0
"""Codecs from a configuration or from a folder of weights.

A model is tied to the codec whose latents it learned; ``Codec.fingerprint`` is written into checkpoints and
latent shards, and checked when they are used again. To add a codec: a subclass of ``base.Codec``, and one
entry in ``config.CODECS``.
"""

import torch

from latte.autoencoder.any_diffusers import AnyDiffusersCodec
from latte.autoencoder.base import Codec
from latte.autoencoder.config import CODECS, CodecConfig
from latte.autoencoder.diffusers_codec import layout_at
from latte.autoencoder.kl import KLCodec
from latte.checks import check

__all__ = ["CODECS", "Codec", "CodecConfig", "build_codec", "decoder_for", "kind_at"]
TEMPORAL_CHUNK = 14  # frames that the released pipeline decodes at once


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
