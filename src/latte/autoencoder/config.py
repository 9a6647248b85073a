# SPDX-License-Identifier: Apache-2.0
"""The codec section of a run's configuration, and the table of codecs. No torch here.

Codecs whose weights all have one shape state their compression here; that of the others is in the
configuration of their weights, and their class reads it.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

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
        "builtin_clip": _fixed(
            "builtin_clip:BuiltinClipCodec",
            "packaged, for moving shapes, eight frames at a time",
            Compression(channels=16, spatial_factor=8, temporal_factor=8, causal=False),
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


class Published(NamedTuple):
    """Where a weight file or repository can be fetched; size and hash are None where the hub checks them."""

    link: str
    num_bytes: int | None = None
    sha256: str | None = None


HUB = "https://huggingface.co/"
TAESD = "https://github.com/madebyollin/taesd/raw/main/"
MSE = f"{HUB}stabilityai/sd-vae-ft-mse/resolve/31f26fdeee1355a5c34592e401dd41e45d25a493/"
PUBLISHED: dict[str, tuple[Published, ...]] = {
    "kl": (
        Published(f"{HUB}stabilityai/sd-vae-ft-ema"),
        Published(
            f"{MSE}diffusion_pytorch_model.safetensors",
            334_643_276,
            "a1d993488569e928462932c8c38a0760b874d166399b14414135bd9c42df5815",
        ),
    ),
    "kl_temporal": (Published(f"{HUB}maxin-cn/Latte-1"),),
    "taef2": (
        Published(
            f"{TAESD}taef2_encoder.pth",
            2_704_692,
            "10a4e1021e89d7551eaf161352da8dbd0b1aa83872ae28b150c1df1ce2f147b6",
        ),
        Published(
            f"{TAESD}taef2_decoder.pth",
            2_704_756,
            "0a44a31e1ae59eb9dbf9359d24942fd3ef5928162c1800d97a28c61d51be0ab5",
        ),
    ),
    "ltx": (Published(f"{HUB}Lightricks/LTX-Video"),),
    "wan": (
        Published(f"{HUB}Wan-AI/Wan2.1-T2V-1.3B-Diffusers"),
        Published(f"{HUB}Wan-AI/Wan2.2-TI2V-5B-Diffusers"),
    ),
    "cogvideox": (Published(f"{HUB}THUDM/CogVideoX-2b"),),
    "hunyuan": (Published(f"{HUB}hunyuanvideo-community/HunyuanVideo"),),
    "dc": (Published(f"{HUB}mit-han-lab/dc-ae-f32c32-sana-1.0-diffusers"),),
}
"""Codec -> where its weights come from; they are in the errors for missing weights and in docs/weights.md."""


def published_text(codec: str) -> str:
    """Return '; its weights: LINK (BYTES bytes, sha256 HASH), ...', '' for a codec that needs none."""
    files = []
    for link, num_bytes, sha256 in PUBLISHED.get(codec, ()):
        size = "" if num_bytes is None else f" ({num_bytes:,} bytes, sha256 {sha256})"
        name = link.removeprefix(HUB) if num_bytes is None else link
        files.append(f"{name}{size}")
    return f"; its weights: {', '.join(files)}" if files else ""


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
