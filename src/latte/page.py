# SPDX-License-Identifier: Apache-2.0
"""A page of results: line plots, tables, images and clips in one HTML file that loads nothing from elsewhere.

A page is a tree of ``tag`` calls. Text is escaped unless it is ``Html`` already, so no value can become
markup. The result is well-formed XML, follows the reader's light or dark theme, and embeds images or names
files beside it.
"""

import base64
import math
import mimetypes
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from urllib.parse import quote

from latte.checks import check

VOID = {"br", "img", "meta"}
WIDTH = 720
HEIGHT = 300
LEFT = 64  # margins of a plot, in the same units
RIGHT = 16
TOP = 14
BOTTOM = 46
COLOURS = 6
MOST_POINTS = 600
MOST_ROWS = 40

STYLE = """
:root{color-scheme:light dark;--ground:#fbfaf8;--card:#fff;--ink:#23211e;--soft:#6d6860;--rule:#e3dfd8;
--s0:#2f6fde;--s1:#d9730d;--s2:#2b9357;--s3:#8a4fd3;--s4:#cf3f4a;--s5:#138a9e}
@media(prefers-color-scheme:dark){:root{
--ground:#191817;--card:#222120;--ink:#ebe8e2;--soft:#a09a90;--rule:#3a3835;
--s0:#7aa8ff;--s1:#ffa24d;--s2:#63cf92;--s3:#c09bff;--s4:#ff8089;--s5:#55c7da}}
*{box-sizing:border-box}
body{margin:0;background:var(--ground);color:var(--ink);font:16px/1.55 system-ui,sans-serif}
main{max-width:860px;margin:0 auto;padding:40px 20px 72px}
h1{font-size:30px;line-height:1.2;margin:0 0 6px}h2{font-size:20px;margin:44px 0 10px}
p{margin:8px 0;max-width:70ch}.lead,figcaption,.tile span,th,details{color:var(--soft)}
figcaption,.tile span,details{font-size:14px}figcaption,details{margin-top:8px}
figure,.tile,pre{
background:var(--card);border:1px solid var(--rule);border-radius:10px;padding:12px 14px;margin:14px 0}
figure img,figure video{
display:block;max-width:100%;margin:0 auto;border-radius:4px}.pixels{image-rendering:pixelated}
.row{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px}.row>*{margin:0}
.tile b{display:block;font-size:23px;line-height:1.25}
.scroll{overflow-x:auto;margin:14px 0}table{border-collapse:collapse;font-size:15px}
th,td{padding:5px 18px 5px 0;border-bottom:1px solid var(--rule);text-align:left;vertical-align:top}
td:last-child{overflow-wrap:anywhere}
.number{text-align:right;font-variant-numeric:tabular-nums}
pre{overflow-x:auto;font:14px/1.5 ui-monospace,monospace}summary{cursor:pointer}
svg{display:block;width:100%;height:auto}svg text{font:12px system-ui,sans-serif;fill:var(--soft)}
.axis,.grid{stroke:var(--rule)}.grid{opacity:.6}
.line{fill:none;stroke-width:2;stroke-linejoin:round;stroke-linecap:round}.faint{stroke-width:1;opacity:.35}
"""


class Html(str):
    """Markup. Everything else is text and is escaped when it is put into a page."""


def tag(name: str, attributes: Mapping[str, object] | None = None, *inside: object) -> Html:
    """Return ``<name attributes>inside</name>``, without attributes that are unset (None)."""
    given = {key: value for key, value in (attributes or {}).items() if value is not None}
    written = "".join(f' {key}="{_clean(value)}"' for key, value in given.items())
    if name in VOID:
        return Html(f"<{name}{written} />")
    return Html(f"<{name}{written}>{''.join(map(_markup, inside))}</{name}>")


def _markup(part: object) -> str:
    return part if isinstance(part, Html) else _clean(part)


