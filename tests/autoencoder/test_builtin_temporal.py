# SPDX-License-Identifier: Apache-2.0
"""The built-in temporal codec: causal both ways, bit for bit, at any length and size that it takes."""

import json

import pytest
import torch
from safetensors import safe_open
from support import noise

from latte.autoencoder.builtin_temporal import (
    SPAN,
    WEIGHTS,
    BuiltinTemporalAutoencoder,
    BuiltinTemporalCodec,
    to_frames,
    to_spans,
)
from latte.checks import InputError
from latte.data.clips import to_float, to_uint8
from latte.data.procedural import draw_scene, read_motion
from latte.data.procedural import render as render_shape
from latte.data.world.kinds import KINDS
from latte.data.world.scenes import render, sample_scene

UNSEEN = 123_456


def random_codec(chunk: int = 16) -> BuiltinTemporalCodec:
    """Return a codec whose every weight is random: also those that start at 0, and the stored moments."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = BuiltinTemporalAutoencoder()
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                if name.endswith("second.weight"):
                    parameter.normal_(std=parameter[0].numel() ** -0.5)
            network.latent_mean.normal_()
            network.latent_std.uniform_(0.5, 2)
    return BuiltinTemporalCodec(network, chunk)


@pytest.fixture(scope="module")
def codec() -> BuiltinTemporalCodec:
    return random_codec()


def clips(b: int, f: int, height: int = 16, width: int = 24) -> torch.Tensor:
    return noise(b, f, 3, height, width).clamp(-1, 1)


def test_spans_and_frames():
    frames = torch.arange(9.0).view(1, 9, 1, 1, 1)
    spans = to_spans(frames)
    assert spans.flatten().tolist() == [0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8]
    assert torch.equal(to_frames(spans), frames)


@pytest.mark.parametrize("size", [(8, 8), (16, 24), (40, 8)])
@pytest.mark.parametrize("length", [1, 5, 9])
def test_any_length_and_size(codec, length, size):
    latent = codec.encode(clips(2, length, *size))
    assert latent.shape == (2, codec.latent_frames(length), 16, size[0] // 8, size[1] // 8)
    decoded = codec.decode(latent)
    assert decoded.shape == (2, length, 3, *size)
    for tensor in (latent, decoded):
        assert tensor.dtype == torch.float32
        assert tensor.is_contiguous()


def test_a_prefix_of_a_clip_has_the_same_latents(codec):
    frames = clips(1, 17)
    latent = codec.encode(frames)
    for length in (1, 5, 9, 13):
        assert torch.equal(codec.encode(frames[:, :length]), latent[:, : codec.latent_frames(length)])


def test_a_prefix_of_a_latent_decodes_to_the_same_frames(codec):
    latent = noise(1, 5, 16, 2, 3)
    frames = codec.decode(latent)
    for kept in range(1, 5):
        assert torch.equal(codec.decode(latent[:, :kept]), frames[:, : codec.frames(kept)])


@pytest.mark.parametrize("changed", [0, 1, 4, 5, 12])
def test_a_frame_changes_its_own_latent_and_none_before(codec, changed):
    frames = clips(1, 13)
    other = frames.clone()
    other[:, changed] = clips(1, 1)[:, 0].flip(-1)
    own = codec.compression.latent_index(changed)
    same = (codec.encode(frames) == codec.encode(other)).all((0, 2, 3, 4)).tolist()
    assert same[:own] == [True] * own
    assert not same[own]


def test_a_later_latent_depends_on_earlier_frames(codec):
    frames = clips(1, 9)
    other = frames.clone()
    other[:, 0] = 0
    assert not torch.equal(codec.encode(frames)[:, 2], codec.encode(other)[:, 2])


def test_clips_of_a_batch_and_the_chunk_change_nothing(codec):
    frames = clips(3, 9)
    latent = codec.encode(frames)
    assert torch.equal(codec.encode(frames[1:2]), latent[1:2])
    assert torch.equal(codec.decode(latent[1:2]), codec.decode(latent)[1:2])
    other = random_codec(chunk=1)
    assert torch.equal(other.encode(frames), latent)
    assert torch.equal(other.decode(latent), codec.decode(latent))


def test_processing_in_parts_is_processing_at_once(codec):
    frames = clips(2, 17)
    network = codec.network
    with torch.no_grad():
        raw = network.raw_encode(to_spans(frames), {})  # both clips, all spans
        at_once = (raw - network.latent_mean[:, None, None]) / network.latent_std[:, None, None]
        decoded = to_frames(network.raw_decode(raw, {}))
    torch.testing.assert_close(codec.encode(frames), at_once, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(codec.decode(at_once), decoded.clamp(-1, 1), rtol=1e-4, atol=1e-4)


def test_one_span_at_a_time(codec, monkeypatch):
    seen = []
    original = BuiltinTemporalAutoencoder.raw_encode

    def spy(self, spans, memory):
        seen.append(tuple(spans.shape[:3]))
        return original(self, spans, memory)

    monkeypatch.setattr(BuiltinTemporalAutoencoder, "raw_encode", spy)
    codec.encode(clips(1, 13))
    assert seen == [(1, 1, SPAN)] * 4


def test_wrong_lengths_and_sizes_are_refused(codec):
    with pytest.raises(InputError, match="nearest valid numbers are 13 and 17"):
        codec.encode(clips(1, 16))
    with pytest.raises(InputError, match="frame height is 12, but codec 'builtin_temporal' needs a multiple"):
        codec.encode(clips(1, 5, 12, 16))
    with pytest.raises(InputError, match="decodes"):
        codec.decode(noise(1, 2, 4, 2, 2))


def test_as_many_numbers_per_clip_as_the_frame_wise_codec(codec):
    frames = 1 + 4 * 100
    ratio = codec.channels * codec.latent_frames(frames) / (4 * frames)
    assert 1 <= ratio < 1.01


def test_the_skeleton_has_the_network_without_weights(codec):
    skeleton = BuiltinTemporalCodec.skeleton(None)
    shapes = {name: tensor.shape for name, tensor in skeleton.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in codec.network.state_dict().items()}
    assert all(tensor.is_meta for tensor in skeleton.parameters())


def test_weights_of_another_autoencoder_are_refused(tmp_path):
    from latte.autoencoder.builtin import WEIGHTS as OTHER

    with pytest.raises(InputError, match="belongs to another autoencoder"):
        BuiltinTemporalCodec.load(str(OTHER), 16, "cpu")


@pytest.fixture(scope="module")
def packaged() -> BuiltinTemporalCodec:
    return BuiltinTemporalCodec.load(None, 16, "cpu")


@pytest.fixture(scope="module")
def card() -> dict:
    with safe_open(WEIGHTS, framework="pt") as file:
        return json.loads(file.metadata()["card"])


def psnr(decoded: torch.Tensor, frames: torch.Tensor) -> float:
    return (10 * torch.log10(4 / (decoded - frames).square().mean())).item()


def test_the_weights_never_change(packaged):
    """A model is tied to the latents that it learned: new weights need a new name."""
    assert packaged.fingerprint == "d44ea89a1b35bd61"


def test_size_and_card(packaged, card):
    assert WEIGHTS.stat().st_size < 3_000_000
    assert card["parameters"] == sum(p.numel() for p in packaged.network.parameters()) == 1_485_708
    assert card["measured"]["psnr_world_clip"] > 28


def test_the_card_is_true_on_other_clips(packaged, card):
    found = []
    for index in range(2 * len(KINDS)):
        frames = to_float(render(sample_scene(UNSEEN, index), 17, 64, 64))[None]
        found.append(psnr(packaged.decode(packaged.encode(frames)), frames))
    assert sum(found) / len(found) == pytest.approx(card["measured"]["psnr_world_clip"], abs=1.0)


def test_longer_clips_and_larger_frames_are_as_good(packaged):
    scene = sample_scene(UNSEEN, 5)
    small = to_float(render(scene, 17, 64, 64))[None]
    reference = psnr(packaged.decode(packaged.encode(small)), small)
    for frames in (to_float(render(scene, 33, 64, 64))[None], to_float(render(scene, 5, 128, 96))[None]):
        assert psnr(packaged.decode(packaged.encode(frames)), frames) > reference - 1.5


def test_latents_have_mean_0_and_variance_1(packaged):
    clips = [to_float(render(sample_scene(UNSEEN, index), 9, 64, 64))[None] for index in range(36)]
    latent = torch.cat([packaged.encode(clip) for clip in clips])
    assert latent.mean((0, 1, 3, 4)).abs().max() < 0.35
    assert (latent.std() - 1).abs() < 0.1
    assert (latent.std((0, 1, 3, 4)) - 1).abs().max() < 0.35


def test_decoded_shapes_still_show_what_they_showed(packaged):
    for index in range(8):
        scene = draw_scene(UNSEEN, index, 17)
        latent = packaged.encode(to_float(render_shape(scene, 17, 64, 64))[None])
        seen = read_motion(to_uint8(packaged.decode(latent + 0.2 * noise(*latent.shape, seed=index))[0]))
        expected = (scene.direction, scene.colour, True)
        assert (seen.direction, seen.colour, seen.coherent) == expected
