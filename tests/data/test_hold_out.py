# SPDX-License-Identifier: Apache-2.0
"""Held-out clips: by video, the same whatever the order, something left on both sides."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from latte.checks import InputError
from latte.data.datasets import DataConfig, build_dataset
from latte.data.hold_out import keys_of, split


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    """Two classes of frame folders: 9 of "a", one of "b"; every pixel of a video has its own level."""
    root = tmp_path_factory.mktemp("videos")
    for number in range(10):
        folder = root / ("b" if number == 9 else "a") / f"clip{number}"
        folder.mkdir(parents=True)
        for frame in range(4):
            Image.fromarray(np.full((16, 16, 3), 20 * number, np.uint8)).save(folder / f"{frame:03d}.png")
    return root


def opened(root: Path, **changes):
    """The folder as a dataset."""
    return build_dataset(
        DataConfig(root=str(root), resolution=16, frames=2, **changes), root.parent / "cache"
    )


def levels(dataset) -> list[int]:
    """The number of each clip's video, read from its pixels."""
    clips = [dataset.clip(index, torch.Generator().manual_seed(index)) for index in range(len(dataset))]
    return [round(float((clip.video.mean() + 1) * 127.5 / 20)) for clip in clips]


def test_a_share_splits_the_videos_and_leaves_every_class_one(videos):
    whole = opened(videos)
    for share in (0.1, 0.3, 0.5, 0.9):
        train, held = split(whole, share)
        assert held is not None
        assert sorted(levels(train) + levels(held)) == list(range(10))
        assert len(held) == min(round(share * 10), 8)
        assert 9 in levels(train), "the only video of its class is not held out"
    small = set(levels(split(whole, 0.1)[1]))
    assert small <= set(levels(split(whole, 0.3)[1])), "a larger share adds to a smaller one"


def test_a_copy_of_the_folder_is_split_alike_and_the_description_says_how(videos, tmp_path):
    copy = tmp_path / "copy"
    copy.symlink_to(videos)
    facts = [split(opened(root), 0.3)[0].describe() for root in (videos, copy)]
    assert facts[0] == facts[1]
    assert facts[0]["hold_out"] == 0.3
    assert facts[0]["clips"] == 7
    assert facts[0]["part"] != split(opened(videos), 0.4)[0].describe()["part"]


def test_a_list_of_files(videos, tmp_path):
    whole = opened(videos)
    listing = tmp_path / "held.txt"
    keys = keys_of(whole)
    listing.write_text(f"# two videos\n{keys[1]}\n\n{keys[4]}\n")
    train, held = split(whole, str(listing))
    assert held is not None
    assert levels(held) == [1, 4]
    assert levels(train) == [0, 2, 3, 5, 6, 7, 8, 9]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a/clip1\na/clip77\n", r"lists 1 videos that are not used, first a/clip77"),
        ("# nothing\n", "lists no video"),
        (None, r"cannot be read \(FileNotFoundError\)"),
    ],
)
def test_a_list_that_cannot_be_used_is_refused(videos, tmp_path, text, message):
    listing = tmp_path / "held.txt"
    if text is not None:
        listing.write_text(text)
    with pytest.raises(InputError, match=message):
        split(opened(videos), str(listing))


def test_something_must_be_left_on_both_sides(videos, tmp_path):
    whole = opened(videos)
    with pytest.raises(InputError, match=r"none would be held out; give a share from 0\.05 to 0\.9"):
        split(whole, 0.04)
    with pytest.raises(InputError, match="none would be left to train on"):
        split(whole, 0.96)
    listing = tmp_path / "all.txt"
    listing.write_text("\n".join(keys_of(whole)))
    with pytest.raises(InputError, match="holds out all 10 videos"):
        split(whole, str(listing))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"root": "x", "hold_out": 4}, r"captions of procedural clips; give a share"),
        ({"root": "x", "hold_out": 1.5}, r"must be in \[0, 1\)"),
        ({"root": "x", "hold_out": ""}, "is empty"),
    ],
)
def test_values_out_of_range_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        DataConfig(**changes)


def test_procedural_clips_hold_out_the_last_ones_even_of_an_unlimited_set():
    config = DataConfig(kind="procedural", resolution=16, frames=2, num_clips=20, hold_out=0.1)
    train, held = split(build_dataset(config), 0.1)
    assert held is not None
    assert (len(train), len(held)) == (18, 2)
    assert held.clip(0, torch.Generator()).key == "0/18"
    endless = build_dataset(DataConfig(kind="procedural", resolution=16, frames=2))
    train, held = split(endless, 0.25)
    assert held is not None
    assert len(train) + len(held) == len(endless)
    assert train.clip(5, torch.Generator()).key == "0/5"
    with pytest.raises(InputError, match="no files"):
        split(endless, "list.txt")


def test_a_whole_number_is_about_captions_and_nothing_is_held_out_by_default(videos):
    scenes = build_dataset(DataConfig(kind="procedural", resolution=16, frames=2, hold_out=6))
    assert split(scenes, 6) == (scenes, None)
    whole = opened(videos)
    assert split(whole, 0) == (whole, None)
