# SPDX-License-Identifier: Apache-2.0
"""Captions of a folder from every kind of file; a caption without a video and a video without a caption are
refused by name.
"""

import json
import unicodedata
from dataclasses import replace

import pytest
from PIL import Image
from support import shared

from latte.checks import InputError
from latte.data.datasets import DataConfig, FolderDataset
from latte.runtime import generator
from videos import encode, numbered

CAPTIONS = {"a/one.mp4": "a grey wall", "a/two.mp4": 'it says "hello", twice', "b/three.mp4": "dusk, é"}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Probe results of a test never meet those of another, or the user's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def root(tmp_path):
    """Three videos in two folders, and one that cannot be used."""
    for key in CAPTIONS:
        path = tmp_path / "set" / key
        path.parent.mkdir(parents=True, exist_ok=True)
        encode(path, numbered(4, 16, 16))
    (tmp_path / "set/b/broken.mp4").write_bytes(b"nothing")
    return tmp_path / "set"


def table(rows, header=("path", "caption")) -> str:
    """Rows as csv."""
    quoted = [",".join('"' + cell.replace('"', '""') + '"' for cell in row) for row in [header, *rows]]
    return "\r\n".join(quoted) + "\r\n"


def lines(rows, names=("path", "caption")) -> str:
    """Rows as jsonl."""
    return "".join(json.dumps(dict(zip(names, row, strict=True))) + "\n\n" for row in rows)


def config(root, captions="auto") -> DataConfig:
    return DataConfig(root=str(root), resolution=16, frames=2, captions=captions)


def captions_of(root, captions="auto") -> dict[str, str]:
    """Key -> caption as the clips have it."""
    dataset = FolderDataset(config(root, captions))
    clips = [dataset.clip(index, generator(index)) for index in range(len(dataset))]
    images = [dataset.image(index, generator(index)) for index in range(len(dataset))]
    assert [clip.caption for clip in clips] == [image.caption for image in images]
    assert dataset.captions == sorted({clip.caption for clip in clips if clip.caption})
    return {clip.key: clip.caption for clip in clips}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("captions.csv", table(CAPTIONS.items())),
        ("captions.csv", "\ufeff" + table(CAPTIONS.items())),
        ("captions.csv", table([("x", *row[::-1]) for row in CAPTIONS.items()], ("class", "text", "video"))),
        ("captions.jsonl", lines(CAPTIONS.items())),
        ("captions.jsonl", lines(CAPTIONS.items(), ("key", "text"))),
        ("captions.csv", table([*CAPTIONS.items(), ("b/broken.mp4", "a broken video")])),
        ("captions.csv", table(CAPTIONS.items()).replace('"path","caption"', "Path, Caption")),
    ],
)
def test_every_kind_of_table_gives_the_same(root, name, text):
    (root / name).write_text(text, encoding="utf-8")
    assert captions_of(root) == CAPTIONS
    assert captions_of(root, str(root / name)) == CAPTIONS


def test_a_text_file_beside_each_video(root):
    for key, caption in CAPTIONS.items():
        (root / key).with_suffix(".txt").write_text(f" {caption}\n")
    assert captions_of(root) == CAPTIONS


def test_a_table_elsewhere_names_videos_from_its_own_folder_or_from_the_root(root):
    elsewhere = root.parent / "words"
    elsewhere.mkdir()
    (elsewhere / "own.csv").write_text(table((f"../set/{key}", caption) for key, caption in CAPTIONS.items()))
    (elsewhere / "root.jsonl").write_text(lines(CAPTIONS.items()))
    assert (
        captions_of(root, str(elsewhere / "own.csv"))
        == captions_of(root, str(elsewhere / "root.jsonl"))
        == CAPTIONS
    )


def test_a_table_of_the_whole_serves_a_part(root):
    (root / "captions.csv").write_text(table(CAPTIONS.items()))
    assert captions_of(root / "a", str(root / "captions.csv")) == {
        "one.mp4": CAPTIONS["a/one.mp4"],
        "two.mp4": CAPTIONS["a/two.mp4"],
    }


