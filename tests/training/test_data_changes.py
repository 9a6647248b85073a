# SPDX-License-Identifier: Apache-2.0
"""A clip that breaks or vanishes in mid-run costs no step, and resuming on changed data needs a word."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from latte.build import build
from latte.checkpoint.run import latest_checkpoint, load_checkpoint
from latte.checks import InputError, RunError
from latte.config.run import load_run
from tiny_runs import SHORT, Latents, curve, run
from videos import encode, numbered

WORDS = (
    "codec.name=pixels",
    "data.resolution=16",
    "data.frames=2",
    "model.depth=2",
    "model.width=16",
    "model.heads=2",
)
TRAIN = ("train.global_batch=2", "train.steps=4", "train.log_every=1", "data.flip=false", "data.labels=false")


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    """Three videos and a frame folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "videos"
    (folder / "images").mkdir(parents=True)
    for name in "abc":
        encode(folder / f"{name}.mp4", numbered(6))
    for index, frame in enumerate(numbered(4)):
        Image.fromarray(frame).save(folder / "images" / f"{index}.png", compress_level=0)
    return folder


def train(root: Path, *words: str, until: int | None = None) -> dict:
    """Train on ``root`` in the folder beside it."""
    run_dir = root.parent / "run"
    config, _ = load_run(None, [*WORDS, *TRAIN, f"data.root={root}", f"run.dir={run_dir}", *words])
    return build(config, "cpu").train(until)


def replace_in_place(path: Path) -> None:
    """Change some bytes near the end of a file, and neither its size nor its time."""
    before = path.stat()
    content = bytearray(path.read_bytes())
    content[-60:-40] = bytes(byte ^ 85 for byte in content[-60:-40])
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)


def test_a_video_of_equal_size_and_time_is_noticed_named_and_may_be_allowed(root, capsys):
    train(root, until=2)
    assert sorted(json.loads((root.parent / "run/data.json").read_text())) == [
        "a.mp4",
        "b.mp4",
        "c.mp4",
        "images",
    ]
    replace_in_place(root / "b.mp4")
    with pytest.raises(InputError) as caught:
        train(root)
    first, *lines = str(caught.value).splitlines()
    assert first == f"the data of the run in {root.parent / 'run'} have changed since its last checkpoint:"
    assert lines == [
        "  changed: b.mp4",
        "restore the files, or resume with the data as they are now with run.allow_data_change=true",
    ]
    done = train(root, "run.allow_data_change=true", until=3)
    assert done["step"] == 3
    assert "notice: data.files was" in capsys.readouterr().err
    assert "allow_data_change: false" in (root.parent / "run/config.yaml").read_text()
    assert train(root)["step"] == 4, "from the next checkpoint on these are the data"


def test_images_replaced_in_place_missing_and_new_files_are_named(root):
    train(root, until=2)
    for image in (root / "images").iterdir():
        replace_in_place(image)
    (root / "a.mp4").unlink()
    encode(root / "new\x1b[31m.mp4", numbered(6))
    with pytest.raises(InputError) as caught:
        train(root)
    assert str(caught.value).splitlines()[1:-1] == [
        "  missing: a.mp4",
        "  changed: images",
        "  new: new\\x1b[31m.mp4",
    ]


def test_many_changed_files_are_counted(root):
    train(root, until=2)
    for index in range(30):
        os.link(root / "a.mp4", root / f"{index:02d}.mp4")
    with pytest.raises(InputError) as caught:
        train(root)
    lines = str(caught.value).splitlines()
    assert (len(lines), lines[-2]) == (23, "  and 10 more")


def test_a_clip_that_vanishes_saves_names_the_file_and_can_be_left_out(root):
    run_dir = root.parent / "run"
    config, _ = load_run(None, [*WORDS, *TRAIN, f"data.root={root}", f"run.dir={run_dir}"])
    job = build(config, "cpu")
    read = job.dataset.clip
    calls = []

    def vanishing(index, generator):
        calls.append(index)
        if len(calls) == 5:  # the first clip of step 3
            for name in "abc":
                (root / f"{name}.mp4").unlink()
            for image in (root / "images").iterdir():
                image.unlink()
        return read(index, generator)

    job.dataset.clip = vanishing
    with pytest.raises(
        RunError, match=r"the clips of step 3 could not be loaded: .*/videos/.* can no longer be read"
    ):
        job.train()
    assert len(calls) == 5
    checkpoint = latest_checkpoint(run_dir)
    assert checkpoint is not None
    assert load_checkpoint(checkpoint).step == 2
    for name in "ab":
        encode(root / f"{name}.mp4", numbered(6))
    with pytest.raises(
        InputError, match=r"(?s)have changed since.*  missing: c\.mp4\n  missing: images\nrestore"
    ):
        train(root)
    assert train(root, "run.allow_data_change=true")["step"] == 4


def test_a_run_of_0_1_0_without_fingerprints_resumes(root, monkeypatch):
    from latte.data.datasets import FolderDataset

    described = FolderDataset.describe

    def old(self):
        return {key: value for key, value in described(self).items() if key != "files"}

    with monkeypatch.context() as patch:
        patch.setattr(FolderDataset, "describe", old)
        train(root, until=2)
    (root.parent / "run/data.json").unlink()
    assert "files" not in load_checkpoint(latest_checkpoint(root.parent / "run")).state["facts"]["data"]
    assert train(root, until=3)["step"] == 3
    replace_in_place(root / "a.mp4")
    with pytest.raises(InputError, match=r"changed: a\.mp4"):
        train(root)


def test_other_differences_are_never_allowed(tmp_path):
    class Other(Latents):
        def describe(self):
            return {**super().describe(), "clips": 11, "flip": True}

    run(tmp_path, replace(SHORT, steps=2))
    with pytest.raises(
        InputError, match=r"(?s)another configuration.*data\.flip: the run has nothing, you gave true"
    ):
        run(tmp_path, dataset=Other(), allow_data_change=True)


def test_the_curve_with_worker_processes_is_the_same(root, quick_start):
    train(root, until=3)
    without = curve(root.parent / "run")
    (root.parent / "run").rename(root.parent / "before")
    train(root, "data.workers=2", until=3)
    assert curve(root.parent / "run") == without
    assert len(without) == 3


def test_a_class_without_a_usable_clip_is_refused_for_a_fresh_run_only(root):
    for name in ("up", "down"):
        (root / name).mkdir()
    for name in "abc":
        (root / f"{name}.mp4").rename(root / "up" / f"{name}.mp4")
    (root / "images").rename(root / "up/images")
    words = ("data.labels=true", "model.num_classes=2")
    (root / "down/d.mp4").write_bytes(b"nothing")
    with pytest.raises(
        InputError, match=r"^class down has no usable clip \(not-a-video: .*repair its clips, or remove"
    ):
        train(root, *words)
    assert not (root.parent / "run").exists()
    (root / "down/d.mp4").unlink()
    encode(root / "down/d.mp4", numbered(6))
    train(root, *words, until=2)
    (root / "down/d.mp4").write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"missing: down/d\.mp4"):
        train(root, *words)
    assert train(root, *words, "run.allow_data_change=true")["step"] == 4