def _clean(value: object) -> str:
    return escape(re.sub(r"[^\t\n\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "", str(value)))


@dataclass(frozen=True)
class Series:
    """A line of a plot through points (x[k], y[k]), broken at non-finite ones; ``faint`` for raw values."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    faint: bool = False

    def __post_init__(self) -> None:
        counts = (len(self.x), len(self.y))
        check(counts[0] == counts[1], f"series {self.name!r} needs as many x values as y, got {counts}")


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Return the running mean over the last ``window`` finite values, over fewer at the start."""
    recent = (values[max(0, k + 1 - window) : k + 1] for k in range(len(values)))
    finite = ([v for v in part if math.isfinite(v)] for part in recent)
    return [sum(part) / len(part) if part else math.nan for part in finite]


@dataclass(frozen=True)
class _Axis:
    """A range of data on a range of the drawing, linear or logarithmic."""

    low: float
    high: float
    start: float
    end: float
    log: bool

    @classmethod
    def over(cls, values: Iterable[float], start: float, end: float, log: bool) -> "_Axis":
        kept = [v for v in values if math.isfinite(v) and (v > 0 or not log)] or [1.0]
        low = min(kept)
        high = max(kept)
        if log:
            return cls(low / 1.05, high * 1.05, start, end, log)
        if low == high:
            low -= abs(low) / 2 or 1
            high += abs(high) / 2 or 1
        return cls(low, high, start, end, log)

    def at(self, value: float) -> float | None:
        """Return the position of ``value`` on the drawing, None when it cannot be drawn."""
        if math.isfinite(value) and (value > 0 or not self.log):
            return self.place(value)
        return None

    def place(self, value: float) -> float:
        """Return the position of a value that can be drawn."""
        scale = math.log10 if self.log else float
        fraction = (scale(value) - scale(self.low)) / (scale(self.high) - scale(self.low))
        return self.start + fraction * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Return round values inside the range: 1, 2 or 5 times a power of ten, decades on a log axis."""
        if self.log and self.high > 4 * self.low:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            parts = (1,) if len(decades) > 5 else (1, 2, 5)
            return [
                part * 10.0**decade
                for decade in decades
                for part in parts
                if self.low <= part * 10.0**decade <= self.high
            ]
        rough = (self.high - self.low) / 5
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(power * part for part in (1, 2, 5, 10) if power * part >= rough * 0.999)
        return [
            k * step
            for k in range(math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9) + 1)
        ]


def number(value: float, digits: int = 4) -> str:
    """Return a number for people: ``digits`` significant digits, thousands separated, no trailing zeros."""
    if value == 0:
        return "0"
    if not math.isfinite(value):
        return str(value)
    if not 1e-4 <= abs(value) < 1e9:
        return f"{value:.{digits}g}"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    text = f"{value:,.{decimals}f}"
    if "." in text:
        return text.rstrip("0").rstrip(".")
    return text


def _thin(series: Series) -> list[tuple[float, float]]:
    """Return the points, of many the lowest and highest of each stretch, so that spikes stay visible."""
    points = list(zip(series.x, series.y, strict=True))
    if len(points) <= MOST_POINTS:
        return points
    stretch = math.ceil(2 * len(points) / MOST_POINTS)
    kept = []
    for start in range(0, len(points), stretch):
        part = points[start : start + stretch]
        if all(math.isfinite(y) for _, y in part):
            part = [min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])]
        kept += part
    return sorted(kept, key=lambda point: point[0])


def _path(series: Series, horizontal: _Axis, vertical: _Axis) -> str:
    """Return the ``d`` of an SVG path; a point that cannot be drawn interrupts it."""
    path = []
    pen = "M"
    for x, y in _thin(series):
        left = horizontal.at(x)
        top = vertical.at(y)
        if left is None or top is None:
            pen = "M"
            continue
        path.append(f"{pen}{left:.1f} {top:.1f}")
        if pen == "M":
            path.append("h0")  # so that a single point is a dot
        pen = "L"
    return "".join(path)


def _frame(horizontal: _Axis, vertical: _Axis, x_label: str, y_label: str) -> list[Html]:
    """Return grid lines, tick labels and names of both axes."""
    bottom = HEIGHT - BOTTOM
    parts = []
    for value in vertical.ticks():
        y = vertical.place(value)
        parts.append(
            tag(
                "line", {"class": "grid", "x1": LEFT, "x2": WIDTH - RIGHT, "y1": f"{y:.1f}", "y2": f"{y:.1f}"}
            )
        )
        parts.append(
            tag("text", {"x": LEFT - 8, "y": f"{y + 4:.1f}", "text-anchor": "end"}, number(value, 6))
        )
    for value in horizontal.ticks():
        x = horizontal.place(value)
        parts.append(
            tag("line", {"class": "axis", "x1": f"{x:.1f}", "x2": f"{x:.1f}", "y1": bottom, "y2": bottom + 5})
        )
        parts.append(
            tag("text", {"x": f"{x:.1f}", "y": bottom + 19, "text-anchor": "middle"}, number(value, 6))
        )
    parts.append(tag("line", {"class": "axis", "x1": LEFT, "x2": WIDTH - RIGHT, "y1": bottom, "y2": bottom}))
    parts.append(
        tag("text", {"x": (LEFT + WIDTH - RIGHT) / 2, "y": HEIGHT - 8, "text-anchor": "middle"}, x_label)
    )
    middle = (TOP + bottom) / 2
    parts.append(
        tag(
            "text",
            {"x": 14, "y": middle, "text-anchor": "middle", "transform": f"rotate(-90 14 {middle})"},
            y_label,
        )
    )
    return parts


def _look(series: Series, index: int) -> dict[str, object]:
    return {"class": "line faint" if series.faint else "line", "style": f"stroke:var(--s{index % COLOURS})"}


def _legend(series: Sequence[Series]) -> list[Html]:
    """Return a dash and a name for each line, in a row above the plot; none for a single line."""
    parts: list[Html] = []
    x = LEFT + 10
    if len(series) < 2:
        return parts
    for index, one in enumerate(series):
        parts.append(tag("line", {**_look(one, index), "x1": x, "x2": x + 18, "y1": 9, "y2": 9}))
        parts.append(tag("text", {"x": x + 24, "y": 13}, one.name))
        x += 44 + 7 * len(one.name)
    return parts


def line_plot(
    title: str,
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    *,
    log_x: bool = False,
    log_y: bool = False,
    caption: str = "",
) -> Html:
    """Return a plot with the lines of ``series``, its axes, and the numbers in a closed table below.

    Non-finite points, and those up to 0 on a logarithmic axis, are left out, and the caption has their
    number.
    """
    horizontal = _Axis.over((v for one in series for v in one.x), LEFT, WIDTH - RIGHT, log_x)
    vertical = _Axis.over((v for one in series for v in one.y), HEIGHT - BOTTOM, TOP + 12, log_y)
    points = [point for one in series for point in zip(one.x, one.y, strict=True)]
    hidden = sum(horizontal.at(x) is None or vertical.at(y) is None for x, y in points)
    lines = [
        tag("path", {**_look(one, k), "d": _path(one, horizontal, vertical)}, tag("title", {}, one.name))
        for k, one in enumerate(series)
    ]
    drawing = [*_frame(horizontal, vertical, x_label, y_label), *lines, *_legend(series)]
    svg = tag("svg", {"viewBox": f"0 0 {WIDTH} {HEIGHT}", "role": "img", "aria-label": title}, *drawing)
    if hidden:
        caption += f" {hidden} of {len(points)} points cannot be drawn on these axes."
    legend = tag("figcaption", {}, tag("b", {}, title), f" {caption}")
    return tag("figure", {}, svg, legend, _numbers_of(series, x_label))


def _numbers_of(series: Sequence[Series], x_label: str) -> Html:
    """Return the data of a plot as closed tables of at most about MOST_ROWS rows, first and last included."""
    tables = []
    for one in series:
        step = max(1, math.ceil(len(one.x) / MOST_ROWS))
        rows = [(one.x[k], one.y[k]) for k in sorted({*range(0, len(one.x), step), len(one.x) - 1}) if k >= 0]
        tables.append(table([x_label, one.name], rows))
    return tag("details", {}, tag("summary", {}, "numbers"), *tables)


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Html:
    """Return a table; columns of numbers are aligned to the right."""
    body = [list(row) for row in rows]
    right = [bool(body) and all(isinstance(row[k], int | float) for row in body) for k in range(len(columns))]

    def cell(kind: str, k: int, value: object) -> Html:
        if isinstance(value, float):
            value = number(value)
        elif type(value) is int:
            value = f"{value:,}"
        return tag(kind, {"class": "number" if right[k] else None}, value)

    head = tag("tr", {}, *(cell("th", k, name) for k, name in enumerate(columns)))
    lines = [tag("tr", {}, *(cell("td", k, value) for k, value in enumerate(row))) for row in body]
    return tag("div", {"class": "scroll"}, tag("table", {}, tag("thead", {}, head), tag("tbody", {}, *lines)))


def media(path: Path, caption: str = "", *, beside: Path | None = None, width: int | None = None) -> Html:
    """Return an image, gif or mp4 (which plays by itself), ``width`` pixels wide with sharp pixels if given.

    The file goes into the page as a data URI; with ``beside`` (the page's folder, which must hold it) the
    page only names it.
    """
    kind = mimetypes.guess_type(path.name)[0] or ""
    known = kind.startswith(("image/", "video/"))
    check(known, f"{path.name!r} is neither an image nor a video; give a png, jpg, gif or mp4 file")
    if beside is None:
        source = f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
    else:
        source = quote(path.resolve().relative_to(beside.resolve()).as_posix())
    looks = {"src": source, "width": width, "class": "pixels" if width else None}
    if kind.startswith("video/"):
        play = dict.fromkeys(("autoplay", "loop", "muted", "playsinline"), "")
        shown = tag("video", {**looks, **play}, caption)
    else:
        shown = tag("img", {**looks, "alt": caption})
    if caption:
        return tag("figure", {}, shown, tag("figcaption", {}, caption))
    return tag("figure", {}, shown)


def row(*parts: Html) -> Html:
    """Return parts side by side, as many as fit the window."""
    return tag("div", {"class": "row"}, *parts)


def tiles(numbers: Mapping[str, object]) -> Html:
    """Return a few headline numbers: name -> value."""
    items = (
        tag("div", {"class": "tile"}, tag("b", {}, value), tag("span", {}, name))
        for name, value in numbers.items()
    )
    return row(*items)


def command(line: str) -> Html:
    """Return a command line to copy."""
    return tag("pre", {}, line)


def prose(text: str) -> Html:
    """Return a paragraph."""
    return tag("p", {}, text)


def section(heading: str, *parts: Html) -> Html:
    """Return a heading and its parts."""
    return tag("section", {}, tag("h2", {}, heading), *parts)


def page(title: str, lead: str, *parts: Html) -> Html:
    """Return the whole document: title, one introductory sentence, sections."""
    head = tag(
        "head",
        {},
        tag("meta", {"charset": "utf-8"}),
        tag("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}),
        tag("title", {}, title),
        tag("style", {}, Html(STYLE)),
    )
    body = tag("body", {}, tag("main", {}, tag("h1", {}, title), tag("p", {"class": "lead"}, lead), *parts))
    return Html(f"<!DOCTYPE html>\n{tag('html', {'lang': 'en'}, head, body)}\n")
