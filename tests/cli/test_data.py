# SPDX-License-Identifier: Apache-2.0
"""``latte data``: synth makes a set that scan reads, inspect shows, encode turns into latents, and train
learns from.
"""

import csv
import json
import re
from pathlib import Path

import pytest
from PIL import Image

from latte.data.clips import to_float
from latte.data.datasets import DataConfig, build_dataset
from latte.data.media import probe, read_frames
from latte.runtime import generator
from tiny import WORDS


@pytest.fixture
def videos(latte):
    """Eight procedural videos of 5 frames, two of each direction."""
    found = latte("data", "synth", "videos", "--count", 8, "--frames", 5, "--size", 16, "--json")
    assert found.json == {"out": "videos", "clips": 8, "classes": ["up", "down", "left", "right"]}
    return Path("videos")


def test_synth_writes_class_folders_and_captions(videos):
    assert sorted(path.name for path in videos.iterdir()) == ["captions.csv", "down", "left", "right", "up"]
    with open(videos / "captions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8
    for row in rows:
        assert probe(videos / row["path"]).frames == 5
        assert row["caption"].endswith(Path(row["path"]).parent.name)


@pytest.mark.parametrize(("language", "ascii"), [("en", True), ("zh", False)])
def test_synth_writes_the_world_as_the_data_set_shows_it(latte, language, ascii):
    words = ("--scenes", "world", "--language", language, "--frames", 3, "--size", 32, "--seed", 5)
    found = latte("data", "synth", "videos", "--count", 10, *words, "--json")
    assert found.code == 0, found.err
    data = build_dataset(
        DataConfig("procedural", resolution=32, frames=3, seed=5, scenes="world", language=language)
    )
    assert found.json == {"out": "videos", "clips": 10, "classes": data.classes}
    with open("videos/captions.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 10
    for index, row in enumerate(rows):
        clip = data.clip(index, generator(0))
        assert row["path"] == f"{data.classes[clip.label]}/{index:05d}.mp4"
        assert row["caption"] == clip.caption
        assert row["caption"].isascii() == ascii
        pixels = to_float(read_frames(probe(Path("videos") / row["path"]), range(3)))
        assert (pixels - clip.video).abs().mean() < 0.05, "the video shows the clip, but for compression"
    captions = ("data.captions=auto", "data.resolution=32", "data.frames=3")
    scanned = latte("data", "inspect", "videos", *captions, "--count", 1, "--json")
    assert scanned.code == 0, scanned.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("--scenes", "wold"),
            "data.scenes is 'wold', which is not one of shapes, world, curtains; did you mean",
        ),
        (
            ("--language", "zh"),
            "data.language is 'zh', but the captions of moving shapes are in English only",
        ),
        (("--scenes", "world", "--language", "fr"), "data.language must be one of en, zh, mixed, got 'fr'"),
        (
            ("--seed", 1, "--scenes", "world", "--size", 16),
            "data.resolution must be at least 32 for data.scenes=world",
        ),
    ],
)
def test_scenes_that_synth_cannot_write_are_refused(latte, words, message):
    found = latte("data", "synth", "out", *words)
    assert (found.code, len(found.errors)) == (2, 1), found.err
    assert found.errors[0].startswith(f"error: {message}")
    assert not Path("out").exists()


def test_scan_lists_the_readable_and_skips_the_rest(latte, videos):
    (videos / "up/broken.mp4").write_bytes(b"nothing")
    found = latte("data", "scan", videos, "--json")
    assert found.code == 0
    assert (found.json["clips"], found.json["classes"]) == (8, ["down", "left", "right", "up"])
    assert [Path(bad["path"]).name for bad in found.json["skipped"]] == ["broken.mp4"]
    assert found.json["quarantined"] == found.json["skipped"], "the key of 0.1.0"
    assert found.json["files"][0]["frames"] == 5
    assert {path.name for path in Path().iterdir()} == {"cache", videos.name}, "nothing is written unasked"
    shown = latte("data", "scan", videos, "--out", "lists/skipped.jsonl").out
    assert json.loads(Path("lists/skipped.jsonl").read_text())["reason"].startswith("not-a-video")
    assert shown.splitlines()[0] == "8 clips in 4 classes, 1 skipped"


