# SPDX-License-Identifier: Apache-2.0
"""The report page is well-formed, escapes what it is given, shows the numbers it was given, and loads nothing from elsewhere."""

import base64
import math
import re
from xml.etree import ElementTree

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from latte import page as report
from latte.checks import InputError
from latte.page import Html, Series, tag

HOSTILE = "<script>alert('x')</script> & \"quotes\" \x00\x1b"


def tree(markup: str) -> ElementTree.Element:
    return ElementTree.fromstring(markup)


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "a sheet.png"
    Image.new("RGB", (8, 4), (200, 30, 40)).save(path)
    return path


def test_a_whole_page_is_well_formed_and_loads_nothing(picture):
    curve = report.line_plot(
        "Loss", [Series("train", range(50), [1 / (k + 1) for k in range(50)])], "step", "loss", log_y=True
    )
    page = report.page(
        "Demo",
        "What it made.",
        report.tiles({"clips": 16}),
        report.section("Curve", report.prose("Falls."), curve),
        report.section(
            "Clips",
            report.row(report.media(picture, "clip"), report.media(picture)),
            report.command("latte demo"),
        ),
    )
    root = tree(page)
    assert [h.text for h in root.iter("h2")] == ["Curve", "Clips"]
    assert page.startswith("<!DOCTYPE html>")
    assert not re.search(r"https?:|//[a-z]|@import|url\(|<script|<link", page)
    assert "prefers-color-scheme:dark" in page


@given(st.text())
@example(HOSTILE)
@settings(max_examples=50, deadline=None)
def test_text_is_escaped_wherever_it_enters(text):
    plot = report.line_plot(
        text, [Series(text, [0, 1], [0, 1]), Series(text, [0, 1], [1, 0])], text, text, caption=text
    )
    parts = (
        report.prose(text),
        report.command(text),
        plot,
        report.table([text], [[text]]),
        report.tiles({text: text}),
    )
    names = {element.tag for element in tree(report.page(text, text, *parts)).iter()}
    assert "script" not in names
    shown = "".join(tree(report.prose(text)).itertext())
    assert re.sub(r"\s", "", shown) == re.sub(r"[\s\x00-\x1f\ud800-\udfff\ufffe\uffff]", "", text)


def test_attributes_are_escaped_and_none_leaves_them_out():
    element = tree(tag("p", {"title": HOSTILE, "class": None}, Html("<b>1</b>"), "<b>2</b>"))
    assert list(element.attrib) == ["title"]
    assert [child.text for child in element] == ["1"]


def test_the_numbers_of_the_data_appear():
    plot = report.line_plot("Loss", [Series("train", [10, 20, 30], [0.731, 0.5203, 0.3307])], "step", "loss")
    text = " ".join(tree(plot).itertext())
    assert all(number in text for number in ("10", "20", "30", "0.731", "0.5203", "0.3307"))
    table = report.table(["what", "value"], [("accuracy", 0.9731), ("clips", 2048)])
    assert [cell.text for cell in tree(table).iter("td")] == ["accuracy", "0.9731", "clips", "2,048"]


def _points(plot: str, line: int = 0) -> list[tuple[float, float]]:
    path = list(tree(plot).iter("path"))[line].attrib["d"]
    return [(float(x), float(y)) for x, y in re.findall(r"[ML](-?[\d.]+) (-?[\d.]+)", path)]


@pytest.mark.parametrize("log", [False, True])
def test_points_lie_where_the_axes_say(log):
    values = [1.0, 10.0, 100.0]
    (_, a), (_, b), (_, c) = _points(
        report.line_plot("p", [Series("s", [1, 2, 3], values)], "x", "y", log_y=log)
    )
    assert (
        report.HEIGHT - report.BOTTOM >= a > b > c >= report.TOP
    )  # larger values higher up, none outside the frame
    assert a - c > 0.9 * (report.HEIGHT - report.BOTTOM - report.TOP - 12)  # and the frame is used
    assert (a - b) / (b - c) == pytest.approx(1.0 if log else 0.1, rel=0.02)


def test_tick_labels_stand_at_their_values():
    root = tree(report.line_plot("p", [Series("s", [0, 400], [0.0, 8.0])], "x", "y"))
    labels = {t.text: float(t.attrib["y"]) for t in root.iter("text") if t.attrib.get("text-anchor") == "end"}
    (_, zero), (_, eight) = _points(report.line_plot("p", [Series("s", [0, 400], [0.0, 8.0])], "x", "y"))
    assert labels["0"] - 4 == pytest.approx(zero)
    assert labels["8"] - 4 == pytest.approx(eight)
    assert labels["4"] == pytest.approx((labels["0"] + labels["8"]) / 2)


def test_several_lines_have_a_legend_and_one_has_none():
    lines = [Series("ours", [0, 1], [0, 1]), Series("theirs", [0, 1], [1, 0])]
    shown = [
        [t.text for t in tree(report.line_plot("p", some, "x", "y")).iter("text")]
        for some in (lines, lines[:1])
    ]
    assert [sum(name in texts for name in ("ours", "theirs")) for texts in shown] == [2, 0]


def test_what_cannot_be_drawn_is_counted_not_hidden():
    plot = report.line_plot("p", [Series("s", [1, 2, 3, 4], [1.0, math.nan, 0.0, 2.0])], "x", "y", log_y=True)
    assert "2 of 4 points cannot be drawn" in plot
    assert len(_points(plot)) == 2
    assert (
        tree(plot).find(".//path").attrib["d"].count("M") == 2
    )  # the line is broken, not joined across the gap


def test_thinning_keeps_a_spike():
    values = [0.0] * 20_000
    values[12_345] = 7.0
    points = _points(report.line_plot("p", [Series("s", range(20_000), values)], "x", "y"))
    assert len(points) <= report.MOST_POINTS
    assert len([1 for _, y in points if y < 100]) == 1


@pytest.mark.parametrize(
    "values", [[5.0, 5.0], [0.0, 0.0], [-3.0, -3.0], [1e-9, 2e-9], [1e12, 3e12], [math.nan, math.inf], []]
)
@pytest.mark.parametrize("log", [False, True])
def test_odd_ranges_still_give_a_plot(values, log):
    tree(report.line_plot("p", [Series("s", range(len(values)), values)], "x", "y", log_y=log))


def test_smooth_is_the_running_mean_of_what_is_finite():
    assert report.smooth([1.0, 3.0, math.nan, 5.0], 2) == [1.0, 2.0, 3.0, 5.0]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (1234.5, "1,234"),
        (0.97312, "0.9731"),
        (2.0, "2"),
        (1e-7, "1e-07"),
        (1500.0, "1,500"),
        (math.inf, "inf"),
    ],
)
def test_numbers_for_people(value, text):
    assert report.number(value) == text


def test_media_goes_in_whole_or_is_named_beside_the_page(picture):
    source = tree(report.media(picture, "clip")).find("img").attrib["src"]
    assert base64.b64decode(source.partition(",")[2]) == picture.read_bytes()
    assert tree(report.media(picture, beside=picture.parent)).find("img").attrib["src"] == "a%20sheet.png"
    clip = picture.with_name("c.mp4")
    clip.write_bytes(b"....")
    assert tree(report.media(clip, "clip")).find("video").attrib["src"].startswith("data:video/mp4;base64,")


def test_wrong_input_is_refused(picture):
    with pytest.raises(InputError, match="neither an image nor a video"):
        report.media(picture.with_suffix(".txt"))
    with pytest.raises(InputError, match="as many x values"):
        Series("s", [1, 2], [1])
