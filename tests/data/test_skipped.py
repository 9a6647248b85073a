# SPDX-License-Identifier: Apache-2.0
"""A scan reports everything: what is skipped and why, what is damaged, what is unusual, and what no reader
exists for.
"""

import json
import logging
import os
import unicodedata

import pytest
from PIL import Image

from encoded import folder_config, pixels
from latte.checks import InputError
from latte.data.encode import encode_dataset
from latte.data.skipped import file_lines, remarks, require_clips, scan, write_skipped
from latte.evaluation.sources import open_side
from videos import encode, numbered


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def root(tmp_path):
    """A whole video, one cut in the middle, and one that decodes on past its damage but lacks frames."""
    folder = tmp_path / "videos"
    folder.mkdir()
    encode(folder / "whole.mkv", numbered(60), g="12")
    data = (folder / "whole.mkv").read_bytes()
    (folder / "cut.mkv").write_bytes(data[: len(data) * 6 // 10])
    return folder


def test_damage_is_shown_by_the_scan_and_recorded(root, caplog):
    with caplog.at_level(logging.INFO, "latte"):
        found = scan(root)
    assert [clip.key for clip in found.clips] == ["cut.mkv", "whole.mkv"]
    assert [bad["path"] for bad in found.damaged] == ["cut.mkv"]
    assert found.damaged[0]["reason"].startswith("damaged: ")
    assert [note["path"] for note in found.notes] == [str(root / "cut.mkv")]
    text = "\n".join(remarks(found))
    assert "1 clips with note damaged, first cut.mkv: " in text
    assert "1 clips with note damaged" in caplog.text
    again = scan(root)
    assert again.damaged == found.damaged, "notes survive the cache"


@pytest.mark.parametrize("stored", [False, True])
def test_a_partly_damaged_video_is_not_whole_on_either_side_of_an_evaluation(
    root, tmp_path, monkeypatch, stored
):
    source = root
    if stored:
        source = tmp_path / "latents"
        monkeypatch.setattr("latte.evaluation.sources._codec", lambda *given: pixels())
        encode_dataset(folder_config(root, labels=False), pixels(), tmp_path / "latents", cache_dir=tmp_path)
        manifest = json.loads((tmp_path / "latents/manifest.json").read_text())
        assert [bad["path"] for bad in manifest["damaged"]] == ["cut.mkv"]
        assert len(manifest["videos"]) == 2, "training uses its first part"
    for side in ("real", "fake"):
        found = open_side(side, source, tmp_path / "cache")
        notes = {source.id: str(source.note).partition(":")[0] for source in found.sources}
        assert notes == {"cut.mkv": "damaged", "whole.mkv": "None"}, "warned of, and in the manifest"


def test_names_that_are_not_utf8_are_skipped_at_the_scan_with_the_reason(root, tmp_path):
    bad_name, bad_class = os.fsdecode(b"\xff.mp4"), os.fsdecode(b"caf\xe9")
    try:
        encode(root / "source.mp4", numbered(3)).rename(root / bad_name)
        (root / bad_class).mkdir()
    except OSError:
        pytest.skip("this file system does not take the name")
    (root / bad_name).rename(root / bad_class / "a.mp4")
    (root / "good").mkdir()
    for name in ("whole.mkv", "cut.mkv"):
        (root / name).rename(root / "good" / name)
    encode(root / "source.mp4", numbered(3)).rename(root / "good" / bad_name)
    found = scan(root)
    assert found.classes == ("good",)
    assert [clip.key for clip in found.clips] == ["good/cut.mkv", "good/whole.mkv"]
    assert {bad["reason"] for bad in found.skipped} == {"unsupported: its name is not valid UTF-8; rename it"}
    assert len(found.skipped) == 2
    assert write_skipped(tmp_path / "skipped.jsonl", found.skipped) == 2
    "\n".join(file_lines(found)).encode("utf-8")


def test_escape_characters_and_line_breaks_in_names_are_shown_escaped(root):
    (root / "red\x1b[31m\nline.mp4").write_bytes(b"nothing")
    (root / "whole.mkv").rename(root / "clip\x1b]0;title\x07.mkv")
    (root / "file.bad\x1b[2J").write_bytes(b"?")
    found = scan(root)
    lines = [*file_lines(found), *remarks(found)]
    assert all(line.isprintable() for line in lines), lines
    assert any("red\\x1b[31m\\nline.mp4  skipped: not-a-video" in line for line in lines)
    (root / "only").mkdir()
    (root / "only" / "x\x1b[31m.mp4").write_bytes(b"nothing")
    with pytest.raises(InputError) as error:
        require_clips(scan(root / "only"))
    assert str(error.value).isprintable()


def test_files_that_are_not_read_are_counted_by_suffix(root):
    for name in ("a.xyz", "b.webm.part", "c.XYZ", "notes.txt", "captions.csv", "LICENSE", ".hidden"):
        (root / name).write_text("something")
    Image.new("RGB", (8, 8)).save(root / "cover.png")
    found = scan(root)
    assert found.ignored == {".xyz": 2, ".part": 1, "": 1, ".png": 1}
    assert "5 files are not read, by suffix: 1 without a suffix, 1 .part, 1 .png, 2 .xyz" in remarks(found)
    empty = root.parent / "none"
    empty.mkdir()
    (empty / "a.xyz").write_text("something")
    with pytest.raises(
        InputError, match=r"holds no video .*1 files are not read, by suffix: 1 .xyz; give another"
    ):
        require_clips(scan(empty))


def test_a_video_without_a_suffix_is_found_by_its_first_bytes(root):
    encode(root / "a.mp4", numbered(5)).rename(root / "clip")
    (root / "README").write_text("ftyp is a word")
    os.mkfifo(root / "pipe")
    found = scan(root)
    assert [clip.key for clip in found.clips] == ["clip", "cut.mkv", "whole.mkv"]
    assert found.ignored == {"": 2}


def test_a_missing_folder_whose_name_looks_the_same_is_explained(tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "\u00e9t\u00e9") for form in ("NFC", "NFD"))
    (tmp_path / decomposed).mkdir()
    if (tmp_path / composed).is_dir():
        pytest.skip("this file system normalises names")
    with pytest.raises(InputError, match="another Unicode form"):
        scan(tmp_path / composed)
