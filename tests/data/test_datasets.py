# SPDX-License-Identifier: Apache-2.0
"""A folder becomes a data set: classes by name, broken files set aside with a reason, nothing decoded twice
without need.
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support import shared

from latte.checks import InputError
from latte.data import probe_cache
from latte.data.clips import ClipRule
from latte.data.datasets import (
    DATASETS,
    ClipReadError,
    DataConfig,
    FolderDataset,
    ProceduralDataset,
    build_dataset,
)
from latte.data.layouts import LAYOUTS
from latte.data.loader import load_batch
from latte.data.order import items_of_step
from latte.data.skipped import scan, write_skipped
from latte.runtime import generator
from videos import encode, number_of, numbered

RULE = {"frames": 4, "interval": 2, "resolution": (24, 32)}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Probe results of a test never meet those of another, or the user's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def video(path: Path, frames: int = 12) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return encode(path, numbered(frames))


def images(folder: Path, frames: int = 12) -> Path:
    folder.mkdir(parents=True)
    for index, frame in enumerate(numbered(frames)):
        Image.fromarray(frame).save(folder / f"{index}.png")
    return folder


def config(root: Path, **changes) -> DataConfig:
    return DataConfig(root=str(root), **RULE | changes)


@pytest.fixture
def classed(tmp_path) -> Path:
    root = tmp_path / "set"
    for name in ("walk/b.mp4", "walk/a.avi", "bend/c.mkv", ".hidden/h.mp4"):
        if name.endswith("avi"):
            encode_as(root / name, "mpeg4")
        else:
            video(root / name)
    images(root / "jump" / "clip1")
    (root / "labels.csv").write_text("not a video")
    (root / "walk" / "._b.mp4").write_bytes(b"resource fork")
    return root


def encode_as(path: Path, codec: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    encode(path, numbered(12), codec)


def test_class_folders_sorted_by_name_give_the_labels(classed):
    data = build_dataset(config(classed))
    assert data.classes == ["bend", "jump", "walk"]
    assert [(clip.key, clip.label) for clip in data.clips] == [
        ("bend/c.mkv", 0),
        ("jump/clip1", 1),
        ("walk/a.avi", 2),
        ("walk/b.mp4", 2),
    ]
    assert not data.latent
    assert len(data.skipped) == 0
    for index in range(4):
        clip = data.clip(index, generator(index))
        assert (clip.video.shape, clip.video.dtype, clip.label, clip.caption) == (
            (4, 3, 24, 32),
            torch.float32,
            data.clips[index].label,
            None,
        )
        assert (clip.key, clip.video.min() >= -1, clip.video.max() <= 1) == (
            data.clips[index].key,
            True,
            True,
        )


def test_labels_off_a_flat_folder_and_deeper_folders_have_no_classes(classed, tmp_path):
    data = FolderDataset(config(classed, labels=False))
    assert data.classes == []
    assert [data.clip(i, generator(i)).label for i in range(4)] == [None] * 4
    video(tmp_path / "flat" / "one.mp4")
    images(tmp_path / "flat" / "two")
    flat = FolderDataset(config(tmp_path / "flat"))
    assert (flat.classes, [clip.key for clip in flat.clips]) == ([], ["one.mp4", "two"])
    video(tmp_path / "deep" / "a" / "b" / "one.mp4")
    video(tmp_path / "deep" / "a" / "b" / "c" / "two.mp4")
    deep = FolderDataset(config(tmp_path / "deep"))
    assert (deep.classes, len(deep)) == ([], 2)
    assert load_batch(deep, 0, 0, 2).label is None


def test_unclear_classes_are_refused(classed):
    video(classed / "stray.mp4")
    with pytest.raises(InputError, match=r"stray.mp4.*different depths.*labels=false"):
        FolderDataset(config(classed))
    assert len(FolderDataset(config(classed, labels=False))) == 5


def test_a_clip_is_a_function_of_its_generator_and_uses_every_start_and_both_sides(classed):
    data = FolderDataset(config(classed, flip=True))
    walk = [clip.key for clip in data.clips].index("walk/b.mp4")
    seen = set()
    for seed in range(80):
        one, two = data.clip(walk, generator(seed)), data.clip(walk, generator(seed))
        assert torch.equal(one.video, two.video)
        pixels = ((one.video.permute(0, 2, 3, 1) + 1) * 127.5).numpy()
        dark_left = pixels[0, 2, 2].mean() < pixels[0, 2, -3].mean()
        numbers = [number_of(frame) for frame in pixels]
        assert np.diff(numbers).tolist() == [2, 2, 2]
        seen.add((numbers[0], bool(dark_left)))
    assert seen == {(start, side) for start in range(6) for side in (True, False)}
    unflipped = FolderDataset(config(classed))
    for seed in range(10):
        plain = unflipped.clip(walk, generator(seed)).video
        turned = data.clip(walk, generator(seed)).video
        assert torch.equal(turned, plain) or torch.equal(turned, plain.flip(-1)), (
            "the start does not depend on flip"
        )


def test_bad_files_are_set_aside_with_a_reason_and_the_rest_goes_on(classed, tmp_path):
    whole = (classed / "walk" / "b.mp4").read_bytes()
    (classed / "walk" / "cut.mp4").write_bytes(whole[: len(whole) // 3])
    (classed / "walk" / "text.mp4").write_text("I am no video")
    (classed / "walk" / "none.avi").write_bytes(b"")
    video(classed / "walk" / "short.mp4", frames=6)
    video(classed / "zzz" / "short.mp4", frames=3)
    data = FolderDataset(config(classed))
    assert len(data) == 4
    assert data.classes == ["bend", "jump", "walk", "zzz"], (
        "a class does not vanish, and others are not renumbered, for a broken file"
    )
    reasons = {os.path.relpath(bad["path"], classed): bad["reason"] for bad in data.skipped}
    assert {path: reason.split(":")[0] for path, reason in reasons.items()} == {
        "walk/cut.mp4": "not-a-video",
        "walk/text.mp4": "not-a-video",
        "walk/none.avi": "empty",
        "walk/short.mp4": "too-short",
        "zzz/short.mp4": "too-short",
    }
    assert (
        reasons["walk/short.mp4"]
        == "too-short: 6 frames decode, a clip spans 7 (4 frames, interval 2, strict)"
    )
    out = tmp_path / "run" / "skipped.jsonl"
    assert write_skipped(out, data.skipped) == 5
    assert write_skipped(out, data.skipped) == 0
    assert write_skipped(out, [{"path": "new\nname", "reason": "damaged: at step 7"}]) == 1
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert lines[:5] == list(data.skipped)
    assert lines[5]["path"] == "new\nname"
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "quarantine.jsonl").write_text(out.read_text())
    assert write_skipped(tmp_path / "old" / "skipped.jsonl", data.skipped) == 0, (
        "the file of 0.1.0 lists them"
    )


def test_a_set_with_a_tenth_of_bad_files_trains_in_the_same_order_after_a_restart(tmp_path):
    for index in range(20):
        path = video(tmp_path / "set" / f"{index:02d}.mp4", frames=8)
        if index % 10 == 3:
            path.write_bytes(path.read_bytes()[:500])
    orders = []
    for _ in range(2):
        data = FolderDataset(config(tmp_path / "set"))
        orders.append([key for step in range(5) for key in load_batch(data, 1, step, 6).keys])
        assert len(data.skipped) == 2
    assert orders[0] == orders[1]
    assert len(set(orders[0])) == 18
    assert orders[0] == [data.clips[i].key for step in range(5) for i in items_of_step(1, step, 6, 18)]


def test_a_file_that_breaks_later_is_named(classed):
    data = FolderDataset(config(classed))
    (classed / "bend" / "c.mkv").write_bytes(b"gone")
    with pytest.raises(ClipReadError, match=r"c\.mkv can no longer be read \(not-a-video"):
        data.clip(0, generator(0))
    (classed / "jump" / "clip1" / "5.png").unlink()
    (classed / "jump" / "clip1" / "6.png").write_bytes(b"")
    last = next(
        seed for seed in range(99) if int(torch.randint(6, (), generator=generator(seed))) == 5
    )  # frames 5, 7, 9, 11 of 11
    with pytest.raises(ClipReadError, match="clip1"):
        data.clip(1, generator(last))


def test_missing_and_useless_folders_are_refused_in_one_line(tmp_path):
    video(tmp_path / "videos" / "a.mp4", 3)
    with pytest.raises(InputError, match=r"no such folder; did you mean 'videos'\?"):
        FolderDataset(config(tmp_path / "vidoes"))
    with pytest.raises(InputError, match="does not exist either"):
        FolderDataset(config(tmp_path / "nowhere" / "at" / "all"))
    with pytest.raises(InputError, match="is a file"):
        FolderDataset(config(tmp_path / "videos" / "a.mp4"))
    with pytest.raises(InputError, match=r"data\.root is missing"):
        FolderDataset(DataConfig())
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"holds no video \(.mp4"):
        FolderDataset(config(tmp_path / "empty"))
    (tmp_path / "videos" / "b.mp4").write_text("text")
    with pytest.raises(
        InputError, match=r"2 tried, all skipped, first: a.mp4 \(too-short: 3 frames.*; b.mp4 \(not-a-video"
    ) as refusal:
        FolderDataset(config(tmp_path / "videos"))
    assert "\n" not in str(refusal.value)


def test_nothing_is_probed_twice_unless_it_changed(classed, monkeypatch):
    probed = []
    monkeypatch.setattr(
        probe_cache,
        "probe",
        lambda path, probe=probe_cache.probe: (probed.append(Path(path).name), probe(path))[1],
    )
    (classed / "bend" / "text.mp4").write_text("no video")
    first = scan(classed)
    assert sorted(probed) == ["a.avi", "b.mp4", "c.mkv", "clip1", "text.mp4"]
    probed.clear()
    again = scan(classed, ClipRule(2, 1))
    assert (probed, again.clips, again.skipped) == ([], first.clips, first.skipped)
    (classed / "bend" / "text.mp4").unlink()
    video(classed / "walk" / "b.mp4", frames=20)
    os.utime(classed / "bend" / "c.mkv", (1, 1))
    Image.fromarray(numbered(1)[0]).save(classed / "jump" / "clip1" / "12.png")
    changed = {clip.key: clip.info.frames for clip in scan(classed).clips}
    assert sorted(probed) == ["b.mp4", "c.mkv", "clip1"]
    assert (changed["walk/b.mp4"], changed["jump/clip1"]) == (20, 13)
    probed.clear()
    cache = next(Path(os.environ["XDG_CACHE_HOME"]).glob("latte/probes-*.json"))
    assert "text.mp4" not in cache.read_text()
    stored = json.loads(cache.read_text())
    del stored["entries"]["walk/a.avi"]["info"]["frames"]
    cache.write_text(json.dumps(stored))
    assert len(scan(classed).clips) == 4
    assert probed == ["a.avi"]
    for junk in ("{", "[]", '{"reader": "another", "entries": {}}', '{"reader": 1}'):
        cache.write_text(junk)
        probed.clear()
        assert len(scan(classed).clips) == 4
        assert len(probed) == 4


def test_a_cache_that_cannot_be_written_is_done_without(classed, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    assert len(scan(classed, cache_dir=tmp_path / "file" / "below").clips) == 4
    monkeypatch.setattr(probe_cache, "SAVE_EVERY", 0.0)
    calls = []
    assert (
        len(
            scan(
                classed, cache_dir=tmp_path / "cache", progress=lambda done, of: calls.append((done, of))
            ).clips
        )
        == 4
    )
    assert calls == [(i, 4) for i in (1, 2, 3, 4)]
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".json"]


def test_links_are_followed_but_not_in_circles(classed, tmp_path):
    joined = tmp_path / "joined"
    joined.mkdir()
    (joined / "left").symlink_to(classed / "walk")
    (joined / "right").symlink_to(classed / "bend")
    (classed / "walk" / "again").symlink_to(joined)
    (joined / "right" / "dead.mp4").symlink_to(tmp_path / "nothing.mp4")
    found = scan(joined)
    assert found.classes == ("left", "right")
    assert [clip.key for clip in found.clips if clip.key.count("/") == 1] == [
        "left/a.avi",
        "left/b.mp4",
        "right/c.mkv",
    ]
    assert [bad["reason"].split(":")[0] for bad in found.skipped] == ["missing"]


def test_the_description_is_that_of_the_data_wherever_they_lie(classed, tmp_path):
    before = FolderDataset(config(classed)).describe()
    assert json.loads(json.dumps(before)) == before
    moved = classed.rename(tmp_path / "elsewhere")
    assert FolderDataset(config(moved)).describe() == before
    for changes in ({"flip": True}, {"frames": 3}, {"interval": 1}, {"resolution": 16}, {"labels": False}):
        assert FolderDataset(config(moved, **changes)).describe() != before, changes
    video(moved / "walk" / "z.mp4")
    assert FolderDataset(config(moved)).describe() != before


def test_the_procedural_set_is_labelled_captioned_and_endless():
    data = build_dataset(DataConfig(kind="procedural", resolution=32, frames=8, seed=3))
    assert data.classes == ["up", "down", "left", "right"]
    assert len(data) > 10**12
    clip = data.clip(6)
    assert (clip.video.shape, clip.label, clip.key) == ((8, 3, 32, 32), 2, "3/6")
    assert clip.caption.endswith("moves left")
    assert torch.equal(clip.video, data.clip(6, generator(1)).video)
    few = ProceduralDataset(DataConfig(kind="procedural", num_clips=10, labels=False))
    assert (len(few), few.classes, few.clip(1).label) == (10, [], None)
    assert data.describe() != few.describe()
    batch = load_batch(data, 0, 0, 4)
    assert batch.label.tolist() == [data.clip(int(key.split("/")[1])).label for key in batch.keys]


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": "foldr"},
        {"resolution": 0},
        {"resolution": (32, -1)},
        {"frames": 0},
        {"rule": "tim"},
        {"seed": 3},
        {"num_clips": 5},
        {"kind": "procedural", "root": "x"},
        {"kind": "procedural", "flip": True},
        {"kind": "procedural", "interval": 3},
        {"kind": "procedural", "num_clips": 0},
        {"kind": "latents", "seed": 1},
    ],
)
def test_wrong_or_unread_keys_are_refused_by_name(wrong):
    with pytest.raises(InputError, match=list(wrong)[-1]):
        DataConfig(**wrong)


def test_every_kind_of_data_set_is_in_the_table():
    assert set(DATASETS) == {"folder", "procedural", "latents", "custom", *LAYOUTS}
    assert DataConfig(resolution=[48, 64]).size == (48, 64)


def test_real_clips_of_several_rates_and_containers():
    data = FolderDataset(
        DataConfig(
            root=str(shared("data", "odd")), resolution=(32, 48), frames=8, interval=2, rule="time", fps=25.0
        )
    )
    assert len(data.skipped) >= 4
    for index in range(len(data)):
        clip = data.clip(index, generator(0, index))
        assert clip.video.shape == (8, 3, 32, 48)
        assert clip.video.isfinite().all()
    print(
        f"{len(data)} clips, {len(data.skipped)} refused: "
        f"{sorted({bad['reason'].split(':')[0] for bad in data.skipped})}"
    )
    actions = FolderDataset(DataConfig(root=str(shared("data", "weizmann_actions")), resolution=64))
    assert (len(actions), actions.classes) == (36, ["bend", "jack", "wave1", "wave2"])