def test_scan_asks_for_long_enough_clips_only_when_a_length_is_given(latte, videos):
    assert latte("data", "scan", videos, "data.frames=3", "data.interval=2", "--json").json["clips"] == 8
    found = latte("data", "scan", videos, "data.frames=3", "data.interval=3", "--out", "skipped.jsonl")
    assert found.code == 2
    assert "too-short" in found.errors[0]
    assert len(Path("skipped.jsonl").read_text().splitlines()) == 8


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere", "SOURCE is nowhere, but there is no such folder, YAML file or recipe"),
        ("shaps", "did you mean 'shapes'?"),
        (".", "holds no video"),
        ("shapes", "SOURCE has no folder of clips: data.root is not set and data.kind is procedural"),
        ("clip.mp4", "SOURCE is clip.mp4, which is a file; give the folder that holds the videos"),
    ],
)
def test_scan_of_nothing_is_refused(latte, source, message):
    if source == "clip.mp4":
        Path(source).touch()
    found = latte("data", "scan", source)
    assert (found.code, len(found.errors)) == (2, 1)
    assert message in found.errors[0]


def test_a_class_without_a_usable_clip_is_no_class(latte, videos):
    (videos / "zigzag").mkdir()
    (videos / "zigzag/broken.mp4").write_bytes(b"nothing")
    found = latte("data", "scan", videos, "--json")
    assert found.json["classes"] == ["down", "left", "right", "up"]
    assert found.json["empty_classes"] == ["zigzag"]
    lines = latte("data", "scan", videos, "--out", "skipped.jsonl").out.splitlines()
    assert lines[-2:] == ["no usable clip in class zigzag", "skipped files and their reasons: skipped.jsonl"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("--count", "1000000000"),
            "--count must be at most 100,000, got 1,000,000,000; data.kind=procedural trains",
        ),
        (("--size", "100000"), "16 frames of 100000 x 100000 take 480,000,000,000 bytes"),
        (("--frames", "1000000000"), "1000000000 frames of 64 x 64 take"),
    ],
)
def test_silly_counts_are_refused_at_once(latte, words, message):
    found = latte("data", "synth", "out", *words)
    assert (found.code, len(found.errors)) == (2, 1), found.err
    assert found.errors[0].startswith(f"error: {message}")
    assert not Path("out").exists()
    assert latte("data", "inspect", "shapes", "--count", 10**9).code == 2


