# SPDX-License-Identifier: Apache-2.0
"""The commands with a codec that compresses time: what a user types counts frames of video."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from latte.autoencoder.base import Compression
from latte.autoencoder.codec import CODECS
from temporal import TIME_WORDS
from tiny import WORDS
from videos import encode, numbered

pytestmark = pytest.mark.usefixtures("time_codecs")
RUN = ["shapes", *WORDS, *TIME_WORDS, "train.steps=2"]


@pytest.mark.parametrize("command", [["config", "show"], ["plan"], ["train"]])
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["data.frames=16"], ["data.frames is 16", "1 + 4 k frames", "13 and 17"]),
        (["data.frames=0"], ["frames must be at least 1"]),
        (["data.frames=9", "model.patch=compression"], ["3 latent frames", "model.tube = 2", "5 and 13"]),
        (["data.frames=1", "model.patch=compression"], ["1 latent frames", "numbers are 5"]),
        (
            ["codec.name=cogvideox", "data.frames=9", "model.patch=compression"],
            ["3 latent frames", "no number is valid; give another model.tube"],
        ),
        (["data.frames=9", "model.num_frames=9"], ["model.num_frames is 9", "encodes to 3 latent frames"]),
        (
            ["codec.name=time_blocks", "data.frames=8", "train.num_images=1"],
            ["train.num_images is 1", "encodes no images"],
        ),
    ],
)
def test_lengths_that_do_not_fit_are_one_line_with_the_nearest_ones(latte, command, words, expected):
    found = latte(*command, *RUN, *words)
    assert found.code == 2
    (line,) = found.errors
    assert all(part in line for part in expected), line
    assert not Path("runs").exists()


def test_valid_lengths_of_codec_and_patches_together(latte):
    for frames, tube in ((5, 2), (13, 2), (13, 4), (9, 3)):
        words = [f"data.frames={frames}", "model.patch=compression", f"model.tube={tube}"]
        assert latte("config", "show", *RUN, *words).code == 0


def width_of(samples: str) -> int:
    with Image.open(f"{samples}/step-0000002.png") as sheet:
        return sheet.width


def test_training_from_frames_writes_sheets_of_whole_clips(latte):
    words = ["train.sample_every=2", "train.num_images=2"]
    found = latte("train", *RUN, *words, "--json")
    assert found.code == 0, found.err
    longer = latte("train", *RUN, *words, "data.frames=17", "--out", "longer", "--json")
    assert longer.code == 0, longer.err
    widths = [width_of("runs/shapes/samples"), width_of("longer/samples")]
    assert widths[0] // 9 == widths[1] // 17, "a sheet has one picture per frame of video"
    again = latte("train", *RUN, *words, "train.steps=4", "--json")
    assert again.json["step"] == 4
    other = latte("train", *RUN, *words, "data.frames=13", "train.steps=6")
    assert other.code == 2
    assert any("data.frames: the run has 9, you gave 13" in line for line in other.errors)


@pytest.fixture
def clips(tmp_path) -> Path:
    """Two classes of videos; those of the first have 9 frames, the others 23."""
    for name, frames in (("a", 9), ("b", 23)):
        (tmp_path / "clips" / name).mkdir(parents=True)
        for index in range(2):
            encode(tmp_path / "clips" / name / f"{index}.mp4", numbered(frames, 16, 16))
    return tmp_path / "clips"


CLIPS = ["data.kind=folder", "data.root=clips", "model.num_classes=2"]
SHARDS = ["data.kind=latents", "data.root=shards", "model.num_classes=2"]


@pytest.mark.usefixtures("clips")
def test_latents_are_encoded_scanned_inspected_and_trained_on(latte):
    found = latte("data", "encode", *RUN, *CLIPS, "--out", "shards", "--json")
    assert found.code == 0, found.err
    assert (found.json["windows"], found.json["frames"], found.json["latent_frames"]) == (2 + 2 * 3, 64, 24)
    again = latte("data", "encode", *RUN, *CLIPS, "--out", "shards")
    assert "4 videos, 64 frames, 8 windows of 9 frames, 24 latent frames, 1 shards" in again.out
    scanned = latte("data", "scan", "shards", "--json").json
    assert scanned["clips"] == 4
    assert scanned["latents"]["latent_frames"] == 24
    assert {file["frames"] for file in scanned["files"]} == {9, 23}
    line = latte("data", "scan", "shards").out.splitlines()[-1]
    assert line == "latents of codec time: 64 frames of video in 8 windows of 9 frames, 24 latent frames"
    looked = latte("data", "inspect", "shards", "--json").json
    assert (looked["frames"], looked["latent_frames"]) == (9, 3)
    assert latte("data", "inspect", "shards", "data.frames=5", "--json").json["latent_frames"] == 2
    trained = latte("train", *RUN, *SHARDS, "train.sample_every=2", "train.num_images=2", "--json")
    assert trained.code == 0, trained.err
    assert Path("runs/shapes/samples/step-0000002.png").exists()


@pytest.mark.usefixtures("clips")
def test_too_short_videos_are_named_in_the_summary(latte):
    found = latte("data", "encode", *RUN, *CLIPS, "data.frames=13", "--out", "shards")
    assert "2 videos skipped" in found.out
    assert "skipped: a/0.mp4 (too-short: 9 frames decode, a clip spans 13" in found.out
    found = latte("data", "encode", *RUN, *CLIPS, "data.frames=12", "--out", "other")
    assert (found.code, len(found.errors)) == (2, 1)
    assert "9 and 13" in found.errors[0]
    assert not Path("other").exists()


def losses(run: str) -> list[float]:
    lines = Path(run, "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.mark.usefixtures("clips")
def test_three_steps_from_shards_are_those_from_videos_where_windows_are_whole_videos(latte):
    """Every video of class a is one window, so both runs train on the same clips in the same order."""
    words = [*RUN, "train.log_every=1", "train.steps=3", "model.num_classes=1"]
    shutil.rmtree("clips/b")
    source = ["data.kind=folder", "data.root=clips"]
    encoded = latte("data", "encode", *words, *source, "--shard-dtype", "float32", "--out", "shards")
    assert encoded.code == 0, encoded.err
    from_videos = latte("train", *words, *source, "--out", "videos", "--json").json
    from_shards = latte(
        "train", *words, "data.kind=latents", "data.root=shards", "--out", "run", "--json"
    ).json
    assert from_shards["weights_sha256"] == from_videos["weights_sha256"]
    assert losses("run") == losses("videos")
    assert len(losses("run")) == 3


@pytest.mark.usefixtures("clips")
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["data.frames=13"], "windows of 9 frames (interval 1, rule strict); give at most 9"),
        (["data.interval=2"], "give data.interval=1, or encode again"),
        (["codec.name=pixels", "data.resolution=16"], "were made with codec"),
        (["codec.name=time_drawn"], "were made with codec"),
        (["data.frames=11"], "nearest valid numbers are 9 and 13"),
    ],
)
def test_latents_that_do_not_fit_the_run_are_one_line(latte, words, expected):
    assert latte("data", "encode", *RUN, *CLIPS, "--out", "shards").code == 0
    found = latte("train", *RUN, *SHARDS, *words, "train.sample_every=0")
    assert (found.code, len(found.errors)) == (2, 1)
    assert expected in found.errors[0]


@pytest.mark.usefixtures("clips")
def test_latents_of_the_same_codec_with_another_compression_are_one_line(latte, monkeypatch):
    """Weights of one class come with several compressions; ``codec.path`` says which."""
    assert latte("data", "encode", *RUN, *CLIPS, "--out", "shards").code == 0
    other = Compression(channels=12, spatial_factor=4, temporal_factor=4)
    monkeypatch.setattr(CODECS["time"], "compression", other)
    found = latte("train", *RUN, *SHARDS, "train.sample_every=0")
    assert (found.code, len(found.errors)) == (2, 1)
    assert "are of another codec 'time'" in found.errors[0]
    assert "give codec.path, the weights that they were made with" in found.errors[0]


def test_the_plan_counts_latent_frames_for_the_model_and_frames_for_the_codec(latte):
    found = latte("plan", *RUN, "--json").json
    assert found["latent"] == [3, 12, 8, 8]
    assert found["tokens"] == 3 * 2 * 2
    encoding = found["encoding"]
    assert (encoding["frames"], encoding["latent_frames"], encoding["temporal_factor"]) == (9, 3, 4)
    assert encoding["clip_bytes"] == 3 * 12 * 8 * 8 * 2
    assert "9 -> 3 latent frames" in latte("plan", *RUN).out
    longer = latte("plan", *RUN, "data.frames=17", "--json").json
    assert longer["tokens"] == 5 * 2 * 2
    frames = ["shapes", "codec.name=builtin", "data.resolution=32"]
    one, two = (latte("plan", *frames, f"data.frames={n}", "--json").json["encoding"] for n in (4, 8))
    assert two["operations"] == 2 * one["operations"] > 0
