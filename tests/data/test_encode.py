# SPDX-License-Identifier: Apache-2.0
"""Encoding a set once: whatever interrupts it, it goes on; whatever does not belong together, it refuses."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from encoded import SHAPES, TWO_CLIPS, Drawn, contents, folder_config, latents_of, make_videos, pixels
from latte.autoencoder.codec import CodecConfig, build_codec
from latte.checks import InputError, RunError
from latte.data.datasets import DataConfig, FolderDataset
from latte.data.encode import Video, encode_dataset, plan_shards
from latte.data.fingerprint import UNREADABLE
from latte.data.latents import LatentDataset
from latte.data.shards import MANIFEST, Record
from latte.runtime import generator
from videos import encode, numbered


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    return make_videos(tmp_path_factory.mktemp("videos"))


@pytest.mark.parametrize("stop", [1, 3, 5])
def test_an_interrupted_encoding_continues_where_it_stopped(tmp_path, stop):
    encode_dataset(SHAPES, Drawn(), tmp_path / "whole", shard_bytes=TWO_CLIPS)
    codec, left, stops = Drawn(), stop, []

    def interrupt() -> None:
        nonlocal left
        if left == 0:
            stops.append(stop)
            raise KeyboardInterrupt
        left -= 1

    codec.before = interrupt
    with pytest.raises(KeyboardInterrupt):
        encode_dataset(SHAPES, codec, tmp_path / "out", shard_bytes=TWO_CLIPS)
    assert stops == [stop]
    with pytest.raises(InputError, match="not finished"):
        LatentDataset(latents_of(SHAPES, tmp_path / "out"))
    times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("shard*")}
    assert len(times) == stop // 2
    counted = []
    done = encode_dataset(
        SHAPES,
        Drawn(),
        tmp_path / "out",
        shard_bytes=TWO_CLIPS,
        progress=lambda *counts: counted.append(counts),
    )
    assert (done["shards"], done["new_shards"]) == (3, 3 - stop // 2)
    assert counted[-1] == (6, 6)
    assert times == {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in times}
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


KILLED = """
import os, signal, sys
sys.path[:0] = sys.argv[1:2]
from encoded import SHAPES, TWO_CLIPS, Drawn
from latte.data import shards
from latte.data.encode import encode_dataset
save = shards.save_file
def dying(tensors, path, **more):
    if "shard-00001" in str(path):
        with open(path, "wb") as file:
            file.write(b"half a shard")
        os.kill(os.getpid(), signal.SIGKILL)
    save(tensors, path, **more)
