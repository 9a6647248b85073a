# SPDX-License-Identifier: Apache-2.0
"""The paper's data sets: right trees are read, wrong ones are refused with their first misfit and the
expected tree.
"""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support import noise

from latte.checks import InputError
from latte.data.clips import to_uint8
from latte.data.datasets import DataConfig, build_dataset
from latte.data.layouts import LAYOUTS
from latte.data.media import write_mp4
from latte.runtime import generator


def video(path: Path, frames: int = 6) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_mp4(path, np.asarray(to_uint8(noise(frames, 3, 16, 16).clamp(-1, 1))), fps=8)


def images(folder: Path, frames: int = 6) -> None:
    folder.mkdir(parents=True)
    for i in range(frames):
        Image.new("RGB", (16, 16), (i * 20, 40, 90)).save(folder / f"{folder.name}_{i + 1:04d}.png")


def read(kind: str, root: Path, cache: Path, **changes):
    return build_dataset(
        DataConfig(kind=kind, root=str(root), resolution=16, frames=2, interval=2, **changes), cache
    )


def test_right_layouts(tmp_path):
    video(tmp_path / "ffs/a/b/c/one.mp4")
    video(tmp_path / "ffs/two.avi.mp4")
    images(tmp_path / "sky/train/day/clip")
    images(tmp_path / "taichi/clip")
    for name in (f"Class{i:03d}" for i in range(101)):
        video(tmp_path / "ucf" / name / "v_g01_c01.mp4", frames=4)
    for kind, folder, clips, classes in [
        ("faceforensics", "ffs", 2, 0),
        ("skytimelapse", "sky", 1, 0),
        ("taichi", "taichi", 1, 0),
        ("ucf101", "ucf", 101, 101),
    ]:
        found = read(kind, tmp_path / folder, tmp_path / "cache")
        assert (len(found), len(found.classes)) == (clips, classes)
        assert found.clip(0, generator(0)).video.shape == (2, 3, 16, 16)
    assert found.clip(7, generator(0)).label == 7
    assert not read("ucf101", tmp_path / "ucf", tmp_path / "cache", labels=False).classes


@pytest.mark.parametrize(
    ("kind", "make", "message"),
    [
        (
            "skytimelapse",
            lambda root: video(root / "sky/a.mp4"),
            "'sky/a.mp4' is a video file, but clips of skytimelapse are folders of",
        ),
        ("taichi", lambda root: video(root / "a.mp4"), "'a.mp4' is a video file"),
        (
            "faceforensics",
            lambda root: images(root / "a/clip"),
            "'a/clip' is a folder of images, but clips of faceforensics are video",
        ),
        ("ucf101", lambda root: video(root / "x/y/a.mp4"), "'x/y/a.mp4' is not at <class>/<clip>"),
        (
            "ucf101",
            lambda root: [video(root / c / "a.mp4") for c in "ab"],
            "holds 2 classes, but ucf101 has 101",
        ),
    ],
)
def test_wrong_layouts_name_the_first_misfit_and_draw_the_tree(kind, make, message, tmp_path):
    make(tmp_path / "set")
    with pytest.raises(InputError) as error:
        read(kind, tmp_path / "set", tmp_path / "cache")
    assert message in str(error.value)
    assert all(line in str(error.value) for line in LAYOUTS[kind].tree)
    assert "data.kind=folder" in str(error.value)
