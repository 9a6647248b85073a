# SPDX-License-Identifier: Apache-2.0
"""Line plots of a page: SVG with axes, legend and the numbers in a closed table."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from latte.checks import check
from latte.page.html import Html, number, table, tag

WIDTH = 720
HEIGHT = 300
LEFT = 72  # margins of a plot, in the same units
RIGHT = 16
TOP = 14
BOTTOM = 46
COLOURS = 6
MOST_POINTS = 600
MOST_ROWS = 40
LOOK = {False: "line", True: "line faint"}  # class of a line, by ``faint``


@dataclass(frozen=True)
class Series:
    """A line of a plot through points (x[k], y[k]), broken at non-finite ones; ``faint`` for raw values.

    ``low`` and ``high`` are the ends of an interval at each point, drawn as a vertical stroke. ``colour``
    numbers the colours; by default each line has its own.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    faint: bool = False
    colour: int | None = None
    low: Sequence[float] = ()
    high: Sequence[float] = ()

    def __post_init__(self) -> None:
        counts = (len(self.x), len(self.y))
        check(counts[0] == counts[1], f"series {self.name!r} needs as many x values as y, got {counts}")


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Return the running mean over the last ``window`` finite values, over fewer at the start."""
    sums = [0.0, *accumulate(v if math.isfinite(v) else 0.0 for v in values)]
    counts = [0, *accumulate(int(math.isfinite(v)) for v in values)]
    found = []
    for end in range(1, len(sums)):
        start = max(0, end - window)
        count = counts[end] - counts[start]
        found.append((sums[end] - sums[start]) / count if count else math.nan)
    return found


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


def _colour(series: Series, index: int) -> str:
    chosen = index if series.colour is None else series.colour
    return f"stroke:var(--s{chosen % COLOURS})"


def _legend(series: Sequence[Series]) -> Html:
    """Return a dash and a name for each line that has one; nothing for a single line."""
    items = []
    for index, one in enumerate(series):
        if not one.name or len(series) < 2:
            continue
        dash = tag("i", {"style": _colour(one, index).replace("stroke", "background")})
        items.append(tag("span", {}, dash, one.name))
    if not items:
        return Html()
    return tag("div", {"class": "legend"}, *items)


def _strokes(series: Series, horizontal: _Axis, vertical: _Axis) -> str:
    """Return the ``d`` of an SVG path: a vertical stroke over the interval of each point that has one."""
    path = []
    for x, low, high in zip(series.x, series.low, series.high, strict=False):
        left = horizontal.at(x)
        top = vertical.at(high)
        if left is not None and top is not None:
            bottom = vertical.at(low)
            path.append(f"M{left:.1f} {top:.1f}V{vertical.start if bottom is None else bottom:.1f}")
    return "".join(path)


def _drawing(
    title: str,
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    log_x: bool,
    log_y: bool,
    kind: str | None,
) -> tuple[Html, int]:
    """Return the SVG of a plot, of class ``kind``, and how many points it leaves out."""
    horizontal = _Axis.over((v for one in series for v in one.x), LEFT, WIDTH - RIGHT, log_x)
    values = (v for one in series for part in (one.y, one.low, one.high) for v in part)
    vertical = _Axis.over(values, HEIGHT - BOTTOM, TOP, log_y)
    points = [point for one in series for point in zip(one.x, one.y, strict=True)]
    hidden = sum(horizontal.at(x) is None or vertical.at(y) is None for x, y in points)
    lines = []
    for k, one in enumerate(series):
        look = {"class": LOOK[one.faint], "style": _colour(one, k)}
        if one.low:
            lines.append(
                tag("path", {**look, "class": "line faint", "d": _strokes(one, horizontal, vertical)})
            )
        lines.append(tag("path", {**look, "d": _path(one, horizontal, vertical)}, tag("title", {}, one.name)))
    view = {"class": kind, "viewBox": f"0 0 {WIDTH} {HEIGHT}", "role": "img", "aria-label": title}
    return tag("svg", view, *_frame(horizontal, vertical, x_label, y_label), *lines), hidden


def line_plot(
    title: str,
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    *,
    log_x: bool = False,
    log_y: bool = False,
    toggle: bool = False,
    caption: str = "",
) -> Html:
    """Return a plot with the lines of ``series``, its axes, and the numbers in a closed table below.

    Non-finite points, and those up to 0 on a logarithmic axis, are left out, and the caption has their
    number. ``toggle`` adds a box that switches between a linear and a logarithmic y axis; ``log_y`` is the
    one that is shown first.
    """
    count = sum(len(one.x) for one in series)
    drawn, hidden = _drawing(title, series, x_label, y_label, log_x, log_y, "first" if toggle else None)
    parts = [drawn]
    if toggle:
        other, _ = _drawing(title, series, x_label, y_label, log_x, not log_y, "second")
        name = "linear axis" if log_y else "logarithmic axis"
        box = tag("input", {"type": "checkbox", "class": "toggle", "aria-label": f"{title}: {name}"})
        parts = [box, tag("span", {"class": "switch"}, name), drawn, other]
    if hidden:
        caption += f" {hidden} of {count} points cannot be drawn on these axes."
    legend = tag("figcaption", {}, tag("b", {}, title), f" {caption}")
    return tag("figure", {}, *parts, _legend(series), legend, _numbers_of(series, x_label))


def _numbers_of(series: Sequence[Series], x_label: str) -> Html:
    """Return the data of a plot as closed tables of at most about MOST_ROWS rows, first and last included."""
    tables = []
    for one in (one for one in series if one.name):
        step = max(1, math.ceil(len(one.x) / MOST_ROWS))
        rows = [(one.x[k], one.y[k]) for k in sorted({*range(0, len(one.x), step), len(one.x) - 1}) if k >= 0]
        tables.append(table([x_label, one.name], rows))
    return tag("details", {}, tag("summary", {}, "numbers"), *tables)
