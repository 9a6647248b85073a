# SPDX-License-Identifier: Apache-2.0
"""A folder at a glance: counts that add up, duplicates by content, captions that fit or not, a page."""

import re
import shutil
from collections import Counter

import pytest

from latte.data.skipped import scan
from latte.data.summary import PREVIEWS, chosen, lines_of, page_of, scan_result, summarise
from videos import encode, numbered


@pytest.fixture
def root(tmp_path):
    """Two classes: two lengths, two rates, two sizes, a copy under another name, and a broken file."""
    folder = tmp_path / "clips"
    for name, frames, side, rate in (("a/1", 4, 32, 25), ("a/2", 6, 32, 25), ("b/1", 6, 48, 30)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        encode(folder / f"{name}.mp4", numbered(frames, side, side), rate=rate)
    shutil.copy(folder / "a/2.mp4", folder / "b/copy.mp4")
    (folder / "b/broken.mp4").write_bytes(b"nothing")
    return folder


def test_counts_are_those_of_the_files(root, tmp_path):
    found = scan(root, cache_dir=tmp_path)
    summary = summarise(found)
    assert summary.sizes == {"32x32": 3, "48x48": 1}
    assert summary.rates == {"25": 3, "30": 1}
    assert summary.frames == {"min": 4, "median": 6, "max": 6}
    assert summary.seconds == {"min": 0.16, "median": 0.22, "max": 0.24}
    assert summary.classes == {"a": 2, "b": 2}
    assert summary.duplicates == [["a/2.mp4", "b/copy.mp4"]]
    assert summary.skipped == {"not-a-video": 1}
    assert summary.captions == {"clips": 0, "different": 0}
    lines = lines_of(found, summary)
    assert lines[0] == "4 clips in 2 classes, 1 skipped"
    assert "sizes       32x32 (3), 48x48 (1)" in lines
    assert "frames      4 to 6, median 6" in lines
    assert "length      0.16 to 0.24 s, median 0.22" in lines
    assert "duplicates  1 copy of another clip" in lines
    assert "  the same: a/2.mp4, b/copy.mp4" in lines
    assert any(line.startswith("  skipped: b/broken.mp4 (not-a-video") for line in lines)
    assert scan_result(found, summary)["summary"]["clips"] == 4


def test_clips_of_one_size_and_other_content_are_no_duplicates(root, tmp_path):
    data = bytearray((root / "b/copy.mp4").read_bytes())
    data[-1] ^= 1
    (root / "b/copy.mp4").write_bytes(data)
    assert summarise(scan(root, cache_dir=tmp_path)).duplicates == []


def test_captions_are_counted_or_the_reason_is_given_why_they_do_not_fit(root, tmp_path):
    names = ("a/1.mp4", "a/2.mp4", "b/1.mp4", "b/copy.mp4")
    rows = [f"{name},words {name[0]}" for name in names]
    (root / "captions.csv").write_text("\n".join(["path,caption", *rows]))
    found = scan(root, cache_dir=tmp_path)
    assert summarise(found).captions == {"clips": 4, "different": 2}
    lines = lines_of(found, summarise(found))
    assert "captions    4 clips, 2 different" in lines
    assert "a text model learns the captions with data.captions=auto" in lines
    assert "1.mp4, 4 frames of 32x32: words a" in page_of(found, summarise(found), "Clips")
    (root / "captions.csv").write_text("\n".join(["path,caption", *rows[1:]]))
    assert "have no caption, first 'a/1.mp4'" in summarise(found).captions["problem"]
    assert any(
        line.startswith("captions    do not fit: 1 of 4 videos") for line in lines_of(found, summarise(found))
    )


def test_the_page_holds_its_previews_and_escapes_names(root, tmp_path):
    shutil.copy(root / "a/1.mp4", root / "a/<script>&.mp4")
    found = scan(root, cache_dir=tmp_path)
    page = page_of(found, summarise(found), "Clips of mine")
    sources = re.findall(r'src="([^"]*)"', page)
    assert len(sources) == 5
    assert all(source.startswith("data:image/webp;base64,") for source in sources)
    assert "&lt;script&gt;&amp;.mp4" in page
    assert "<script>" not in page
    assert str(tmp_path) not in page, "a page may be shared"
    for words in ("Previews", "Classes", "Equal content", "Skipped", "b/broken.mp4"):
        assert words in page, words


def test_a_file_that_is_gone_has_no_preview(root, tmp_path):
    found = scan(root, cache_dir=tmp_path)
    (root / "a/1.mp4").unlink()
    page = page_of(found, summarise(found), "Clips")
    assert page.count("data:image/webp") == 3


def test_previews_are_of_every_class_in_turn(root, tmp_path):
    clip = scan(root, cache_dir=tmp_path).clips[0]
    many = [
        type(clip)(f"{label}/{k}", clip.info, label)
        for label, n in ((0, 500), (1, 3), (2, 40))
        for k in range(n)
    ]
    picked = chosen(many)
    assert len(picked) <= PREVIEWS
    counts = Counter(one.label for one in picked)
    assert counts == {0: 8, 1: 3, 2: 8}
    assert [one.label for one in picked[:3]] == [0, 1, 2]
    assert len({one.key for one in picked}) == len(picked)
    assert len(chosen([clip] * 3)) == 3
