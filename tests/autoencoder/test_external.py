# SPDX-License-Identifier: Apache-2.0
"""Codecs over the autoencoders of LTX-Video, Wan, CogVideoX, HunyuanVideo and DC-AE.

The numbers of diffusers' classes with the normalisation of diffusers' pipelines, and what clips they take.
"""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from support import noise
from torch import Tensor

from latte.autoencoder.base import Codec
from latte.autoencoder.codec import CODECS, CodecConfig, build_codec
from latte.autoencoder.external import DECODER_SEED
from latte.checks import InputError
from latte.runtime import generator
from tiny_external import CASES, Case, save_external, tiny_external

NAMES = list(CASES)
CLIPS = [name for name in NAMES if CASES[name].time > 1]


@dataclass
class Saved:
    """A case in a folder: diffusers' network and our codec of it."""

    case: Case
    path: str
    network: Any
    codec: Codec

    def clips(self, frames: int, b: int = 1) -> Tensor:
        """Return (b f 3 H W), not square, in [-1, 1]."""
        return noise(b, frames, 3, 2 * self.case.space, 3 * self.case.space).clamp(-1, 1)

    def latents(self, frames: int, b: int = 1) -> Tensor:
        return noise(b, self.codec.latent_frames(frames), self.case.channels, 2, 3)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """What returns the case of a name, saved once."""
    found = {}

    def get(name: str) -> Saved:
        if name not in found:
            folder = tmp_path_factory.mktemp(name)
            network = save_external(name, folder)
            codec = build_codec(CodecConfig(CASES[name].codec, str(folder)))
            found[name] = Saved(CASES[name], str(folder), network, codec)
        return found[name]

    return get


def moments(network: Any) -> tuple[Tensor, Tensor, float]:
    """(mean, deviation, scale) as the network's pipeline reads them, the former two for (1 c f h w)."""
    config = network.config
    mean, deviation, scale = torch.zeros(1), torch.ones(1), config.get("scaling_factor", 1.0)
    if "latents_mean" in dict(network.named_buffers()):  # LTXPipeline._normalize_latents
        mean, deviation = network.latents_mean, network.latents_std
    elif config.get("latents_mean"):  # WanImageToVideoPipeline.prepare_latents
        mean, deviation = torch.tensor(config.latents_mean), torch.tensor(config.latents_std)
    return mean[:, None, None, None], deviation[:, None, None, None], scale


def expected_latents(one: Saved, clip: Tensor, draw: Tensor | None = None) -> Tensor:
    """(1 f' c h w) of (1 f 3 H W) by diffusers' network and its pipeline's normalisation."""
    if one.case.layout == "AutoencoderDC":  # SanaPipeline: latents / scaling_factor are decoded
        return (one.network.encode(clip[0]).latent * one.network.config.scaling_factor)[None]
    posterior = one.network.encode(clip.transpose(1, 2)).latent_dist
    raw = posterior.mean
    if draw is not None:
        raw = raw + posterior.std * draw.transpose(1, 2)
    mean, deviation, scale = moments(one.network)
    return ((raw - mean) * scale / deviation).transpose(1, 2)


def expected_frames(one: Saved, latent: Tensor) -> Tensor:
    """(1 f 3 H W) of (1 f' c h w) likewise."""
    if one.case.layout == "AutoencoderDC":
        return one.network.decode(latent[0] / one.network.config.scaling_factor).sample[None]
    mean, deviation, scale = moments(one.network)
    raw = latent.transpose(1, 2) * deviation / scale + mean
    words = []
    if one.network.config.get("timestep_conditioning"):  # LTXPipeline with its decode_timestep of 0
        torch.manual_seed(DECODER_SEED)
        words = [torch.tensor([0.0])]
    return one.network.decode(raw, *words).sample.transpose(1, 2)


def close(found: Tensor, expected: Tensor) -> None:
    """At most 1e-5 of the scale of what is expected."""
    assert found.shape == expected.shape
    scale = expected.abs().max()
    assert scale > 0.05, "the network does nothing"
    assert (found - expected).abs().max() <= 1e-5 * scale


@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_the_numbers_are_those_of_diffusers(saved, name, steps):
    one = saved(name)
    frames = 1 + steps * one.case.step
    if name == "hunyuan":  # not in the blended pieces that diffusers makes of more than 16 frames
        frames += 8 * (steps == 3)
        one.network.use_framewise_encoding = one.network.use_framewise_decoding = False
    clip, latent = one.clips(frames), one.latents(frames)
    close(one.codec.encode(clip), expected_latents(one, clip))
    close(one.codec.decode(latent), expected_frames(one, latent).clamp(-1, 1))


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_generator_samples_the_posterior(saved, name):
    one = saved(name)
    clip = one.clips(1 + one.case.step)
    found = one.codec.encode(clip, generator(5))
    if not one.codec.stochastic:
        assert name == "dc"
        assert torch.equal(found, one.codec.encode(clip))
        return
    draw = torch.randn(found.shape, generator=generator(5))
    close(found, expected_latents(one, clip, draw))
    assert (found - one.codec.encode(clip)).abs().max() > 0.01


