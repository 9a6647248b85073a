# SPDX-License-Identifier: Apache-2.0
"""Clips of codecs that compress time: as many frames of video as asked for, or the nearest valid numbers."""

from pathlib import Path

import numpy as np
import pytest
import torch
from support import wake
from torch import nn

import temporal
from latte.autoencoder.base import Codec
from latte.autoencoder.codec import CODECS, CodecConfig, build_codec, decoder_for
from latte.autoencoder.taef2 import Taef2Codec, build_decoder, build_encoder
from latte.checks import InputError
from latte.data.clips import to_uint8
from latte.data.media import probe
from latte.data.procedural import draw_scene, render
from latte.diffusion.config import DiffusionConfig
from latte.diffusion.frame_conditioning import restore_frames
from latte.diffusion.long_video import LONG_VIDEO_METHODS
from latte.inference.conditioning_frames import encode_frames
from latte.inference.generate import SampleConfig
from latte.inference.outputs import clip_facts
from latte.inference.pipeline import VideoPipeline
from latte.inference.requests import class_requests
from latte.model.latte import Latte, ModelConfig
from temporal import BlockCodec, TimeCodec, time_codec
from tiny_external import CASES, WAN, save_external, tiny_external
from tiny_pipeline import NAMES, tiny_codec

LENGTHS = (1, 2, 3, 4, 5, 7, 8, 9, 12, 13, 16, 17, 24)
SAMPLE = SampleConfig(sampler="ddim", steps=1, batch=2)


def taef2(folder: Path) -> Codec:
    parts = {"encoder": build_encoder(), "decoder": build_decoder()}
    return Taef2Codec(nn.ModuleDict(parts))


def any_diffusers(folder: Path) -> Codec:
    tiny_external("AutoencoderKLQwenImage", WAN).save_pretrained(folder)
    return build_codec(CodecConfig("diffusers", str(folder)))


TINY = {  # codecs whose weights would be downloaded -> the same with tiny random weights
    "taef2": taef2,
    "diffusers": any_diffusers,
    **{name: lambda folder, kind=kind: tiny_codec(kind, folder) for kind, name in NAMES.items()},
    **{name: lambda folder, name=name: external(name, folder) for name in CASES if name in CODECS},
}


def external(name: str, folder: Path) -> Codec:
    save_external(name, folder)
    return build_codec(CodecConfig(name, str(folder / "vae")))


def pipeline(codec: Codec, num_frames: int = 3, side: int = 16, **changes) -> VideoPipeline:
    """A model with random weights of ``num_frames`` latent frames, for ``side`` pixels each way."""
    latent = side // codec.spatial_factor
    shape = {"num_frames": num_frames, "latent_size": latent, "latent_channels": codec.channels}
    shape |= {"patch_size": min(latent, 2), "temporal_position": "rotary"}
    config = ModelConfig(depth=2, width=16, heads=2, **{**shape, **changes})
    torch.manual_seed(0)
    model = Latte(config)
    wake(model).eval()
    return VideoPipeline("tiny", model, DiffusionConfig(), CodecConfig(), codec, [], SAMPLE, "none")


def clip(pipe: VideoPipeline, **options) -> np.ndarray:
    """The clip of seed 0."""
    return next(iter(pipe.generate([0], **options)))[1]


def picture(level: int, side: int = 16) -> np.ndarray:
    """A frame of one level, with a corner of another."""
    frame = np.full((side, side, 3), level, np.uint8)
    frame[:4, :4] = 255 - level
    return frame


@pytest.fixture
def pipe(time_codecs) -> VideoPipeline:
    """Three latent frames, 9 frames of video, of 16 x 16."""
    return pipeline(time_codec())


