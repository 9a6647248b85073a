# SPDX-License-Identifier: Apache-2.0
"""Captions of a folder from every kind of file; a caption without a video and a video without a caption are refused by name."""

import json
from dataclasses import replace

import pytest
from support import shared

from latte.checks import InputError
from latte.data.datasets import DataConfig, FolderDataset
from latte.runtime import generator
from videos import encode, numbered

TOLD = {"a/one.mp4": "a grey wall", "a/two.mp4": 'it says "hello", twice', "b/three.mp4": "dusk, é"}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Probe results of a test never meet those of another, or the user's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def root(tmp_path):
    """Three videos in two folders, and one that cannot be used."""
    for key in TOLD:
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
    stills = [dataset.still(index, generator(index)) for index in range(len(dataset))]
    assert [clip.caption for clip in clips] == [still.caption for still in stills]
    assert dataset.captions == sorted({clip.caption for clip in clips if clip.caption})
    return {clip.key: clip.caption for clip in clips}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("captions.csv", table(TOLD.items())),
        ("captions.csv", "\ufeff" + table(TOLD.items())),
        ("captions.csv", table([("x", *row[::-1]) for row in TOLD.items()], ("class", "text", "video"))),
        ("captions.jsonl", lines(TOLD.items())),
        ("captions.jsonl", lines(TOLD.items(), ("key", "text"))),
        ("captions.csv", table([*TOLD.items(), ("b/broken.mp4", "nobody sees it")])),
        ("captions.csv", table(TOLD.items()).replace('"path","caption"', "Path, Caption")),
    ],
)
def test_every_kind_of_table_says_the_same(root, name, text):
    (root / name).write_text(text, encoding="utf-8")
    assert captions_of(root) == TOLD
    assert captions_of(root, str(root / name)) == TOLD


def test_a_text_file_beside_each_video(root):
    for key, caption in TOLD.items():
        (root / key).with_suffix(".txt").write_text(f" {caption}\n")
    assert captions_of(root) == TOLD


def test_a_table_elsewhere_names_videos_from_its_own_folder_or_from_the_root(root):
    elsewhere = root.parent / "words"
    elsewhere.mkdir()
    (elsewhere / "mine.csv").write_text(table((f"../set/{key}", caption) for key, caption in TOLD.items()))
    (elsewhere / "root.jsonl").write_text(lines(TOLD.items()))
    assert (
        captions_of(root, str(elsewhere / "mine.csv"))
        == captions_of(root, str(elsewhere / "root.jsonl"))
        == TOLD
    )


def test_a_table_of_the_whole_serves_a_part(root):
    (root / "captions.csv").write_text(table(TOLD.items()))
    assert captions_of(root / "a", str(root / "captions.csv")) == {
        "one.mp4": TOLD["a/one.mp4"],
        "two.mp4": TOLD["a/two.mp4"],
    }


def test_without_the_key_nothing_is_read_and_nothing_changes(root):
    before = FolderDataset(config(root, None)).describe()
    (root / "captions.csv").write_text("rubbish")
    assert captions_of(root, None) == dict.fromkeys(TOLD)
    assert FolderDataset(config(root, None)).describe() == before


def test_another_caption_is_another_set(root):
    (root / "captions.csv").write_text(table(TOLD.items()))
    before = FolderDataset(config(root)).describe()
    (root / "captions.csv").write_text(table({**TOLD, "a/one.mp4": "a white wall"}.items()))
    after = FolderDataset(config(root)).describe()
    assert after != before
    assert before != FolderDataset(config(root, None)).describe()


