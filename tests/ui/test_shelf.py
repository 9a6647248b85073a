# SPDX-License-Identifier: Apache-2.0
"""What the page offers by name, and what it shows of data sets and reports."""

import numpy as np
import pytest

from latte.checks import InputError
from latte.data.media import write_mp4
from latte.page import html
from latte.ui import shelf as shelves
from latte.ui.shelf import GENERATED, Shelf, UiConfig, clips_table, open_data, report_frame, skipped_table
from latte.ui.views import STYLE

CLIP = np.random.default_rng(0).integers(0, 255, (4, 16, 24, 3), dtype=np.uint8)


@pytest.fixture
def videos(tmp_path):
    root = tmp_path / "secret place" / "films"
    for number in range(14):
        write_mp4(root / f"clip{number:02d}.mp4", CLIP, 8)
        (root / f"clip{number:02d}.txt").write_text(f"caption <b>{number}</b>")
    (root / "broken.mp4").write_text("no video")
    (root / "sound.xyz").write_text("x")
    return root


@pytest.fixture(autouse=True)
def no_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_a_folder_is_shown_with_captions_sizes_and_skipped_files(videos):
    data = open_data("films", videos)
    assert data.summary.startswith("14 clips; 14 with a caption; sizes 24 x 16; 1 skipped")
    assert data.pages == 2
    first = data.page(1)
    second = data.page(2)
    assert (len(first), len(second)) == (12, 2)
    assert first[0].name == "clip00.mp4"
    assert first[0].facts.startswith("4 frames of 24 x 16, 8 fps")
    page = clips_table(first)
    assert page.count("data:image/webp") == 12
    assert "caption &lt;b&gt;0&lt;/b&gt;" in page
    skipped = skipped_table(data)
    assert "broken.mp4" in skipped
    assert "1 .xyz" in skipped
    assert "secret place" not in page + skipped + data.summary
    for number in (0, 3, -1):
        with pytest.raises(InputError, match="page must be in"):
            data.page(number)


def test_captions_with_a_fault_are_named_and_the_clips_are_shown(videos):
    (videos / "clip03.txt").unlink()
    data = open_data("films", videos)
    assert "captions: 1 of 14 videos" in data.summary
    assert "secret" not in data.summary
    assert len(data.page(1)) == 12


def test_a_clip_that_was_deleted_leaves_a_note(videos):
    data = open_data("films", videos)
    (videos / "clip00.mp4").unlink()
    assert "can no longer be read" in data.page(1)[0].fault


@pytest.mark.parametrize("scenes", ["shapes", "world"])
def test_procedural_sets_need_no_files(scenes, monkeypatch):
    monkeypatch.setattr(shelves, "PER_PAGE", 1)
    data = open_data(f"{GENERATED}{scenes}", None)
    (clip,) = data.page(1)
    assert clip.caption
    assert clip.picture.startswith("data:image/webp")


def test_names_stand_for_what_is_below_the_roots_and_nothing_else(tmp_path):
    root = tmp_path / "runs"
    (root / "a" / "checkpoints" / "step-1").mkdir(parents=True)
    (root / "a" / "config.yaml").write_text("train: {}")
    (root / "sweep" / "b").mkdir(parents=True)
    (root / "sweep" / "b" / "config.yaml").write_text("train: {}")
    (root / "a" / "report.html").write_text("<p>a</p>")
    (tmp_path / "outside.html").write_text("secret")
    (root / "link.html").symlink_to(tmp_path / "outside.html")
    found = Shelf(UiConfig(models=("builtin", str(tmp_path / "weights")), runs=(root,)))
    assert set(found.runs()) == {"a", "sweep/b"}
    assert found.models() == {
        "builtin": "builtin",
        "weights": str(tmp_path / "weights"),
        "a": str(root / "a"),
    }
    assert set(found.reports()) == {"a/report.html"}
    assert list(found.data()) == [f"{GENERATED}{name}" for name in ("shapes", "world", "curtains")]


def test_a_report_is_shown_in_a_frame_that_reaches_nothing(tmp_path, monkeypatch):
    report = tmp_path / "report.html"
    report.write_text('<script>alert("x")</script>')
    frame = report_frame(report)
    assert 'sandbox="allow-scripts"' in frame
    assert "<script>" not in frame
    monkeypatch.setattr(shelves, "MAX_REPORT_BYTES", 5)
    with pytest.raises(InputError, match="bytes"):
        report_frame(report)


def test_the_page_draws_plots_in_the_colours_and_the_look_of_reports():
    assert all(part in STYLE for part in (html.LIGHT, html.DARK, html.PLOTS))