shards.save_file = dying
encode_dataset(SHAPES, Drawn(), sys.argv[2], shard_bytes=TWO_CLIPS)
"""


def test_a_kill_in_the_middle_of_a_shard_loses_that_shard_alone(tmp_path):
    out, support = tmp_path / "out", Path(__file__).parents[1]
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(support), str(out)], capture_output=True, check=False
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert sorted(name for name in contents(out) if name[0] != ".") == [MANIFEST, "shard-00000.safetensors"]
    assert [path.read_bytes() for path in out.glob(".tmp-shard-*")] == [b"half a shard"]
    assert encode_dataset(SHAPES, Drawn(), out, shard_bytes=TWO_CLIPS)["new_shards"] == 2
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
    assert (
        encode_dataset(config, pixels(), tmp_path / "out", shard_bytes=1, cache_dir=tmp_path)["new_shards"]
        == 1
    )
    source, latents = FolderDataset(config, tmp_path), LatentDataset(latents_of(config, tmp_path / "out"))
    for index in range(3):
        torch.testing.assert_close(
            latents.clip(index, generator(0)).video,
            source.clip(index, generator(0)).video,
            rtol=1e-3,
            atol=1e-3,
        )


def test_a_long_video_is_read_in_pieces_each_with_its_own_draw(tmp_path, monkeypatch):
    from latte.data import encode_sources

    root, calls = tmp_path / "videos", []
    root.mkdir()
    encode(root / "long.mp4", numbered(1).repeat(20, 0))
    monkeypatch.setattr(encode_sources, "READ_BYTES", 1)
    codec = Drawn()
    codec.before = lambda: calls.append(1)
    config = folder_config(root, frames=20, interval=1, flip=False)
    encode_dataset(config, codec, tmp_path / "out", cache_dir=tmp_path)
    assert len(calls) == 2  # 16 frames and 4
    drawn = LatentDataset(latents_of(config, tmp_path / "out")).clip(0, generator(0)).video
    assert (drawn[0] - drawn[16]).std() > 1


def test_a_video_that_no_longer_reads_is_left_out_with_its_reason(videos, tmp_path, monkeypatch):
    from latte.data import encode_sources
    from latte.data.media import Unreadable

    def read(info, frames):
        if "uneven" in info.path:
            raise Unreadable(info.path, "damaged", "it was cut short")
        return original(info, frames)

    original = encode_sources.read_frames
    monkeypatch.setattr(encode_sources, "read_frames", read)
    config = folder_config(videos)
    done = encode_dataset(config, pixels(), tmp_path / "out", cache_dir=tmp_path)
    assert done["skipped"] == [{"path": "a/uneven.mp4", "reason": "damaged: it was cut short"}]
    assert [video.key for video in LatentDataset(latents_of(config, tmp_path / "out")).videos] == [
        "a/even.mp4",
        "b/pictures",
    ]
    monkeypatch.setattr(
        encode_sources, "read_frames", lambda info, frames: read(replace(info, path="uneven"), frames)
    )
    with pytest.raises(InputError, match=r"nothing was encoded .*first a/even\.mp4 \(damaged"):
        encode_dataset(config, pixels(), tmp_path / "none", cache_dir=tmp_path)


def test_a_posterior_is_drawn_from_the_seed(tmp_path):
    for out, seed in (("one", 0), ("same", 0), ("other", 1)):
        encode_dataset(SHAPES, Drawn(), tmp_path / out, seed=seed)
    one, same, other = (
        LatentDataset(latents_of(SHAPES, tmp_path / out)).clip(2, generator(0)).video
        for out in ("one", "same", "other")
    )
    assert torch.equal(one, same)
    assert (one - other).std() > 1
    assert (
        json.loads((tmp_path / "other" / MANIFEST).read_text())["settings"]["posterior"]
        == "one sample per frame, seed 1"
    )


def test_crops_depend_on_the_seed_and_the_key_are_listed_and_one_of_them_is_drawn(tmp_path):
    """The first crop is the centred one, bit for bit that of an encoding without others."""
    made = {}
    for out, crops in (("one", 1), ("three", 3), ("again", 3)):
        encode_dataset(SHAPES, pixels(), tmp_path / out, crops=crops, shard_bytes=1)
        manifest = json.loads((tmp_path / out / MANIFEST).read_text())
        tensors = {}
        for path in sorted((tmp_path / out).glob("shard-*.safetensors")):
            tensors |= load_file(path)
        made[out] = (manifest, tensors)
    assert contents(tmp_path / "three") == contents(tmp_path / "again")
    manifest, tensors = made["three"]
    assert manifest["settings"]["crops"] == 3
    assert "crops" not in made["one"][0]["settings"]
    assert "crops" not in made["one"][0]["videos"][0]
    places = [video["crops"] for video in manifest["videos"]]
    assert places[0][0] is None
    assert places[0][1:] != places[1][1:], "each video has places of its own"
    for name, latent in made["one"][1].items():
        assert torch.equal(latent, tensors[name])
        assert len({tensors[name.replace(":", f"@{crop}:", 1)].numpy().tobytes() for crop in (1, 2)}) == 2
    data = LatentDataset(latents_of(SHAPES, tmp_path / "three"))
    drawn = {data.clip(0, generator(seed)).video.numpy().tobytes() for seed in range(30)}
    starts = {data.clip(0, generator(seed)).video.shape for seed in range(30)}
    assert len(starts) == 1
    assert len(drawn) >= 3
    with pytest.raises(InputError, match=r"--crops must be in \[1, 16\], got 0"):
        encode_dataset(SHAPES, pixels(), tmp_path / "none", crops=0)
    with pytest.raises(InputError, match="crops"):
        encode_dataset(SHAPES, pixels(), tmp_path / "three", crops=2)


@pytest.fixture
def made(tmp_path) -> Path:
    encode_dataset(SHAPES, pixels(), tmp_path / "out")
    return tmp_path / "out"


@pytest.mark.parametrize(
    ("changes", "dtype", "message"),
    [
        ({"resolution": 24}, "float16", r"resolution \[16, 16\] instead of \[24, 24\]"),
        ({"seed": 4}, "float16", "source .*'seed': 3.* instead of .*'seed': 4"),
        ({}, "float32", "dtype float16 instead of float32"),
    ],
)
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


@pytest.mark.parametrize(
    ("config", "dtype", "message"),
    [
        (
            replace(SHAPES, num_clips=None),
            "float16",
            "data.num_clips is None, but up to 1,000,000 procedural clips can be encoded",
        ),
        (SHAPES, "float8", "dtype is 'float8'"),
        (
            DataConfig(kind="latents", root="somewhere"),
            "float16",
            "data.kind is 'latents', which is not one of folder, procedural",
        ),
        (
            replace(SHAPES, resolution=20),
            "float16",
            "frame height is 20, but codec 'builtin' needs a multiple of 8",
        ),
    ],
)
def test_what_cannot_be_encoded_is_refused(tmp_path, config, dtype, message):
    with pytest.raises(InputError, match=message):
        encode_dataset(config, build_codec(CodecConfig("builtin")), tmp_path / "out", dtype=dtype)
    assert not (tmp_path / "out").exists()


def test_latents_too_large_for_their_type_are_not_written(tmp_path):
    codec = Drawn()
    codec.encode = lambda frames, generator=None: frames * 1e6
    with pytest.raises(
        RunError, match=r"latents of 3/0 hold NaN/Inf or do not fit into torch.float16.*float32"
    ):
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
    with pytest.raises(
        RunError,
        match=r"could not write latents to .*shard-00001\.safetensors: No space left.*run the same command",
    ):
        encode_dataset(SHAPES, pixels(), tmp_path / "out", shard_bytes=1)
    assert sorted(contents(tmp_path / "out")) == [MANIFEST, "shard-00000.safetensors"]
    monkeypatch.setattr(shards, "save_file", save)
    assert encode_dataset(SHAPES, pixels(), tmp_path / "out", shard_bytes=1)["new_shards"] == 5


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 10), st.integers(1, 200))
def test_shards_hold_every_video_once_in_order_and_no_more_than_fits(lengths, frame_bytes, shard_bytes):
    videos = [Video(Record(str(index), None, None, frames), len, 1) for index, frames in enumerate(lengths)]
    parts = plan_shards(videos, lambda record: record.frames * frame_bytes, shard_bytes)
    assert [video for part in parts for video in part] == videos
    sizes = [[video.record.frames * frame_bytes for video in part] for part in parts]
    assert all(len(part) == 1 or sum(part) <= shard_bytes for part in sizes)
    assert all(sum(part) + after[0] > shard_bytes for part, after in pairwise(sizes))


def test_names_that_are_not_utf8_are_decided_at_the_scan(tmp_path):
    root = tmp_path / "vid\udcfdeos"
    for name in ("bad\udcff.mp4", "two\nlines\x1b[31m.mp4", "жест.mp4"):
        (root / "a").mkdir(parents=True, exist_ok=True)
        os.rename(encode(tmp_path / "plain.mp4", numbered(6)), root / "a" / name)
    config = folder_config(root, frames=2)
    for field, act in (
        ("--out", lambda: encode_dataset(config, Drawn(), tmp_path / "l\udcfcatents", cache_dir=tmp_path)),
        ("data.root", lambda: LatentDataset(latents_of(config, root))),
    ):
        with pytest.raises(
            InputError, match=rf"^{field} is .*, which is not UTF-8, and safetensors cannot open"
        ):
            act()
    out = tmp_path / "out"
    done = encode_dataset(config, Drawn(), out, cache_dir=tmp_path)
    assert (done["videos"], done["classes"]) == (2, ["a"])
    assert [Path(entry["path"]).name for entry in done["skipped"]] == ["bad\udcff.mp4"]
    latents = LatentDataset(latents_of(config, out))
    assert [video.key for video in latents.videos] == ["a/two\nlines\x1b[31m.mp4", "a/жест.mp4"]
    assert UNREADABLE not in latents.files.values()
    source = FolderDataset(config, tmp_path)
    for index in range(2):
        one, two = source.clip(index, generator(index)), latents.clip(index, generator(index))
        assert (one.key, one.label, one.video.shape) == (two.key, two.label, two.video.shape)
    assert encode_dataset(config, Drawn(), out, cache_dir=tmp_path)["new_shards"] == 0


def test_a_disk_that_is_too_small_is_noticed_before_anything_is_encoded(tmp_path, monkeypatch):
    codec = Drawn()
    encoded = []
    codec.before = lambda: encoded.append(1)
    needed = 6 * 4 * 3 * 16 * 16 * 2

    def disk(free: int) -> None:
        monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=free))

    disk(needed - 1)
    with pytest.raises(
        RunError,
        match=rf"^the latents take {needed:,} bytes more, but the disk of .* has {needed - 1:,} free",
    ):
        encode_dataset(SHAPES, codec, tmp_path / "deep" / "out")
    assert (encoded, list(tmp_path.iterdir())) == ([], [])
    disk(needed)
    encode_dataset(SHAPES, codec, tmp_path / "out", shard_bytes=1)
    (tmp_path / "out" / "shard-00005.safetensors").unlink()
    disk(needed // 6)  # only the missing shard counts
    assert encode_dataset(SHAPES, codec, tmp_path / "out", shard_bytes=1)["new_shards"] == 1
    assert len(encoded) == 7


def test_files_have_the_permissions_of_the_umask(tmp_path):
    before = os.umask(0o022)
    try:
        encode_dataset(SHAPES, pixels(), tmp_path / "out")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    assert modes == {MANIFEST: 0o644, "shard-00000.safetensors": 0o644}


def test_temporary_files_of_other_writers_and_of_the_user_stay(tmp_path):
    out = tmp_path / "out"
    encode_dataset(SHAPES, pixels(), out)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    gone = [
        f".tmp-shard-00000.safetensors-{dead.pid}-0123abcd",
        f".captions-00000.safetensors.{dead.pid}.partial",
    ]
    kept = [
        f".tmp-shard-00000.safetensors-{os.getpid()}-0123abcd",
        ".notes.partial",
        ".tmp-notes",
        f".tmp-x-{dead.pid}-0123abcd",
    ]
    for name in (*gone, *kept):
        (out / name).write_text("text")
    encode_dataset(SHAPES, pixels(), out)
    assert sorted(path.name for path in out.glob(".*")) == sorted(kept)


def test_a_million_procedural_clips_are_the_most(tmp_path):
    with pytest.raises(
        InputError, match=r"^data\.num_clips is 1000000000, but up to 1,000,000 procedural clips"
    ):
        encode_dataset(replace(SHAPES, num_clips=10**9), pixels(), tmp_path / "out")
