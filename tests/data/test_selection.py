# SPDX-License-Identifier: Apache-2.0
"""Which clips a run uses: the rule that the frame rates settle, the bucket of each, and the skipped."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from latte.autoencoder.compression import Compression
from latte.checks import InputError
from latte.data.bucket_settings import Grid, buckets_of
from latte.data.datasets import DataConfig, FolderDataset, ProceduralDataset, build_dataset
from latte.data.loader import load_batch
from latte.data.selection import bucket_table, report, settle, table_lines
from latte.data.skipped import reasons
from latte.runtime import generator
from videos import encode, number_of, numbered

GRID = Grid("builtin", Compression(4, 8), patch_size=2)
NAMES = ("4x32x32", "4x32x64", "2x32x32", "1x32x32")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Probe results of a test never meet those of another, or the user's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@dataclass(frozen=True)
class Length:
    """A video of even frames."""

    frames: int
    fps: float

    @property
    def times(self) -> list[float]:
        """Seconds of its frames."""
        return [i / self.fps for i in range(self.frames)] if self.fps else []


def config(root: Path | str = ".", **changes) -> DataConfig:
    return DataConfig(root=str(root), **({"frames": 4, "resolution": 32, "labels": False} | changes))


def bucketed(root: Path, *names: str, **changes) -> FolderDataset:
    data = config(root, buckets=names, **changes)
    dataset = build_dataset(data, buckets=buckets_of(data, GRID))
    assert isinstance(dataset, FolderDataset)
    return dataset


@pytest.mark.parametrize("rates", [[25], [25, 25, 25], [30, 29.97], [25, 0], [0, 0], [], [24, 24.4]], ids=str)
def test_one_rate_is_used_frame_by_frame(rates):
    rules = settle(config(), [Length(40, rate) for rate in rates])
    assert rules.notice is None
    assert rules.settled(config()) == config(rule="strict")
    assert rules.of_length[4] == config(rule="strict").clip_rule
    assert rules.refusals(Length(4, 999)) == {4: None}


@pytest.mark.parametrize(
    ("videos", "fps"),
    [
        ([(40, 25), (40, 50), (40, 50)], 25),  # at 25 all three are used
        ([(40, 25), (40, 29.97), (40, 30), (40, 30)], 25),
        ([(3, 10), (40, 25), (40, 50)], 25),  # too short a video has no say
        ([(40, 25), (40, 50), (2, 50)], 25),
        ([(40, 24), (40, 24.5)], 24),  # more than 2 % apart
    ],
)
def test_mixed_rates_are_used_by_time_at_the_rate_of_most_clips(videos, fps):
    rules = settle(config(), [Length(*video) for video in videos])
    assert rules.of_length[4] == config(rule="time", fps=fps).clip_rule
    assert rules.settled(config()) == config(rule="time", fps=fps)
    low = min(rate for _, rate in videos)
    high = max(rate for _, rate in videos)
    assert rules.notice is not None
    assert rules.notice.startswith(
        f"the clips have different frame rates, {low:g} to {high:g} fps, so frames are chosen by time: clips "
        f"are taken at {fps:g} fps (data.rule=time data.fps={fps:g} data.interval=1)"
    )
    assert "\n" not in rules.notice


def test_a_slower_clip_would_repeat_frames_and_is_not_used():
    videos = [Length(40, 30)] * 5 + [Length(6, 10)] * 2 + [Length(40, 60)]
    rules = settle(config(frames=8), videos)
    assert rules.of_length[8].fps == 30
    assert rules.refusals(videos[0]) == {8: None}
    assert rules.refusals(videos[-1]) == {8: None}
    assert rules.refusals(videos[5]) == {8: "too-slow: it has 10 fps, clips are taken at 30"}
    apart = settle(config(frames=4, interval=3), [Length(40, 30), Length(40, 10)])
    assert apart.slowest == 10, "every third frame at 30 fps is one at 10 fps"
    assert apart.refusals(Length(40, 10)) == {4: None}


def test_where_no_rate_fits_the_reason_is_the_length():
    videos = [Length(6, 10), Length(9, 30)]
    rules = settle(config(frames=20), videos)
    assert all(str(rules.refusals(video)[20]).startswith("too-short: it lasts") for video in videos)


@pytest.mark.parametrize("changes", [{"rule": "strict"}, {"fps": 12.0}, {"rule": "linspace"}, {"frames": 1}])
def test_what_is_given_is_kept(changes):
    rules = settle(config(**changes), [Length(40, 25), Length(40, 50)])
    assert rules.notice is None
    assert rules.of_length == {config(**changes).frames: config(**changes).clip_rule}


def test_a_folder_of_one_rate_is_the_same_bit_for_bit(tmp_path):
    for index in range(3):
        encode(tmp_path / f"{index}.mp4", numbered(12, 40, 40))
    found = FolderDataset(config(tmp_path))
    strict = FolderDataset(config(tmp_path, rule="strict"))
    assert found.describe() == strict.describe()
    assert found.config == strict.config
    for step in range(4):
        one, two = load_batch(found, 0, step, 4), load_batch(strict, 0, step, 4)
        assert torch.equal(one.video, two.video)
        assert one.keys == two.keys


def test_a_folder_of_mixed_rates_moves_at_one_speed(tmp_path):
    encode(tmp_path / "fast.mp4", numbered(30, 40, 40), rate=50)
    encode(tmp_path / "slow.mp4", numbered(30, 40, 40), rate=25)
    found = FolderDataset(config(tmp_path))
    assert (found.config.rule, found.config.fps) == ("time", 25)
    assert found.describe()["rule"] == "time"
    assert report(found.selection, 4) == [found.selection.rules.notice]
    speeds = {}
    for index, clip in enumerate(found.clips):
        video = found.clip(index, generator(3)).video
        frames = ((video + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        numbers = [number_of(frame) for frame in frames]
        speeds[clip.key] = set(np.diff(numbers).tolist())
    assert speeds == {"fast.mp4": {2}, "slow.mp4": {1}}


@pytest.fixture
def mixed(tmp_path) -> Path:
    """Videos of two aspects and two lengths, an image, and files that no bucket takes."""
    encode(tmp_path / "square.mp4", numbered(9, 64, 64))
    encode(tmp_path / "wide.mp4", numbered(9, 40, 80))
    encode(tmp_path / "brief.mp4", numbered(2, 64, 64))
    encode(tmp_path / "single.mp4", numbered(1, 64, 64))
    encode(tmp_path / "strip.mp4", numbered(9, 32, 256))
    encode(tmp_path / "slow.mp4", numbered(9, 64, 64), rate=5)
    Image.fromarray(numbered(1, 48, 48)[0]).save(tmp_path / "photo.png")
    return tmp_path


def test_every_clip_is_cut_to_its_bucket_and_the_others_are_skipped_with_the_reason(mixed):
    found = bucketed(mixed, *NAMES)
    bucket_of = {clip.key: str(found.bucket(index)) for index, clip in enumerate(found.clips)}
    assert bucket_of == {
        "brief.mp4": "2x32x32",
        "photo.png": "1x32x32",
        "single.mp4": "1x32x32",
        "square.mp4": "4x32x32",
        "wide.mp4": "4x32x64",
    }
    for index in range(len(found)):
        bucket = found.bucket(index)
        assert found.clip(index, generator(1)).video.shape == (bucket.frames, 3, *bucket.size)
        assert found.image(index, generator(1)).video.shape == (1, 3, *bucket.size)
        assert index in found.members[found.buckets.shapes.index(bucket)]
    skipped = {Path(entry["path"]).name: entry["reason"] for entry in found.skipped}
    assert skipped == {
        "slow.mp4": "too-slow: it has 5 fps, clips are taken at 25",
        "strip.mp4": "size: its frames of 256x32 would lose 75% of their pixels in the nearest bucket, "
        "4x32x64; at most 50% is cropped",
    }
    assert reasons(found.skipped) == "1 too-slow, 1 size"
    assert reasons(bucketed(mixed, "4x32x32").skipped) == "2 too-short, 1 too-slow, 1 size"
    assert found.describe()["buckets"] == [[4, 32, 32], [4, 32, 32], [4, 32, 64], [2, 32, 32], [1, 32, 32]]


def test_the_table_shows_clips_cropped_pixels_and_batches(mixed):
    found = bucketed(mixed, *NAMES, "4x64x32")
    rows = {row["bucket"]: row for row in bucket_table(found.selection, 4)}
    assert list(rows) == list(NAMES), "a bucket without clips is left out"
    assert rows["4x32x64"] == {
        "bucket": "4x32x64",
        "clips": 1,
        "lost": 0.0,
        "upscaled": 0,
        "batch": 2,
        "tokens": 32,
    }
    assert [row["batch"] for row in rows.values()] == [4, 2, 8, 16]
    lines = report(found.selection, 4)
    assert lines[1].split() == ["bucket", "clips", "cropped", "upscaled", "batch", "tokens", "per", "clip"]
    assert lines[2].split() == ["4x32x32", "1", "0.0%", "0", "4", "16"]
    assert lines[-2] == "buckets without a clip are left out: 4x64x32"
    assert lines[-1] == "pixels cropped: 0.0% of a clip with buckets, 10.0% with data.resolution alone"
    assert table_lines([rows["4x32x32"] | {"clips": None, "lost": None, "upscaled": None}])[1].split() == [
        "4x32x32",
        "4",
        "16",
    ]


def test_images_are_buckets_of_one_frame_and_videos_never_fill_them_up(mixed):
    assert "photo.png" not in {clip.key for clip in bucketed(mixed, *NAMES[:3]).clips}
    found = bucketed(mixed, *NAMES)
    images = {found.clips[index].key for index in found.members[3]}
    assert images == {"photo.png", "single.mp4"}, "a video of one frame is an image too"
    only = bucketed(mixed, "1x32x32", frames=1)
    assert len(only) == 6, "without longer buckets a frame of a video is an image; the strip is skipped"
    assert {str(only.bucket(index)) for index in range(len(only))} == {"1x32x32"}


def test_a_folder_of_photos_is_many_images_and_one_of_numbered_frames_is_a_clip(tmp_path):
    for name in ("frames", "photos"):
        (tmp_path / name).mkdir()
    for index, frame in enumerate(numbered(6, 40, 40)):
        Image.fromarray(frame).save(tmp_path / "frames" / f"{index:03d}.png")
    for index, side in enumerate((40, 48, 64)):
        Image.fromarray(numbered(1, side, side)[0]).save(tmp_path / "photos" / f"holiday {index * 7}.png")
    found = bucketed(tmp_path, "4x32x32", "1x32x32")
    assert [clip.key for clip in found.clips] == [
        "frames",
        "photos/holiday 0.png",
        "photos/holiday 14.png",
        "photos/holiday 7.png",
    ]
    assert [found.bucket(index).frames for index in range(4)] == [4, 1, 1, 1]


def test_nothing_that_fits_is_an_error_with_the_first_reason(tmp_path):
    encode(tmp_path / "strip.mp4", numbered(9, 32, 256))
    with pytest.raises(InputError, match=r"strip.mp4.*would lose 88% of their pixels"):
        bucketed(tmp_path, "4x32x32")


def test_procedural_clips_fill_the_buckets_in_turn():
    data = DataConfig("procedural", frames=4, resolution=32, num_clips=7, buckets=("4x32x32", "2x16x48"))
    found = build_dataset(data, buckets=buckets_of(data, GRID))
    assert isinstance(found, ProceduralDataset)
    assert [str(found.bucket(index)) for index in range(7)] == ["4x32x32", "2x16x48"] * 3 + ["4x32x32"]
    assert list(map(list, found.members)) == [[0, 2, 4, 6], [1, 3, 5]]
    for index in range(7):
        bucket = found.bucket(index)
        assert found.clip(index).video.shape == (bucket.frames, 3, *bucket.size)
    plain = build_dataset(replace(data, buckets=None))
    assert torch.equal(found.clip(2).video, plain.clip(2, generator(0)).video)
    with pytest.raises(InputError, match=r"^data.num_clips is 1, but there are 2 buckets"):
        build_dataset(replace(data, num_clips=1), buckets=buckets_of(data, GRID))
    with pytest.raises(InputError, match=r"^data.buckets needs the codec and the model"):
        build_dataset(data)