@pytest.mark.parametrize("name", [*CODECS, *(kind.name for kind in temporal.TIME_CODECS)])
def test_every_codec_makes_exactly_n_frames_or_names_the_nearest_numbers(name, tmp_path, time_codecs):
    codec = TINY[name](tmp_path) if name in TINY else build_codec(CodecConfig(name))
    found = pipeline(codec, side=2 * codec.spatial_factor)
    valid = 0
    for frames in LENGTHS:
        nearest = codec.compression.nearest_frames(frames)
        if nearest == [frames]:
            assert clip(found, frames=frames).shape == (frames, *found.frame_size(), 3)
            valid += 1
            continue
        with pytest.raises(InputError, match=f"frames is {frames}, but .*{' and '.join(map(str, nearest))}$"):
            found.generate([0], frames=frames)
    assert len(clip(found)) == found.num_frames == codec.frames(3)
    assert valid >= 3


def test_compression_patches_and_codec_decide_together_which_lengths_are_valid(time_codecs):
    tubes = {"patch": "compression", "tube": 2, "num_frames": 4}
    found = pipeline(time_codec(), **tubes)
    assert len(clip(found)) == 13
    for frames in (5, 13, 21):
        assert len(clip(found, frames=frames)) == frames
    for frames, nearest in ((1, "5"), (9, "5 and 13"), (17, "13 and 21"), (16, "13 and 21")):
        with pytest.raises(InputError, match=rf"frames is {frames}, .*nearest valid numbers are {nearest}$"):
            found.generate([0], frames=frames)
    assert len(clip(found, frames=17, window=2, overlap=0)) == 17, (
        "the model sees two latent frames at a time"
    )
    with pytest.raises(InputError, match=r"window is 3 latent frames, .* 2 and 4$"):
        found.generate([0], frames=17, window=3)
    plain = pipeline(build_codec(CodecConfig("pixels")), **tubes)
    with pytest.raises(InputError, match=r"frames is 7, .*nearest valid numbers are 6 and 8$"):
        plain.generate([0], frames=7)


def test_sizes_that_codec_and_patches_do_not_divide_name_the_next_below_and_above(pipe):
    with pytest.warns(UserWarning, match="latents of 4 x 10 are larger than the 8 x 8 .* table is extended"):
        assert clip(pipe, size=(8, 20)).shape == (9, 8, 20, 3)
    with pytest.raises(InputError) as error:
        pipe.generate([0], size=(18, 3))
    assert str(error.value).endswith(
        "codec 'time' and patches make tokens of 4 x 4 pixels; the nearest multiples are 16 and 20 for the "
        "height 18, 4 for the width 3"
    )


def test_memory_counts_frames_of_video(pipe):
    message = r"2 clips of 400000001 frames needs 2,289 GiB"
    with pytest.raises(InputError, match=message):
        pipe.generate([0, 1], frames=400_000_001)


def test_files_and_record_count_frames_of_video(pipe, tmp_path):
    options = {"config": SAMPLE, "frames": None, "size": None, "dtype": torch.float32, "window": None}
    facts = clip_facts(pipe, {**options, "conditioning_frames": {}})
    assert facts["frames"] == 9
    pipe.write_clips(class_requests(pipe, None, 2, 0), tmp_path, facts=facts)
    assert [probe(path).frames for path in sorted(tmp_path.glob("*.mp4"))] == [9, 9]
    with pytest.raises(InputError, match=r"frames is 10, .*9 and 13"):
        pipe.write_clips(class_requests(pipe, None, 2, 0), tmp_path / "new", facts=facts, frames=10)


@pytest.mark.parametrize("longer", LONG_VIDEO_METHODS)
def test_windows_count_latent_frames(pipe, longer):
    seen = []
    pipe.model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
    found = clip(pipe, frames=33, window=3, longer=longer, overlap=1)
    assert len(found) == 33
    assert set(seen) == {3}
    assert (found == clip(pipe, frames=33, window=3, longer=longer, overlap=1)).all()
    with pytest.raises(InputError, match="overlap is 3, but windows have 3 latent frames"):
        pipe.generate([0], frames=33, window=3, overlap=3, longer=longer)
    with pytest.raises(InputError, match="window must be at least 1 latent frame, got 0"):
        pipe.generate([0], frames=33, window=0, longer=longer)


def encoded(codec, images, frames):
    """Latents (f c h w) and mask of conditioning frames of a clip of ``frames`` frames."""
    shape = codec.latent_frames(frames), *codec.latent_shape(16, 16)
    latents, mask = encode_frames(images, codec, shape)
    return latents[0], mask.tolist()