def test_without_the_key_nothing_is_read_and_nothing_changes(root):
    before = FolderDataset(config(root, None)).describe()
    (root / "captions.csv").write_text("rubbish")
    assert captions_of(root, None) == dict.fromkeys(CAPTIONS)
    assert FolderDataset(config(root, None)).describe() == before


def test_another_caption_is_another_set(root):
    (root / "captions.csv").write_text(table(CAPTIONS.items()))
    before = FolderDataset(config(root)).describe()
    (root / "captions.csv").write_text(table({**CAPTIONS, "a/one.mp4": "a white wall"}.items()))
    after = FolderDataset(config(root)).describe()
    assert after != before
    assert before != FolderDataset(config(root, None)).describe()


def test_a_space_after_the_separator_is_skipped_and_quotes_are_no_part_of_a_caption(root):
    rows = ['a/one.mp4, "dog"', 'a/two.mp4,  "one, ""two"""', "b/three.mp4, plain "]
    (root / "captions.csv").write_text("path, caption\n" + "\n".join(rows) + "\n")
    assert captions_of(root) == {"a/one.mp4": "dog", "a/two.mp4": 'one, "two"', "b/three.mp4": "plain"}


def test_frame_folders_with_dots_in_their_names_have_captions_of_their_own(tmp_path):
    for name in ("scene.01", "scene.02"):
        (tmp_path / name).mkdir()
        for number, pixels in enumerate(numbered(3, 16, 16)):
            Image.fromarray(pixels).save(tmp_path / name / f"{number}.png")
    (tmp_path / "scene.01.txt").write_text("first")
    (tmp_path / "scene.02.txt").write_text("second")
    encode(tmp_path / "scene.03.mp4", numbered(3, 16, 16))
    (tmp_path / "scene.03.txt").write_text("third")
    assert captions_of(tmp_path) == {"scene.01": "first", "scene.02": "second", "scene.03.mp4": "third"}
    (tmp_path / "scene.02.txt").unlink()
    with pytest.raises(InputError, match=r"first 'scene.02'; write one into .*scene\.02\.txt"):
        captions_of(tmp_path)


def test_names_match_in_any_unicode_form_unless_two_videos_differ_in_it_alone(root):
    composed, decomposed = (unicodedata.normalize(form, "caf\u00e9.mp4") for form in ("NFC", "NFD"))
    (root / "b/three.mp4").rename(root / "b" / decomposed)
    if (root / "b" / composed).exists():
        pytest.skip("this file system normalises names")
    rows = [("a/one.mp4", "one"), ("a/two.mp4", "two"), (f"b/{composed}", "three")]
    (root / "captions.csv").write_text(table(rows), encoding="utf-8")
    assert captions_of(root)[f"b/{decomposed}"] == "three"
    encode(root / "b" / composed, numbered(4, 16, 16))
    rows.append((f"b/{decomposed}", "four"))
    (root / "captions.csv").write_text(table(rows), encoding="utf-8")
    found = captions_of(root)
    assert (found[f"b/{composed}"], found[f"b/{decomposed}"]) == ("three", "four")


