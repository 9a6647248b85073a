# SPDX-License-Identifier: Apache-2.0
"""Latents encoded once are the clips they were made from, whatever interrupts the encoding, and are never taken for others."""

import json
import signal
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from latte.autoencoder.codec import CodecConfig, build_codec
from latte.checks import InputError, RunError
from latte.data.datasets import DataConfig, FolderDataset, ProceduralDataset, build_dataset
from latte.data.encoding import Video, encode_dataset, plan_shards
from latte.data.latents import LatentDataset
from latte.data.shards import MANIFEST, Record
from latte.runtime import generator
from videos import encode, numbered

SHAPES = DataConfig(kind="procedural", resolution=16, frames=4, num_clips=6, seed=3)


def pixels():
    return build_codec(CodecConfig("pixels"))


class Drawn:
    """A stochastic codec: pixels plus noise. Its ``encode`` calls ``before()`` first."""

    name, identity, channels, downscale, stochastic = "drawn", "0123456789abcdef", 3, 1, True
    before = staticmethod(lambda: None)

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        return 3, height, width

    def encode(self, frames: Tensor, generator: torch.Generator | None = None) -> Tensor:
        self.before()
        return frames + torch.randn(frames.shape, generator=generator)


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    """Two classes: an even mp4, an mp4 of uneven frame times, a folder of pictures of another aspect, and a short clip."""
    root = tmp_path_factory.mktemp("videos")
    for name in ("a", "b"):
        (root / name).mkdir()
    encode(root / "a" / "even.mp4", numbered(20))
    encode(root / "a" / "uneven.mp4", numbered(16), ticks=[i * 40 + 200 * (i > 7) for i in range(16)])
    for index, frame in enumerate(numbered(9, 40, 40)):
        (root / "b" / "pictures").mkdir(exist_ok=True)
        Image.fromarray(frame).save(root / "b" / "pictures" / f"{index}.png")
    encode(root / "b" / "short.mp4", numbered(3))
    return root


def folder_config(root: Path, **changes) -> DataConfig:
    return DataConfig(**{"root": str(root), "resolution": (24, 32), "frames": 3, "interval": 2, "flip": True} | changes)


def latents_of(config: DataConfig, out: Path) -> DataConfig:
    """The configuration that reads ``out``, with the clips of ``config``."""
    if config.kind == "procedural":
        return DataConfig(kind="latents", root=str(out), resolution=config.resolution, frames=config.frames)
    return replace(config, kind="latents", root=str(out))


@pytest.mark.parametrize(
    "changes", [{}, {"interval": 1, "frames": 5}, {"rule": "linspace"}, {"rule": "time", "fps": 25.0}, {"flip": False}]
)
def test_clips_are_those_of_the_folder(videos, tmp_path, changes):
    """With the identity as codec and float32, the clip of every draw is the same to the last bit: start, mirror image, label, key."""
    config = folder_config(videos, **changes)
    encode_dataset(config, pixels(), tmp_path / "out", dtype="float32", cache_dir=tmp_path)
    source, latents = FolderDataset(config, tmp_path), LatentDataset(latents_of(config, tmp_path / "out"))
    assert [video.key for video in latents.videos] == [clip.key for clip in source.clips]
    assert latents.classes == source.classes == ["a", "b"]
    assert {bad["reason"] for bad in latents.quarantined} == {bad["reason"] for bad in source.quarantined}
    seen = set()
    for index in range(len(source)):
        for draw in range(12):
            one, two = source.clip(index, generator(draw)), latents.clip(index, generator(draw))
            assert torch.equal(one.video, two.video)
            assert (one.label, one.caption, one.key) == (two.label, two.caption, two.key)
            seen.add(two.video.numpy().tobytes())
    assert len(seen) > 3 * len(source)


def test_one_encoding_serves_every_rule_that_fits(videos, tmp_path):
    config = folder_config(videos, frames=16, interval=1)
    encode_dataset(config, pixels(), tmp_path / "out", cache_dir=tmp_path)
    lengths = {frames: len(LatentDataset(replace(latents_of(config, tmp_path / "out"), frames=frames))) for frames in (2, 9, 16, 20)}
    assert lengths == {2: 4, 9: 3, 16: 2, 20: 1}
    with pytest.raises(InputError, match=r"hold no clip that fits: 4 videos are there, first: .*too-short"):
        LatentDataset(replace(latents_of(config, tmp_path / "out"), frames=21))