ALL = list(TOLD.items())


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        (
            "captions.csv",
            table([*ALL, ("a/four.mp4", "nothing")]),
            "captions.csv:5 describes 'a/four.mp4', but there is no such video",
        ),
        ("captions.csv", table([*ALL, ("a", "a folder")]), "there is no such video"),
        ("captions.csv", table([*ALL, ("captions.csv", "itself")]), "there is no such video"),
        ("captions.csv", table([*ALL, ("", "nobody")]), "there is no such video"),
        ("captions.csv", table([*ALL, ("\0", "nobody")]), "there is no such video"),
        (
            "captions.csv",
            table([*ALL, ALL[0]]),
            "captions.csv:5 is 'a/one.mp4', but this video has a caption already",
        ),
        ("captions.csv", table([*ALL, ("b/../a/one.mp4", "again")]), "this video has a caption already"),
        (
            "captions.csv",
            table([*ALL[:2], ("b/three.mp4", "  ")]),
            "captions.csv:4 is 'b/three.mp4', but its caption is empty",
        ),
        ("captions.csv", table(ALL[1:]), "1 of 3 videos in .* have no caption, first 'a/one.mp4'"),
        ("captions.csv", table(ALL, ("path", "words")), "one of its names is to be caption or text"),
        (
            "captions.csv",
            table(ALL, ("name", "text")),
            "one of its names is to be path or file or video or key",
        ),
        (
            "captions.csv",
            table([(*row, "x") for row in ALL], ("path", "caption", "text")),
            "one of its names",
        ),
        (
            "captions.csv",
            "path,caption\na/one.mp4,one, two\n",
            "captions.csv:2 is 'a/one.mp4', but the header has 2 columns",
        ),
        ("captions.csv", "path,caption\na/one.mp4\n", "the header has 2 columns"),
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
        ("captions.jsonl", lines(ALL) + "{", r"captions.jsonl:7 is no JSON object"),
        ("captions.jsonl", "[" * 50_000, "is no JSON object"),
        ("captions.jsonl", '["a/one.mp4", "x"]\n', "is no JSON object"),
        ("captions.jsonl", lines([("a/one.mp4", 3)]), r"captions.jsonl:1 is 3, but caption is a text"),
        ("a/one.txt", "", "its caption is empty"),
        ("a/one.txt", "only this", "2 of 3 videos .* first 'a/two.mp4'; write one into .*two.txt"),
        ("other.txt", "nothing", "holds neither captions.csv nor captions.jsonl, nor a .txt beside a video"),
    ],
)
def test_what_is_wrong_with_captions_is_told_in_one_line(root, name, text, told):
    (root / name).write_text(text)
    with pytest.raises(InputError, match=told) as error:
        FolderDataset(config(root))
    assert "\n" not in str(error.value)


def test_a_text_file_beside_no_video_is_no_caption(root):
    for key, caption in TOLD.items():
        (root / key).with_suffix(".txt").write_text(caption)
    (root / "README.txt").write_text("about these videos")
    assert captions_of(root) == TOLD


def test_captions_of_two_kinds_are_refused(root):
    (root / "captions.csv").write_text(table(ALL))
    (root / "a/two.txt").write_text("two")
    with pytest.raises(InputError, match=r"two kinds, captions.csv and a/two.txt"):
        FolderDataset(config(root))
    assert captions_of(root, str(root / "captions.csv")) == TOLD


@pytest.mark.parametrize(
    ("path", "told"),
    [("none.csv", "there is no such file"), ("words.xls", "read by its ending"), ("l.csv", "UTF-8")],
)
def test_a_file_that_cannot_be_read_is_told(root, path, told):
    (root / "l.csv").write_bytes("path,caption\na/one.mp4,é\n".encode("latin1"))
    with pytest.raises(InputError, match=told):
        FolderDataset(config(root, str(root / path)))


@pytest.mark.parametrize("kind", ["procedural", "latents"])
def test_kinds_that_bring_their_own_refuse_the_key(kind):
    with pytest.raises(InputError, match=r"data.captions is 'auto', but data.kind"):
        DataConfig(kind=kind, captions="auto")


@pytest.mark.parametrize(
    ("name", "count"), [("captioned_panda", 132), ("isl_signs", 90), ("asl_gestures", 20)]
)
def test_the_captions_of_real_sets_are_read(name, count):
    dataset = FolderDataset(replace(config(shared("data", name)), labels=False))
    assert len(dataset) == count
    assert set(dataset.caption_of) == {clip.key for clip in dataset.clips}
    assert all(len(caption) > 5 for caption in dataset.captions)
