# SPDX-License-Identifier: Apache-2.0
"""Any autoencoder of diffusers as a codec: what probing finds, the numbers, and what is refused."""

import json

import pytest
import torch
from support import noise
from torch import Tensor

from latte.autoencoder.any_diffusers import AnyDiffusersCodec, probe
from latte.autoencoder.codec import CODECS, CodecConfig, build_codec, kind_at
from latte.autoencoder.compression import Compression
from latte.checks import InputError
from latte.runtime import generator
from tiny_external import WAN, save_external, tiny_external

KL = {
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "block_out_channels": [4, 4, 8],
    "norm_num_groups": 2,
    "latent_channels": 16,
    "scaling_factor": 0.36,
    "shift_factor": 0.12,
}
MOCHI = {
    "encoder_block_out_channels": [32] * 4,
    "decoder_block_out_channels": [32] * 4,
    "latent_channels": 3,
    "layers_per_block": [1] * 5,
    "add_attention_block": [False] * 5,
    "latents_mean": [0.1, 0.2, -0.3],
    "latents_std": [0.5, 2.0, 1.0],
    "scaling_factor": 0.8,
}
TINY = {
    "encoder_block_out_channels": [8, 8, 8],
    "decoder_block_out_channels": [8, 8, 8],
    "num_encoder_blocks": [1, 1, 1],
    "num_decoder_blocks": [1, 1, 1],
    "scaling_factor": 1.5,
}
CASES = {
    "AutoencoderKL": (KL, Compression(16, 4)),
    "AutoencoderTiny": (TINY, Compression(4, 4)),
    "AutoencoderKLMochi": (MOCHI, Compression(3, 8, 6)),
    "AutoencoderKLQwenImage": (WAN, Compression(4, 8, 4)),
}
OOBLECK = {
    "encoder_hidden_size": 4,
    "downsampling_ratios": [2, 2],
    "channel_multiples": [1, 2],
    "decoder_channels": 4,
    "decoder_input_channels": 4,
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """What returns (folder, network of diffusers) of a class, saved once."""
    found = {}

    def get(layout: str):
        if layout not in found:
            folder = tmp_path_factory.mktemp(layout)
            network = tiny_external(layout, CASES[layout][0]).requires_grad_(False)
            network.save_pretrained(folder)
            found[layout] = (folder, network)
        return found[layout]

    return get


def normalised(layout: str, raw: Tensor) -> Tensor:
    """Latents (1 c f' h w) of raw ones as the pipelines of diffusers make them."""
    if layout == "AutoencoderKL":  # StableDiffusion3Img2ImgPipeline
        return (raw - 0.12) * 0.36
    if layout == "AutoencoderTiny":
        return raw * 1.5
    arguments = CASES[layout][0]
    mean, deviation = (
        torch.tensor(arguments[key])[:, None, None, None] for key in ("latents_mean", "latents_std")
    )
    return (raw - mean) * arguments.get("scaling_factor", 1) / deviation


@pytest.mark.parametrize("layout", list(CASES))
@torch.no_grad()
def test_the_compression_and_the_numbers_are_those_of_the_class(saved, layout):
    folder, network = saved(layout)
    expected = CASES[layout][1]
    assert AnyDiffusersCodec.compression_at(str(folder)) == expected
    codec = build_codec(CodecConfig("diffusers", str(folder), chunk=2))
    assert codec.compression == expected
    frames = 3 if expected.temporal_factor == 1 else 1 + 2 * expected.temporal_factor
    clip = noise(2, frames, 3, 2 * expected.spatial_factor, 3 * expected.spatial_factor).clamp(-1, 1)
    latent, drawn = codec.encode(clip), codec.encode(clip, generator(3))
    decoded = codec.decode(latent)
    assert decoded.shape == clip.shape
    draw = torch.randn(latent.shape, generator=generator(3))
    for index in range(2):
        single = expected.temporal_factor == 1
        video = clip[index] if single else clip[index : index + 1].transpose(1, 2)
        output = network.encode(video)
        raw, spread = (
            (output.latents, torch.zeros(1))
            if layout == "AutoencoderTiny"
            else (output.latent_dist.mean, output.latent_dist.std)
        )
        back = network.decode(raw).sample
        if single:  # (f c h w) to (1 c f h w)
            raw, back = (tensor.transpose(0, 1)[None] for tensor in (raw, back))
            spread = spread.transpose(0, 1)[None] if spread.ndim == 4 else spread
        found = normalised(layout, raw).transpose(1, 2)
        sample = normalised(layout, raw + spread * draw[index : index + 1].transpose(1, 2)).transpose(1, 2)
        scale = float(found.abs().max())
        assert scale > 0.05
        torch.testing.assert_close(latent[index : index + 1], found, rtol=0, atol=1e-5 * scale)
        torch.testing.assert_close(drawn[index : index + 1], sample, rtol=0, atol=1e-5 * scale)
        torch.testing.assert_close(
            decoded[index : index + 1], back.transpose(1, 2).clamp(-1, 1), rtol=0, atol=1e-4
        )
    assert codec.stochastic == (layout != "AutoencoderTiny")


def write_config(folder, layout: str, arguments: dict) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"_class_name": layout, **arguments}))
    return str(folder)


