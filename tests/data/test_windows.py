# SPDX-License-Identifier: Apache-2.0
"""Latents of a codec that compresses time are windows: exact, resumable, and never taken for other clips."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from encoded import SHAPES, contents, folder_config, latents_of, make_videos, pixels
from latte.autoencoder.codec import CodecConfig, build_codec
from latte.checks import InputError
from latte.data.clips import ClipRule, centre_crop_resize, flip_horizontal, to_float
from latte.data.datasets import FolderDataset, LatentDataset, ProceduralDataset
from latte.data.encode import encode_dataset
from latte.data.joint import JointDataset
from latte.data.media import read_frames
from latte.data.shards import MANIFEST
from latte.data.windows import Windows, has_exact_prefixes
from latte.runtime import generator
from temporal import BlockCodec, DrawnTimeCodec, TimeCodec, time_codec
from tiny_external import save_external

pytestmark = pytest.mark.usefixtures("time_codecs")


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    return make_videos(tmp_path_factory.mktemp("videos"))


def config_of(videos: Path, **changes):
    """Windows of 5 frames, which are 2 latent frames."""
    return folder_config(videos, **{"frames": 5, "interval": 1, "flip": False} | changes)


class Blurred(TimeCodec):
    """Every latent frame has a share of the last one, as norms over time do it."""

    def encode_clip(self, frames, noise):
        latent = super().encode_clip(frames, noise)
        return latent + 0.2 * latent[:, -1:]


@given(
    st.integers(1, 60),
    st.integers(1, 9),
    st.integers(1, 4),
    st.sampled_from(["strict", "linspace"]),
    st.none() | st.integers(1, 9),
)
def test_windows_cover_the_video_and_stay_inside(num_frames, frames, interval, rule, stride):
    clip = ClipRule(frames, interval, rule)
    starts = Windows(clip, stride).starts(num_frames)
    assert bool(starts) == (clip.needs(num_frames) is None)
    if not starts:
        return
    chosen = [clip.frames_at(start) for start in starts]
    assert starts[0] == 0
    assert len(set(starts)) == len(starts)
    assert all(0 <= frame < num_frames for window in chosen for frame in window)
    assert starts[-1] == num_frames - clip.span, "the last window does not end where the video ends"
    for before, after in pairwise(starts[:-1]):
        expected = clip.frames_at(before)[-1] + 1
        assert after == (expected if stride is None else before + stride)
    if interval == 1 and stride is None:
        assert {frame for window in chosen for frame in window} == set(range(num_frames))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"interval": 2},
        {"rule": "linspace", "interval": 2},
        {"rule": "time", "fps": 12.5},
        {"flip": True},
        {"frames": 9},
    ],
)
@pytest.mark.parametrize("stride", [None, 3])
def test_every_window_is_the_encoding_of_its_frames(videos, tmp_path, changes, stride):
    """Difference 0 in float32, for the windows, their mirror images and their first frames."""
    config = config_of(videos, **changes)
    codec = time_codec()
    done = encode_dataset(config, codec, tmp_path / "out", dtype="float32", cache_dir=tmp_path, stride=stride)
    source = FolderDataset(config, tmp_path)
    latents = LatentDataset(latents_of(config, tmp_path / "out"), codec.fingerprint)
    assert [video.key for video in latents.videos] == [clip.key for clip in source.clips]
    assert [Path(bad["path"]).name for bad in done["skipped"]] == [
        Path(bad["path"]).name for bad in source.skipped
    ]
    infos = {clip.key: clip.info for clip in source.clips}
    counted = 0
    for index, record in enumerate(latents.videos):
        expected = {}
        for start in record.starts:
            numbers = config.clip_rule.frames_at(start, record.times)
            frames = to_float(centre_crop_resize(read_frames(infos[record.key], numbers), *config.size))
            for clip in (frames, flip_horizontal(frames))[: 1 + config.flip]:
                expected[codec.encode(clip[None])[0].numpy().tobytes()] = clip
        seen = set()
        for draw in range(80):
            found = latents.clip(index, generator(draw)).video
            assert found.dtype == torch.float32
            assert found.shape == (codec.latent_frames(config.frames), 12, 12, 16)
            assert found.numpy().tobytes() in expected
            image = latents.image(index, generator(draw)).video
            assert torch.equal(image, found[:1]), "another window than that of the clip"
            clip = expected[found.numpy().tobytes()]
            assert torch.equal(image, codec.encode(clip[None, :1])[0])
            seen.add(found.numpy().tobytes())
        assert len(seen) == len(expected), "not every window is drawn"
        counted += len(record.starts)
    assert (done["windows"], done["latent_frames"]) == (counted, counted * codec.latent_frames(config.frames))
    assert counted > len(latents)


def test_fewer_frames_are_the_beginning_of_a_window(videos, tmp_path):
    config, codec = config_of(videos, frames=13), time_codec()
    encode_dataset(config, codec, tmp_path / "out", dtype="float32", cache_dir=tmp_path)
    whole = LatentDataset(latents_of(config, tmp_path / "out"))
    for frames in (1, 5, 9):
        short = LatentDataset(replace(latents_of(config, tmp_path / "out"), frames=frames))
        direct = FolderDataset(config_of(videos, frames=frames), tmp_path)
        assert len(short) == len(whole) < len(direct)
        infos = {clip.key: clip.info for clip in direct.clips}
        for index in range(len(short)):
            record = short.videos[index]
            found = short.clip(index, generator(3)).video
            assert torch.equal(found, whole.clip(index, generator(3)).video[: codec.latent_frames(frames)])
            pixels_of = [
                to_float(centre_crop_resize(read_frames(infos[record.key], range(s, s + frames)), 24, 32))
                for s in record.starts
            ]
            assert any(torch.equal(found, codec.encode(clip[None])[0]) for clip in pixels_of)


@pytest.mark.parametrize(
    ("made", "changes", "message"),
    [
        (
            {},
            {"frames": 9},
            r"data.frames is 9, .* windows of 5 frames \(interval 1, rule strict\); give at most 5",
        ),
        ({}, {"frames": 4}, "data.frames is 4, .* nearest valid numbers are 1 and 5"),
        (
            {},
            {"interval": 2},
            "data.interval is 2, but the latents in .*; give data.interval=1, or encode again",
        ),
        ({}, {"rule": "linspace"}, "data.rule is linspace, but .*; give data.rule=strict"),
        ({"rule": "time", "fps": 25.0}, {"fps": 12.5}, "data.fps is 12.5, but .*rule time, fps 25"),
        ({"rule": "linspace", "interval": 2}, {"frames": 1, "rule": "linspace", "interval": 2}, None),
        (
            {"rule": "linspace", "interval": 3, "frames": 5},
            {"frames": 5, "rule": "linspace", "interval": 3},
            None,
        ),
    ],
)
def test_clips_that_the_windows_do_not_hold_are_refused(videos, tmp_path, made, changes, message):
    config = config_of(videos, **made)
    encode_dataset(config, time_codec(), tmp_path / "out", cache_dir=tmp_path)
    asked = replace(latents_of(config, tmp_path / "out"), **changes)
    if message is None:
        LatentDataset(asked)
        return
    with pytest.raises(InputError, match=message) as caught:
        LatentDataset(asked)
    assert "\n" not in str(caught.value)


def test_a_rule_that_spreads_fewer_frames_differently_has_no_prefix(videos, tmp_path):
    config = config_of(videos, frames=9, rule="linspace", interval=2)
    encode_dataset(config, time_codec(), tmp_path / "out", cache_dir=tmp_path)
    with pytest.raises(
        InputError, match=r'rule "linspace" spreads fewer frames differently; give data.frames=9'
    ):
        LatentDataset(replace(latents_of(config, tmp_path / "out"), frames=5))


def test_a_codec_whose_latents_depend_on_later_frames_has_no_prefix_and_no_images(videos, tmp_path):
    codec = Blurred(TimeCodec.skeleton(None))
    assert has_exact_prefixes(time_codec(), 9)
    assert has_exact_prefixes(time_codec(BlockCodec), 8)
    assert has_exact_prefixes(codec, 1)
    assert not has_exact_prefixes(codec, 9)
    config = config_of(videos, frames=9)
    encode_dataset(config, codec, tmp_path / "out", cache_dir=tmp_path)
    dataset = LatentDataset(latents_of(config, tmp_path / "out"))
    with pytest.raises(InputError, match=r"latents depend on later frames, .* no clip of fewer frames"):
        LatentDataset(replace(latents_of(config, tmp_path / "out"), frames=5))
    with pytest.raises(
        InputError, match=r"whose first latent frame depends on later frames, .*from the videos"
    ):
        JointDataset(dataset, 2)
    blocks = replace(config, frames=8)
    encode_dataset(blocks, time_codec(BlockCodec), tmp_path / "blocks", cache_dir=tmp_path)
    with pytest.raises(InputError, match="codec 'time_blocks' encodes no images"):
        JointDataset(LatentDataset(latents_of(blocks, tmp_path / "blocks")), 2)


def test_images_ride_behind_clips_as_latent_frames(videos, tmp_path):
    config = config_of(videos)
    encode_dataset(config, time_codec(), tmp_path / "out", cache_dir=tmp_path)
    joint = JointDataset(LatentDataset(latents_of(config, tmp_path / "out")), 3)
    assert joint.clip(0, generator(0)).video.shape == (2 + 3, 12, 12, 16)


def test_videos_too_short_for_a_window_are_skipped_with_the_reason(videos, tmp_path):
    done = encode_dataset(config_of(videos, frames=13), time_codec(), tmp_path / "out", cache_dir=tmp_path)
    reasons = {bad["path"]: bad["reason"] for bad in done["skipped"]}
    assert sorted(reasons) == ["b/pictures", "b/short.mp4"]
    assert reasons["b/short.mp4"] == (
        "too-short: 3 frames decode, a clip spans 13 (13 frames, interval 1, strict)"
    )
    assert json.loads((tmp_path / "out" / MANIFEST).read_text())["skipped"] == done["skipped"]
    with pytest.raises(
        InputError, match=r"no video is long enough for a window of 21 frames .*first .*too-short"
    ):
        encode_dataset(config_of(videos, frames=21), time_codec(), tmp_path / "no", cache_dir=tmp_path)
    assert not (tmp_path / "no").exists()


def test_lengths_and_strides_that_cannot_be_are_refused_before_anything_is_written(videos, tmp_path):
    def encode(codec=None, stride=None, **changes):
        config = config_of(videos, **changes)
        encode_dataset(config, codec or time_codec(), tmp_path / "out", cache_dir=tmp_path, stride=stride)

    with pytest.raises(InputError, match=r"data.frames is 7, .* nearest valid numbers are 5 and 9"):
        encode(frames=7)
    with pytest.raises(InputError, match="--stride must be at least 1 source frame, got 0"):
        encode(stride=0)
    with pytest.raises(InputError, match="--stride is 2, but codec 'pixels' encodes every frame by itself"):
        encode(pixels(), stride=2)
    assert not (tmp_path / "out").exists()


def test_an_interrupted_encoding_continues_and_other_windows_are_other_settings(tmp_path):
    config = replace(SHAPES, frames=5)
    encode_dataset(config, time_codec(DrawnTimeCodec), tmp_path / "whole", shard_bytes=1)
    codec, calls = time_codec(DrawnTimeCodec), []
    encode_clip = codec.encode_clip

    def interrupted(frames, noise):
        if len(calls) == 4:
            calls.append(frames)
            raise KeyboardInterrupt
        calls.append(frames)
        return encode_clip(frames, noise)

    codec.encode_clip = interrupted
    with pytest.raises(KeyboardInterrupt):
        encode_dataset(config, codec, tmp_path / "out", shard_bytes=1)
    with pytest.raises(InputError, match="not finished"):
        LatentDataset(latents_of(config, tmp_path / "out"))
    done = encode_dataset(config, time_codec(DrawnTimeCodec), tmp_path / "out", shard_bytes=1)
    assert (done["shards"], done["new_shards"]) == (6, 2)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    with pytest.raises(InputError, match=r"holds latents of other settings \(windows .*'stride': None"):
        encode_dataset(config, time_codec(DrawnTimeCodec), tmp_path / "out", stride=2)


def test_a_posterior_is_drawn_from_the_seed_the_video_and_the_window(videos, tmp_path):
    config = config_of(videos)
    for out, seed in (("one", 0), ("same", 0), ("other", 1)):
        encode_dataset(config, time_codec(DrawnTimeCodec), tmp_path / out, seed=seed, cache_dir=tmp_path)
    one, same, other = (LatentDataset(latents_of(config, tmp_path / out)) for out in ("one", "same", "other"))
    assert torch.equal(one.clip(0, generator(0)).video, same.clip(0, generator(0)).video)
    assert (one.clip(0, generator(0)).video - other.clip(0, generator(0)).video).std() > 1


def test_procedural_clips_are_one_window_each(tmp_path):
    config, codec = replace(SHAPES, frames=9), time_codec()
    done = encode_dataset(config, codec, tmp_path / "out", dtype="float32")
    assert (done["windows"], done["frames"], done["latent_frames"]) == (6, 54, 18)
    source, latents = ProceduralDataset(config), LatentDataset(latents_of(config, tmp_path / "out"))
    for index in range(6):
        expected = codec.encode(source.clip(index).video[None])[0]
        assert torch.equal(latents.clip(index, generator(0)).video, expected)
    described = latents.describe()
    assert json.loads(json.dumps(described)) == described
    encode_dataset(config, codec, tmp_path / "half")
    assert LatentDataset(latents_of(config, tmp_path / "half")).describe()["content"] != described["content"]


def test_the_manifest_holds_the_whole_compression(tmp_path):
    codec = time_codec()
    codec.compression = replace(codec.compression, latent_step=2)
    encode_dataset(replace(SHAPES, frames=9), codec, tmp_path / "out")
    latents = LatentDataset(latents_of(replace(SHAPES, frames=9), tmp_path / "out"))
    assert latents.compression == codec.compression
    with pytest.raises(InputError, match=r"data.frames is 5, .* nearest valid numbers are 1 and 9"):
        LatentDataset(replace(latents_of(SHAPES, tmp_path / "out"), frames=5))


def test_codecs_of_single_frames_leave_no_trace_of_windows(tmp_path):
    encode_dataset(SHAPES, pixels(), tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert sorted(manifest["settings"]["codec"]) == ["channels", "downscale", "identity", "name"]
    assert "windows" not in manifest["settings"]
    assert "exact_prefix" not in manifest
    assert "starts" not in manifest["videos"][0]


@pytest.mark.parametrize(
    ("name", "exact"), [("ltx", True), ("wan", True), ("cogvideox", False), ("hunyuan", False)]
)
def test_codecs_of_diffusers_through_shards_and_which_have_prefixes(tmp_path, monkeypatch, name, exact):
    """Causal convolutions alone have exact prefixes; the group norms of the other two mix time."""
    save_external(name, tmp_path / name)
    codec = build_codec(CodecConfig(name, str(tmp_path / name)))
    monkeypatch.setattr(type(codec), "stochastic", False)
    frames = 1 + codec.compression.step
    config = replace(SHAPES, frames=frames, resolution=2 * codec.spatial_factor, num_clips=2)
    encode_dataset(config, codec, tmp_path / "out", dtype="float32")
    latents = LatentDataset(latents_of(config, tmp_path / "out"), codec.fingerprint)
    for index in range(2):
        expected = codec.encode(ProceduralDataset(config).clip(index).video[None])[0]
        assert torch.equal(latents.clip(index, generator(0)).video, expected)
    assert latents.manifest["exact_prefix"] is exact
