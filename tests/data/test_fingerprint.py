# SPDX-License-Identifier: Apache-2.0
"""Data replaced in place are noticed, whatever their size and time; a copy is the same data."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from latte.data.base import DataConfig
from latte.data.datasets import FolderDataset
from latte.data.fingerprint import (
    SAMPLE,
    UNREADABLE,
    changed_files,
    combined,
    fingerprint,
    fingerprints,
    read_listing,
    write_listing,
)
from videos import encode, numbered


def replace_in_place(path: Path, content: bytes) -> None:
    """Write ``content`` of equal length to ``path`` and put its modification time back."""
    status = path.stat()
    assert len(content) == status.st_size
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_mtime_ns == status.st_mtime_ns


@pytest.mark.parametrize("size", [1, 100, SAMPLE, 3 * SAMPLE + 7, 40 * SAMPLE])
def test_a_change_at_the_start_in_the_middle_and_at_the_end_is_noticed(tmp_path, size):
    path = tmp_path / "clip.mp4"
    content = os.urandom(size)
    path.write_bytes(content)
    before = fingerprint(path)
    for position in (0, size // 2, size - 1):
        changed = bytearray(content)
        changed[position] ^= 1
        replace_in_place(path, bytes(changed))
        assert fingerprint(path) != before, position
    replace_in_place(path, content)
    assert fingerprint(shutil.copy(path, tmp_path / "copy.mp4")) == before, "neither name nor time count"
    path.write_bytes(content + b"0")
    assert fingerprint(path) != before


def test_only_a_span_of_a_file_can_count(tmp_path):
    (tmp_path / "a").write_bytes(b"one" + bytes(5 * SAMPLE))
    (tmp_path / "b").write_bytes(b"three" + bytes(5 * SAMPLE))
    same = fingerprints({"a": tmp_path / "a", "b": tmp_path / "b"}, {"a": (3, 90), "b": (5, 92)})
    assert same["a"] == same["b"] == fingerprint(tmp_path / "a", 3, 90)
    assert len({fingerprint(tmp_path / "a", *span) for span in ((3, 90), (2, 90), (3, 91), ())}) == 4


@pytest.mark.parametrize("count", [1, 3, 30])
def test_all_images_of_a_frame_folder_replaced_in_place_are_noticed(tmp_path, count):
    for index in range(count):
        Image.fromarray(np.full((4, 4, 3), index, np.uint8)).save(
            tmp_path / f"{index:03d}.png", compress_level=0
        )
    before = fingerprint(tmp_path)
    for path in tmp_path.iterdir():
        replace_in_place(path, path.read_bytes()[:-20] + bytes(20))
    assert fingerprint(tmp_path) not in (before, UNREADABLE)
    (tmp_path / "000.png").unlink()
    assert fingerprint(tmp_path) != before


def test_a_file_that_is_gone_has_a_fingerprint_of_its_own(tmp_path):
    assert fingerprint(tmp_path / "none") == UNREADABLE
    assert fingerprints({"a": tmp_path / "none"}) == {"a": UNREADABLE}


def test_changed_files_are_named():
    old = {"a": "1", "b": "2", "c": "3"}
    new = {"b": "2", "c": "4", "d": "5"}
    assert changed_files(old, new) == ["missing: a", "changed: c", "new: d"]
    assert changed_files(old, dict(reversed(old.items()))) == []
    assert combined(old) == combined(dict(reversed(old.items()))) != combined(new)


def test_the_listing_survives_strange_names_and_a_damaged_one_is_empty(tmp_path):
    files = {"walk/b\n.mp4": "0123", "жест.mp4": "4567", "bad\udcff.mp4": "89ab"}
    assert read_listing(tmp_path) == {}
    write_listing(tmp_path, files)
    assert read_listing(tmp_path) == files
    for damaged in ("[1]", "{", "{}"):
        (tmp_path / "data.json").write_text(damaged)
        assert read_listing(tmp_path) == {}


def test_a_dataset_notices_a_video_of_equal_size_and_a_copy_is_the_same(tmp_path):
    root = tmp_path / "videos"
    root.mkdir()
    for name in "ab":
        encode(root / f"{name}.mp4", numbered(6))
    config = DataConfig(root=str(root), resolution=16, frames=2)
    before = FolderDataset(config, tmp_path / "cache")
    assert list(before.files) == ["a.mp4", "b.mp4"]
    shutil.copytree(root, tmp_path / "copy")
    copy = FolderDataset(DataConfig(root=str(tmp_path / "copy"), resolution=16, frames=2), tmp_path / "cache")
    assert copy.describe() == before.describe()
    content = bytearray((root / "b.mp4").read_bytes())
    middle = content.index(b"mdat") + 200
    content[middle : middle + 4] = bytes(byte ^ 85 for byte in content[middle : middle + 4])
    replace_in_place(root / "b.mp4", bytes(content))
    after = FolderDataset(config, tmp_path / "cache")
    assert after.describe()["content"] == before.describe()["content"], "what 0.1.0 compared does not see it"
    assert after.describe() != before.describe()
    assert changed_files(before.files, after.files) == ["changed: b.mp4"]
