# SPDX-License-Identifier: Apache-2.0
"""The built-in codec of short clips: eight frames in one latent, bit for bit at any length and size that it
takes; and its training.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from support import noise

from latte.autoencoder.builtin_clip import SPAN, WEIGHTS, BuiltinClipAutoencoder, BuiltinClipCodec
from latte.checks import InputError
from latte.data.clips import to_float, to_uint8
from latte.data.procedural import draw_scene, read_motion, render
from tools.train_clip_autoencoder import ClipConfig, draw_batch, halved, make_weights, procedural_clips

UNSEEN = 123_456
TINY = ClipConfig(steps=4, decay_steps=2, clips=6, size=16)


def random_codec(chunk: int = 16) -> BuiltinClipCodec:
    """Return a codec whose every weight is random: also those that start at 0, and the stored moments."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = BuiltinClipAutoencoder().eval()
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                if name.endswith("second.weight"):
                    parameter.normal_(std=parameter[0].numel() ** -0.5)
            network.normaliser.mean.normal_()
            network.normaliser.var.uniform_(0.5, 2)
    return BuiltinClipCodec(network, chunk)


@pytest.fixture(scope="module")
def codec() -> BuiltinClipCodec:
    return random_codec()


@pytest.fixture(scope="module")
def packaged() -> BuiltinClipCodec:
    return BuiltinClipCodec.load(None, 16, "cpu")


@pytest.fixture(scope="module")
def card() -> dict:
    with safe_open(WEIGHTS, framework="pt") as file:
        return json.loads(file.metadata()["card"])


def clips(b: int, f: int, height: int = 16, width: int = 24) -> torch.Tensor:
    return noise(b, f, 3, height, width).clamp(-1, 1)


@pytest.mark.parametrize("size", [(8, 8), (16, 24), (40, 8)])
@pytest.mark.parametrize("length", [8, 16])
def test_any_length_and_size(codec, length, size):
    latent = codec.encode(clips(2, length, *size))
    assert latent.shape == (2, length // 8, 16, size[0] // 8, size[1] // 8)
    decoded = codec.decode(latent)
    assert decoded.shape == (2, length, 3, *size)
    for tensor in (latent, decoded):
        assert tensor.dtype == torch.float32


def test_eight_frames_know_nothing_of_the_next(codec):
    frames = clips(2, 16)
    latent = codec.encode(frames)
    for part in range(2):
        own = slice(SPAN * part, SPAN * (part + 1))
        assert torch.equal(codec.encode(frames[:, own]), latent[:, part : part + 1])
        assert torch.equal(codec.decode(latent[:, part : part + 1]), codec.decode(latent)[:, own])


def test_clips_of_a_batch_and_the_chunk_change_nothing(codec):
    frames = clips(3, 8)
    latent = codec.encode(frames)
    assert torch.equal(codec.encode(frames[1:2]), latent[1:2])
    assert torch.equal(codec.decode(latent[1:2]), codec.decode(latent)[1:2])
    assert torch.equal(random_codec(chunk=1).encode(frames), latent)


def test_wrong_lengths_sizes_and_images_are_refused(codec):
    with pytest.raises(InputError, match="nearest valid numbers are 8 and 16"):
        codec.encode(clips(1, 12))
    with pytest.raises(InputError, match="frame height is 12, but codec 'builtin_clip' needs a multiple"):
        codec.encode(clips(1, 8, 12, 16))
    with pytest.raises(InputError, match="decodes"):
        codec.decode(noise(1, 2, 4, 2, 2))
    assert not codec.encodes_images


def test_the_skeleton_has_the_network_without_weights(codec):
    skeleton = BuiltinClipCodec.skeleton(None)
    shapes = {name: tensor.shape for name, tensor in skeleton.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in codec.network.state_dict().items()}
    assert all(tensor.is_meta for tensor in skeleton.parameters())


def test_the_weights_never_change(packaged):
    """A model is tied to the latents that it learned: new weights need a new name."""
    assert packaged.fingerprint == "5f03042f73edc4cb"


def test_size_and_card(packaged, card):
    assert WEIGHTS.stat().st_size < 4_100_000
    assert card["parameters"] == sum(p.numel() for p in packaged.network.parameters())
    assert card["measured"]["consistent_noise_0"] > 0.9


def test_decoded_shapes_still_show_what_they_showed(packaged):
    for index in range(8):
        scene = draw_scene(UNSEEN, index, 8)
        latent = packaged.encode(to_float(render(scene, 8, 64, 64))[None])
        seen = read_motion(to_uint8(packaged.decode(latent + 0.3 * noise(*latent.shape, seed=index))[0]))
        expected = (scene.direction, scene.colour, True, True)
        assert (seen.direction, seen.colour, seen.coherent, seen.keeps_colour) == expected


def test_latents_have_mean_0_and_variance_1(packaged):
    shapes = [to_float(render(draw_scene(UNSEEN, index, 8), 8, 64, 64))[None] for index in range(48)]
    latent = torch.cat([packaged.encode(clip) for clip in shapes])
    assert latent.mean((0, 1, 3, 4)).abs().max() < 0.35
    assert (latent.std((0, 1, 3, 4)) - 1).abs().max() < 0.35


def test_a_batch_is_a_function_of_its_step():
    pool = procedural_clips(5, 6, 16)
    batch = draw_batch(pool, TINY, 0)
    assert batch.shape == (12, 8, 3, 16, 16)
    assert torch.equal(batch, draw_batch(pool, TINY, 0))
    assert not torch.equal(batch, draw_batch(pool, TINY, 1))
    assert torch.equal(pool, procedural_clips(5, 6, 16)), "the pool is not written to"


def test_half_the_size_is_the_mean_of_what_it_covers():
    clip = noise(1, 2, 3, 8, 8).cumsum(-1).cumsum(-2)
    assert halved(clip).shape == (1, 2, 3, 4, 4)
    even = torch.full((1, 1, 3, 8, 8), 0.25)
    torch.testing.assert_close(halved(even), torch.full((1, 1, 3, 4, 4), 0.25))


def test_the_written_file_is_the_codec_that_was_measured(tmp_path):
    out: Path = tmp_path / "clip.safetensors"
    card = make_weights(out, TINY, num_clips=2)
    assert set(card["measured"]) >= {"psnr_noise_0", "consistent_noise_0.5", "latent_std"}
    loaded = BuiltinClipCodec.load(str(out), 16, "cpu")
    assert all(tensor.dtype == torch.float16 for tensor in load_file(out).values())
    assert abs(loaded.encode(to_float(render(draw_scene(5, 0, 8), 8, 16, 16))[None]).mean()) < 5