ALL = list(CAPTIONS.items())


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "captions.csv",
            table([*ALL, ("a/four.mp4", "nothing")]),
            "captions.csv:5 describes 'a/four.mp4', but there is no such video",
        ),
        ("captions.csv", table([*ALL, ("a", "a folder")]), "there is no such video"),
        ("captions.csv", table([*ALL, ("captions.csv", "itself")]), "there is no such video"),
        ("captions.csv", table([*ALL, ("", "no video")]), "there is no such video"),
        ("captions.csv", table([*ALL, ("\0", "no video")]), "there is no such video"),
        (
            "captions.csv",
            table([*ALL, ALL[0]]),
            "captions.csv:5 describes 'a/one.mp4', which has a caption already",
        ),
        ("captions.csv", table([*ALL, ("b/../a/one.mp4", "again")]), "which has a caption already"),
        (
            "captions.csv",
            table([*ALL[:2], ("b/three.mp4", "  ")]),
            "captions.csv:4 has an empty caption for 'b/three.mp4'",
        ),
        ("captions.csv", table(ALL[1:]), "1 of 3 videos in .* have no caption, first 'a/one.mp4'"),
        ("captions.csv", table(ALL, ("path", "words")), "exactly one must be caption or text"),
        ("captions.csv", table(ALL, ("name", "text")), "exactly one must be path or file or video or key"),
        (
            "captions.csv",
            table([(*row, "x") for row in ALL], ("path", "caption", "text")),
            "exactly one must be",
        ),
        (
            "captions.csv",
            "path,caption\na/one.mp4,one, two\n",
            "captions.csv:2 \\('a/one.mp4'\\) does not have the 2 columns of the header",
        ),
        ("captions.csv", "path,caption\na/one.mp4\n", "does not have the 2 columns"),
        ("captions.csv", 'path,caption\na/one.mp4,"one\n', "captions.csv:2 is not csv"),
        ("captions.csv", 'path,caption\na/one.mp4,"one"x\n', "captions.csv:2 is not csv"),
        ("captions.csv", "", "the header in .*captions.csv:1 is ''"),
        ("captions.csv", "path,caption\n", "3 of 3 videos"),
        (
            "captions.csv",
            table(ALL[1:], ALL[0]),
            "captions.csv:1 is 'a/one.mp4,a grey wall', but .*write path,caption above",
        ),
        (
            "captions.csv",
            "path;caption\na/one.mp4;one\n",
            "captions.csv:1 is 'path;caption', but .*commas between the columns",
        ),
        ("captions.jsonl", lines(ALL) + "{", r"captions.jsonl:7 is not a JSON object"),
        ("captions.jsonl", "[" * 50_000, "is not a JSON object"),
        ("captions.jsonl", '["a/one.mp4", "x"]\n', "is not a JSON object"),
        ("captions.jsonl", lines([("a/one.mp4", 3)]), r"captions.jsonl:1: caption must be a string, got 3"),
        ("a/one.txt", "", "has an empty caption"),
        ("a/one.txt", "only this", "2 of 3 videos .* first 'a/two.mp4'; write one into .*two.txt"),
        ("other.txt", "nothing", "holds neither captions.csv nor captions.jsonl, nor a .txt beside a video"),
    ],
)
def test_wrong_captions_are_refused_in_one_line(root, name, text, message):
    (root / name).write_text(text)
    with pytest.raises(InputError, match=message) as error:
        FolderDataset(config(root))
    assert "\n" not in str(error.value)


def test_a_text_file_beside_no_video_is_no_caption(root):
    for key, caption in CAPTIONS.items():
        (root / key).with_suffix(".txt").write_text(caption)
    (root / "README.txt").write_text("about these videos")
    assert captions_of(root) == CAPTIONS


def test_captions_of_two_kinds_are_refused(root):
    (root / "captions.csv").write_text(table(ALL))
    (root / "a/two.txt").write_text("two")
    with pytest.raises(InputError, match=r"two kinds, captions.csv and a/two.txt"):
        FolderDataset(config(root))
    assert captions_of(root, str(root / "captions.csv")) == CAPTIONS


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("none.csv", "there is no such file"),
        ("words.xls", "ends in neither .csv nor .jsonl"),
        ("l.csv", "UTF-8"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused(root, path, message):
    (root / "l.csv").write_bytes("path,caption\na/one.mp4,é\n".encode("latin1"))
    with pytest.raises(InputError, match=message):
        FolderDataset(config(root, str(root / path)))


@pytest.mark.parametrize("kind", ["procedural", "latents"])
def test_kinds_that_bring_their_own_refuse_the_key(kind):
    with pytest.raises(InputError, match=r"data.captions is 'auto', but data.kind"):
        DataConfig(kind=kind, captions="auto")


@pytest.mark.parametrize(
    ("name", "count"),
    [
        pytest.param("captioned_panda", 132, marks=pytest.mark.nightly),
        ("isl_signs", 90),
        ("asl_gestures", 20),
    ],
)
def test_the_captions_of_real_sets_are_read(name, count):
    dataset = FolderDataset(replace(config(shared("data", name)), labels=False))
    assert len(dataset) == count
    assert set(dataset.caption_of) == {clip.key for clip in dataset.clips}
    assert all(len(caption) > 5 for caption in dataset.captions)