def test_latents_are_what_the_codec_makes_of_the_frames(tmp_path):
    codec, config = build_codec(CodecConfig("builtin")), replace(SHAPES, resolution=(16, 24))
    encode_dataset(config, codec, tmp_path / "out")
    source, latents = ProceduralDataset(config), build_dataset(latents_of(config, tmp_path / "out"), codec_identity=codec.identity)
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


def test_a_posterior_is_drawn_from_the_seed(tmp_path):
    for out, seed in (("one", 0), ("same", 0), ("other", 1)):
        encode_dataset(SHAPES, Drawn(), tmp_path / out, seed=seed)
    one, same, other = (LatentDataset(latents_of(SHAPES, tmp_path / out)).clip(2, generator(0)).video for out in ("one", "same", "other"))
    assert torch.equal(one, same)
    assert (one - other).std() > 1
    assert json.loads((tmp_path / "other" / MANIFEST).read_text())["settings"]["posterior"] == "one sample per frame, seed 1"


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir()}


@pytest.mark.parametrize("stop", [1, 3, 5])
def test_an_interrupted_encoding_goes_on_where_it_stopped(tmp_path, stop):
    shard = 2 * 4 * 3 * 16 * 16 * 2  # two clips
    encode_dataset(SHAPES, Drawn(), tmp_path / "whole", shard_bytes=shard)
    codec, left, stops = Drawn(), stop, []

    def interrupt() -> None:
        nonlocal left
        if left == 0:
            stops.append(stop)
            raise KeyboardInterrupt
        left -= 1

    codec.before = interrupt
    with pytest.raises(KeyboardInterrupt):
        encode_dataset(SHAPES, codec, tmp_path / "out", shard_bytes=shard)
    assert stops == [stop]
    with pytest.raises(InputError, match="not finished"):
        LatentDataset(latents_of(SHAPES, tmp_path / "out"))
    times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("shard*")}
    assert len(times) == stop // 2
    told = []
    done = encode_dataset(SHAPES, Drawn(), tmp_path / "out", shard_bytes=shard, progress=lambda *counts: told.append(counts))
    assert (done["shards"], done["new_shards"]) == (3, 3 - stop // 2)
    assert told[-1] == (6, 6)
    assert times == {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in times}
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


KILLED = """
import os, signal, sys
sys.path[:0] = sys.argv[1:3]
from test_latents import SHAPES, Drawn
from latte.data import shards
from latte.data.encoding import encode_dataset
save = shards.save_file
def dying(tensors, path, **more):
    if "shard-00001" in str(path):
        with open(path, "wb") as file:
            file.write(b"half a shard")
        os.kill(os.getpid(), signal.SIGKILL)
    save(tensors, path, **more)
shards.save_file = dying
encode_dataset(SHAPES, Drawn(), sys.argv[3], shard_bytes=2 * 4 * 3 * 16 * 16 * 2)
"""


def test_a_kill_in_the_middle_of_a_shard_loses_that_shard_alone(tmp_path):
    out, here = tmp_path / "out", Path(__file__).parent
    killed = subprocess.run([sys.executable, "-c", KILLED, str(here), str(here.parent), str(out)], capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert sorted(name for name in contents(out) if name[0] != ".") == [MANIFEST, "shard-00000.safetensors"]
    assert [path.read_bytes() for path in out.glob(".*.partial")] == [b"half a shard"]
    assert encode_dataset(SHAPES, Drawn(), out, shard_bytes=2 * 4 * 3 * 16 * 16 * 2)["new_shards"] == 2
    assert len(LatentDataset(latents_of(SHAPES, out))) == 6
    assert not list(out.glob(".*"))


def test_nothing_is_done_twice_and_a_changed_source_is_noticed(videos, tmp_path):
    config = folder_config(videos)
    one = encode_dataset(config, pixels(), tmp_path / "out", shard_bytes=1, cache_dir=tmp_path)
    again = encode_dataset(config, pixels(), tmp_path / "out", shard_bytes=1, cache_dir=tmp_path)
    assert (one["new_shards"], again["new_shards"], again["shards"]) == (4, 0, 4)
    added = videos / "b" / "third.mp4"
    encode(added, numbered(10))
    more = encode_dataset(config, pixels(), tmp_path / "out", shard_bytes=1, cache_dir=tmp_path)
    added.unlink()
    assert (more["videos"], more["new_shards"]) == (5, 1)
    fewer = encode_dataset(config, pixels(), tmp_path / "out", shard_bytes=1, cache_dir=tmp_path)
    assert (fewer["videos"], fewer["shards"], len(list((tmp_path / "out").glob("shard*")))) == (4, 4, 4)


def test_a_changed_file_is_encoded_again_and_the_rest_is_not(tmp_path):
    root = tmp_path / "videos"
    root.mkdir()
    for name in "abc":
        encode(root / f"{name}.mp4", numbered(6))
    config = folder_config(root)
    encode_dataset(config, pixels(), tmp_path / "out", shard_bytes=1, cache_dir=tmp_path)
    encode(root / "b.mp4", numbered(12)[6:])
    assert encode_dataset(config, pixels(), tmp_path / "out", shard_bytes=1, cache_dir=tmp_path)["new_shards"] == 1
    source, latents = FolderDataset(config, tmp_path), LatentDataset(latents_of(config, tmp_path / "out"))
    for index in range(3):
        torch.testing.assert_close(latents.clip(index, generator(0)).video, source.clip(index, generator(0)).video, rtol=1e-3, atol=1e-3)


def test_a_long_video_is_read_in_pieces_each_with_its_own_draw(tmp_path, monkeypatch):
    from latte.data import encoding

    root, calls = tmp_path / "videos", []
    root.mkdir()
    encode(root / "long.mp4", numbered(1).repeat(20, 0))
    monkeypatch.setattr(encoding, "READ_BYTES", 1)
    codec = Drawn()
    codec.before = lambda: calls.append(1)
    config = folder_config(root, frames=20, interval=1, flip=False)
    encode_dataset(config, codec, tmp_path / "out", cache_dir=tmp_path)
    assert len(calls) == 2  # 16 frames and 4
    drawn = LatentDataset(latents_of(config, tmp_path / "out")).clip(0, generator(0)).video
    assert (drawn[0] - drawn[16]).std() > 1


def test_a_video_that_no_longer_reads_is_left_out_with_its_reason(videos, tmp_path, monkeypatch):
    from latte.data import encoding
    from latte.data.media import Unreadable

    def read(info, frames):
        if "uneven" in info.path:
            raise Unreadable(info.path, "damaged", "it was cut short")
        return original(info, frames)

    original = encoding.read_frames
    monkeypatch.setattr(encoding, "read_frames", read)
    config = folder_config(videos)
    done = encode_dataset(config, pixels(), tmp_path / "out", cache_dir=tmp_path)
    assert done["quarantined"] == [{"path": "a/uneven.mp4", "reason": "damaged: it was cut short"}]
    assert [video.key for video in LatentDataset(latents_of(config, tmp_path / "out")).videos] == ["a/even.mp4", "b/pictures"]
    monkeypatch.setattr(encoding, "read_frames", lambda info, frames: read(replace(info, path="uneven"), frames))
    with pytest.raises(InputError, match=r"nothing was encoded .*first a/even\.mp4 \(damaged"):
        encode_dataset(config, pixels(), tmp_path / "none", cache_dir=tmp_path)


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
        (lambda out: None, {"resolution": 24}, r"data.resolution is \[24, 24\], but the latents in .* are of frames \[16, 16\]"),
        (lambda out: None, {"flip": True}, "data.flip is True, but the latents in .* hold no mirror images"),
        (lambda out: None, {"root": "/nowhere/at/all"}, "data.root is '/nowhere/at/all', but there is no such folder"),
        (lambda out: (out / MANIFEST).unlink(), {}, "holds no manifest.json"),
        (lambda out: (out / MANIFEST).write_text('{"format": '), {}, "manifest.json is damaged"),
        (lambda out: edit(out, version=99), {}, "format of .*manifest.json is .*99"),
        (lambda out: edit(out, complete=False), {}, "not finished"),
        (truncate, {}, r"size of .*shard-00000\.safetensors is"),
        (lambda out: (out / "shard-00000.safetensors").unlink(), {}, r"size of .*shard-00000\.safetensors is 0"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_reason(made, spoil, changes, message):
    config = latents_of(SHAPES, made)
    LatentDataset(config, pixels().identity)
    spoil(made)
    with pytest.raises(InputError, match=message) as caught:
        LatentDataset(replace(config, **changes))
    assert "\n" not in str(caught.value)


def test_latents_of_another_codec_are_refused(made):
    with pytest.raises(InputError, match=f"made with codec pixels {pixels().identity}, but this run's codec is {'0' * 16}"):
        LatentDataset(latents_of(SHAPES, made), "0" * 16)


@pytest.mark.parametrize(("changes", "dtype", "message"), [
    ({"resolution": 24}, "float16", r"resolution \[16, 16\] instead of \[24, 24\]"),
    ({"seed": 4}, "float16", "source .*'seed': 3.* instead of .*'seed': 4"),
    ({}, "float32", "dtype float16 instead of float32"),
])  # fmt: skip
def test_other_settings_never_go_into_the_same_folder(made, changes, dtype, message):
    before = contents(made)
    with pytest.raises(InputError, match=message):
        encode_dataset(replace(SHAPES, **changes), pixels(), made, dtype=dtype)
    with pytest.raises(InputError, match=r"codec .*pixels.* instead of .*drawn"):
        encode_dataset(SHAPES, Drawn(), made)
    assert contents(made) == before


def test_a_folder_of_other_files_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(InputError, match=r"holds files, but none is a manifest\.json"):
        encode_dataset(SHAPES, pixels(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(("config", "dtype", "message"), [
    (replace(SHAPES, num_clips=None), "float16", "data.num_clips is None, but an endless set cannot be encoded"),
    (SHAPES, "float8", "dtype is 'float8'"),
    (DataConfig(kind="latents", root="somewhere"), "float16", "data.kind is 'latents', which is not one of folder, procedural"),
    (replace(SHAPES, resolution=20), "float16", "frame height is 20, but codec 'builtin' shrinks 8 times"),
])  # fmt: skip
def test_what_cannot_be_encoded_is_refused(tmp_path, config, dtype, message):
    with pytest.raises(InputError, match=message):
        encode_dataset(config, build_codec(CodecConfig("builtin")), tmp_path / "out", dtype=dtype)
    assert not (tmp_path / "out").exists()


def test_latents_too_large_for_their_type_are_not_written(tmp_path):
    codec = Drawn()
    codec.encode = lambda frames, generator=None: frames * 1e6
    with pytest.raises(RunError, match=r"latents of 3/0 do not fit into torch.float16.*float32"):
        encode_dataset(SHAPES, codec, tmp_path / "out")
    assert not list((tmp_path / "out").glob("shard*"))


def test_a_full_disk_loses_nothing_finished(tmp_path, monkeypatch):
    from latte.data import shards

    save, saved = shards.save_file, []

    def full(tensors, path, **more):
        if saved:
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        saved.append(path)
        save(tensors, path, **more)

    monkeypatch.setattr(shards, "save_file", full)
    with pytest.raises(RunError, match=r"shard-00001\.safetensors cannot be written \(.*No space left.*run the same command again"):
        encode_dataset(SHAPES, pixels(), tmp_path / "out", shard_bytes=1)
    assert sorted(contents(tmp_path / "out")) == [MANIFEST, "shard-00000.safetensors"]
    monkeypatch.setattr(shards, "save_file", save)
    assert encode_dataset(SHAPES, pixels(), tmp_path / "out", shard_bytes=1)["new_shards"] == 5


def test_a_shard_that_vanishes_later_is_a_run_error(made):
    dataset = LatentDataset(latents_of(SHAPES, made))
    (made / "shard-00000.safetensors").unlink()
    with pytest.raises(RunError, match="can no longer be read"):
        dataset.clip(0, generator(0))


def test_the_description_follows_the_content_alone(made, tmp_path):
    config = latents_of(SHAPES, made)
    first = LatentDataset(config).describe()
    assert json.loads(json.dumps(first)) == first
    assert first["codec"] == pixels().identity
    encode_dataset(SHAPES, pixels(), tmp_path / "again", shard_bytes=1)
    assert LatentDataset(latents_of(SHAPES, tmp_path / "again")).describe() == first
    encode_dataset(replace(SHAPES, num_clips=5), pixels(), tmp_path / "fewer")
    others = [replace(config, frames=2), latents_of(SHAPES, tmp_path / "fewer")]
    assert all(LatentDataset(other).describe() != first for other in others)


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 10), st.integers(1, 200))
def test_shards_hold_every_video_once_in_order_and_no_more_than_fits(lengths, frame_bytes, shard_bytes):
    videos = [Video(Record(str(index), None, None, frames), len, 1) for index, frames in enumerate(lengths)]
    parts = plan_shards(videos, frame_bytes, shard_bytes)
    assert [video for part in parts for video in part] == videos
    sizes = [[video.record.frames * frame_bytes for video in part] for part in parts]
    assert all(len(part) == 1 or sum(part) <= shard_bytes for part in sizes)
    assert all(sum(part) + after[0] > shard_bytes for part, after in pairwise(sizes))