def test_scan_and_inspect_read_a_folder_of_latents(latte, videos):
    words = ["data.resolution=[16,24]", "codec.name=pixels", "data.frames=4"]
    assert latte("data", "encode", videos, *words, "--out", "shards").code == 0
    found = latte("data", "scan", "shards", "--json")
    assert found.code == 0, found.err
    assert (found.json["clips"], found.json["classes"]) == (8, ["down", "left", "right", "up"])
    assert {key: found.json["files"][0][key] for key in ("path", "frames", "height", "width", "class")} == {
        "path": "down/00001.mp4",
        "frames": 5,
        "height": 16,
        "width": 24,
        "class": "down",
    }
    assert found.json["captions"] == {"clips": 0, "different": 0}
    found = latte("data", "scan", "shards", "data.frames=6")
    assert found.code == 2
    assert "too-short" in found.errors[0]
    found = latte("data", "inspect", "shards", "data.frames=4", "--count", 2, "--json")
    assert found.code == 0, found.err
    assert len(found.json["clips"]) == 2
    with Image.open("clips.png") as sheet:
        assert sheet.width == 4 * (24 * 6 + 2) + 2
    found = latte("data", "encode", "shards")
    assert (found.code, len(found.errors)) == (2, 1)
    assert "data.kind is 'latents'" in found.errors[0]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_line(latte, videos, monkeypatch):
    (videos / "up/broken.mp4").write_bytes(b"nothing")
    writes = []

    def full(*_, **__):
        writes.append(1)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("PIL.Image.Image.save", full)
        found = latte(
            "data", "inspect", videos, "data.resolution=16", "data.frames=4", "--out", "sheets/s.png"
        )
    assert (found.code, len(found.errors), len(writes)) == (1, 1, 1), found.err
    assert re.match(
        r"error: could not write the contact sheet to sheets/s\.png: No space left", found.errors[0]
    )
    assert list(Path("sheets").iterdir()) == []
    found = latte("data", "scan", videos, "--out", "/dev/full")
    assert (found.code, len(found.errors)) == (1, 1), found.err
    assert re.match(
        r"error: could not write the list of skipped videos to /dev/full: No space left", found.errors[0]
    )
    with monkeypatch.context() as patch:
        patch.setattr("latte.files.commit_file", full)
        found = latte("data", "synth", "more", "--count", 1, "--frames", 2, "--size", 16)
    assert (found.code, len(found.errors)) == (1, 1)
    assert re.match(r"error: could not write the clips to more: No space left", found.errors[0])


def test_inspect_checks_its_destination_first(latte, videos):
    for out, message in (
        ("clips.docx", "names no image format"),
        (".", "names no image format"),
        ("up.png", "is a folder"),
    ):
        Path("up.png").mkdir(exist_ok=True)
        found = latte("data", "inspect", "nowhere-else" if out == "clips.docx" else videos, "--out", out)
        assert (found.code, len(found.errors)) == (2, 1)
        assert message in found.errors[0] or out == "clips.docx"


def test_names_reach_the_terminal_escaped(latte, videos):
    (videos / "up" / "red\x1b[31m\n.mp4").write_bytes((videos / "up/00000.mp4").read_bytes())
    found = latte("data", "scan", videos, "--files")
    assert found.code == 0
    assert "red\\x1b[31m\\n.mp4  5 frames" in found.out
    assert "\x1b" not in found.out + found.err
    found = latte("data", "encode", videos, "codec.name=pixels", "data.resolution=16", "--out", "a b")
    assert found.out.splitlines()[-1] == "train on it with: data.kind=latents 'data.root=a b'"


def test_inspect_shows_clips_as_training_sees_them(latte, videos):
    found = latte(
        "data",
        "inspect",
        videos,
        "data.resolution=8",
        "data.frames=4",
        "codec.name=pixels",
        "--count",
        3,
        "--json",
    )
    assert found.code == 0, found.err
    assert len(found.json["clips"]) == 3
    with Image.open(found.json["sheet"]) as sheet:
        assert sheet.width == 4 * (96 + 2) + 2
    assert latte("data", "inspect", "shapes", "--count", 2, "--out", "p/q.png").code == 0


def test_encode_once_then_inspect_and_train_from_the_latents(latte, videos):
    codec = ["codec.name=builtin", "data.resolution=16", "data.frames=4"]
    first = latte("data", "encode", videos, *codec, "--out", "shards", "--json")
    assert first.code == 0, first.err
    assert (first.json["videos"], first.json["new_shards"]) == (8, first.json["shards"])
    assert latte("data", "encode", videos, *codec, "--out", "shards", "--json").json["new_shards"] == 0
    latents = ["data.kind=latents", "data.root=shards"]
    assert (
        latte("data", "inspect", "actions-small", *codec, "data.flip=false", "data.interval=1", *latents).code
        == 0
    )
    model = [
        word
        for word in WORDS
        if word.startswith(("model.depth", "model.width", "model.heads", "train.", "sample."))
    ]
    words = ["actions-small", *model, *codec, "data.flip=false", "data.interval=1", *latents, "train.steps=1"]
    trained = latte("train", *words, "--out", "run", "--json")
    assert trained.code == 0, trained.err
    assert latte("train", *words, "train.sample_every=1", "train.steps=2", "--out", "run").code == 0, (
        "samples may be asked for later"
    )
    assert latte("sample", "run", "--count", 1).code == 0
    for words, message in [
        (["data.resolution=32"], "data.resolution"),
        (["codec.name=pixels", "model.patch_size=2"], "codec"),
        (["data.flip=true"], "data.flip"),
        (["data.frames=6"], "too-short"),
    ]:
        found = latte(
            "train",
            "actions-small",
            *model,
            *codec,
            "data.flip=false",
            "data.interval=1",
            *latents,
            *words,
            "--out",
            "other",
        )
        assert found.code == 2
        assert message in found.errors[0]