@pytest.mark.parametrize("name", NAMES)
def test_a_clip_does_not_depend_on_its_batch(saved, name):
    one = saved(name)
    clips, latents = one.clips(1 + one.case.step, 3), one.latents(1 + one.case.step, 3)
    encoded, decoded = one.codec.encode(clips), one.codec.decode(latents)
    for index in range(3):
        alone = slice(index, index + 1)
        torch.testing.assert_close(encoded[alone], one.codec.encode(clips[alone]), rtol=0, atol=1e-6)
        torch.testing.assert_close(decoded[alone], one.codec.decode(latents[alone]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_the_compression_is_known_before_the_weights(saved, name):
    one, case = saved(name), CASES[name]
    found = CODECS[case.codec].compression_at(one.path)
    assert found == one.codec.compression
    assert (found.channels, found.spatial_factor, found.temporal_factor) == (
        case.channels,
        case.space,
        case.time,
    )
    assert found.step == case.step
    assert found.encodes_images
    for height, width in ((1, 4), (5, 2)):  # in latent pixels
        clip = torch.zeros(1, 1 + case.step, 3, height * case.space, width * case.space)
        latent = one.codec.encode(clip)
        assert latent.shape == (1, found.latent_frames(1 + case.step), case.channels, height, width)
        assert one.codec.decode(latent).shape == clip.shape


@pytest.mark.parametrize("frames", range(1, 13))
@pytest.mark.parametrize("name", NAMES)
def test_a_length_is_exact_or_refused_with_the_two_nearest(saved, name, frames):
    one = saved(name)
    step = one.case.step
    clip = torch.zeros(1, frames, 3, one.case.space, one.case.space)
    if (frames - 1) % step == 0:
        latent = one.codec.encode(clip)
        assert latent.shape[1] == 1 + (frames - 1) // one.case.time
        assert one.codec.decode(latent).shape == clip.shape
        return
    below = 1 + (frames - 1) // step * step
    with pytest.raises(
        InputError,
        match=rf"frames is {frames}, but .* takes clips of 1 \+ {step} k frames; the nearest valid numbers "
        rf"are {below} and {below + step}$",
    ):
        one.codec.encode(clip)


def test_latent_frames_that_no_clip_has_are_refused(saved):
    with pytest.raises(InputError, match=r"frames is 5, but .* 1 \+ 8 k frames; .* are 1 and 9$"):
        saved("cogvideox").codec.decode(torch.zeros(1, 2, 4, 2, 2))


def test_the_noise_of_a_decoder_is_always_the_same_and_leaves_torch_alone(saved):
    one = saved("ltx_timestep")
    latent = one.latents(9)
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    first = one.codec.decode(latent)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(4)
    assert torch.equal(one.codec.decode(latent), first)
    with torch.no_grad():
        torch.manual_seed(DECODER_SEED + 1)
        mean, deviation, _ = moments(one.network)
        raw = latent.transpose(1, 2) * deviation + mean
        other = one.network.decode(raw, torch.tensor([0.0])).sample.transpose(1, 2)
    assert (other.clamp(-1, 1) - first).abs().max() > 1e-3, "the decoder adds no noise"


@pytest.mark.parametrize("name", [*CLIPS, "dc"])
@torch.no_grad()
def test_tiles_are_those_of_diffusers(saved, name):
    one = saved(name)
    side = 4 * one.case.space
    codec = build_codec(CodecConfig(one.case.codec, one.path, tile=side))
    assert codec.tile == side
    frames = {"hunyuan": 17, "dc": 2}.get(
        name, 9
    )  # more than 16 frames are pieces of time in Hunyuan's tiles
    clip = noise(1, frames, 3, 3 * side // 2, side).clamp(-1, 1)
    latent = noise(1, codec.latent_frames(frames), one.case.channels, 6, 4)
    network = tiny_external(one.case.layout, one.case.arguments).requires_grad_(False)
    overlap = {"tile_sample_stride_height": 3 * side // 4, "tile_sample_stride_width": 3 * side // 4}
    if name == "cogvideox":
        overlap = {"tile_overlap_factor_height": 0.25, "tile_overlap_factor_width": 0.25}
    network.enable_tiling(tile_sample_min_height=side, tile_sample_min_width=side, **overlap)
    tiled = Saved(one.case, one.path, network, codec)
    close(codec.encode(clip), expected_latents(tiled, clip))
    close(codec.decode(latent), expected_frames(tiled, latent).clamp(-1, 1))
    assert (codec.decode(latent) - one.codec.decode(latent)).abs().max() > 1e-3, "no tiles"


@pytest.mark.parametrize("name", ["wan", "wan_22"])
def test_tiles_have_sides_that_divide(saved, name):
    one = saved(name)
    unit = 4 * one.case.space
    with pytest.raises(
        InputError,
        match=rf"codec.tile is {unit + 1}, but tiles of codec 'wan' need .* multiple of {unit} .* is {unit}$",
    ):
        build_codec(CodecConfig("wan", one.path, tile=unit + 1))
