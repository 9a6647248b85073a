# SPDX-License-Identifier: Apache-2.0
"""Encoded latents are the clips they were made from, and are never taken for others."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from encoded import SHAPES, folder_config, latents_of, make_videos, pixels
from latte.autoencoder.codec import CodecConfig, build_codec
from latte.checks import InputError, RunError
from latte.data.datasets import FolderDataset, ProceduralDataset, build_dataset
from latte.data.encode import encode_dataset
from latte.data.fingerprint import changed_files
from latte.data.latents import LatentDataset
from latte.data.shards import MANIFEST, read_manifest, tensor_offsets
from latte.runtime import generator


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    return make_videos(tmp_path_factory.mktemp("videos"))


@pytest.mark.parametrize(
    "changes",
    [{}, {"interval": 1, "frames": 5}, {"rule": "linspace"}, {"rule": "time", "fps": 25.0}, {"flip": False}],
)
def test_clips_are_those_of_the_folder(videos, tmp_path, changes):
    """With the fingerprint as codec and float32, the clip of every draw is the same to the last bit: start,
    mirror image, label, key.
    """
    config = folder_config(videos, **changes)
    encode_dataset(config, pixels(), tmp_path / "out", dtype="float32", cache_dir=tmp_path)
    source, latents = FolderDataset(config, tmp_path), LatentDataset(latents_of(config, tmp_path / "out"))
    assert [video.key for video in latents.videos] == [clip.key for clip in source.clips]
    assert latents.classes == source.classes == ["a", "b"]
    assert {bad["reason"] for bad in latents.skipped} == {bad["reason"] for bad in source.skipped}
    seen = set()
    for index in range(len(source)):
        for draw in range(12):
            one, two = source.clip(index, generator(draw)), latents.clip(index, generator(draw))
            assert torch.equal(one.video, two.video)
            assert (one.label, one.caption, one.key) == (two.label, two.caption, two.key)
            image, same = source.image(index, generator(draw)), latents.image(index, generator(draw))
            assert image.video.shape[0] == 1
            assert torch.equal(image.video, same.video)
            assert image.label == same.label
            seen.add(two.video.numpy().tobytes())
    assert len(seen) > 3 * len(source)


def test_one_encoding_serves_every_rule_that_fits(videos, tmp_path):
    config = folder_config(videos, frames=16, interval=1)
    encode_dataset(config, pixels(), tmp_path / "out", cache_dir=tmp_path)
    lengths = {
        frames: len(LatentDataset(replace(latents_of(config, tmp_path / "out"), frames=frames)))
        for frames in (2, 9, 16, 20)
    }
    assert lengths == {2: 4, 9: 3, 16: 2, 20: 1}
    with pytest.raises(InputError, match=r"hold no clip that fits: 4 videos are there, first: .*too-short"):
        LatentDataset(replace(latents_of(config, tmp_path / "out"), frames=21))


def test_latents_are_what_the_codec_makes_of_the_frames(tmp_path):
    codec, config = build_codec(CodecConfig("builtin")), replace(SHAPES, resolution=(16, 24))
    encode_dataset(config, codec, tmp_path / "out")
    source, latents = (
        ProceduralDataset(config),
        build_dataset(latents_of(config, tmp_path / "out"), codec_fingerprint=codec.fingerprint),
    )
    assert len(latents) == 6
    assert latents.latent
    assert latents.classes == source.classes
    for index in range(6):
        one, two = source.clip(index), latents.clip(index, generator(0))
        torch.testing.assert_close(two.video, codec.encode(one.video[None])[0], rtol=1e-3, atol=2e-3)
        assert two.video.dtype == torch.float32
        assert (one.label, one.caption, one.key) == (two.label, two.caption, two.key)


def test_labels_can_be_left_out(videos, tmp_path):
    encode_dataset(folder_config(videos), pixels(), tmp_path / "out", cache_dir=tmp_path)
    config = latents_of(folder_config(videos, labels=False), tmp_path / "out")
    assert LatentDataset(config).classes == []
    assert LatentDataset(config).clip(0, generator(0)).label is None


@pytest.fixture
def made(tmp_path) -> Path:
    encode_dataset(SHAPES, pixels(), tmp_path / "out")
    return tmp_path / "out"


def edit(out: Path, **changes) -> None:
    path = out / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def truncate(out: Path) -> None:
    shard = out / "shard-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-7])


@pytest.mark.parametrize(
    ("spoil", "changes", "message"),
    [
        (
            lambda out: None,
            {"resolution": 24},
            r"data.resolution is \[24, 24\], but the latents in .* were made from frames of \[16, 16\]",
        ),
        (lambda out: None, {"flip": True}, "data.flip is True, but the latents in .* hold no mirror images"),
        (
            lambda out: None,
            {"root": "/nowhere/at/all"},
            "data.root is '/nowhere/at/all', but there is no such folder",
        ),
        (lambda out: (out / MANIFEST).unlink(), {}, "holds no manifest.json"),
        (lambda out: (out / MANIFEST).write_text('{"format": '), {}, "manifest.json is damaged"),
        (lambda out: edit(out, version=99), {}, "manifest.json has format .*99.*, but this version"),
        (lambda out: edit(out, complete=False), {}, "not finished"),
        (truncate, {}, r"shard-00000\.safetensors has [\d,]+ bytes, but its manifest lists"),
        (
            lambda out: (out / "shard-00000.safetensors").unlink(),
            {},
            r"shard-00000\.safetensors has 0 bytes, but its manifest lists",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_its_reason(made, spoil, changes, message):
    config = latents_of(SHAPES, made)
    LatentDataset(config, pixels().fingerprint)
    spoil(made)
    with pytest.raises(InputError, match=message) as caught:
        LatentDataset(replace(config, **changes))
    assert "\n" not in str(caught.value)


def test_latents_of_another_codec_are_refused(made):
    with pytest.raises(
        InputError, match=f"made with codec pixels {pixels().fingerprint}, but this run's codec is {'0' * 16}"
    ):
        LatentDataset(latents_of(SHAPES, made), "0" * 16)


def test_a_shard_that_vanishes_later_is_a_run_error(made):
    dataset = LatentDataset(latents_of(SHAPES, made))
    (made / "shard-00000.safetensors").unlink()
    with pytest.raises(RunError, match="can no longer be read"):
        dataset.clip(0, generator(0))


def test_the_description_follows_the_content_alone(made, tmp_path):
    config = latents_of(SHAPES, made)
    first = LatentDataset(config).describe()
    assert json.loads(json.dumps(first)) == first
    assert first["codec"] == pixels().fingerprint
    encode_dataset(SHAPES, pixels(), tmp_path / "again", shard_bytes=1)
    assert LatentDataset(latents_of(SHAPES, tmp_path / "again")).describe() == first
    encode_dataset(replace(SHAPES, num_clips=5), pixels(), tmp_path / "fewer")
    others = [replace(config, frames=2), latents_of(SHAPES, tmp_path / "fewer")]
    assert all(LatentDataset(other).describe() != first for other in others)


def test_a_manifest_of_0_1_0_lists_its_skipped_videos_under_the_old_key(made):
    manifest = json.loads((made / MANIFEST).read_text())
    manifest["quarantined"] = [{"path": "a.mp4", "reason": "damaged: at step 7"}]
    del manifest["skipped"]
    (made / MANIFEST).write_text(json.dumps(manifest))
    found = read_manifest(made)
    assert found["skipped"] == manifest["quarantined"]
    assert "quarantined" not in found
    assert len(LatentDataset(latents_of(SHAPES, made))) == len(manifest["videos"])


def test_latents_replaced_in_place_are_noticed_and_named(made):
    config = latents_of(SHAPES, made)
    before = LatentDataset(config)
    assert list(before.files) == [f"3/{index}" for index in range(6)]
    shard = made / "shard-00000.safetensors"
    content = bytearray(shard.read_bytes())
    start, stop = tensor_offsets(shard)["source:3/2"]
    assert stop - start == 4 * 3 * 16 * 16 * 2
    content[start + 7] ^= 1
    shard.write_bytes(content)
    after = LatentDataset(config)
    assert after.describe()["content"] == before.describe()["content"]
    assert changed_files(before.files, after.files) == ["changed: 3/2"]


def test_any_order_of_frames_is_read_and_a_clip_is_a_copy(videos, tmp_path):
    config = folder_config(videos, frames=3)
    encode_dataset(config, pixels(), tmp_path / "out", dtype="float32", cache_dir=tmp_path)
    latents = LatentDataset(latents_of(config, tmp_path / "out"))
    record, shard = latents.videos[0], latents.shard_of[0]
    name = f"source:{record.key}"
    everything = latents._read_tensor(shard, name, list(range(record.frames))).clone()
    for frames in ([0], [3, 4, 5], [1, 4, 7], [2, 2, 2], [0, 1, 3], [5, 3, 1], [0, 2, 2]):
        assert torch.equal(latents._read_tensor(shard, name, frames), everything[frames]), frames
    latents._read_tensor(shard, name, [0, 1]).zero_()
    assert torch.equal(latents._read_tensor(shard, name, [0, 1]), everything[:2]), (
        "float32 shards are copied too"
    )