def test_encode_reads_captions_first_and_refuses_them_before_anything_is_encoded(latte, videos):
    words = [
        "shapes-text",
        "data.kind=folder",
        f"data.root={videos}",
        "data.hold_out=0",
        "data.captions=auto",
        "codec.name=pixels",
        "data.resolution=16",
        "data.frames=4",
        "--out",
        "shards",
    ]
    found = latte("data", "encode", *words, "text.length=5")
    assert (found.code, len(found.errors), Path("shards").exists()) == (2, 1, False)
    assert re.match(
        r"error: the caption of \w+/0000\d.mp4, 'a .*', has 6 tokens, but text.length is 5 \(",
        found.errors[0],
    )
    assert found.errors[0].endswith("; give text.length=6, or shorten them")
    found = latte("data", "encode", *words, "data.flip=true", "--json")
    assert found.code == 0, found.err
    assert found.json["new_captions"] == found.json["captions"] + 1
    (warning,) = [line for line in found.err.splitlines() if "data.flip" in line]
    assert re.match(
        r"\d of \d captions mention left or right \('a .* (left|right)'\), .*; set data.flip=false$", warning
    )
    assert found.err.index("captions 100%") < found.err.index("encode 100%")
    again = latte("data", "encode", *words, "data.flip=true")
    assert "0 features are new" in again.out
    assert not [
        line for line in latte("data", "encode", *words[:-1], "plain").err.splitlines() if "data.flip" in line
    ]


def test_scan_writes_a_page_where_it_is_asked_to(latte, videos):
    found = latte("data", "scan", videos, "--page", "pages/clips.html", "--json")
    assert found.code == 0, found.err
    assert found.json["page"] == "pages/clips.html"
    assert found.json["summary"]["classes"] == {"down": 2, "left": 2, "right": 2, "up": 2}
    assert Path("pages/clips.html").read_text().count("data:image/webp") == 8
    for page, message in (
        ("clips.txt", "is no .html file"),
        (".", "is no .html file"),
        ("d.html", "a folder"),
    ):
        Path("d.html").mkdir(exist_ok=True)
        found = latte("data", "scan", videos, "--page", page)
        assert (found.code, len(found.errors)) == (2, 1)
        assert message in found.errors[0]


def test_a_manifest_of_something_else_beside_videos_is_no_latents(latte, videos):
    for content in ("[]", "{}", "nonsense"):
        (videos / "manifest.json").write_text(content)
        found = latte("data", "scan", videos, "--json")
        assert found.code == 0, found.err
        assert found.json["clips"] == 8


def test_synth_into_a_file_and_encode_with_its_speed(latte, videos):
    Path("taken").touch()
    found = latte("data", "synth", "taken", "--count", 1)
    assert (found.code, found.errors) == (2, ["error: OUT is taken, which is a file; give a folder"])
    words = ("codec.name=pixels", "data.resolution=16", "data.frames=4")
    found = latte("data", "encode", videos, *words, "--out", "latents")
    assert re.search(r"^encode 100%  [\d.e+]+ clips/s  0 s left$", found.err, re.MULTILINE), found.err