def whole(codec, images):
    """Latents of a clip."""
    return codec.encode(torch.from_numpy(np.stack(images)).movedim(-1, 1)[None] / 127.5 - 1)[0]


def test_a_first_frame_is_its_own_latent_frame(time_codecs):
    codec = time_codec()
    latents, mask = encoded(codec, {0: picture(200)}, 9)
    assert mask == [True, False, False]
    assert torch.allclose(latents[0], whole(codec, [picture(200)])[0], atol=1e-6)
    assert not latents[1:].any()
    both, mask = encoded(codec, {0: picture(200), -1: picture(40)}, 9)
    assert mask == [True, False, True]
    assert (both[0] == latents[0]).all(), "what is given later does not change it"


def test_the_frames_of_a_prefix_are_encoded_as_the_clip_that_they_are(time_codecs):
    codec = time_codec()
    images = [picture(20 * level) for level in range(9)]
    latents, mask = encoded(codec, dict(enumerate(images[:5])), 13)
    assert mask == [True, True, False, False]
    assert torch.allclose(latents[:2], whole(codec, images[:5]), atol=1e-6)
    latents, mask = encoded(codec, dict(enumerate(images[:7])), 13)
    assert mask == [True, True, True, False]
    held = [*images[:7], images[6], images[6]]
    assert torch.allclose(latents[:3], whole(codec, held), atol=1e-6), "the rest of a span repeats its last"


def test_a_last_frame_is_held_for_its_span(time_codecs, monkeypatch):
    codec = time_codec()
    first = picture(200)
    last = picture(40)
    latents, _ = encoded(codec, {0: first, -1: last}, 9)
    clip_there = [first] * 5 + [last] * 4  # what is not given repeats the nearest; of two, the earlier one
    assert torch.allclose(latents[2], whole(codec, clip_there)[2], atol=1e-6)
    short, _ = encoded(codec, {0: first, -1: last}, 5)
    assert torch.allclose(short[1], whole(codec, [first] + [last] * 4)[1], atol=1e-6), (
        "its span, not the first"
    )
    alone, mask = encoded(codec, {8: last}, 9)
    assert mask == [False, False, True]
    assert torch.allclose(alone[2], whole(codec, [last] * 9)[2], atol=1e-6)
    monkeypatch.setattr(temporal, "MEMORY", 0.0)
    shown = clip(pipeline(codec), conditioning_frames={0: first, -1: last})
    assert (shown[0] == first).all()
    assert (shown[5:] == last).all(), "decoded without a memory, the whole span is the conditioning frame"
    assert not (shown[1:5] == last).all()


def test_given_latent_frames_are_in_the_sample_bit_for_bit(pipe, monkeypatch):
    samples = []
    decode = type(pipe.codec).decode
    monkeypatch.setattr(type(pipe.codec), "decode", lambda codec, z: samples.append(z) or decode(codec, z))
    images = {0: picture(200), 1: picture(180), -1: picture(40)}
    latents, mask = encoded(pipe.codec, images, 13)
    clip(pipe, frames=13, conditioning_frames=images)
    assert mask == [True, True, False, True]
    assert (samples[0][0][mask] == latents[mask]).all()


@pytest.mark.parametrize("name", ["wan", "cogvideox", "hunyuan", "ltx"])
def test_published_codecs_pin_an_image_and_a_clip_as_they_encode_them(name, tmp_path):
    codec = TINY[name](tmp_path)
    step = codec.compression.step
    images = [picture(10 * level, 32) for level in range(1 + step)]
    shape = codec.latent_frames(1 + 2 * step), *codec.latent_shape(32, 32)
    first, mask = encode_frames({0: images[0], -1: images[1]}, codec, shape)
    assert mask.nonzero().flatten().tolist() == [0, shape[0] - 1]
    assert torch.equal(first[0, 0], whole(codec, images[:1])[0])
    _, mask = encode_frames({2: images[2]}, codec, shape)
    assert mask.nonzero().flatten().tolist() == [1], "also where no clip ends with its span"
    prefix, mask = encode_frames(dict(enumerate(images)), codec, shape)
    count = codec.latent_frames(len(images))
    assert int(mask.sum()) == count
    assert torch.equal(prefix[0, :count], whole(codec, images))


