# SPDX-License-Identifier: Apache-2.0
"""A page is well-formed, escapes what it is given, shows its numbers, and loads nothing from elsewhere."""

import base64
import math
import re
from xml.etree import ElementTree

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from latte.checks import InputError
from latte.page import html as report
from latte.page import plots
from latte.page.html import Html, tag
from latte.page.plots import Series

HOSTILE = "<script>alert('x')</script> & \"quotes\" \x00\x1b"


def tree(markup: str) -> ElementTree.Element:
    return ElementTree.fromstring(markup)


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "a sheet.png"
    Image.new("RGB", (8, 4), (200, 30, 40)).save(path)
    return path


def test_a_whole_page_is_well_formed_and_loads_nothing(picture):
    curve = plots.line_plot(
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
    assert not re.search(r"https?:|//[a-z]|@import|url\(|<script", page)
    assert "prefers-color-scheme:dark" in page


@given(st.text())
@example(HOSTILE)
@settings(max_examples=50, deadline=None)
def test_text_is_escaped_wherever_it_enters(text):
    plot = plots.line_plot(
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
    plot = plots.line_plot("Loss", [Series("train", [10, 20, 30], [0.731, 0.5203, 0.3307])], "step", "loss")
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
        plots.line_plot("p", [Series("s", [1, 2, 3], values)], "x", "y", log_y=log)
    )
    assert (
        plots.HEIGHT - plots.BOTTOM >= a > b > c >= plots.TOP
    )  # larger values higher up, none outside the frame
    assert a - c > 0.9 * (plots.HEIGHT - plots.BOTTOM - plots.TOP)  # and the frame is used
    assert (a - b) / (b - c) == pytest.approx(1.0 if log else 0.1, rel=0.02)


def test_tick_labels_stand_at_their_values():
    root = tree(plots.line_plot("p", [Series("s", [0, 400], [0.0, 8.0])], "x", "y"))
    labels = {t.text: float(t.attrib["y"]) for t in root.iter("text") if t.attrib.get("text-anchor") == "end"}
    (_, zero), (_, eight) = _points(plots.line_plot("p", [Series("s", [0, 400], [0.0, 8.0])], "x", "y"))
    assert labels["0"] - 4 == pytest.approx(zero)
    assert labels["8"] - 4 == pytest.approx(eight)
    assert labels["4"] == pytest.approx((labels["0"] + labels["8"]) / 2)


def test_several_lines_have_a_legend_and_one_has_none():
    lines = [Series("ours", [0, 1], [0, 1]), Series("theirs", [0, 1], [1, 0])]
    shown = [
        [span.find("i").tail for span in tree(plots.line_plot("p", some, "x", "y")).iter("span")]
        for some in (lines, lines[:1])
    ]
    assert shown == [["ours", "theirs"], []]


def test_what_cannot_be_drawn_is_counted_not_hidden():
    plot = plots.line_plot("p", [Series("s", [1, 2, 3, 4], [1.0, math.nan, 0.0, 2.0])], "x", "y", log_y=True)
    assert "2 of 4 points cannot be drawn" in plot
    assert len(_points(plot)) == 2
    assert (
        tree(plot).find(".//path").attrib["d"].count("M") == 2
    )  # the line is broken, not joined across the gap


def test_thinning_keeps_a_spike():
    values = [0.0] * 20_000
    values[12_345] = 7.0
    points = _points(plots.line_plot("p", [Series("s", range(20_000), values)], "x", "y"))
    assert len(points) <= plots.MOST_POINTS
    assert len([1 for _, y in points if y < 100]) == 1


@pytest.mark.parametrize(
    "values", [[5.0, 5.0], [0.0, 0.0], [-3.0, -3.0], [1e-9, 2e-9], [1e12, 3e12], [math.nan, math.inf], []]
)
@pytest.mark.parametrize("log", [False, True])
def test_odd_ranges_still_give_a_plot(values, log):
    tree(plots.line_plot("p", [Series("s", range(len(values)), values)], "x", "y", log_y=log))


def test_smooth_is_the_running_mean_of_what_is_finite():
    assert plots.smooth([1.0, 3.0, math.nan, 5.0], 2) == [1.0, 2.0, 3.0, 5.0]


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


def test_a_box_switches_between_two_axes():
    line = [Series("s", [1, 2, 3], [1.0, 10.0, 100.0])]
    plot = tree(plots.line_plot("p", line, "x", "y", toggle=True))
    assert [svg.get("class") for svg in plot.iter("svg")] == ["first", "second"]
    assert [box.get("type") for box in plot.iter("input")] == ["checkbox"]
    first, second = (svg.find("path").get("d") for svg in plot.iter("svg"))
    assert first != second
    other = tree(plots.line_plot("p", line, "x", "y", toggle=True, log_y=True))
    assert [svg.find("path").get("d") for svg in other.iter("svg")] == [second, first]


def test_an_interval_is_a_stroke_from_its_low_to_its_high_end():
    line = Series("s", [0, 10], [4.0, 4.0], low=[2.0, 4.0], high=[8.0, 4.0])
    strokes, middle = (path.get("d") for path in tree(plots.line_plot("p", [line], "x", "y")).iter("path"))
    top, bottom = map(float, re.match(r"M[\d.]+ ([\d.]+)V([\d.]+)", strokes).groups())
    height = float(re.match(r"M[\d.]+ ([\d.]+)", middle)[1])
    assert top == plots.TOP
    assert bottom == plots.HEIGHT - plots.BOTTOM
    assert (bottom - height) / (bottom - top) == pytest.approx((4 - 2) / (8 - 2), abs=0.01)


def test_a_slider_shows_the_last_part_at_first():
    shown = report.slides("step", [("1", report.prose("a")), ("2", report.prose("b"))])
    page = report.page("T", "l", shown)
    parts = [part for part in tree(page).iter("div") if part.get("class") == "slide"]
    assert [part.get("hidden") for part in parts] == ["", None]
    assert tree(page).find(".//input").attrib["max"] == "1"
    assert len(list(tree(page).iter("script"))) == 1
    assert not set("<&") & set(report.SCRIPT), "the same text in HTML and XML"
    alone = report.slides("step", [("1", report.prose("a"))])
    assert tree(alone).find("input") is None
