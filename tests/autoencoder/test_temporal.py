# SPDX-License-Identifier: Apache-2.0
"""The temporal decoder: the numbers of diffusers' pipeline, and chunks that never cross clips."""

import pytest
import torch
from diffusers import AutoencoderKLTemporalDecoder, LattePipeline
from support import noise

from latte.autoencoder.codec import CodecConfig, build_codec
from latte.autoencoder.kl import TemporalCodec
from latte.checks import InputError
from latte.runtime import generator
from tiny_pipeline import tiny_vae


def tiny() -> AutoencoderKLTemporalDecoder:
    return tiny_vae("AutoencoderKLTemporalDecoder")


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """A folder of diffusers' own making, with the autoencoder where Latte's release has it."""
    root = tmp_path_factory.mktemp("pipeline")
    tiny().save_pretrained(root / "vae_temporal_decoder")
    return root


def load(path, chunk: int = 14) -> TemporalCodec:
    return build_codec(CodecConfig("kl_temporal", str(path), chunk))


@torch.no_grad()
def test_decodes_as_lattes_pipeline_does(pipeline):
    codec, latent = load(pipeline, 3), noise(1, 5, 4, 2, 3)
    expected = LattePipeline(None, None, tiny(), None, None)
    expected = expected.decode_latents(latent.transpose(1, 2), 5, decode_chunk_size=3).transpose(1, 2)
    assert expected.std() > 0.05
    torch.testing.assert_close(codec.decode(latent), expected.clamp(-1, 1), rtol=0, atol=1e-5)


@torch.no_grad()
def test_encodes_frame_by_frame_as_diffusers_does(pipeline):
    codec, frames = load(pipeline, 2), noise(1, 3, 3, 16, 24).clamp(-1, 1)
    posterior = tiny().encode(frames[0]).latent_dist
    torch.testing.assert_close(codec.encode(frames)[0], posterior.mean * 0.18215, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        codec.encode(frames, generator(5))[0], posterior.sample(generator(5)) * 0.18215, rtol=1e-4, atol=1e-5
    )


def test_frames_of_a_clip_see_each_other_and_clips_do_not(pipeline):
    codec, latent = load(pipeline, 4), noise(3, 6, 4, 2, 2)
    decoded = codec.decode(latent)
    assert decoded.shape == (3, 6, 3, 16, 16)
    for clip in range(3):
        torch.testing.assert_close(decoded[clip], codec.decode(latent[clip : clip + 1])[0], rtol=0, atol=1e-6)
    other = latent.clone()
    other[1, 0] += 1
    moved = (codec.decode(other) - decoded).abs().amax((2, 3, 4))
    assert moved[1, 1] > 1e-4, "the decoder mixes no frames"
    assert moved[[0, 2]].max() == 0
    assert moved[1, 4:].max() < 1e-6, "frames of the next chunk"


def test_the_release_s_size():
    """97,742,847 parameters in 374 tensors (reference facts of the release), counted without memory."""
    with torch.device("meta"):
        vae = AutoencoderKLTemporalDecoder(
            down_block_types=["DownEncoderBlock2D"] * 4,
            block_out_channels=[128, 256, 512, 512],
            layers_per_block=2,
        )
    assert (sum(p.numel() for p in vae.parameters()), len(vae.state_dict())) == (97_742_847, 374)


def test_other_autoencoders_and_empty_folders_are_refused(pipeline, tmp_path):
    with pytest.raises(
        InputError, match=r"layout in .*AutoencoderKLTemporalDecoder.*but codec 'kl' is an AutoencoderKL"
    ):
        build_codec(CodecConfig("kl", str(pipeline / "vae_temporal_decoder")))
    with pytest.raises(
        InputError,
        match=r"neither directly nor in vae_temporal_decoder or vae; give .* AutoencoderKLTemporalDecoder",
    ):
        load(tmp_path)
    with pytest.raises(InputError, match="codec 'kl_temporal' needs AutoencoderKLTemporalDecoder weights"):
        build_codec(CodecConfig("kl_temporal"))
    with pytest.raises(InputError, match="latent has shape"):
        load(pipeline).decode(noise(2, 3, 5, 2, 2))
