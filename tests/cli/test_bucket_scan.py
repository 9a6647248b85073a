# SPDX-License-Identifier: Apache-2.0
"""What ``latte data scan`` and ``latte plan`` print about buckets and frame rates, and what they refuse."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from tiny import WORDS
from videos import encode, numbered

SHAPES = "data.buckets=[4x32x32,4x32x64,1x32x32]"
RUN = [*WORDS, "data.kind=folder", "data.labels=false", "model.num_classes=null", "data.root=videos"]
RUN += ["data.frames=4", "data.resolution=32"]
HEADS = ["bucket", "clips", "cropped", "upscaled", "batch", "tokens", "per", "clip"]


@pytest.fixture
def videos(latte):
    """Square, wide and brief videos of one rate, and an image; see ``latte`` for the folder."""
    Path("videos").mkdir()
    for index in range(3):
        encode(Path(f"videos/square{index}.mp4"), numbered(9, 64, 64))
    encode(Path("videos/wide.mp4"), numbered(9, 40, 80))
    encode(Path("videos/brief.mp4"), numbered(2, 64, 64))
    encode(Path("videos/strip.mp4"), numbered(9, 32, 256))
    Image.fromarray(numbered(1, 48, 60)[0]).save("videos/photo.png")


def table(text: str) -> list[list[str]]:
    """The cells of the lines from the head of the table on."""
    lines = [line.split() for line in text.splitlines()]
    return lines[lines.index(HEADS) :]


def test_scan_prints_the_buckets_of_a_folder(latte, videos):
    words = ("data", "scan", "videos", SHAPES, "data.frames=4", "data.resolution=32", "data.labels=false")
    found = latte(*words, "codec.name=builtin", "--out", "skipped.jsonl")
    assert found.code == 0, found.err
    assert table(found.out)[1:4] == [
        ["4x32x32", "3", "0.0%", "0", "8", "16"],
        ["4x32x64", "1", "0.0%", "0", "4", "32"],
        ["1x32x32", "1", "20.0%", "0", "32", "4"],
    ]
    assert "pixels cropped: 4.0% of a clip with buckets, 14.0% with data.resolution alone" in found.out
    lines = Path("skipped.jsonl").read_text().splitlines()
    assert {json.loads(line)["reason"].partition(":")[0] for line in lines} == {"too-short", "size"}
    data = latte(*words, "codec.name=builtin", "--json").json
    assert [(row["bucket"], row["clips"], row["batch"], row["tokens"]) for row in data["buckets"]] == [
        ("4x32x32", 3, 8, 16),
        ("4x32x64", 1, 4, 32),
        ("1x32x32", 1, 32, 4),
    ]
    assert [row["lost"] for row in data["buckets"]] == pytest.approx([0, 0, 0.2])
    assert (data["cropped"], data["cropped_with_one_size"]) == pytest.approx((0.04, 0.14))
    assert (data["rule"], data["fps"]) == ("strict", None)


def test_plan_prints_the_same_table_and_without_files_only_shapes(latte, videos):
    found = latte("plan", "shapes", *RUN, SHAPES)
    assert found.code == 0, found.err
    expected = [
        ["4x32x32", "3", "0.0%", "0", "4", "256"],
        ["4x32x64", "1", "0.0%", "0", "2", "512"],
        ["1x32x32", "1", "20.0%", "0", "16", "64"],
    ]
    assert table(found.out)[1:4] == expected
    data = latte("plan", "shapes", *RUN, SHAPES, "--json").json
    assert [[row["bucket"], row["clips"], row["batch"]] for row in data["buckets"]] == [
        ["4x32x32", 3, 4],
        ["4x32x64", 1, 2],
        ["1x32x32", 1, 16],
    ]
    bare = latte("plan", "shapes", *RUN, SHAPES, "data.root=nowhere")
    assert table(bare.out)[1:4] == [[row[0], *row[4:]] for row in expected]
    assert latte("plan", "shapes", *RUN, "--json").json["buckets"] == []


def test_training_counts_the_skipped_and_prints_the_table_at_its_start(latte, videos):
    found = latte("train", "shapes", *RUN, SHAPES, "train.steps=2", "--out", "run", "--json")
    assert found.code == 0, found.err
    assert "2 files cannot be used (1 too-short, 1 size), see run/skipped.jsonl" in found.err
    heads = [line for line in found.err.splitlines() if line.split()[-8:] == HEADS]
    assert len(heads) == 1
    assert "pixels cropped: " in found.err


def test_mixed_rates_are_reported_in_one_line_by_scan_and_at_the_start_of_training(latte, videos):
    encode(Path("videos/fast.mp4"), numbered(20, 64, 64), rate=50)
    notice = "the clips have different frame rates, 25 to 50 fps, so frames are chosen by time"
    words = ("data", "scan", "videos", "data.labels=false")
    scanned = latte(*words)
    assert [notice in line for line in scanned.out.splitlines()].count(True) == 1
    data = latte(*words, "data.frames=4", "--json").json
    assert (data["rule"], data["fps"]) == ("time", 25)
    trained = latte("train", "shapes", *RUN, "train.steps=1", "--out", "run", "--json")
    assert trained.code == 0, trained.err
    assert [notice in line for line in trained.err.splitlines()].count(True) == 1
    strict = latte(*words, "data.rule=strict")
    assert notice not in strict.out


def test_one_rate_is_not_reported(latte, videos):
    for words in (("data", "scan", "videos", "data.labels=false"), ("plan", "shapes", *RUN)):
        found = latte(*words)
        assert found.code == 0, found.err
        assert "frame rates" not in found.out + found.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("data.buckets=[4x32x32,4x30x32]",), "data.buckets: 4x30x32 must have a height .* 4x32x32"),
        (
            ("data.buckets=[4x32x32,5x32x32]", "model.patch=compression", "model.tube=2"),
            "data.buckets: 5x32x32 has 5 frames, .*; the nearest is 4x32x32",
        ),
        (
            ("data.buckets=[4x32x32,4x128x128]", "train.global_batch=2"),
            "train.global_batch is 2 clips of 4x32x32, a budget of .* give train.global_batch=15, or leave",
        ),
        (("data.buckets=auto", "data.bucket_pixels=3"), "data.bucket_pixels is 3, but the smallest frame"),
        (
            ("data.buckets=[4x32x32]", "data.kind=latents"),
            "data.buckets is .*data.kind=latents does not read",
        ),
        (("data.buckets=[4x32x48]",), "data.buckets does not list 4x32x32, which data.frames and"),
    ],
)
@pytest.mark.parametrize("command", [("plan", "shapes"), ("train", "shapes", "--out", "run")])
def test_bad_buckets_are_one_line_and_exit_2(latte, videos, command, words, message):
    found = latte(*command, *RUN, *words)
    assert (found.code, len(found.errors)) == (2, 1), found.err
    assert "Traceback" not in found.err
    assert re.search(message, found.errors[0]), found.errors[0]
    assert not Path("run/checkpoints").exists()


def test_encoding_with_buckets_is_refused(latte, videos):
    words = ("data.labels=false", "data.resolution=32", "data.frames=4", "data.buckets=[4x32x32]")
    found = latte("data", "encode", "videos", "--out", "latents", *words)
    assert (found.code, len(found.errors)) == (2, 1), found.err
    assert "one set of latents has one size" in found.errors[0]
    assert not Path("latents").exists()


def test_a_folder_of_which_no_bucket_takes_a_file_is_refused_with_the_first_reason(latte):
    Path("videos").mkdir()
    encode(Path("videos/strip.mp4"), numbered(9, 32, 256))
    found = latte("train", "shapes", *RUN, "data.buckets=[4x32x32]", "--out", "run")
    assert (found.code, len(found.errors)) == (2, 1), found.err
    assert "would lose 88% of their pixels in the nearest bucket, 4x32x32" in found.errors[0]