def decibels(found: np.ndarray, expected: np.ndarray) -> float:
    """Peak signal-to-noise ratio of uint8 pictures."""
    return float(10 * np.log10(255**2 / np.square(found.astype(float) - expected).mean()))


@pytest.mark.skipif("builtin_temporal" not in CODECS, reason="needs the built-in codec that compresses time")
def test_a_trained_causal_codec_shows_the_first_and_the_last_frame():
    codec = build_codec(CodecConfig("builtin_temporal"))
    frames = render(draw_scene(77, 0, 17), 17, 64, 64)
    latents = whole(codec, frames)[None]
    shape = codec.latent_frames(17), *codec.latent_shape(64, 64)
    known, mask = encode_frames({0: frames[0], -1: frames[-1]}, codec, shape)
    plain, pinned = (
        np.asarray(to_uint8(codec.decode(z)))[0] for z in (latents, restore_frames(latents, known, mask))
    )
    assert decibels(frames[12], frames[16]) < 25, "the shape moves, or the test is empty"
    for frame in (0, 16):
        own = decibels(plain[frame], frames[frame])
        assert own > 27
        assert decibels(pinned[frame], frames[frame]) > own - 2, "as good as the codec itself"


def test_another_decoder_must_compress_alike(tmp_path):
    found = pipeline(TINY["wan"](tmp_path / "wan"))
    found.decoder = decoder_for(found.codec, str(tmp_path / "wan" / "vae"))
    assert found.decoder is not found.codec
    assert len(clip(found, frames=5)) == 5
    TINY["ltx"](tmp_path / "ltx")
    with pytest.raises(InputError, match=r"8 times in time.* but the model's are .* 4 times in time"):
        decoder_for(found.codec, str(tmp_path / "ltx" / "vae"))


def test_windows_keep_conditioning_frames(pipe, monkeypatch):
    monkeypatch.setattr(temporal, "MEMORY", 0.0)
    images = {0: picture(200), -1: picture(40)}
    for longer in LONG_VIDEO_METHODS:
        found = clip(pipe, frames=25, window=3, longer=longer, conditioning_frames=images)
        assert (found[0] == images[0]).all()
        assert (found[-1] == images[-1]).all()


def test_frames_out_of_range_count_the_video_and_a_codec_without_images_takes_none(pipe, time_codecs):
    for frame in (9, -10):
        with pytest.raises(InputError, match=f"conditioning frame {frame} .* has the frames 0 to 8$"):
            pipe.generate([0], conditioning_frames={frame: picture(0)})
    blocks = pipeline(time_codec(BlockCodec))
    assert len(clip(blocks)) == 12
    with pytest.raises(InputError, match=r"codec 'time_blocks' is not causal.*leave them out"):
        blocks.generate([0], conditioning_frames={0: picture(0)})


def test_a_call_takes_images_and_counts_frames_of_video(pipe, monkeypatch):
    monkeypatch.setattr(temporal, "MEMORY", 0.0)
    found = pipe(num_frames=13, seed=1, image=picture(200), last_image=picture(40), output_type="uint8")
    assert found.frames.shape == (1, 13, 16, 16, 3)
    assert (found.frames[0, 0] == picture(200)).all()
    assert (found.frames[0, -1] == picture(40)).all()
    with pytest.raises(InputError, match=r"frames is 15, .*13 and 17"):
        pipe(num_frames=15)


def test_what_is_saved_comes_back_with_its_codec(pipe, tmp_path):
    pipe.codec_config = CodecConfig(TimeCodec.name)
    pipe.save_pretrained(tmp_path)
    again = VideoPipeline.from_pretrained(tmp_path, device="cpu")
    assert again.num_frames == 9
    assert (clip(again, config=SAMPLE) == clip(pipe)).all()