WITHOUT_SCALE = {key: value for key, value in WAN.items() if not key.startswith("latents")}
REFUSED = {
    "AutoencoderOobleck": (OOBLECK, "it has no convolution over images; it encodes sound"),
    "LTX2VideoDiffusionDecoderModel": ({}, "it has no encode"),
    "AutoencoderKLTemporalDecoder": (
        {},
        r"an AutoencoderKLTemporalDecoder, which has .* codec.name=kl_temporal",
    ),
    "AutoencoderKLWan": ({}, "has a codec of its own; set codec.name=wan"),
    "AutoencoderKLNext": ({}, r"the class 'AutoencoderKLNext', which diffusers \S+ does not have"),
    "AutoencoderKLFlux2": ({}, r"neither scaling_factor nor latents_mean and latents_std"),
    "AutoencoderKLQwenImage": ({**WAN, "latents_mean": [0.0] * 3}, "have 3 and 4 numbers, .* 4 channels"),
    "AutoencoderKLMochi": ({**MOCHI, "layers_per_block": "many"}, "does not describe an AutoencoderKLMochi"),
    "AutoencoderRAE": ({}, r"decodes to shape \(1, 3, 256, 256\)"),
    "T5EncoderModel": ({}, "the class 'T5EncoderModel', which diffusers"),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("layout", list(REFUSED))
def test_what_is_no_codec_is_refused_with_what_is_missing(layout, tmp_path):
    arguments, reason = REFUSED[layout]
    path = write_config(tmp_path, layout, arguments)
    for refusing in (
        AnyDiffusersCodec.compression_at,
        lambda path: build_codec(CodecConfig("diffusers", path)),
    ):
        with pytest.raises(InputError, match=reason) as caught:
            refusing(path)
        assert "\n" not in str(caught.value)
        assert "codec.path" in str(caught.value)
        assert path in str(caught.value)


class Blocks(torch.nn.Module):
    """Not causal: the mean of 4 frames and 8 x 8 pixels; ``pairs`` and ``crops`` break what a codec needs."""

    def __init__(self, crops: bool = False):
        super().__init__()
        self.conv = torch.nn.Conv3d(3, 5, (4, 8, 8), stride=(4, 8, 8))
        self.back = torch.nn.ConvTranspose3d(5, 3, (4, 8, 8), stride=(4, 8, 8))
        self.crops = crops

    def encode(self, frames: Tensor):
        return type("Output", (), {"latent": self.conv(frames)})()

    def decode(self, latent: Tensor) -> Tensor:
        return self.back(latent)[..., : -1 if self.crops else None]


def test_a_network_that_is_not_causal_is_found_out():
    found = probe(Blocks().to("meta"))
    assert found.compression == Compression(5, 8, 4, causal=False)
    assert not found.single
    assert not found.stochastic
    with pytest.raises(InputError, match=r"clips of 25 frames: what it encodes .* decodes to shape"):
        probe(Blocks(crops=True).to("meta"))


def test_a_class_without_a_codec_of_its_own_is_recognised(saved, tmp_path):
    assert kind_at(str(saved("AutoencoderKLMochi")[0])) is AnyDiffusersCodec
    save_external("wan", tmp_path)
    assert kind_at(str(tmp_path)) is CODECS["wan"]
    assert kind_at(str(tmp_path / "vae")) is CODECS["wan"]
    assert kind_at(str(tmp_path / "nothing")) is CODECS["kl"]


def test_a_path_is_needed():
    for refusing in (AnyDiffusersCodec.compression_at, AnyDiffusersCodec.skeleton):
        with pytest.raises(InputError, match=r"codec.path is missing, but codec 'diffusers' needs"):
            refusing(None)


def test_tiles_of_a_class_that_has_none_are_refused(saved):
    folder, _ = saved("AutoencoderKLMochi")
    codec = build_codec(CodecConfig("diffusers", str(folder), tile=64))
    assert codec.network.use_tiling
    codec.network.enable_tiling = None
    with pytest.raises(
        InputError, match=r"codec.tile is 64, but AutoencoderKLMochi has no tiling in diffusers"
    ):
        codec.enable_tiles(64)
