# SPDX-License-Identifier: Apache-2.0
"""The codec section of a run's configuration, and the table of codecs. No torch here.

Codecs whose weights all have one shape state their compression here; that of the others is in the
configuration of their weights, and their class reads it.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from latte.autoencoder.compression import Compression
from latte.checks import check, check_name
from latte.tables import Later, Table

if TYPE_CHECKING:
    from latte.autoencoder.base import Codec

MAX_CHUNK = 10_000
STABLE_DIFFUSION = Compression(channels=4, spatial_factor=8)


def _of_files(place: str, about: str) -> Later:
    """Return the entry of a codec whose weights decide its compression."""
    return Later(f"latte.autoencoder.{place}", about, tileable=True)


def _fixed(place: str, about: str, compression: Compression, tileable: bool = False) -> Later:
    """Return the entry of a codec that has one compression."""
    return Later(f"latte.autoencoder.{place}", about, compression=compression, tileable=tileable)


CODECS: Table[str, type["Codec"]] = Table(
    {
        "kl": _fixed(
            "kl:KLCodec", "Stable Diffusion's autoencoder, as in the paper", STABLE_DIFFUSION, tileable=True
        ),
        "kl_temporal": _fixed(
            "kl:TemporalCodec", "the same encoder, with the temporal decoder of SVD", STABLE_DIFFUSION
        ),
        "taef2": _fixed(
            "taef2:Taef2Codec",
            "a small image autoencoder, weights of 5.4 MB at codec.path",
            Compression(channels=32, spatial_factor=8),
        ),
        "pixels": _fixed(
            "base:PixelCodec", "no autoencoder: pixels", Compression(channels=3, spatial_factor=1)
        ),
        "builtin": _fixed(
            "builtin:BuiltinCodec",
            "packaged, for procedural clips, frame by frame",
            Compression(channels=4, spatial_factor=8),
        ),
        "builtin_temporal": _fixed(
            "builtin_temporal:BuiltinTemporalCodec",
            "packaged, compresses time 4 times",
            Compression(channels=16, spatial_factor=8, temporal_factor=4),
        ),
        "ltx": _of_files("external:LTXCodec", "LTX-Video's autoencoder, compresses time"),
        "wan": _of_files("external:WanCodec", "Wan's autoencoder, compresses time"),
        "cogvideox": _of_files("external:CogVideoXCodec", "CogVideoX's autoencoder, compresses time"),
        "hunyuan": _of_files("external:HunyuanCodec", "HunyuanVideo's autoencoder, compresses time"),
        "dc": _of_files("external:DCCodec", "the image autoencoder of DC-AE, 32 or 64 times smaller"),
        "diffusers": _of_files(
            "any_diffusers:AnyDiffusersCodec", "any autoencoder class of diffusers, found out by probing"
        ),
    }
)


def compression_at(name: str, path: str | None) -> Compression:
    """Return the compression of codec ``name`` with the weights at ``path``, without reading the weights.

    InputError when their configuration is missing or states none.
    """
    later = CODECS.declared().get(name)
    if later is not None and "compression" in later.facts:
        return later.facts["compression"]
    return CODECS[name].compression_at(path)


@dataclass(frozen=True)
class CodecConfig:
    """Which codec, and where its weights are."""

    name: str = "kl"  # the autoencoder, see latte config list codecs
    path: str | None = (
        None  # folder, file or hub id, as the codec needs it; null: the packaged weights or none
    )
    chunk: int = 16  # frames in memory at a time, for codecs of single frames; codecs of whole clips use tile
    tile: int | None = None  # side in pixels of the tiles of frames too large for memory; null: whole frames

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        check_name("codec.name", self.name, CODECS)
        check(
            type(self.chunk) is int and 1 <= self.chunk <= MAX_CHUNK,
            f"codec.chunk must be an integer from 1 to {MAX_CHUNK} frames, got {self.chunk!r}",
        )
        check(
            self.tile is None or (type(self.tile) is int and self.tile >= 1),
            f"codec.tile must be null or a side in pixels, at least 1, got {self.tile!r}",
        )
        tileable = [name for name in CODECS if CODECS.fact(name, "tileable")]
        check(
            self.tile is None or self.name in tileable,
            f"codec.tile is {self.tile}, but codec {self.name!r} has no tiles; the codecs that have are "
            f"{', '.join(tileable)}, and for others codec.tile must be null",
        )
